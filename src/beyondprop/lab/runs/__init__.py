"""The run directory: what is written as trainings go, and read afterwards."""

from __future__ import annotations

from beyondprop.lab.runs.directory import RunDirectory
from beyondprop.lab.runs.recorded import Run, read_run

__all__ = ["Run", "RunDirectory", "read_run"]
