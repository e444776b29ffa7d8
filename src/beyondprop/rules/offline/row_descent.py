"""Gradient steps on every row's own problem at once, each with its own step length, none of which goes uphill."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from beyondprop.nn.activations import Activation
from beyondprop.rules.offline.row_losses import RowLoss

HALVINGS = 5
"""How often a step that goes uphill is halved before its row stays where it is."""


class RowPoint(Protocol):
    """A function of rows at one place: its values, gradient and curvature there."""

    values: Tensor

    def gradient(self) -> Tensor:
        """Return the gradient, `(N, width)`."""
        ...

    def curvature(self, direction: Tensor) -> Tensor:
        """Return `direction^T H direction` for a Gauss-Newton H, `(N,)`."""
        ...


RowFunction = Callable[[Tensor, Tensor | None], RowPoint]
"""`function(v, chosen)` at rows v `(M, width)`; `chosen` are their indices among all rows, None for all."""


class Anchor:
    """`weight |v - center|^2 / 2` for each row."""

    def __init__(self, center: Tensor, weight: float) -> None:
        self.center, self.weight = center, weight


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
            _halve(moved, reached, uphill, v, gradient, length, total, function, anchor)
            point = function(moved, None)
        v, total = moved, reached
    return v


def _halve(
    moved: Tensor,
    reached: Tensor,
    uphill: Tensor,
    v: Tensor,
    gradient: Tensor,
    length: Tensor,
    total: Tensor,
    function: RowFunction,
    anchor: Anchor,
) -> None:
    """Write into `moved` and `reached` shorter steps for the rows that went uphill."""
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


class AffineAfter:
    """`distance(W f(v) + b)`: the layer above a pre-activation v, as a `RowFunction`.

    Args:
        activation: f, or None for the identity.
        weight: W `(out, in)`.
        bias: b `(out,)`, or None.
        goal: the distance of an output to what it should be.
    """

    def __init__(self, activation: Activation | None, weight: Tensor, bias: Tensor | None, goal: Goal) -> None:
        self.activation, self.weight, self.bias, self.goal = activation, weight, bias, goal

    def __call__(self, v: Tensor, chosen: Tensor | None) -> RowPoint:
        """See `RowFunction`."""
        active = v if self.activation is None else self.activation.value(v)
        slope = None if self.activation is None else self.activation.slope(v, active)
        output = torch.nn.functional.linear(active, self.weight, self.bias)
        return _Point(self.goal.of(chosen), output, self.weight, slope_below=slope)


class AffineBefore:
    """`distance(f(W v + b))`: the layer above a post-activation v, as a `RowFunction`.

    Args:
        activation: f, or None for the identity.
        weight: W `(out, in)`.
        bias: b `(out,)`, or None.
        goal: the distance of an output to what it should be.
    """

    def __init__(self, activation: Activation | None, weight: Tensor, bias: Tensor | None, goal: Goal) -> None:
        self.activation, self.weight, self.bias, self.goal = activation, weight, bias, goal

    def __call__(self, v: Tensor, chosen: Tensor | None) -> RowPoint:
        """See `RowFunction`."""
        output = torch.nn.functional.linear(v, self.weight, self.bias)
        if self.activation is None:
            return _Point(self.goal.of(chosen), output, self.weight)
        active = self.activation.value(output)
        return _Point(self.goal.of(chosen), active, self.weight, slope_above=self.activation.slope(output, active))


class Goal:
    """How far an output is from what it should be, row by row.

    Args:
        target: `(N, ...)`.
        loss: the distance; its values, gradient and curvature.
        weight: > 0, factor on all of them.
    """

    def __init__(self, target: Tensor, loss: RowLoss, weight: float = 1.0) -> None:
        self.target, self.loss, self.weight = target, loss, weight

    def of(self, chosen: Tensor | None) -> Goal:
        """Return the goal of some rows."""
        return self if chosen is None else Goal(self.target[chosen], self.loss, self.weight)


class _Point:
    def __init__(
        self,
        goal: Goal,
        output: Tensor,
        weight: Tensor,
        *,
        slope_below: Tensor | None = None,
        slope_above: Tensor | None = None,
    ) -> None:
        self.goal, self.output, self.weight = goal, output, weight
        self.slope_below, self.slope_above = slope_below, slope_above
        self.values = goal.loss.values(output, goal.target) * goal.weight

    def gradient(self) -> Tensor:
        cotangent = self.goal.loss.gradient(self.output, self.goal.target) * self.goal.weight
        if self.slope_above is not None:
            cotangent = cotangent * self.slope_above
        gradient = cotangent @ self.weight
        return gradient if self.slope_below is None else gradient.mul_(self.slope_below)

    def curvature(self, direction: Tensor) -> Tensor:
        if self.slope_below is not None:
            direction = direction * self.slope_below
        image = direction @ self.weight.t()
        if self.slope_above is not None:
            image = image * self.slope_above
        return self.goal.loss.curvature(self.output, self.goal.target, image) * self.goal.weight


def _square_norm(values: Tensor) -> Tensor:
    return values.square().sum(1)
