"""Networks by name, one file a family."""

from __future__ import annotations

from beyondprop.lab.nets.forms import FORMS, build

__all__ = [
    "FORMS",
    "build",
]
