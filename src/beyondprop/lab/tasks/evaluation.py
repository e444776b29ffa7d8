"""Numbers of a model on rows it is not trained on: in evaluation mode, part by part."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from beyondprop.lab.tasks.base import Kind
from beyondprop.nn.functional import evaluation_mode
from beyondprop.stages.losses import LossFunction, OutputLoss

ROWS = 1024
"""Rows that go through the model at once: large products, small memory also for convolutions."""


def measured(model: nn.Module, kind: Kind, pairs: Iterable[tuple[Any, Tensor]]) -> dict[str, float]:
    """Return a kind's numbers over pairs of inputs and targets; the device is read once."""
    with evaluation_mode(model), torch.inference_mode():
        sums = torch.stack([kind.part(model(x), y) for x, y in pairs]).sum(0)
    return kind.numbers(sums.tolist())


def loss_sums(loss: LossFunction, output: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Return a loss times the weight of these rows in a mean, and that weight, 0-d in `wide`.

    A mean over all rows is put together from those of its parts; cross-entropy's own weights, and rows that it ignores, count
    as they do in one mean over all rows. Of a sum over rows the weight is their number.
    """
    dtype = wide(y.device)
    judge = loss if isinstance(loss, OutputLoss) else OutputLoss(loss)
    judge.check(output.to(y.dtype) if y.is_floating_point() else output, y)
    weights = row_weights(judge.loss, output, y)
    rows = torch.tensor(float(len(y))).to(y.device, dtype)
    total = rows if weights is None else weights.to(dtype).sum()
    value = judge(output, y).to(dtype) * (total if judge.is_mean else 1)
    if weights is not None:
        value = torch.where(total > 0, value, 0.0)  # the mean of no row is nan
    return value, total if judge.is_mean else rows


def row_weights(loss: object, output: Tensor, y: Tensor) -> Tensor | None:
    """Return every row's weight in a mean, where there are labels, which may count less or not at all; None: all count 1."""
    if y.is_floating_point():
        return None
    knows = isinstance(loss, nn.CrossEntropyLoss | nn.NLLLoss)
    if not knows and (output.ndim != y.ndim + 1 or output.shape[1] == 1):
        return None
    kept = counted(loss, y)
    weight = loss.weight if knows else None
    if weight is None:
        return kept.to(output.dtype)
    return torch.where(kept, weight[torch.where(kept, y, 0)], 0.0)


def counted(loss: object, y: Tensor) -> Tensor:
    """Return which labels count; a function has no `ignore_index` to ask for, and torch's own is -100."""
    return y.ne(getattr(loss, "ignore_index", -100))


def wide(device: torch.device) -> torch.dtype:
    """Return the dtype for sums over many rows: float64 where the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64
