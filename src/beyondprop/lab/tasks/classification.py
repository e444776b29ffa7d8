"""Labels: cross-entropy and accuracy."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from beyondprop.data import Dataset
from beyondprop.lab.tasks.base import ACCURACY, LOSS, Kind
from beyondprop.lab.tasks.evaluation import counted, loss_sums
from beyondprop.lab.tasks.rows import RowsTask
from beyondprop.stages.losses import LossFunction


class Classification(Kind):
    """Rows with labels `(N,)` in int64; accuracy is the share of rows whose largest output is at their label.

    Args:
        loss: `loss(output, y)`; default: cross-entropy.
        classes: names of the labels.
    """

    metrics = (ACCURACY, LOSS)

    def __init__(self, loss: LossFunction | None = None, classes: tuple[str, ...] = ()) -> None:
        self.loss = nn.CrossEntropyLoss() if loss is None else loss
        self.classes = classes

    @classmethod
    def task(cls, dataset: Dataset) -> RowsTask:
        """Return the task of a data set with labels."""
        return RowsTask.of(dataset, cls(classes=dataset.classes))

    def part(self, output: Tensor, y: Tensor) -> Tensor:
        value, total = loss_sums(self.loss, output, y)
        if output.ndim == 2 and y.ndim == 1 and y.dtype == torch.int64:
            kept = counted(getattr(self.loss, "loss", self.loss), y)
            correct, seen = (output.argmax(1).eq(y) & kept).sum().to(value), kept.sum().to(value)
        else:
            correct, seen = torch.full_like(value, math.nan), torch.ones_like(value)
        return torch.stack([value, total, correct, seen])

    def numbers(self, sums: list[float]) -> dict[str, float]:
        value, total, correct, seen = sums
        return {"accuracy": correct / seen if seen else math.nan, "loss": value / total if total else math.nan}

    def check(self, output: Tensor, y: Tensor) -> None:
        if output.ndim != 2 or output.shape[1] < len(self.classes):
            found = ", ".join(map(str, ("N", *output.shape[1:])))
            raise ValueError(f"its output is ({found}); {len(self.classes)} classes need (N, {len(self.classes)})")
        super().check(output, y)
