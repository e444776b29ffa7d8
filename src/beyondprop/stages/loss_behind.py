"""The task loss as a backward pass shows it: the output and the gradient there are known, the targets are not.

Of cross-entropies and squared error, the Hessian depends on the output alone, and so does the change of
the gradient from one output to another.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from beyondprop.errors import UnsupportedModelError
from beyondprop.nn.functional import nothing
from beyondprop.stages.losses import LossPoint, Map, OutputLoss, hessian_at

_SUMS_TO_ZERO = 1e-2
"""How far a cross-entropy's gradient may be from a sum of 0 over classes, relative to its size: half precision rounds."""


def check_known(loss: OutputLoss) -> None:
    """Raise `ValueError` where the loss is none whose curvature depends on the output alone."""
    kind = type(loss.loss)
    weights = [name for name in ("weight", "pos_weight") if getattr(loss.loss, name, None) is not None]
    if kind not in (nn.CrossEntropyLoss, nn.NLLLoss, nn.MSELoss, nn.BCEWithLogitsLoss) or weights:
        raise ValueError(
            "loss must be an nn.CrossEntropyLoss, nn.NLLLoss, nn.MSELoss or nn.BCEWithLogitsLoss without weights, whose "
            f"curvature depends on the output alone, got {loss.loss!r}{' with ' + weights[0] if weights else ''}. Codes with "
            "the solver 'gradient', and feedback alignment, need no loss."
        )


def unknown_loss(output: Tensor, gradient: Tensor) -> LossPoint:
    """Return a loss of which only the gradient at the output is known."""

    def refuse(_: Tensor) -> Any:
        raise ValueError("This credit asks for the curvature of the loss: pass loss=, such as nn.CrossEntropyLoss().")

    return LossPoint(nothing(output.dtype, output.device), gradient, 1.0 / len(output), refuse, refuse)


@torch.no_grad()
def loss_behind(loss: OutputLoss, output: Tensor, gradient: Tensor) -> LossPoint:
    """Return the loss at an output where its gradient is known; `value` is NaN, as it would need the targets.

    Args:
        loss: one that `check_known` lets pass.
        output: `(N, ...)`.
        gradient: of each sample's loss there, no 1/N inside.
    """
    hessian, slope, curved, bend = _maps(loss, output, gradient)

    def again(moved: Tensor) -> LossPoint:
        # A small move is not lost in the difference of two slopes where these are linear.
        change = hessian(moved - output) if curved else slope(moved) - slope(output)
        return loss_behind(loss, moved, gradient + change)

    return LossPoint(nothing(output.dtype, output.device), gradient, loss.scale(output), hessian, again, curved, bend)


def _maps(loss: OutputLoss, output: Tensor, gradient: Tensor) -> tuple[Map, Map, float | None, Map | None]:
    """Return a sample's Hessian, what of its gradient depends on the output, and curvature and bend as of `LossPoint`."""
    factor = len(output) / output.numel() if loss.is_mean else 1.0
    if isinstance(loss.loss, nn.NLLLoss):  # linear in the log-probabilities
        return torch.zeros_like, torch.zeros_like, None, None
    if isinstance(loss.loss, nn.MSELoss):
        return (lambda v: v * (2 * factor)), (lambda moved: moved * (2 * factor)), 2 * factor, None
    if isinstance(loss.loss, nn.BCEWithLogitsLoss):
        p = torch.sigmoid(output)
        return (lambda v: v * p * (1 - p) * factor), (lambda moved: torch.sigmoid(moved) * factor), 0.0, None
    dim = _classes(loss, output, gradient)
    q = torch.softmax(output, dim)
    # In a row that has a part, no class has a gradient of 0, short of underflow.
    if output.ndim == 2 and output.device.type == "cpu" and int(gradient[:, 0].count_nonzero()) == len(output):
        of_all, bend = hessian_at(q)
        return of_all, (lambda moved: torch.softmax(moved, 1)), 0.0, bend
    weight = _seen(gradient, dim).to(output.dtype)
    if loss.is_mean:
        weight *= len(output) / weight.sum().clamp_min(1)

    def hessian(v: Tensor) -> Tensor:
        qv = q * v
        return torch.addcmul(qv, q, qv.sum(dim, keepdim=True), value=-1.0).mul_(weight)

    return hessian, (lambda moved: torch.softmax(moved, dim) * weight), 0.0, None


@torch.no_grad()
def factor_of(loss: OutputLoss, output: Tensor, gradient: Tensor) -> Tensor | None:
    """Return what a sum of the samples' losses was multiplied with to have this gradient, 0-d; None where it does not show.

    1/N for a mean, times whatever the loss was scaled with. It shows for cross-entropy: with p the softmax and y the class, the
    gradient of a sample is that factor times `p - onehot(y)`.
    """
    if not isinstance(loss.loss, nn.CrossEntropyLoss):
        return None
    dim = _classes(loss, output, gradient)
    seen = _seen(gradient, dim)
    wide = torch.promote_types(output.dtype, torch.float32)
    g, p = gradient.to(wide), torch.softmax(output.to(wide), dim)
    least, label = g.min(dim, keepdim=True)
    of_label = p.gather(dim, label)
    factor = -(least * seen).sum() / ((1 - of_label) * seen).sum().clamp_min(torch.finfo(wide).tiny)
    # Besides y, the gradient is that factor times p; with mixed or smoothed labels it is not.
    squares = (g.square().sum(dim, keepdim=True) - least.square()).sum()
    expected = ((p.square().sum(dim, keepdim=True) - of_label.square()) * seen).sum() * factor.square()
    if not bool((squares - expected).abs() <= _SUMS_TO_ZERO * expected):
        return None
    # Positions are of one weight, so that a mean over those that are seen comes to 1/N a sample.
    return factor * seen.sum() / len(output) if loss.is_mean else factor


def _seen(gradient: Tensor, dim: int) -> Tensor:
    """Return which positions have a part in the loss: those with `ignore_index` have no gradient."""
    return gradient.abs().amax(dim, keepdim=True) > 0


def _classes(loss: OutputLoss, output: Tensor, gradient: Tensor) -> int:
    """Return the dimension of the classes: the second, or the last where the loss saw the output flattened."""
    known = loss.class_dims.get(output.shape)
    if known is not None:
        return known
    size = gradient.abs().max()
    if not bool(size.isfinite()):
        return 1  # the step is refused, or skipped, by itself
    for dim in dict.fromkeys((1, output.ndim - 1)):
        if bool(gradient.sum(dim).abs().max() <= _SUMS_TO_ZERO * size):
            if bool(size > 0):
                loss.class_dims[output.shape] = dim
            return dim
    raise UnsupportedModelError(
        f"The gradient at the output {tuple(output.shape)} is not that of a cross-entropy over its second or last dimension: "
        "give the loss that is really taken of it as loss=."
    )
