"""Closed-form minimisers of the block problems that BCD and ADMM split training into.

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


def _clipped(low: float, high: float, slope: float = 1.0, intercept: float = 0.0) -> Pieces:
    least, most = slope * low + intercept, slope * high + intercept
    return (Piece(-math.inf, low, 0.0, least), Piece(low, high, slope, intercept), Piece(high, math.inf, 0.0, most))


_PIECES: dict[type[nn.Module], Callable[[Any], Pieces]] = {
    nn.ReLU: lambda module: RELU,
    nn.LeakyReLU: lambda module: (Piece(-math.inf, 0.0, module.negative_slope, 0.0), RELU[1]),
    nn.Hardtanh: lambda module: _clipped(module.min_val, module.max_val),
    nn.ReLU6: lambda module: _clipped(0.0, 6.0),
    nn.Hardsigmoid: lambda module: _clipped(-3.0, 3.0, 1 / 6, 0.5),
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

    On each piece, which together cover the line, the minimum of a parabola, clamped to the piece; the lowest one is taken.

    Example:
        >>> piecewise_prox(torch.tensor([3.0]), torch.tensor([0.5]), 1.0, pieces_of(nn.Hardtanh(0, 1)))
        tensor([1.])
    """
    _checks.positive("weight", weight)
    if pieces == RELU:
        return relu_prox(a, b, weight)
    found = []
    for low, high, slope, intercept in pieces:
        u = ((a - intercept) * slope + weight * b).div_(slope * slope + weight)
        if len(pieces) == 1:
            return u
        u.clamp_(low, high)
        own = (a - intercept - slope * u).square_().add_((u - b).square_(), alpha=weight)
        found.append((u, own))
    best, cost = found[0]
    for u, own in found[1:]:
        lower = own < cost
        best, cost = torch.where(lower, u, best), torch.where(lower, own, cost)
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

    Example:
        >>> hinge_prox(torch.tensor([1.0, 1.0, 0.0]), torch.tensor([-1.0, 0.9, 0.2]), 1.0)
        tensor([0., 1., 0.])
    """
    _checks.positive("weight", weight)
    up = torch.maximum(b, (b + 1 / weight).clamp_max_(1))
    down = torch.minimum(b, (b - 1 / weight).clamp_min_(0))
    return torch.where(target > 0.5, up, down)


def feature_prox(
    weight: Tensor, bias: Tensor | None, *, gamma: float, rho: float
) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the map of s `(N, in)`, t `(N, out)` to v `(N, in)`: `argmin_v gamma |v - s|^2 / 2 + rho |t - W v - b|^2 / 2`.

    In delta form, `v = s + (t - b - W s) K` with `K = rho (rho W W^T + gamma I)^-1 W`: what is small against s is not lost in
    it, the matrix to invert is as large as the layer is wide at its output, and W, not W^T W, meets the rows. It is the
    published `(rho W^T W + gamma I)^-1 (rho W^T (t - b) + gamma s)`. `weight` is W `(out, in)`, `bias` b `(out,)` or None.
    """
    _checks.positive("gamma", gamma)
    _checks.positive("rho", rho)
    wide = weight.double()
    matrix = (wide @ wide.t()).mul_(rho)
    matrix.diagonal().add_(gamma)
    gain = torch.cholesky_solve(wide, torch.linalg.cholesky(matrix)).mul_(rho).to(weight.dtype)

    def solve(s: Tensor, target: Tensor) -> Tensor:
        rest = torch.addmm(target, s, weight.t(), alpha=-1)
        if bias is not None:
            rest -= bias
        return torch.addmm(s, rest, gain)

    return solve
