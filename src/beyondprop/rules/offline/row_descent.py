"""Gradient steps on every row's own problem at once, each with its own step length, none of which goes uphill."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from beyondprop.nn.activations import Activation
from beyondprop.rules.offline.row_losses import RowLoss

HALVINGS = 5
"""How often a step that goes uphill is halved before its row stays where it is."""


RowFunction = Callable[[Tensor, Tensor | None], "RowPoint"]
"""`function(v, chosen)` at rows v `(M, width)`; `chosen` are their indices among all rows, None for all."""


class Anchor(NamedTuple):
    """`weight |v - center|^2 / 2` for each row."""

    center: Tensor
    weight: float


def descend(start: Tensor, function: RowFunction, anchor: Anchor, steps: int) -> Tensor:
    """Return rows at which `function + anchor` is at most what it is at `start`, row by row.

    Every step goes along the row's gradient, as far as the quadratic model says (exact for a quadratic, and for a piecewise
    linear network while no unit flips); a step that would go uphill is halved until it does not.

    Args:
        start: rows `(N, width)`; not changed.
        function: what is minimised besides the anchor.
        anchor: holds the rows near their center.
        steps: >= 1.
    """
    center, weight = anchor.center, anchor.weight
    v, point = start, function(start, None)
    total = point.values + 0.5 * weight * _square_norm(v - center)
    for _ in range(steps):
        gradient = point.gradient().add_(v - center, alpha=weight)
        squared = _square_norm(gradient)
        curvature = point.curvature(gradient) + weight * squared
        length = squared / curvature.clamp_min(torch.finfo(v.dtype).tiny)
        moved = torch.addcmul(v, gradient, length.unsqueeze(1), value=-1.0)
        point = function(moved, None)
        reached = point.values + 0.5 * weight * _square_norm(moved - center)
        uphill = (reached <= total).logical_not_().nonzero().squeeze(1)  # nan counts as uphill
        if len(uphill):
            _halve(moved, reached, uphill, (v, gradient, length, total), function, anchor)
            point = function(moved, None)
        v, total = moved, reached
    return v


def _halve(
    moved: Tensor, reached: Tensor, uphill: Tensor, step: tuple[Tensor, ...], function: RowFunction, anchor: Anchor
) -> None:
    """Write into `moved` and `reached` shorter steps for the rows that went uphill."""
    v, gradient, length, total = step
    factor = 1.0
    for _ in range(HALVINGS):
        factor *= 0.5
        trial = v[uphill] - gradient[uphill] * (factor * length[uphill]).unsqueeze(1)
        values = function(trial, uphill).values + 0.5 * anchor.weight * _square_norm(trial - anchor.center[uphill])
        good = values <= total[uphill]
        moved[uphill[good]], reached[uphill[good]] = trial[good], values[good]
        uphill = uphill[~good]
        if not len(uphill):
            return
    moved[uphill], reached[uphill] = v[uphill], total[uphill]


class _Affine:
    """The layer above some rows v as a `RowFunction`: W, b, its nonlinearity f, None for the identity, and its goal."""

    def __init__(self, activation: Activation | None, weight: Tensor, bias: Tensor | None, goal: Goal) -> None:
        self.activation, self.weight, self.bias, self.goal = activation, weight, bias, goal


class AffineAfter(_Affine):
    """`distance(W f(v) + b)`: v is a pre-activation."""

    def __call__(self, v: Tensor, chosen: Tensor | None) -> RowPoint:
        active = v if self.activation is None else self.activation.value(v)
        slope = None if self.activation is None else self.activation.slope(v, active)
        output = torch.nn.functional.linear(active, self.weight, self.bias)
        return RowPoint(self.goal.of(chosen), output, self.weight, below=slope)


class AffineBefore(_Affine):
    """`distance(f(W v + b))`: v is a post-activation."""

    def __call__(self, v: Tensor, chosen: Tensor | None) -> RowPoint:
        output = torch.nn.functional.linear(v, self.weight, self.bias)
        if self.activation is None:
            return RowPoint(self.goal.of(chosen), output, self.weight)
        active = self.activation.value(output)
        return RowPoint(self.goal.of(chosen), active, self.weight, above=self.activation.slope(output, active))


class Goal(NamedTuple):
    """How far an output is from what it should be, row by row: `loss` against `target` `(N, ...)`, times `weight`."""

    target: Tensor
    loss: RowLoss
    weight: float = 1.0

    def of(self, chosen: Tensor | None) -> Goal:
        """Return the goal of some rows."""
        return self if chosen is None else Goal(self.target[chosen], self.loss, self.weight)


class RowPoint:
    """A function of rows at one place: its values `(N,)`, gradient and curvature there."""

    def __init__(
        self, goal: Goal, output: Tensor, weight: Tensor, *, below: Tensor | None = None, above: Tensor | None = None
    ) -> None:
        self.goal, self.output, self.weight = goal, output, weight
        self.below, self.above = below, above
        self.values = goal.loss.values(output, goal.target) * goal.weight

    def gradient(self) -> Tensor:
        """Return the gradient, `(N, width)`."""
        cotangent = self.goal.loss.gradient(self.output, self.goal.target) * self.goal.weight
        if self.above is not None:
            cotangent = cotangent * self.above
        gradient = cotangent @ self.weight
        return gradient if self.below is None else gradient.mul_(self.below)

    def curvature(self, direction: Tensor) -> Tensor:
        """Return `direction^T H direction` for a Gauss-Newton H, `(N,)`."""
        if self.below is not None:
            direction = direction * self.below
        image = direction @ self.weight.t()
        if self.above is not None:
            image = image * self.above
        return self.goal.loss.curvature(self.output, self.goal.target, image) * self.goal.weight


def _square_norm(values: Tensor) -> Tensor:
    return values.square().sum(1)
