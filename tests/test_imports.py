"""Rooms import only from those before them, files make no circle, and importing the package costs nothing beyond torch."""

from __future__ import annotations

import ast
import importlib
import os
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import beyondprop

ROOT = Path(beyondprop.__file__).parent

# fmt: off
ORDER = [
    "errors", "_checks", "func", "nn", "optim", "stages", "credit", "solvers", "rules", "variational", "deploy", "data",
    "envs", "lab", "estimators", "cli", "__init__", "__main__",
]
# fmt: on
LIBRARY = ORDER[: ORDER.index("lab")]
MODULES = {
    ".".join(("beyondprop", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__"): path
    for path in ROOT.rglob("*.py")
}


def _room(module: str) -> str:
    return module.split(".")[1] if "." in module else "__init__"


def _imports(module: str) -> set[str]:
    """The package's modules that a file names in its imports, those for types and those inside functions among them."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative import"
            base = str(node.module)
            found |= {full if (full := f"{base}.{a.name}") in MODULES else base for a in node.names}
        elif isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
    return {name for name in found if name == "beyondprop" or name.startswith("beyondprop.")}


def test_the_root_is_small() -> None:
    entries = [path for path in ROOT.iterdir() if path.name != "__pycache__"]
    assert len(entries) <= 17, entries
    assert {path.stem for path in entries} <= {*ORDER, "py"}


@pytest.mark.parametrize("module", sorted(MODULES))
def test_a_room_imports_from_those_before_it(module: str) -> None:
    for name in _imports(module):
        assert name in MODULES, f"{module} imports {name}, which is no file"
        assert ORDER.index(_room(name)) <= ORDER.index(_room(module)), f"{module} imports {name}, which comes after it"


def test_files_make_no_circle() -> None:
    TopologicalSorter({module: _imports(module) - {module} for module in MODULES}).prepare()


def test_named_rules_do_not_import_each_other() -> None:
    shared = {"base", "local", "guard", "watchdog", "refusals", "result", "ranks", "kept", "shown", "offline", ""}
    for module in MODULES:
        if module.startswith("beyondprop.rules.") and module.count(".") == 2 and not module.endswith(".offline"):
            named = {f"{n}.".split(".")[2] for n in _imports(module) if n.startswith("beyondprop.rules")}
            assert named <= shared, f"{module} imports {named - shared}"


def test_the_library_is_silent() -> None:
    for module, path in MODULES.items():
        if _room(module) in LIBRARY:
            calls = [n.func for n in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(n, ast.Call)]
            assert not any(isinstance(f, ast.Name) and f.id == "print" for f in calls), path


def test_public_names_are_those_listed() -> None:
    assert sorted(beyondprop.__all__) == beyondprop.__all__
    assert all(getattr(beyondprop, name).__doc__ for name in beyondprop.__all__)


def test_each_public_name_has_one_home() -> None:
    homes: dict[str, str] = {}
    for room in sorted({_room(module) for module in MODULES} - {"__init__", "__main__", "_checks"}, key=ORDER.index):
        module = importlib.import_module(f"beyondprop.{room}")
        for name in module.__all__:
            assert name not in homes, f"{name} is in {homes[name]} and in {room}"
            homes[name] = room
            assert getattr(module, name) is not None
    for name in beyondprop.__all__:
        home = importlib.import_module(f"beyondprop.{homes[name]}")
        assert getattr(beyondprop, name) is getattr(home, name)


def _loaded(code: str, *modules: str) -> list[str]:
    """Those of the modules that are loaded after the code."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT.parent)}
    code = f"import sys; {code}; print(*[m for m in {modules} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    return done.stdout.split()


def test_importing_loads_no_laboratory() -> None:
    rooms = ", ".join(f"beyondprop.{room}" for room in LIBRARY if f"beyondprop.{room}" in MODULES)
    heavy = ("beyondprop.lab", "sklearn", "matplotlib", "rich", "tyro", "PIL")
    assert _loaded(f"import torch, beyondprop, {rooms}", *heavy) == []


@pytest.mark.parametrize("code", ["pass", "optim.AffineProjection(torch.nn.Linear(2, 2))"], ids=["import", "hooks"])
def test_the_compiler_is_left_to_torch(code: str) -> None:
    """Neither importing optimizers nor hooks on a model load it; building any `torch.optim.Optimizer` does."""
    heavy = ("torch._dynamo", "torch._inductor", "sympy", "numpy.polynomial")
    assert _loaded(f"import torch; from beyondprop import optim; {code}", *heavy) == []


def test_arguments_are_checked_without_torch() -> None:
    assert _loaded("from beyondprop import _checks; _checks.one_of('x', 1, (1, 2))", "torch", "numpy") == []


def test_help_is_free_of_torch() -> None:
    assert _loaded("import beyondprop.cli", "torch", "numpy", "rich.progress") == []
