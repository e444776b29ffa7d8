"""The training loop, and what is measured around it."""

from __future__ import annotations

from beyondprop.lab.training.alignment import Alignment, alignment
from beyondprop.lab.training.fit import fit
from beyondprop.lab.training.loop import Failed, History, Row, State, Training
from beyondprop.lab.training.streaming import StreamResult, run_stream
from beyondprop.lab.training.work import work_per_step

__all__ = [
    "Alignment",
    "Failed",
    "History",
    "Row",
    "State",
    "StreamResult",
    "Training",
    "alignment",
    "fit",
    "run_stream",
    "work_per_step",
]
