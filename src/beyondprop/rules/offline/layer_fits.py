"""One layer's fit to given inputs and targets, full batch: steps that never raise its loss.

Both take the layer's Gram matrix of inputs as a bound on the curvature, so that one factorisation serves every step and every
unit: a step along `gradient (X^T X)^-1` with the loss's bound as divisor majorises the loss.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from beyondprop import _checks
from beyondprop.nn.activations import Activation
from beyondprop.rules.offline.layers import Weights, value_of, with_slope
from beyondprop.rules.offline.least_squares import LeastSquares, mean_square
from beyondprop.rules.offline.row_losses import RowLoss

Chunks = Callable[[], Iterable[tuple[Tensor, Tensor]]]
"""Yields inputs `(M, in)` and targets `(M, ...)` of all rows, chunk by chunk; called once a pass."""

_LENGTHS = ((1.0,), (0.5, 0.25, 0.125), (0.5**4, 0.5**5, 0.5**6, 0.5**7))  # most units are done after the first pass


def fit_output(
    chunks: Chunks, weight: Tensor, bias: Tensor | None, loss: RowLoss, *, steps: int, damping: float
) -> Weights:
    """Return weight and bias after majorising steps on the sum of `loss(W x + b, t)` over the rows.

    For the squared loss a step is the solution; for cross-entropy it is that of Böhning ("Multinomial logistic regression
    algorithm", 1992), whose Hessian bound is I / 2 times the inputs' Gram matrix. The loss's bound must be > 0.

    `weight` `(out, in)` and `bias` `(out,)` are the old ones. `damping` > 0 is a share of the Gram matrix's mean diagonal, on
    the distance to them; where all inputs are 0, they stay. steps >= 1.

    Raises:
        LinAlgError: if the inputs' moments are not finite, or too close to singular for the damping.
    """
    _checks.at_least("steps", steps, 1)
    factor = _factor(chunks, weight, bias, damping)
    for _ in range(steps):
        direction = _direction(chunks, weight, bias, factor, loss.gradient)
        weight, bias = _moved(weight, bias, direction / loss.bound, 1.0)
    return weight, bias


def fit_units(
    chunks: Chunks, weight: Tensor, bias: Tensor | None, activation: Activation | None, *, steps: int, damping: float
) -> Weights:
    """Return weight and bias after steps on `|t - f(W x + b)|^2 / 2` summed over the rows, every unit for itself.

    A step goes along the Gauss-Newton gradient; a unit whose loss would rise halves its step until it does not. Without
    `activation` f is the identity; the other arguments and what is raised are as for `fit_output`.
    """
    _checks.at_least("steps", steps, 1)
    factor = _factor(chunks, weight, bias, damping)
    before = weight.new_zeros(len(weight), dtype=torch.float64)

    def cotangent(z: Tensor, targets: Tensor) -> Tensor:
        active, slope = with_slope(activation, z)
        rest = active - targets
        before.add_(rest.square().sum(0))
        return rest if slope is None else rest * slope

    for _ in range(steps):
        before.zero_()
        direction = _direction(chunks, weight, bias, factor, cotangent)
        lengths = _lengths(chunks, (weight, bias), activation, direction, before)
        weight, bias = _moved(weight, bias, direction, lengths.to(weight.dtype).unsqueeze(1))
    return weight, bias


def _lengths(
    chunks: Chunks, weights: Weights, activation: Activation | None, direction: Tensor, before: Tensor
) -> Tensor:
    """Return for every unit the longest of 1, 1/2, 1/4, ... and 0 at which its loss is not above `before`."""
    weight, bias = weights
    lengths, left = torch.zeros_like(before), torch.ones_like(before, dtype=torch.bool)
    for group in _LENGTHS:
        units = left.nonzero().squeeze(1)
        losses = before.new_zeros(len(group), len(units))
        own_weight, own_bias = weight[units], None if bias is None else bias[units]
        way = direction[units].to(weight.dtype)
        for inputs, targets in chunks():
            z = F.linear(inputs, own_weight, own_bias)
            image = inputs @ way[:, : inputs.shape[1]].t()
            if bias is not None:
                image += way[:, -1]
            wanted = targets[:, units]
            for row, length in enumerate(group):
                moved = torch.sub(z, image, alpha=length)
                losses[row] += (value_of(activation, moved) - wanted).square_().sum(0)
        good = losses <= before[units]
        for row in range(len(group) - 1, -1, -1):  # the longest that is good is written last
            lengths[units[good[row]]] = group[row]
        left[units] = ~good.any(0)
        if not bool(left.any()):
            break
    return lengths


def _factor(chunks: Chunks, weight: Tensor, bias: Tensor | None, damping: float) -> Tensor:
    """Return the Cholesky factor of the inputs' damped Gram matrix, a column of ones among them where there is a bias."""
    _checks.positive("damping", damping)
    moments = LeastSquares(weight.shape[1], 1, weight.device)
    for inputs, _ in chunks():
        moments.add_inputs(inputs)
    gram = moments.input_gram(bias=bias is not None)
    gram.diagonal().add_(damping * mean_square(gram))
    return torch.linalg.cholesky(gram)


def _direction(
    chunks: Chunks, weight: Tensor, bias: Tensor | None, factor: Tensor, cotangent: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """Return `gradient (X^T X)^-1` in float64 for `cotangent(W x + b, t)`, that of the bias in the last column."""
    gradient = torch.zeros(len(weight), len(factor), dtype=torch.float64, device=weight.device)
    for inputs, targets in chunks():
        given = cotangent(F.linear(inputs, weight, bias), targets)
        gradient[:, : inputs.shape[1]] += given.t() @ inputs
        if bias is not None:
            gradient[:, -1] += given.sum(0)
    return torch.cholesky_solve(gradient.t(), factor).t()


def _moved(weight: Tensor, bias: Tensor | None, direction: Tensor, lengths: Tensor | float) -> Weights:
    step = direction.to(weight.dtype) * lengths
    if bias is None:
        return weight - step, None
    return weight - step[:, :-1], bias - step[:, -1]
