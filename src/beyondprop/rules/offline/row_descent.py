"""Gradient steps on every row's own problem at once, each with its own step length, none of which goes uphill."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from beyondprop.nn.activations import Activation
from beyondprop.rules.offline.layers import rows, value_of, with_slope
from beyondprop.rules.offline.row_losses import ROW_LOSSES, RowLoss

_HALVINGS = 5  # of a step that goes uphill, before its row stays where it is


class Goal(NamedTuple):
    """How far an output is from what it should be, row by row: `loss` against `target` `(N, ...)`, times `weight`."""

    target: Tensor
    loss: RowLoss
    weight: float = 1.0

    def of(self, chosen: Tensor | slice) -> Goal:
        """Return the goal of some rows."""
        return self._replace(target=self.target[chosen])


class CodeMap(NamedTuple):
    """One layer as the map `g(W f(v) + b)` from its code v to the code above; None is the identity.

    A code that is a pre-activation has the nonlinearity f `before` the map, a post-activation has g `after` it.
    """

    weight: Tensor
    bias: Tensor | None
    before: Activation | None = None
    after: Activation | None = None

    def __call__(self, v: Tensor) -> Tensor:
        """Return the map's values for rows v `(N, in)`."""
        return value_of(self.after, F.linear(value_of(self.before, v), self.weight, self.bias))

    def point(self, v: Tensor, goal: Goal) -> RowPoint:
        """Return the map's distance to its goal at rows v."""
        active, below = with_slope(self.before, v)
        output, above = with_slope(self.after, F.linear(active, self.weight, self.bias))
        return RowPoint(goal, output, self.weight, below, above)


class RowPoint(NamedTuple):
    """A distance of rows at one place; `below` and `above` are the slopes there on both sides of W, None for 1."""

    goal: Goal
    output: Tensor
    weight: Tensor
    below: Tensor | None
    above: Tensor | None

    def values(self) -> Tensor:
        """Return the distances, `(N,)`."""
        return self.goal.loss.values(self.output, self.goal.target) * self.goal.weight

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


def descend(start: Tensor, above: CodeMap, goal: Goal, center: Tensor, mu: float, steps: int) -> Tensor:
    """Return rows v at which `distance(above(v), goal) + mu |v - center|^2 / 2` is at most what it is at `start`, row by row.

    Every step goes along the row's gradient, as far as the quadratic model says (exact for a quadratic, and for a piecewise
    linear network while no unit flips); a step that would go uphill is halved until it does not. `start` `(N, width)` is not
    changed; steps >= 1.
    """
    v, point = start, above.point(start, goal)
    total = point.values() + 0.5 * mu * (v - center).square().sum(1)
    for _ in range(steps):
        gradient = point.gradient().add_(v - center, alpha=mu)
        squared = gradient.square().sum(1)
        curvature = point.curvature(gradient) + mu * squared
        length = squared / curvature.clamp_min(torch.finfo(v.dtype).tiny)
        moved = torch.addcmul(v, gradient, length.unsqueeze(1), value=-1.0)
        point = above.point(moved, goal)
        reached = point.values() + 0.5 * mu * (moved - center).square().sum(1)
        uphill = (reached <= total).logical_not_().nonzero().squeeze(1)  # nan counts as uphill
        if len(uphill):
            for halving in range(1, _HALVINGS + 1):
                trial = v[uphill] - gradient[uphill] * (0.5**halving * length[uphill]).unsqueeze(1)
                values = above.point(trial, goal.of(uphill)).values()
                values += 0.5 * mu * (trial - center[uphill]).square().sum(1)
                good = values <= total[uphill]
                moved[uphill[good]], reached[uphill[good]] = trial[good], values[good]
                uphill = uphill[~good]
                if not len(uphill):
                    break
            moved[uphill], reached[uphill] = v[uphill], total[uphill]
            point = above.point(moved, goal)
        v, total = moved, reached
    return v


def move_codes(
    old: Sequence[Tensor], maps: Sequence[CodeMap], features: Tensor, goal: Goal, mu: float, steps: int
) -> list[Tensor]:
    """Return codes `(N, width)` after `steps` on each one's own problem, last code first, each with the moved code above.

    A code is held to what its map gives for the code below by `mu / 2` times their squared distance, and so is the map above
    to the code above; the last map has `goal`. `maps` are those of all layers, the first of `features` `(N, in)`.
    """
    moved = [torch.empty_like(code) for code in old]
    for part in rows(len(features)):
        for index in range(len(old) - 1, -1, -1):  # the code below is still the old one
            is_last = index == len(old) - 1
            own = goal.of(part) if is_last else Goal(moved[index + 1][part], ROW_LOSSES["squared"], mu)
            center = maps[index](old[index - 1][part] if index else features[part])
            moved[index][part] = descend(old[index][part], maps[index + 1], own, center, mu, steps)
    return moved


def penalty_energy(codes: Sequence[Tensor], maps: Sequence[CodeMap], features: Tensor, goal: Goal, mu: float) -> Tensor:
    """Return the objective of `move_codes`, mean over the rows, 0-d in float64."""
    total = torch.zeros((), dtype=torch.float64, device=features.device)
    for part in rows(len(features)):
        for given, code, code_map in zip([features, *codes], [*codes, None], maps, strict=True):
            output = code_map(given[part])
            if code is None:
                total += goal.loss.values(output, goal.target[part]).double().sum()
            else:
                total += 0.5 * mu * (code[part] - output).double().square().sum()
    return total / len(features)
