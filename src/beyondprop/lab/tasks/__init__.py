"""What contenders are compared on."""

from __future__ import annotations

from beyondprop.lab.tasks.evaluation import Evaluation, evaluate

__all__ = [
    "Evaluation",
    "evaluate",
]
