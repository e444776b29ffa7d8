"""Contenders side by side on the same work."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from beyondprop.lab.comparing.comparison import compare, resume
    from beyondprop.lab.comparing.member import Contender, Member, Observer
    from beyondprop.lab.comparing.plan import Plan, prepare
    from beyondprop.lab.comparing.settings import Settings

__all__ = ["Contender", "Member", "Observer", "Plan", "Settings", "compare", "prepare", "resume"]


def __getattr__(name: str) -> Any:
    # Loaded when asked for, lightest home first: the command line's settings shall not wait for torch.
    if name in __all__:
        for home in ("settings", "member", "plan", "comparison"):
            module = importlib.import_module(f"{__name__}.{home}")
            if hasattr(module, name):
                return getattr(module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
