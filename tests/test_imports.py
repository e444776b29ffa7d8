"""Imports point one way, and importing the package costs nothing beyond torch."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import beyondprop

ROOT = Path(beyondprop.__file__).parent

# A file imports from its own floor or from lower ones. Anything that is not listed is the laboratory, on top.
FLOORS = (
    {"_checks", "errors"},
    {
        "activations",
        "transport",
        "stage",
        "affine",
        "block",
        "_operation",
        "_norms",
        "_pooling",
        "_residual",
        "operations",
        "pipeline",
        "nn",
        "_moments",
        "recurrent",
        "chain",
        "losses",
        "theory",
    },
    {"credit", "solvers", "watchdog"},
    {"rules", "optim", "diagnostics"},
    {"registry", "__init__"},
)
LABORATORY = len(FLOORS)


def _top(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def _floor(name: str) -> int:
    return next((level for level, floor in enumerate(FLOORS) if name in floor), LABORATORY)


def _imports(path: Path) -> set[str]:
    """Names of the package's modules that the file imports when it is imported; types alone do not count."""
    found = set()
    pending: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {f"beyondprop.{a.name}" for a in node.names} if node.module == "beyondprop" else {str(node.module)}
        elif isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        pending += ast.iter_child_nodes(node)
    return {name for name in found if name == "beyondprop" or name.startswith("beyondprop.")}


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_no_file_imports_from_a_higher_floor(path: Path) -> None:
    own = _floor(_top(path))
    for name in _imports(path):
        parts = name.split(".")
        imported = parts[1] if len(parts) > 1 else "__init__"
        if own < LABORATORY:
            assert _floor(imported) <= own, f"{path.name} imports {name}, which is above it"
            assert imported != "__init__" or own == _floor("__init__"), f"{path.name} imports the package's front"


def test_named_rules_do_not_import_each_other() -> None:
    shared = {"base", "local", "offline", "_guard", "_layers"}
    for path in (ROOT / "rules").glob("*.py"):
        named = {n.split(".")[2] for n in _imports(path) if n.startswith("beyondprop.rules.")}
        assert named <= shared, f"{path.name} imports {named - shared}"


def test_the_library_is_silent() -> None:
    for path in ROOT.rglob("*.py"):
        if _floor(_top(path)) < LABORATORY:
            calls = [n.func for n in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(n, ast.Call)]
            assert not any(isinstance(f, ast.Name) and f.id == "print" for f in calls), path


def test_public_names_are_those_listed() -> None:
    assert sorted(beyondprop.__all__) == beyondprop.__all__
    assert all(getattr(beyondprop, name).__doc__ for name in beyondprop.__all__)


def test_importing_loads_no_laboratory() -> None:
    heavy = ("sklearn", "matplotlib", "rich", "tyro", "PIL")
    code = f"import sys, torch; import beyondprop; print([m for m in {heavy} if m in sys.modules])"
    environment = {**os.environ, "PYTHONPATH": str(ROOT.parent)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.strip() == "[]"
