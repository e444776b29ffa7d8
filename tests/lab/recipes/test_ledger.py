from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from beyondprop import data
from beyondprop.cli import main
from beyondprop.lab import recipes
from beyondprop.lab.recipes import Result, Row
from beyondprop.lab.recipes._ledger import ledger

NAN = math.nan


@pytest.mark.parametrize(
    ("row", "verdict", "asked", "shown"),
    [
        (Row("a", (97.5, 98.5), "%", at_least=98), "reached", ">= 98 %", "98.00 % (97.50 to 98.50, 2 seeds)"),
        (Row("a", (97.5,), "%", at_least=98), "missed", ">= 98 %", "97.50 %"),
        (Row("a", (0.5,), at_least=0.4, at_most=0.6, digits=1), "reached", ">= 0.4, <= 0.6", "0.5"),
        (Row("a", (0.7,), at_most=0.6), "missed", "<= 0.6", "0.70"),
        (Row("a", (1.0,)), "shown", "", "1.00"),
        (Row("a", (1.0, NAN), at_most=3), "missed", "<= 3", "failed (1 of 2)"),
        (Row("a", (), at_most=3), "missed", "<= 3", "not run"),
        (Row("a", (NAN,)), "shown", "", "failed (1 of 1)"),
        (Row("a", (math.inf, 1.0), at_least=1.0), "missed", ">= 1", "failed (1 of 2)"),
    ],
)
def test_a_row_judges_its_mean(row: Row, verdict: str, asked: str, shown: str) -> None:
    assert (row.verdict, row.asked, row.shown) == (verdict, asked, shown)


def _result(name: str = "lenet-mnist", **changes: Any) -> Result:
    rows = (
        Row("a | b", (1.0, 2.0), "%", "2 to 3", at_least=2.0, note="see\nthere"),
        Row("good", (1.0,), at_most=2.0),
        Row("lost", (1.0, math.inf), digits=4),
    )
    made = {"torch": "2.13.0", "commit": "abc"}
    settings = {"batch 9": {"lr": {"adam": 0.001, "sgd": 0.3, "x": None}, "at_edge": ["sgd"]}, "other": {}}
    return replace(Result(name, False, rows, settings, 90.0, "2026-01-31", made), **changes)


def test_a_result_comes_back_as_it_was_written(tmp_path: Path) -> None:
    result = _result()
    found = Result.read(result.write(tmp_path / "r.json"))
    assert [row.verdict for row in found.rows] == ["missed", "reached", "shown"]
    assert math.isnan(found.rows[2].measured[1])
    assert json.loads((tmp_path / "r.json").read_text())["rows"][2]["measured"] == [1.0, None]
    assert replace(found, rows=found.rows[:2]) == replace(result, rows=result.rows[:2])


@pytest.mark.parametrize(
    "damaged",
    [
        "",
        "{",
        "[]",
        "{}",
        '{"rows": [{}]}',
        '{"rows": [{"label": "a", "measured": ["x"]}]}',
        '{"rows": [{"label": "a", "measured": [1], "at_least": "98"}], "recipe": "r", "quick": false}',
        '{"rows": [{"label": 7, "measured": [1]}], "recipe": "r", "quick": false}',
        '{"rows": [], "new": 1}',
    ],
)
def test_a_damaged_result_is_named(tmp_path: Path, damaged: str) -> None:
    (tmp_path / "r.json").write_text(damaged)
    with pytest.raises(ValueError, match=r"r\.json' is no recorded result: \w+Error"):
        Result.read(tmp_path / "r.json")


def test_every_recipe_says_what_it_is() -> None:
    assert {"lenet-mnist", "fully-connected", "higgs", "bcd-3x1500", "dtp-discrete"} <= set(recipes.names())
    for name in recipes.names():
        recipe = recipes.get(name)
        assert recipe.title, name
        assert recipe.source, name
        assert recipe.about.endswith("."), name
        assert recipe.minutes > 0, name
        assert set(recipe.needs) <= set(data.names()), name
    with pytest.raises(ValueError, match=r"recipe must be one of .*'higgs'.*, got 'higs'"):
        recipes.get("higs")


# The ledger


def test_the_ledger_shows_published_beside_measured(tmp_path: Path) -> None:
    _result().write(tmp_path / "lenet-mnist.json")
    _result("higgs", rows=(Row("only", (1.0,)),), settings={}, environment={}).write(tmp_path / "higgs.json")
    (tmp_path / "higgs.png").touch()
    text = ledger(tmp_path, tmp_path / "docs" / "book.md")
    assert f"![{recipes.get('higgs').title}](../higgs.png)" in text.splitlines()
    assert "lenet-mnist.png" not in text
    assert text.startswith("# Reproduction\n")
    assert "| [`lenet-mnist`](#lenet-mnist) | LeNet-5 on MNIST | 1 | 1 | 1 |" in text
    assert "| [`higgs`](#higgs) |" in text
    line = "| a \\| b | 2 to 3 | >= 2 % | 1.50 % (1.00 to 2.00, 2 seeds) | **missed**; see there |"
    assert line in text.splitlines()
    assert "| lost |  |  | failed (1 of 2) | shown |" in text.splitlines()
    made = "Recorded 2026-01-31, 2 minutes, torch 2.13.0, commit abc. Learning rates, batch 9: adam: 0.001; "
    made += "sgd: 0.3 (at the edge of its grid)."
    assert made in text.splitlines()
    missing = text.rpartition("## Not yet recorded")[2]
    assert "`first-epoch`" in missing
    assert "`higgs`" not in missing


def test_the_ledger_takes_whole_results_of_full_runs_only(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="There is no recorded result"):
        ledger(tmp_path, tmp_path / "docs" / "book.md")
    _result(quick=True).write(tmp_path / "a.json")
    with pytest.raises(ValueError, match=r"a\.json' is of the short version"):
        ledger(tmp_path, tmp_path / "docs" / "book.md")
    _result("gone").write(tmp_path / "a.json")
    with pytest.raises(ValueError, match=r"a\.json' is a result of 'gone'; it must be named gone\.json"):
        ledger(tmp_path, tmp_path / "docs" / "book.md")
    (tmp_path / "a.json").rename(tmp_path / "gone.json")
    with pytest.raises(ValueError, match="got 'gone'"):
        ledger(tmp_path, tmp_path / "docs" / "book.md")
    (tmp_path / "gone.json").unlink()
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(ValueError, match=r"a\.json' is no recorded result"):
        ledger(tmp_path, tmp_path / "docs" / "book.md")


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "There is no recorded result"), ("{", "is no recorded result"), ("quick", "is of the short version")],
)
def test_what_the_ledger_cannot_use_is_wrong_usage(
    content: str | None, message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    if content == "quick":
        _result(quick=True).write(tmp_path / "a.json")
    elif content is not None:
        (tmp_path / "a.json").write_text(content)
    assert main(["ledger", "--recorded", str(tmp_path), "--output", str(tmp_path / "book.md")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "book.md").exists()
