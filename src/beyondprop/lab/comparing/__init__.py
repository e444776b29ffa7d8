"""Contenders side by side on the same work."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from beyondprop.lab.comparing.comparison import compare, resume
    from beyondprop.lab.comparing.member import Contender, Member, Observer, Silent
    from beyondprop.lab.comparing.plan import Plan, prepare
    from beyondprop.lab.comparing.settings import Settings

_HOMES = {
    "beyondprop.lab.comparing.comparison": (
        "compare",
        "resume",
    ),
    "beyondprop.lab.comparing.member": (
        "Contender",
        "Member",
        "Observer",
        "Silent",
    ),
    "beyondprop.lab.comparing.plan": (
        "Plan",
        "prepare",
    ),
    "beyondprop.lab.comparing.settings": ("Settings",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "Contender",
    "Member",
    "Observer",
    "Plan",
    "Settings",
    "Silent",
    "compare",
    "prepare",
    "resume",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_HOME_OF[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
