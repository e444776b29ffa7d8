"""The laboratory: everything that compares."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from beyondprop.lab.comparing.comparison import compare, resume
    from beyondprop.lab.comparing.member import Contender
    from beyondprop.lab.comparing.settings import Settings
    from beyondprop.lab.registry import NetSpec, RuleSpec, TaskSpec, register
    from beyondprop.lab.tasks import (
        AddingTask,
        Classification,
        ContinualTask,
        Metric,
        Reconstruction,
        Regression,
        RowsTask,
        Task,
        evaluate,
    )
    from beyondprop.lab.training import Alignment, History, StreamResult, Training, alignment, fit, run_stream

_HOMES = {
    "beyondprop.lab.comparing.comparison": (
        "compare",
        "resume",
    ),
    "beyondprop.lab.comparing.member": ("Contender",),
    "beyondprop.lab.comparing.settings": ("Settings",),
    "beyondprop.lab.registry": (
        "NetSpec",
        "RuleSpec",
        "TaskSpec",
        "register",
    ),
    "beyondprop.lab.tasks": (
        "AddingTask",
        "Classification",
        "ContinualTask",
        "Metric",
        "Reconstruction",
        "Regression",
        "RowsTask",
        "Task",
        "evaluate",
    ),
    "beyondprop.lab.training": (
        "Alignment",
        "History",
        "StreamResult",
        "Training",
        "alignment",
        "fit",
        "run_stream",
    ),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "AddingTask",
    "Alignment",
    "Classification",
    "Contender",
    "ContinualTask",
    "History",
    "Metric",
    "NetSpec",
    "Reconstruction",
    "Regression",
    "RowsTask",
    "RuleSpec",
    "Settings",
    "StreamResult",
    "Task",
    "TaskSpec",
    "Training",
    "alignment",
    "compare",
    "evaluate",
    "fit",
    "register",
    "resume",
    "run_stream",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_HOME_OF[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
