from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from beyondprop import data
from beyondprop.cli import main
from beyondprop.errors import DataUnavailableError
from beyondprop.lab import recipes
from beyondprop.lab.recipes import Recipe, Result, Row
from beyondprop.lab.recipes._base import Context


def _tiny(*needs: str) -> Recipe:
    def measure(context: Context) -> tuple[Sequence[Row], dict[str, Any]]:
        context.say("training")
        (context.out / "figure.png").touch()
        return [Row("accuracy", (1.0,), "%", "2", at_least=2.0, note="of a kind")], {}

    return Recipe("A tiny one", "nowhere", "Nothing.", measure, minutes=1, needs=needs)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(recipes, "names", lambda: ["tiny", "needy"])
    monkeypatch.setattr(recipes, "get", lambda name: _tiny("mnist") if name == "needy" else _tiny())
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.chdir(tmp_path)


def test_reproduce_lists_recipes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reproduce"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in recipes.names())


@pytest.mark.usefixtures("tiny")
def test_reproduce_shows_and_records(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["reproduce", "tiny", "--record", "kept"]) == 0
    out = capsys.readouterr().out
    for words in (
        "tiny: training",
        ">= 2 %",
        "1.00 %",
        "missed",
        "of a kind",
        "runs/reproduce/tiny/figure.png",
    ):
        assert words in out
    assert (tmp_path / "kept" / "tiny.png").is_file()
    (row,) = Result.read(tmp_path / "kept" / "tiny.json").rows
    assert row == Row("accuracy", (1.0,), "%", "2", at_least=2.0, note="of a kind")
    assert main(["ledger", "--recorded", "kept", "--output", "book.md"]) == 0
    assert capsys.readouterr().out.endswith("book.md\n")
    assert "**missed**; of a kind" in (tmp_path / "book.md").read_text()


@pytest.mark.usefixtures("tiny")
def test_the_short_version_is_not_recorded(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["reproduce", "tiny", "--quick", "--out", "o", "--record", "kept"]) == 2
    assert "--record keeps results of full runs; leave out --quick or --record" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()
    assert main(["reproduce", "tiny", "--quick", "--json", "--quiet", "--out", "o"]) == 0
    captured = capsys.readouterr()
    (found,) = json.loads(captured.out)
    assert found["quick"]
    assert {row["verdict"] for row in found["rows"]} == {"shown"}
    assert "its numbers are no reproduction" in captured.err
    assert "missed" not in captured.err
    assert "training" not in captured.err
    assert (tmp_path / "o" / "tiny-quick" / "result.json").is_file()
    assert not (tmp_path / "kept").exists()


def test_recipes_are_listed_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reproduce", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [one["id"] for one in found] == recipes.names()
    assert found[0]["title"] == recipes.get(recipes.names()[0]).title


@pytest.mark.usefixtures("tiny")
def test_an_interrupted_recipe_says_how_to_go_on(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def measure(context: Context) -> tuple[Sequence[Row], dict[str, Any]]:
        warnings.simplefilter("always")  # elsewhere in the tests, a warning is an error
        warnings.warn("mind the step", stacklevel=2)
        raise KeyboardInterrupt

    monkeypatch.setattr(recipes, "get", lambda name: Recipe("Stopped", "nowhere", "Nothing.", measure, minutes=1))
    assert main(["reproduce", "tiny", "needy", "--quick", "--out", "my runs"]) == 130
    out = capsys.readouterr().out
    assert "Warning: mind the step" in out.splitlines()
    assert "beyondprop reproduce tiny needy --quick --out 'my runs'" in out.splitlines()


def test_an_unknown_recipe_is_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reproduce", "higgs", "higs"]) == 2
    assert "recipe must be one of" in capsys.readouterr().err


@pytest.mark.usefixtures("tiny")
def test_missing_data_is_found_before_anything_is_trained(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def load(name: str) -> None:
        raise DataUnavailableError(f"{name} was not found.")

    monkeypatch.setattr(data, "load", load)
    monkeypatch.setattr(data, "at_hand", lambda name: False)
    assert main(["reproduce", "needy"]) == 1
    captured = capsys.readouterr()
    assert captured.err == "beyondprop: mnist was not found.\n"
    assert "training" not in captured.out
    assert not (tmp_path / "runs").exists()
