"""Everything public has a docstring, an overriding method that of its base."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import beyondprop

ROOT = Path(beyondprop.__file__).parent
MODULES = sorted(
    ".".join(("beyondprop", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__")
    for path in ROOT.rglob("*.py")
    if path.stem != "__main__"
)


def _is_documented(owner: type, name: str) -> bool:
    return any(inspect.getdoc(vars(base)[name]) for base in owner.__mro__ if name in vars(base))


def _undocumented(name: str, thing: Any) -> Iterator[str]:
    if not thing.__doc__:
        yield name
    if inspect.isclass(thing):
        for member, value in vars(thing).items():
            is_ours = inspect.isfunction(value) or isinstance(value, property | classmethod | staticmethod)
            if is_ours and not member.startswith("_") and not _is_documented(thing, member):
                yield f"{name}.{member}"


@pytest.mark.parametrize("module", MODULES)
def test_what_is_public_has_a_docstring(module: str) -> None:
    found = importlib.import_module(module)
    assert found.__doc__
    for name, thing in vars(found).items():
        is_own = getattr(thing, "__module__", "") == module and (inspect.isclass(thing) or inspect.isfunction(thing))
        if is_own and not name.startswith("_"):
            assert list(_undocumented(f"{module}.{name}", thing)) == []
