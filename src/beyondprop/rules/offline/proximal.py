"""Closed-form minimisers of the block problems that methods with auxiliary variables split training into.

| problem | function | used by |
|---|---|---|
| `(a - f(u))^2 / 2 + w (u - b)^2 / 2`, f piecewise linear, entry by entry | `relu_prox`, `piecewise_prox` | BCD, ADMM |
| `loss(z, y) + w (z - b)^2 / 2`, entry by entry | `squared_prox`, `hinge_prox` | BCD, ADMM |
| `gamma |v - s|^2 + rho |t - W v|^2`, row by row | `FeatureProx` | BCD, ADMM |

Source: Lau, Zeng, Wu & Yao, ICLR workshop 2018, arXiv 1803.09082; Taylor et al., ICML 2016, arXiv 1605.02026, section 4.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from beyondprop import _checks


class Piece(NamedTuple):
    """One linear piece of an activation: `slope * u + intercept` for `low <= u <= high`."""

    low: float
    high: float
    slope: float
    intercept: float


Pieces = tuple[Piece, ...]

IDENTITY: Pieces = (Piece(-math.inf, math.inf, 1.0, 0.0),)
RELU: Pieces = (Piece(-math.inf, 0.0, 0.0, 0.0), Piece(0.0, math.inf, 1.0, 0.0))


def _clipped(low: float, high: float) -> Pieces:
    return (Piece(-math.inf, low, 0.0, low), Piece(low, high, 1.0, 0.0), Piece(high, math.inf, 0.0, high))


_PIECES: dict[type[nn.Module], Callable[[Any], Pieces]] = {
    nn.ReLU: lambda module: RELU,
    nn.LeakyReLU: lambda module: (Piece(-math.inf, 0.0, module.negative_slope, 0.0), RELU[1]),
    nn.Hardtanh: lambda module: _clipped(module.min_val, module.max_val),
    nn.ReLU6: lambda module: _clipped(0.0, 6.0),
    nn.Hardsigmoid: lambda module: (
        Piece(-math.inf, -3.0, 0.0, 0.0),
        Piece(-3.0, 3.0, 1 / 6, 0.5),
        Piece(3.0, math.inf, 0.0, 1.0),
    ),
}

PIECEWISE = tuple(kind.__name__ for kind in _PIECES)
"""Names of the activations that are piecewise linear."""


def pieces_of(activation: nn.Module | None) -> Pieces | None:
    """Return the linear pieces of an activation module, or None where it is not piecewise linear; None is the identity."""
    if activation is None:
        return IDENTITY
    factory = _PIECES.get(type(activation))
    return None if factory is None else factory(activation)


def relu_prox(a: Tensor, b: Tensor, weight: float) -> Tensor:
    """Return `argmin_u (a - relu(u))^2 / 2 + weight (u - b)^2 / 2`, entry by entry.

    Two branches: `(a + weight b) / (1 + weight)` where that is positive, `min(b, 0)`; the lower one is taken.

    Args:
        a: what the activation should be, any shape.
        b: where the pre-activation should stay, same shape.
        weight: > 0.

    Example:
        >>> relu_prox(torch.tensor([2.0, 2.0, -1.0]), torch.tensor([0.0, -3.0, 1.0]), 1.0)
        tensor([ 1., -3.,  0.])
    """
    _checks.positive("weight", weight)
    on = torch.add(a, b, alpha=weight).mul_(1 / (1 + weight)).clamp_min_(0)
    off = b.clamp_max(0)
    cost_on = (a - on).square_().add_((on - b).square_(), alpha=weight)
    cost_off = a.square().add_((off - b).square_(), alpha=weight)
    return torch.where(cost_on <= cost_off, on, off)


def piecewise_prox(a: Tensor, b: Tensor, weight: float, pieces: Sequence[Piece]) -> Tensor:
    """Return `argmin_u (a - f(u))^2 / 2 + weight (u - b)^2 / 2`, entry by entry, for a piecewise linear f.

    On each piece the minimum of a parabola, clamped to the piece; the lowest one is taken.

    Args:
        a: what the activation should be, any shape.
        b: where the pre-activation should stay, same shape.
        weight: > 0.
        pieces: of f, covering the line.

    Example:
        >>> piecewise_prox(torch.tensor([3.0]), torch.tensor([0.5]), 1.0, pieces_of(nn.Hardtanh(0, 1)))
        tensor([1.])
    """
    _checks.positive("weight", weight)
    if pieces == RELU:
        return relu_prox(a, b, weight)
    best = cost = None
    for low, high, slope, intercept in pieces:
        u = ((a - intercept) * slope + weight * b).div_(slope * slope + weight)
        if len(pieces) == 1:
            return u
        u.clamp_(low, high)
        own = (a - intercept - slope * u).square_().add_((u - b).square_(), alpha=weight)
        if best is None or cost is None:
            best, cost = u, own
        else:
            lower = own < cost
            best, cost = torch.where(lower, u, best), torch.where(lower, own, cost)
    assert best is not None
    return best


def squared_prox(target: Tensor, b: Tensor, weight: float) -> Tensor:
    """Return `argmin_z (z - target)^2 / 2 + weight (z - b)^2 / 2`, entry by entry.

    Example:
        >>> squared_prox(torch.tensor([1.0]), torch.tensor([0.0]), 3.0)
        tensor([0.2500])
    """
    _checks.positive("weight", weight)
    return torch.add(target, b, alpha=weight).div_(1 + weight)


def hinge_prox(target: Tensor, b: Tensor, weight: float) -> Tensor:
    """Return `argmin_z hinge(z, target) + weight (z - b)^2 / 2`, entry by entry.

    The hinge of Taylor et al., section 4.3: `max(1 - z, 0)` where the target is 1, `max(z, 0)` where it is 0.

    Args:
        target: 0 or 1, any shape.
        b: where z should stay, same shape.
        weight: > 0.

    Example:
        >>> hinge_prox(torch.tensor([1.0, 1.0, 0.0]), torch.tensor([-1.0, 0.9, 0.2]), 1.0)
        tensor([0., 1., 0.])
    """
    _checks.positive("weight", weight)
    up = torch.maximum(b, (b + 1 / weight).clamp_max_(1))
    down = torch.minimum(b, (b - 1 / weight).clamp_min_(0))
    return torch.where(target > 0.5, up, down)


class FeatureProx:
    """Minimises `gamma |v - s|^2 / 2 + rho |t - W v - b|^2 / 2` over the rows v of a layer's input.

    In delta form, `v = s + (t - b - W s) K` with `K = rho (rho W W^T + gamma I)^-1 W`: what is small against s is not lost in
    it, the matrix to invert is as large as the layer is wide at its output, and W, not W^T W, meets the rows. It is the
    published `(rho W^T W + gamma I)^-1 (rho W^T (t - b) + gamma s)`.

    Args:
        weight: W `(out, in)`.
        bias: b `(out,)`, or None.
        gamma: > 0, weight of staying at s.
        rho: > 0, weight of reaching t.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, *, gamma: float, rho: float) -> None:
        _checks.positive("gamma", gamma)
        _checks.positive("rho", rho)
        self.weight, self.bias = weight, bias
        wide = weight.double()
        matrix = (wide @ wide.t()).mul_(rho)
        matrix.diagonal().add_(gamma)
        self.gain = torch.cholesky_solve(wide, torch.linalg.cholesky(matrix)).mul_(rho).to(weight.dtype)

    def __call__(self, s: Tensor, target: Tensor) -> Tensor:
        """Return the minimiser `(N, in)` for `s` `(N, in)` and `target` `(N, out)`."""
        rest = torch.addmm(target, s, self.weight.t(), alpha=-1)
        if self.bias is not None:
            rest -= self.bias
        return torch.addmm(s, rest, self.gain)
