"""Affine projection: a layer's virtual targets met exactly, by the smaller of two linear systems.

For rows X `(N, in)` of a layer's inputs and D `(N, out)` of what its outputs should lose, the ridge problem

    min_V  |X V^T - D|^2 + damping |V|^2

is solved by either side of the push-through identity

    V = D^T X (X^T X + damping I)^-1 = [(X X^T + damping I)^-1 D]^T X

As damping goes to 0, V is the least change of the weights that meets all targets, where they can be met. With one row this is
normalised LMS (Nagumo & Noda 1967), with several the affine projection algorithm (Ozeki & Umeda 1984), applied to the layers
of a network as consequentialism (Paeedeh & Ghiasi-Shirazi, Neurocomputing 2021, arXiv 2003.05164). All functions take a leading
batch dimension: the groups of a convolution. A bias is one more column of ones in X; it is eliminated by hand, since a matrix
of 1001 columns is multiplied half as fast as one of 1000. Half precision is widened to float32, in which results are given.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_BLOCK = 256  # narrower blocks of a Gram matrix are no longer multiplied at full speed


class RowMoments(NamedTuple):
    """X^T X of a layer's inputs in parts.

    Attributes:
        inner: of the inputs themselves, `(groups, n, n)`, or its diagonal `(groups, n)` where the rest is zero. For
            solving, its upper triangle is enough.
        sums: their sums `(groups, n)`.
        rows: how many there are, 0-d.
    """

    inner: Tensor
    sums: Tensor
    rows: Tensor

    def __add__(self, other: RowMoments) -> RowMoments:  # type: ignore[override]
        return RowMoments(*(a + b for a, b in zip(self, other, strict=True)))

    def scaled(self, factor: float) -> RowMoments:
        """Return all parts times `factor`."""
        return RowMoments(*(part * factor for part in self))

    def mean_square(self) -> Tensor:
        """Return the mean squared length of a row, `(groups,)`."""
        diagonal = self.inner if self.inner.ndim == 2 else self.inner.diagonal(dim1=-2, dim2=-1)
        return diagonal.sum(-1) / self.rows


def moments(rows: Tensor, *, mirror: bool = True) -> RowMoments:
    """Return the moments of rows `(groups, N, n)`; `mirror` as for `gram`."""
    rows = widened(rows)
    return RowMoments(gram(rows, mirror=mirror), rows.sum(-2), rows.new_tensor(float(rows.shape[-2])))


def gram(rows: Tensor, *, mirror: bool = True) -> Tensor:
    """Return `rows^T rows`, `(n, n)` or `(groups, n, n)`, multiplying the upper triangle of blocks only.

    Args:
        rows: `(N, n)` or `(groups, N, n)`.
        mirror: whether to fill the lower triangle, too.
    """
    size = rows.shape[-1]
    if size < 2 * _BLOCK:
        return rows.mT @ rows
    out = rows.new_zeros(*rows.shape[:-2], size, size)
    count = min(4, size // _BLOCK)
    edges = [round(size * i / count) for i in range(count + 1)]
    for x, c in zip(rows.unbind(), out.unbind(), strict=True) if rows.ndim == 3 else [(rows, out)]:
        for i in range(count):
            own, below = slice(edges[i], edges[i + 1]), slice(edges[i + 1], size)
            torch.mm(x[:, own].mT, x[:, edges[i] :], out=c[own, edges[i] :])
            if mirror:
                c[below, own] = c[own, below].mT
    return out


def widened(values: Tensor) -> Tensor:
    """Return values in float32 at least: float16 ends at 65504, and nothing factorises half precision."""
    return values if values.dtype.itemsize > 2 else values.float()


def joined(weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return weights `(groups, out, n)` with a bias `(groups, out)`, where there is one, as the last column."""
    return weight if bias is None else torch.cat([weight, bias.unsqueeze(-1)], -1)


def parted(whole: Tensor, bias: bool) -> tuple[Tensor, Tensor | None]:
    """Undo `joined`."""
    return (whole[..., :-1], whole[..., -1]) if bias else (whole, None)


