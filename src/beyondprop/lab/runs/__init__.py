"""The run directory: what is written as trainings go, and read afterwards."""

from __future__ import annotations

from beyondprop.lab.runs.directory import RunDirectory

__all__ = [
    "RunDirectory",
]
