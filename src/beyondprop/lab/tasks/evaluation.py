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
    return from_totals(*totals(model, loss, x, y).tolist())


def totals(model: nn.Module, loss: Callable[[Tensor, Tensor], Tensor], x: Tensor, y: Tensor) -> Tensor:
    """Return `(2,)` on the device: the mean loss, and the share of correct rows or nan for a task without labels.

    A mean over rows is put together from those of its parts; cross-entropy's own weights, and rows that it ignores, count as
    they do in one mean over all rows.
    """
    is_mean = getattr(loss, "is_mean", getattr(loss, "reduction", "mean") == "mean")
    inner = getattr(loss, "loss", loss)
    parts = []
    with evaluation_mode(model), torch.inference_mode():
        for rows in zip(x.split(ROWS), y.split(ROWS), strict=True):
            output, labels = model(rows[0]), rows[1]
            weights = _weights(inner, output, labels)
            total = torch.tensor(float(len(labels))) if weights is None else weights.to(wide(x.device)).sum()
            total = total.to(x.device, wide(x.device))
            value = loss(output, labels).to(wide(x.device)) * (total if is_mean else 1)
            if weights is not None:
                value = torch.where(total > 0, value, 0.0)  # the mean of no row is nan
            if output.ndim == 2 and labels.ndim == 1 and labels.dtype == torch.int64:
                counted = torch.ones_like(labels) if weights is None else labels.ne(inner.ignore_index)  # type: ignore[attr-defined]
                correct, seen = (output.argmax(1).eq(labels) & counted.bool()).sum().to(value), counted.sum().to(value)
            else:
                correct, seen = torch.full_like(value, math.nan), torch.ones_like(value)
            parts.append(torch.stack([value, total, correct, seen]))
        value, total, correct, seen = torch.stack(parts).sum(0).unbind()
        result = torch.stack([value / (total if is_mean else len(x)), correct / seen])
    return result.clone()  # an inference tensor could not be used outside


def _weights(loss: object, output: Tensor, labels: Tensor) -> Tensor | None:
    """Return every row's weight in a mean, where the loss is one that knows weights or rows to ignore; None: all count 1."""
    if not isinstance(loss, nn.CrossEntropyLoss | nn.NLLLoss) or labels.is_floating_point():
        return None
    kept = labels.ne(loss.ignore_index)
    if loss.weight is None:
        return kept.to(output.dtype)
    return torch.where(kept, loss.weight[torch.where(kept, labels, 0)], 0.0)


def wide(device: torch.device) -> torch.dtype:
    """Return the dtype for sums over many rows: float64 where the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


def from_totals(loss: float, correct: float) -> Evaluation:
    """Return what `totals` found as an `Evaluation`."""
    return Evaluation(loss, None if math.isnan(correct) else correct)


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
