"""Operations with closed forms: what a `PipelineStage` is made of."""

from __future__ import annotations

from beyondprop.stages.operations.base import Operation, Recorded, RecordedRun
from beyondprop.stages.operations.elementary import operation

__all__ = [
    "Operation",
    "Recorded",
    "RecordedRun",
    "operation",
]
