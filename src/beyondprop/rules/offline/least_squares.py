"""Least squares over many rows from their second moments: rows pass once, in chunks; the small system is solved in float64."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from beyondprop import _checks
from beyondprop.rules.offline.layers import Weights

_BLOCK = 384  # columns: blocks below the diagonal of a symmetric product are not computed twice
_LEAST = 1e-30  # far below what any inputs that are not all 0 give


class LeastSquares:
    """Sums over rows of what least squares needs: inputs and targets, their products with the inputs, and how many rows.

    Products of a chunk are taken in the rows' own precision, sums over chunks in float64. `inputs` and `outputs` are the widths
    of inputs and targets.

    Example:
        >>> x, w = torch.randn(50, 3), torch.randn(2, 3)
        >>> moments = LeastSquares(3, 2)
        >>> for rows in (slice(0, 20), slice(20, 50)):
        ...     moments.add(x[rows], x[rows] @ w.t() + 1)
        >>> weight, bias = moments.solve(0.0)
        >>> torch.testing.assert_close(weight.float(), w)
    """

    def __init__(self, inputs: int, outputs: int, device: torch.device | str = "cpu") -> None:
        self.gram = torch.zeros(inputs, inputs, dtype=torch.float64, device=device)
        self.cross = torch.zeros(outputs, inputs, dtype=torch.float64, device=device)
        self.input_sum = torch.zeros(inputs, dtype=torch.float64, device=device)
        self.target_sum = torch.zeros(outputs, dtype=torch.float64, device=device)
        self.rows = 0

    def add(self, inputs: Tensor, targets: Tensor) -> None:
        """Add rows: inputs `(M, in)`, targets `(M, out)`."""
        self.add_inputs(inputs)
        self.target_sum += targets.sum(0)
        self.cross += targets.t() @ inputs

    def add_inputs(self, inputs: Tensor) -> None:
        """Add the rows' inputs `(M, in)` alone, for their Gram matrix."""
        self.rows += len(inputs)
        self.input_sum += inputs.sum(0)
        for first in range(0, inputs.shape[1], _BLOCK):
            last = first + _BLOCK
            product = inputs[:, first:].t() @ inputs[:, first:last]
            self.gram[first:, first:last] += product
            if last < inputs.shape[1]:
                self.gram[first:last, last:] += product[_BLOCK:].t()

    def solve(self, damping: float, *, bias: bool = True) -> Weights:
        """Return weight and bias of the least-squares fit, `(out, in)` and `(out,)` in float64.

        `damping` >= 0 is a ridge on weights and bias as a share of the moments' mean diagonal; 0 is the pseudo-inverse,
        singular values of the inputs below 1e-6 of the largest taken for 0. Inputs that are all 0 get weights of 0.

        Raises:
            LinAlgError: if the moments are not finite.
        """
        _checks.non_negative("damping", damping)
        gram, cross = self._augmented(bias)
        if damping == 0.0:
            return _split(cross @ torch.linalg.pinv(gram, rtol=1e-12, hermitian=True), bias)
        gram.diagonal().add_(damping * mean_square(gram))
        return _split(_solve(gram, cross), bias)

    def proximal(self, weight: Tensor, bias: Tensor | None, *, alpha: float, rho: float = 1.0) -> Weights:
        """Return weight and bias of `rho |t - W x - b|^2 / 2 + alpha |(W, b) - old|^2 / 2`, in float64.

        The objective without the second term does not rise either, whatever alpha is. `weight` `(out, in)` and `bias` `(out,)`
        are the old ones.

        Raises:
            ValueError: if alpha or rho is not above 0.
            LinAlgError: if the moments are not finite.
        """
        old = weight.double() if bias is None else torch.cat([weight, bias.unsqueeze(1)], 1).double()
        gram, cross = self._augmented(bias is not None)
        return _split(_near(old, gram, cross - old @ gram, alpha, rho), bias is not None)

    def proximal_in_turn(self, weight: Tensor, bias: Tensor | None, *, alpha: float, rho: float = 1.0) -> Weights:
        """Return what `proximal` does with the weight first, at the old bias, and then the bias: two blocks, as published."""
        old = weight.double()
        rest = self.cross - old @ self.gram
        if bias is not None:
            rest -= torch.outer(bias.double(), self.input_sum)
        new = _near(old, self.gram.clone(), rest, alpha, rho)
        if bias is None:
            return new, None
        rest = self.target_sum - new @ self.input_sum
        return new, (rest.mul_(rho) + alpha * bias.double()) / (rho * self.rows + alpha)

    def input_gram(self, *, bias: bool) -> Tensor:
        """Return the sum of `x x^T` over the rows, for a layer with a bias with a last entry of one in every x."""
        if not bias:
            return self.gram.clone()
        column = self.input_sum.unsqueeze(1)
        corner = torch.full((1, 1), float(self.rows), dtype=column.dtype, device=column.device)
        return torch.cat([torch.cat([self.gram, column], 1), torch.cat([column.t(), corner], 1)])

    def _augmented(self, bias: bool) -> tuple[Tensor, Tensor]:
        cross = torch.cat([self.cross, self.target_sum.unsqueeze(1)], 1) if bias else self.cross
        return self.input_gram(bias=bias), cross


def mean_square(gram: Tensor) -> float:
    """Return the inputs' mean second moment, summed over the rows: what shares of damping are of.

    Where all inputs are 0 it is a tiny number, so that the share of it is a damping and weights stay or vanish.

    Raises:
        LinAlgError: if it is not finite.
    """
    value = float(gram.diagonal().mean())
    if not math.isfinite(value):
        raise torch.linalg.LinAlgError("The inputs' second moments are not finite.")  # pyright: ignore[reportPrivateImportUsage]
    return max(value, _LEAST)  # a share of 0 would damp nothing


def _solve(gram: Tensor, right: Tensor) -> Tensor:
    """Return `right gram^-1` for a symmetric positive definite matrix."""
    return torch.cholesky_solve(right.t(), torch.linalg.cholesky(gram)).t()


def _near(old: Tensor, gram: Tensor, rest: Tensor, alpha: float, rho: float) -> Tensor:
    """Return `old + rho rest (rho gram + alpha I)^-1`: `rest` is what old leaves to fit. Overwrites gram and rest."""
    _checks.positive("alpha", alpha)
    _checks.positive("rho", rho)
    gram.mul_(rho).diagonal().add_(alpha)
    return old + _solve(gram, rest.mul_(rho))


def _split(solved: Tensor, bias: bool) -> Weights:
    return (solved[:, :-1], solved[:, -1]) if bias else (solved, None)
