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

_HOMES = ("comparing.settings", "registry", "tasks", "training", "comparing.member", "comparing.comparison")

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
    # Loaded when asked for, lightest home first: the command line's settings shall not wait for torch.
    if name in __all__:
        for home in map(importlib.import_module, (f"{__name__}.{home}" for home in _HOMES)):
            if hasattr(home, name):
                value = globals()[name] = getattr(home, name)
                return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
