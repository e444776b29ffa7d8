"""Networks by name, one file a family."""

from __future__ import annotations

from beyondprop.lab.nets.forms import build, spec_of

__all__ = ["build", "spec_of"]
