"""Every Python block of the documentation runs, each in a namespace and a working directory of its own."""

import json
import re
from pathlib import Path

import pytest

from beyondprop.cli import main
from beyondprop.lab import registry

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
BLOCKS = [
    pytest.param(match[1], id=f"{page.name}-{number}")
    for page in PAGES
    for number, match in enumerate(BLOCK.finditer(page.read_text()))
]


def test_the_pages_have_examples() -> None:
    assert len(BLOCKS) >= 4


@pytest.mark.parametrize("code", BLOCKS)
def test_example_runs(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(registry, "_RULES", dict(registry._RULES))  # a page may register a rule
    exec(compile(code, "example", "exec"), {"__name__": "example"})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_within_the_repository_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), target


def test_the_design_pages_credit_rule_trains_from_outside_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (code,) = BLOCK.findall((ROOT / "docs" / "design.md").read_text())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(registry, "_RULES", dict(registry._RULES))
    Path("sign_symmetry.py").write_text(code)
    plugin = ["--plugin", "sign_symmetry.py", "--rule", "sign-symmetry"]
    assert main(["compare", *plugin, "--epochs", "10", "--seeds", "1", "--json", "--out", "run"]) == 0
    (rule,) = json.loads(capsys.readouterr().out)["rules"]
    assert rule["name"] == "sign-symmetry"
    assert rule["final"]["mean"] > 0.93
