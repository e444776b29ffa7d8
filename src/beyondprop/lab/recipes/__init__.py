"""Published experiments as data: settings, published numbers and how they are judged; `beyondprop reproduce ID` runs one.

A recipe is a module here with a `RECIPE`; its name with `-` for `_` is the recipe's id.
"""

from __future__ import annotations

import importlib
from pathlib import Path

from beyondprop import _checks
from beyondprop.lab.recipes._base import Recipe, Result, Row

__all__ = ["Recipe", "Result", "Row", "get", "names"]


def names() -> list[str]:
    """Return the ids of all recipes."""
    files = sorted(Path(__file__).parent.glob("[!_]*.py"))
    return [file.stem.replace("_", "-") for file in files]


def get(name: str) -> Recipe:
    """Return the recipe of that id.

    Raises:
        ValueError: if there is none; the message lists those that there are.
    """
    known = _checks.one_of("recipe", name, names())
    return importlib.import_module(f"beyondprop.lab.recipes.{known.replace('-', '_')}").RECIPE
