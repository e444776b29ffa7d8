"""Solvers: how each stage comes to produce what it should have produced."""

from __future__ import annotations

from beyondprop.solvers.base import Solver
from beyondprop.solvers.descent import Descent
from beyondprop.solvers.memory import Memory

__all__ = ["Descent", "Memory", "Solver"]
