"""Recorded results, notes on parts and kept values: what was changed, or cannot be read, is named."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from beyondprop.lab import recipes
from beyondprop.lab.recipes import Result, Row
from beyondprop.lab.recipes._base import Context, Recipe
from beyondprop.lab.recipes._kept import Kept
from beyondprop.lab.recipes._ledger import ledger


def _result() -> Result:
    settings = {"part": {"lr": {"adam": 0.001}, "at_edge": []}}
    return Result("higgs", False, (Row("a", (1.5, 2.5)),), settings, 90.0, "2026-01-31", {"torch": "2.13.0"})


def test_a_changed_result_is_refused_and_one_without_a_checksum_is_said(tmp_path: Path) -> None:
    file = _result().write(tmp_path / "higgs.json")
    text = file.read_text()
    for old, new in (("1.5", "9.5"), ('"adam": 0.001', '"adam": 0.1'), ("90.0", "91.0"), ("2026-01-31", "2026-01-30")):
        assert old in text
        file.write_text(text.replace(old, new, 1))
        with pytest.raises(
            ValueError, match=r"higgs\.json' is no recorded result: .*not those of its checksum.*delete"
        ):
            ledger(tmp_path, tmp_path / "book.md")
    file.write_text("\n" + text.replace(" ", "  "))  # form is no change
    whole = ledger(tmp_path, tmp_path / "book.md")
    file.write_text(re.sub(r',\s*"checksum": "\w+"', "", text))
    with pytest.warns(UserWarning, match=r"higgs\.json' has no checksum, as those of older versions"):
        assert ledger(tmp_path, tmp_path / "book.md") == whole


def test_every_recorded_result_has_its_checksum() -> None:
    for file in (Path(__file__).parents[3] / "reproduction").glob("*.json"):
        assert "checksum" in json.loads(file.read_text()), file
        Result.read(file)


@pytest.mark.parametrize(
    ("old", "new"),
    [('"digits": 2', '"digits": 10000000'), ('"seconds": 90.0', '"seconds": NaN'), ('"lr": {', '"lr": 3, "x": {'),
     ('"settings": {', '"settings": [], "x": {'), ('"quick": false', '"quick": 0'), ("1.5", "1" + "0" * 400),
     ('"date": "', '"date": 3, "x": "')],
)  # fmt: skip
def test_odd_values_without_a_checksum_are_named(old: str, new: str, tmp_path: Path) -> None:
    file = _result().write(tmp_path / "higgs.json")
    text = re.sub(r',\s*"checksum": "\w+"', "", file.read_text())
    assert old in text
    file.write_text(text.replace(old, new, 1))
    with pytest.raises(ValueError, match=r"higgs\.json' is no recorded result: \w+Error: .*Put the original back"):
        Result.read(file)


@pytest.mark.parametrize(
    "content",
    ["{", "[]", "{}", "3", '{"seconds": 1.0}', '{"seconds": "x", "commits": []}', '{"seconds": 1.0, "commits": [1]}',
     '{"seconds": 1.0, "commits": [], "checksum": "0"}', '{"seconds": 1' + "0" * 400 + ', "commits": []}', "[" * 9000],
)  # fmt: skip
def test_odd_notes_on_parts_are_named(content: str, tmp_path: Path) -> None:
    (tmp_path / "parts.json").write_text(content)
    with pytest.raises(ValueError, match=r"parts\.json' is damaged: .*Remove it; what was measured is kept elsewhere"):
        recipes.get("theorem-3-2").run("theorem-3-2", Context(tmp_path, True, lambda line: None))


def test_the_time_of_parts_adds_up_and_old_notes_are_read(tmp_path: Path) -> None:
    def measure(context: Context) -> tuple[list[Row], dict[str, Any]]:
        if not (context.out / "again").exists():
            (context.out / "again").touch()
            raise KeyboardInterrupt
        return [Row("a", (1.0,))], {}

    recipe = Recipe("t", "s", "a.", measure, 1.0)
    with pytest.raises(KeyboardInterrupt):
        recipe.run("r", Context(tmp_path, False, lambda line: None))
    assert "checksum" in json.loads((tmp_path / "parts.json").read_text())
    (tmp_path / "parts.json").write_text('{"seconds": 100.0, "commits": ["abc"]}')  # of an older version
    assert recipe.run("r", Context(tmp_path, False, lambda line: None)).seconds >= 100.0


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{}", '{"values": [1], "settings": 1}', '{"values": {"a": 2.0}, "settings": 1, "checksum": "0"}'],
)
def test_odd_kept_values_are_named(content: str, tmp_path: Path) -> None:
    file = tmp_path / "kept.json"
    file.write_text(content)
    with pytest.raises(ValueError, match=r"kept\.json' is damaged: .*Remove it: what it has is measured again"):
        Kept(file, 1)


def test_a_kept_value_that_was_changed_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "kept.json"
    assert Kept(file, {"seed": 0}).get("a", lambda: 1.25) == 1.25
    assert Kept(file, {"seed": 0}).get("a", lambda: 2.0) == 1.25
    file.write_text(file.read_text().replace("1.25", "9.25"))
    with pytest.raises(ValueError, match=r"kept\.json' is damaged: its values are not those of its checksum"):
        Kept(file, {"seed": 0})
    file.write_text('{"settings": {"seed": 0}, "values": {"a": 3.0}}')  # of an older version
    assert Kept(file, {"seed": 0}).get("a", lambda: 2.0) == 3.0
