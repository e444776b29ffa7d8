"""A method's row in the README, its row in the table of rules, its public name and its page belong together."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

import beyondprop
from beyondprop import deploy, lab, nn
from beyondprop.cli import main
from beyondprop.func import sensing
from beyondprop.lab import registry
from beyondprop.lab.registry import RuleSpec

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(
    not (ROOT / "README.md").is_file(), reason="needs the repository, not the package alone"
)


def _built_in() -> list[RuleSpec]:
    registry.rules.names()
    return [spec for spec in registry.rules if spec.home]


def _methods() -> list[str]:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    table = text.partition("| method | name |")[2].partition("\n\n")[0]
    return [line for line in table.splitlines() if line.startswith("| ")]


@pytest.mark.parametrize("spec", _built_in(), ids=lambda spec: spec.name)
def test_a_rule_is_found_from_everywhere(spec: RuleSpec) -> None:
    assert spec.home in beyondprop.__all__
    assert isinstance(getattr(beyondprop, spec.home), type)
    rows = [row for row in _methods() if f"`{spec.name}`" in row]
    assert len(rows) == 1, f"README's table of methods must have {spec.name} once"
    names, page = rows[0].split(" | ")[1], rows[0].rstrip("| ").split(" | ")[-1]
    assert f"`{spec.home}`" in names
    assert f"docs/{spec.page}.md" in page
    text = (ROOT / "docs" / f"{spec.page}.md").read_text(encoding="utf-8")
    assert f"`{spec.name}`" in text or f"--rule {spec.name}" in text, f"docs/{spec.page}.md must name {spec.name}"
    assert spec.home in text


def test_every_method_of_the_readme_is_there() -> None:
    known = {*registry.rules.names(), *beyondprop.__all__, *lab.__all__, *nn.__all__, *sensing.__all__, *deploy.__all__}
    for row in _methods():
        names = re.findall(r"`([^`]+)`", row.split(" | ")[1])
        assert names
        assert set(names) <= known
        for page in re.findall(r"\]\((docs/[^)#]+)", row):
            assert (ROOT / page).is_file()


def test_the_list_says_where_a_rule_lives_and_what_explains_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "--json"]) == 0
    listed = {row["name"]: row for row in json.loads(capsys.readouterr().out)["rules"]}
    for spec in _built_in():
        assert (listed[spec.name]["home"], listed[spec.name]["page"]) == (spec.home, spec.page)
    assert main(["list"]) == 0
    shown = capsys.readouterr().out
    for spec in _built_in():
        assert spec.home in shown
        assert f"docs/{spec.page}.md" in shown
