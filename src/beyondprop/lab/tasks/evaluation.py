"""Numbers of a model on rows it is not trained on: in evaluation mode, part by part."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from beyondprop.lab.tasks.base import Kind
from beyondprop.nn.functional import evaluation_mode
from beyondprop.stages.losses import LossFunction, OutputLoss

ROWS = 1024
"""Rows that go through the model at once: large products, small memory also for convolutions."""


def measured(model: nn.Module, kind: Kind, pairs: Iterable[tuple[Any, Tensor]]) -> dict[str, float]:
    """Return a kind's numbers over pairs of inputs and targets; the device is read once.

    Raises:
        ValueError: if the loss has to be called on all rows at once, and they cannot be put together.
    """
    with evaluation_mode(model), torch.inference_mode():
        parts: Iterable[tuple[Any, Tensor]] = ((model(x), y) for x, y in pairs)
        if not adds_up(kind.loss):
            parts = _joined(list(parts))
        sums = torch.stack([kind.part(*part) for part in parts]).sum(0)
    return kind.numbers(sums.tolist())


def adds_up(loss: Any) -> bool:
    """Whether a loss says how it reduces, so that its value over all rows is known from its values over parts of them.

    Any other function may be a sum, a root or a quotient: it is what it is only on all rows.
    """
    own = loss.loss if isinstance(loss, OutputLoss) else loss
    return hasattr(own, "reduction") or own in _MEANS


_MEANS = (F.cross_entropy, F.nll_loss, F.mse_loss, F.l1_loss, F.binary_cross_entropy_with_logits)


def _joined(parts: list[tuple[Any, Tensor]]) -> list[tuple[Any, Tensor]]:
    if len(parts) < 2 or not all(isinstance(tensor, Tensor) for part in parts for tensor in part):
        return parts
    shapes = {(tuple(output.shape[1:]), tuple(y.shape[1:])) for output, y in parts}
    if len(shapes) > 1:
        raise ValueError(
            "The loss does not say how it reduces, so that it is called on all rows at once, and the batches have outputs and "
            f"targets of the shapes {sorted(shapes)} a row. Set its attribute reduction to 'mean' or 'sum'."
        )
    return [(torch.cat([output for output, _ in parts]), torch.cat([y for _, y in parts]))]


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