def solve_primal(
    weight: Tensor, bias: Tensor | None, moments: RowMoments, damping: Tensor | float
) -> tuple[Tensor, Tensor | None]:
    """Return `gradient (X^T X + damping I)^-1`, as parts for weight and bias.

    Args:
        weight: gradient `(groups, out, n)`.
        bias: gradient `(groups, out)`; None: X has no column of ones.
        moments: X^T X.
        damping: >= 0, a number or `(groups,)`; at 0 the pseudo-inverse is used.

    Raises:
        torch.linalg.LinAlgError: if the moments are not finite.
    """
    inner, sums, rows = map(widened, moments)
    weight, bias = widened(weight), None if bias is None else widened(bias)
    damping = torch.as_tensor(damping, dtype=inner.dtype, device=inner.device).expand(inner.shape[0])
    damped = bool((damping > 0).all())
    if len(inner) > 1 and not damped:
        parts = [
            solve_primal(weight[g], None if bias is None else bias[g], RowMoments(inner[g], sums[g], rows), damping[g])
            for g in (slice(group, group + 1) for group in range(len(inner)))
        ]
        return parted(torch.cat([joined(*part) for part in parts]), bias is not None)
    if bias is None:
        return _solve(inner.clone(), weight.mT, damping).mT, None
    if not damped:
        # Elimination would leave the bias out of the least change.
        joint = torch.cat([inner, sums.unsqueeze(-2)], -2)
        ones = torch.cat([sums, rows.expand(len(sums), 1)], -1)
        return parted(_pseudo_solve(joined(joint, ones), joined(weight, bias).mT).mT, True)
    # Schur complement of the column of ones.
    border = (rows + damping).view(-1, 1, 1)
    share = (sums.unsqueeze(-2) / border).neg_()
    weight = torch.baddbmm(weight, bias.unsqueeze(-1), share)
    new = _solve(torch.baddbmm(inner, sums.unsqueeze(-1), share), weight.mT, damping).mT
    return new, (bias - (new @ sums.unsqueeze(-1)).squeeze(-1)) / border.squeeze(-1)


def solve_dual(
    rows: Tensor, deltas: Tensor, damping: Tensor | float, *, bias: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Return `[(X X^T + damping I)^-1 deltas]^T X`, as parts for weight and bias.

    Args:
        rows: X `(groups, N, n)`, without a column of ones.
        deltas: `(groups, N, out)`.
        damping: >= 0, a number or `(groups,)`; at 0 the pseudo-inverse is used.
        bias: whether X has a column of ones besides.

    Raises:
        torch.linalg.LinAlgError: if the rows are not finite.
    """
    rows, deltas = widened(rows), widened(deltas)
    damping = torch.as_tensor(damping, dtype=rows.dtype, device=rows.device).expand(rows.shape[0])
    amended = _solve(gram(rows.mT, mirror=False).add_(float(bias)), deltas, damping)
    return amended.mT @ rows, amended.sum(-2) if bias else None


def _solve(matrix: Tensor, right: Tensor, damping: Tensor) -> Tensor:
    """Solve `(matrix + damping I) x = right` for positive semi-definite matrices `(groups, n, n)`.

    Reads the upper triangle only, and writes over `matrix`.
    """
    if bool((damping > 0).all()):
        matrix.diagonal(dim1=-2, dim2=-1).add_(damping.unsqueeze(-1))
        for dtype in {matrix.dtype: None, torch.float64: None}:
            # float32 rounds the smallest eigenvalues below 0 where damping is under 1e-6 of the largest; float64 does not.
            factor, failed = torch.linalg.cholesky_ex(matrix.mT.to(dtype))
            if bool(failed.any()):
                continue
            if right.shape[-1] >= right.shape[-2]:  # many right sides: the inverse and a product are faster
                return (right.mT.to(dtype) @ torch.cholesky_inverse(factor)).mT.to(right.dtype)
            return torch.cholesky_solve(right.to(dtype), factor).to(right.dtype)
    elif len(matrix) > 1:
        parts = zip(matrix.split(1), right.split(1), damping.split(1), strict=True)
        return torch.cat([_solve(*part) for part in parts])
    return _pseudo_solve(matrix, right)


def _pseudo_solve(matrix: Tensor, right: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix.to(torch.float64), UPLO="U")
    # A Gram matrix squares its rows' condition number: what lies below the rounding of its own entries is zero.
    tiny = values[..., -1:].clamp_min(0) * matrix.shape[-1] * torch.finfo(matrix.dtype).eps
    inverse = torch.where(values > tiny, 1 / values.clamp_min(torch.finfo(torch.float64).tiny), 0.0)
    return (vectors @ (inverse.unsqueeze(-1) * (vectors.mT @ right.to(torch.float64)))).to(right.dtype)
