"""What is packed: the source distribution holds all that its own README, Makefile and tests name."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.skipif(not (ROOT / "pyproject.toml").is_file(), reason="needs the repository, not the package alone")
def test_the_sdist_holds_what_its_readme_and_tests_name() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    packed = {path.removeprefix("/") for path in project["tool"]["hatch"]["build"]["targets"]["sdist"]["include"]}
    assert all((ROOT / path).exists() for path in packed)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    links = {target.partition("/")[0] for target in re.findall(r"\]\(([^)#\s:]+)\)", readme)}
    assert links
    # `make demo` and `make test`, the constraints that they install by, and what the ledger's tests and page are made of.
    assert {*links, "Makefile", "constraints.txt", "reproduction", "tests", "src"} <= packed
