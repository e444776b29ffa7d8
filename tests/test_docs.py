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
OPTIONAL = ("transformers",)
"""Packages of other people that an example is about."""


def test_the_pages_have_examples() -> None:
    assert len(BLOCKS) >= 4


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a page registers is gone afterwards."""
    for table in registry.TABLES.values():
        table.names()
        monkeypatch.setattr(table, "rows", dict(table.rows))


@pytest.mark.parametrize("code", BLOCKS)
def test_example_runs(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tables: None) -> None:
    for package in OPTIONAL:
        if f"from {package} import" in code:
            pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "example", "exec"), {"__name__": "example"})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_within_the_repository_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), target


@pytest.fixture
def plugins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tables: None) -> list[str]:
    """The design page's plugins as files, and the arguments that load them."""
    blocks = BLOCK.findall((ROOT / "docs" / "design.md").read_text())
    names = [block.partition("\n")[0].removeprefix("# ") for block in blocks]
    assert names == ["sign_symmetry.py", "bottleneck.py", "parity.py"]
    monkeypatch.chdir(tmp_path)
    for name, block in zip(names, blocks, strict=True):
        assert block.count("\n") <= 25
        Path(name).write_text(block)
    return [argument for name in names for argument in ("--plugin", name)]


def test_the_design_pages_credit_rule_trains_from_outside_the_package(
    plugins: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    rule = ["--rule", "sign-symmetry"]
    assert main(["compare", *plugins, *rule, "--epochs", "10", "--seeds", "1", "--json", "--out", "run"]) == 0
    (found,) = json.loads(capsys.readouterr().out)["contenders"]
    assert found["name"] == "sign-symmetry"
    assert found["final"]["mean"] > 0.93


def test_the_design_pages_net_and_task_are_compared_listed_and_reported(
    plugins: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    nets = ["--net", "bottleneck:16", "--net", "mlp:32x1"]
    command = ["compare", *plugins, "--task", "parity:6", *nets, "--rule", "adam", "--epochs", "30", "--seeds", "1"]
    assert main([*command, "--json", "--out", "run"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [entry["net"] for entry in found["config"]["contenders"]] == ["bottleneck:16", "mlp:32x1"]
    assert max(entry["final"]["mean"] for entry in found["contenders"]) > 0.9
    assert found["metric"] == "accuracy"
    assert "bottleneck:16" in Path("run/report.html").read_text()
    assert main(["list", *plugins, "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert "sign-symmetry" in {rule["name"] for rule in listed["rules"]}
    assert "bottleneck:WIDTH" in listed["nets"]
    assert "parity[:BITS]" in listed["tasks"]
