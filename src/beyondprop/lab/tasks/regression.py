"""Numbers as targets: squared error and R squared."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from beyondprop.data import Dataset
from beyondprop.lab.tasks.base import LOSS, R2, Kind
from beyondprop.lab.tasks.evaluation import loss_sums, wide
from beyondprop.lab.tasks.rows import RowsTask
from beyondprop.stages.losses import LossFunction


class LossOnly(Kind):
    """Rows that are judged by their loss alone, whatever it is.

    Args:
        loss: `loss(output, y)`.
    """

    metrics = (LOSS,)

    def __init__(self, loss: LossFunction) -> None:
        self.loss = loss

    def part(self, output: Tensor, y: Tensor) -> Tensor:
        return torch.stack(loss_sums(self.loss, output, y))

    def numbers(self, sums: list[float]) -> dict[str, float]:
        return {"loss": sums[0] / sums[1] if sums[1] else math.nan}


class Regression(Kind):
    """Rows with numbers `(N, k)`: squared error, and R squared, the mean over the targets of 1 - residuals / variance.

    Args:
        loss: `loss(output, y)`; default: mean squared error.
    """

    metrics = (R2, LOSS)

    def __init__(self, loss: LossFunction | None = None) -> None:
        self.loss = nn.MSELoss() if loss is None else loss

    @classmethod
    def task(cls, dataset: Dataset) -> RowsTask:
        """Return the task of a data set with numbers as targets."""
        return RowsTask.of(dataset, cls())

    def part(self, output: Tensor, y: Tensor) -> Tensor:
        dtype = wide(y.device)
        value, total = loss_sums(self.loss, output, y)
        target, residual = y.to(dtype), (output.to(dtype) - y.to(dtype)).square()
        rows = torch.full_like(value, float(len(y)))
        sums = torch.stack([residual.sum(0), target.sum(0), target.square().sum(0)])
        return torch.cat([torch.stack([value, total, rows]), sums.flatten()])

    def numbers(self, sums: list[float]) -> dict[str, float]:
        value, total, rows, *rest = sums
        count = len(rest) // 3
        shares = []
        for residual, first, second in zip(rest[:count], rest[count : 2 * count], rest[2 * count :], strict=True):
            spread = second - first * first / rows
            shares.append(1 - residual / spread if spread > 0 else float(residual == 0))  # of a constant target
        return {"r2": math.fsum(shares) / count, "loss": value / total}

    def check(self, output: Tensor, y: Tensor) -> None:
        if output.shape != y.shape:
            found, wanted = (", ".join(map(str, ("N", *shape[1:]))) for shape in (output.shape, y.shape))
            raise ValueError(f"its output is ({found}); the targets are ({wanted})")
        super().check(output, y)
