"""The run directory: what is written as trainings go, and read afterwards."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from beyondprop.lab.runs.directory import RunDirectory
    from beyondprop.lab.runs.recorded import Run, read_run

__all__ = ["Run", "RunDirectory", "read_run"]


def __getattr__(name: str) -> Any:
    # Loaded when asked for: what the command line says is wrong with its settings shall not wait for torch.
    if name in __all__:
        home = "directory" if name == "RunDirectory" else "recorded"
        return getattr(importlib.import_module(f"{__name__}.{home}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
