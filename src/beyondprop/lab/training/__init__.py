"""The training loop, and what is measured around it."""

from __future__ import annotations

from beyondprop.lab.training.alignment import Alignment, alignment
from beyondprop.lab.training.fit import fit
from beyondprop.lab.training.loop import Data, Failed, History, Row, State
from beyondprop.lab.training.streaming import StreamResult, run_stream
from beyondprop.lab.training.work import work_per_step

__all__ = [
    "Alignment",
    "Data",
    "Failed",
    "History",
    "Row",
    "State",
    "StreamResult",
    "alignment",
    "fit",
    "run_stream",
    "work_per_step",
]
