"""Loss and accuracy of a model on data it is not trained on."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

ROWS = 1024
"""Rows that go through the model at once: large products, small memory also for convolutions."""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What an evaluation found.

    Attributes:
        loss: mean loss of a row.
        accuracy: share of rows whose largest output is at their label; None where the task is no classification.
    """

    loss: float
    accuracy: float | None


def evaluate(model: nn.Module, loss: Callable[[Tensor, Tensor], Tensor], x: Tensor, y: Tensor) -> Evaluation:
    """Evaluate in evaluation mode and give every module its mode back.

    Args:
        model: any module.
        loss: `loss(output, y)`, mean or sum over the batch.
        x: inputs `(N, ...)`.
        y: labels `(N,)` in int64 for a classification, else targets as the loss takes them.
    """
    total, correct = totals(model, loss, x, y).tolist()
    return from_totals(total, correct, len(x))


def totals(model: nn.Module, loss: Callable[[Tensor, Tensor], Tensor], x: Tensor, y: Tensor) -> Tensor:
    """Return `(2,)` on the device: the mean loss, and the count of correct rows or nan for a task without labels."""
    is_mean = getattr(loss, "is_mean", getattr(loss, "reduction", "mean") == "mean")
    parts = []
    with evaluation_mode(model), torch.inference_mode():
        for rows in zip(x.split(ROWS), y.split(ROWS), strict=True):
            output, labels = model(rows[0]), rows[1]
            value = loss(output, labels).to(wide(x.device)) * ((len(labels) if is_mean else 1) / len(x))
            if output.ndim == 2 and labels.ndim == 1 and labels.dtype == torch.int64:
                correct = output.argmax(1).eq(labels).sum().to(value)
            else:
                correct = torch.full_like(value, math.nan)
            parts.append(torch.stack([value, correct]))
        result = torch.stack(parts).sum(0)
    return result.clone()  # an inference tensor could not be used outside


def wide(device: torch.device) -> torch.dtype:
    """Return the dtype for sums over many rows: float64 where the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


def from_totals(loss: float, correct: float, rows: int) -> Evaluation:
    """Return what `totals` counted as an `Evaluation`."""
    return Evaluation(loss, None if math.isnan(correct) else correct / rows)


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put a model in evaluation mode, and give every module its own mode back."""
    # Each module's own: a part of the model may be in evaluation mode during training, too.
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
