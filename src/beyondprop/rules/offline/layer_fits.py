"""One layer's fit to given inputs and targets, full batch: steps that never raise its loss.

Both take the layer's Gram matrix of inputs as a bound on the curvature, so that one factorisation serves every step and every
unit: a step along `gradient (X^T X)^-1` with the loss's bound as divisor majorises the loss.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from beyondprop import _checks
from beyondprop.nn.activations import Activation
from beyondprop.rules.offline.least_squares import LeastSquares, add_ridge
from beyondprop.rules.offline.row_losses import RowLoss

Chunks = Callable[[], Iterable[tuple[Tensor, Tensor]]]
"""Yields inputs `(M, in)` and targets `(M, ...)` of all rows, chunk by chunk; called once a pass."""

_HALVINGS = 8


def fit_output(
    chunks: Chunks, weight: Tensor, bias: Tensor | None, loss: RowLoss, *, steps: int, damping: float
) -> tuple[Tensor, Tensor | None]:
    """Return weight and bias after majorising steps on the sum of `loss(W x + b, t)` over the rows.

    For the squared loss a step is the solution; for cross-entropy it is that of Böhning ("Multinomial logistic regression
    algorithm", 1992), whose Hessian bound is I / 2 times the inputs' Gram matrix.

    Args:
        chunks: the rows.
        weight: old W `(out, in)`.
        bias: old b `(out,)`, or None.
        loss: the loss; its bound on the curvature must be > 0.
        steps: >= 1.
        damping: > 0, as a share of the Gram matrix's mean diagonal, on the distance to the old weights; where all inputs
            are 0, the weights stay.

    Raises:
        ValueError: if an argument is out of its range; the message has the range.
        LinAlgError: if the inputs' moments are not finite, or too close to singular for the damping.
    """
    _checks.at_least("steps", steps, 1)
    inverse = _InverseGram(chunks, weight, bias is not None, damping)
    for _ in range(steps):
        gradient = inverse.zeros()
        for inputs, targets in chunks():
            output = torch.nn.functional.linear(inputs, weight, bias)
            inverse.collect(gradient, loss.gradient(output, targets), inputs)
        weight, bias = _moved(weight, bias, inverse.solve(gradient) / loss.bound, 1.0)
    return weight, bias


def fit_units(
    chunks: Chunks, weight: Tensor, bias: Tensor | None, activation: Activation | None, *, steps: int, damping: float
) -> tuple[Tensor, Tensor | None]:
    """Return weight and bias after steps on `|t - f(W x + b)|^2 / 2` summed over the rows, every unit for itself.

    A step goes along the Gauss-Newton gradient through the inverse of the inputs' Gram matrix, which bounds every unit's own;
    a unit whose loss would rise halves its step until it does not. Without `activation` f is the identity; the other
    arguments and what is raised are as for `fit_output`.
    """
    _checks.at_least("steps", steps, 1)
    inverse = _InverseGram(chunks, weight, bias is not None, damping)
    for _ in range(steps):
        gradient, before = inverse.zeros(), weight.new_zeros(len(weight), dtype=torch.float64)
        for inputs, targets in chunks():
            z = torch.nn.functional.linear(inputs, weight, bias)
            active = z if activation is None else activation.value(z)
            rest = active - targets
            before += rest.square().sum(0)
            cotangent = rest if activation is None else rest * activation.slope(z, active)
            inverse.collect(gradient, cotangent, inputs)
        direction = inverse.solve(gradient)
        lengths = _lengths(chunks, weight, bias, activation, direction, before)
        weight, bias = _moved(weight, bias, direction, lengths.to(weight.dtype).unsqueeze(1))
    return weight, bias


def _lengths(
    chunks: Chunks,
    weight: Tensor,
    bias: Tensor | None,
    activation: Activation | None,
    direction: Tensor,
    before: Tensor,
) -> Tensor:
    """Return for every unit the longest of 1, 1/2, 1/4, ... and 0 at which its loss is not above `before`."""
    tried = [0.5**k for k in range(_HALVINGS)]
    lengths, left = torch.zeros_like(before), torch.ones_like(before, dtype=torch.bool)
    for group in (tried[:1], tried[1:4], tried[4:]):  # most units are done after the first pass
        units = left.nonzero().squeeze(1)
        losses = before.new_zeros(len(group), len(units))
        own_weight, own_bias = weight[units], None if bias is None else bias[units]
        way = direction[units].to(weight.dtype)
        for inputs, targets in chunks():
            z = torch.nn.functional.linear(inputs, own_weight, own_bias)
            image = inputs @ way[:, : inputs.shape[1]].t()
            if bias is not None:
                image += way[:, -1]
            wanted = targets[:, units]
            for row, length in enumerate(group):
                moved = torch.sub(z, image, alpha=length)
                active = moved if activation is None else activation.value(moved)
                losses[row] += (active - wanted).square_().sum(0)
        good = losses <= before[units]
        for row in range(len(group) - 1, -1, -1):  # the longest that is good is written last
            lengths[units[good[row]]] = group[row]
        left[units] = ~good.any(0)
        if not bool(left.any()):
            break
    return lengths


class _InverseGram:
    """The damped Gram matrix of a layer's inputs, a column of ones among them where there is a bias, factorised once."""

    def __init__(self, chunks: Chunks, weight: Tensor, bias: bool, damping: float) -> None:
        _checks.positive("damping", damping)
        self.bias, self.shape = bias, (weight.shape[0], weight.shape[1] + bias)
        self.device = weight.device
        moments = LeastSquares(weight.shape[1], 1, weight.device)
        for inputs, _ in chunks():
            moments.add_inputs(inputs)
        gram = moments.input_gram(bias=bias)
        add_ridge(gram, damping)
        self.factor = torch.linalg.cholesky(gram)

    def zeros(self) -> Tensor:
        return torch.zeros(self.shape, dtype=torch.float64, device=self.device)

    def collect(self, gradient: Tensor, cotangent: Tensor, inputs: Tensor) -> None:
        gradient[:, : inputs.shape[1]] += cotangent.t() @ inputs
        if self.bias:
            gradient[:, -1] += cotangent.sum(0)

    def solve(self, gradient: Tensor) -> Tensor:
        return torch.cholesky_solve(gradient.t(), self.factor).t()


def _moved(
    weight: Tensor, bias: Tensor | None, direction: Tensor, lengths: Tensor | float
) -> tuple[Tensor, Tensor | None]:
    step = direction.to(weight.dtype) * lengths
    if bias is None:
        return weight - step, None
    return weight - step[:, :-1], bias - step[:, -1]
