"""Every row of a Jacobian from its own nonzeros, by least squares along the probes."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from beyondprop.func.sensing.designs import columns_of
from beyondprop.func.sensing.linearised import Sparse
from beyondprop.func.sensing.patterns import Pattern

_CHUNK = 4_000_000
_CLOSE, _EXACT = 0.05, 1e-9


class Rows:
    """The least-squares fits of all rows of a pattern, for probes `(k, n)` that all samples share.

    Attributes:
        condition: the worst condition number of a row's system.
    """

    def __init__(self, pattern: Pattern, probes: Tensor) -> None:
        self.pattern, self.probes = pattern, probes
        own = [columns_of(probes, columns) for _, columns, _ in pattern.supports]
        self.inverses = [torch.linalg.pinv(each).mT.contiguous() for each in own]
        values = [torch.linalg.svdvals(each) for each in own]
        self.condition = max((float((v[:, 0] / v[:, -1]).max()) for v in values), default=1.0)

    def solve(self, differences: Tensor) -> Sparse:
        """Return the Jacobians for directional derivatives `(B, k, m)` along the shared probes."""
        values = differences.new_empty(len(differences), self.pattern.nnz)
        by_row = differences.permute(2, 0, 1)
        for (rows, _, places), inverse in zip(self.pattern.supports, self.inverses, strict=True):
            values[:, places.flatten()] = torch.bmm(by_row[rows], inverse).transpose(0, 1).flatten(1)
        return Sparse(self.pattern, values)

    def fit(self, differences: Tensor, probes: Tensor, missing: Tensor | None = None) -> Sparse:
        """Return the Jacobians for the probes `(B, k, n)` that were used, which may differ from those that were meant.

        Rounding of `x + h d` in float32 changes them a little: a correction of the shared solution serves. Where bounds cut
        them short, or calls are missing, `(B, k)` or of single outputs `(B, k, m)`, every sample has systems of its own.

        Raises:
            ValueError: if the calls that are left do not determine a row.
        """
        if missing is not None and bool(missing.any()):
            return each_sample(self.pattern, differences, probes, missing)
        rate = float((probes - self.probes).abs().max()) * self.condition
        if rate > _CLOSE:
            check_moved(probes[(self.probes != 0).expand_as(probes)])
            return each_sample(self.pattern, differences, probes)
        found, error = self.solve(differences), rate
        while error > _EXACT:  # each correction leaves this share of the error before it
            found.values += self.solve(differences - found.along(probes)).values
            error *= rate
        return found


def check_moved(moved: Tensor) -> None:
    """Raise `ValueError` where an input was not moved that should have been."""
    if bool((moved == 0).any()):
        raise ValueError(
            "A probe does not move an input at all: its step is below rounding. Give a larger step or x_scale."
        )


def each_sample(pattern: Pattern, differences: Tensor, probes: Tensor, missing: Tensor | None = None) -> Sparse:
    """Return the Jacobians for probes `(B, k, n)` of each sample's own, along which `(B, k, m)` was seen.

    Args:
        pattern: which entries may be nonzero.
        differences: the directional derivatives.
        probes: the directions.
        missing: which are not known, `(B, k)` or `(B, k, m)`.

    Raises:
        ValueError: if the probes that are left do not determine a row.
    """
    batch, count = probes.shape[:2]
    gone = torch.zeros(1, 1, 1, dtype=torch.bool) if missing is None else missing.reshape(batch, count, -1)
    gone = gone.expand(differences.shape)
    differences = differences.masked_fill(gone, 0.0)
    values = differences.new_zeros(batch, pattern.nnz)
    for rows, columns, places in pattern.supports:
        step = max(1, _CHUNK // (count * columns.numel()))
        for low in range(0, batch, step):
            part = slice(low, low + step)
            here = gone[part][:, :, rows].mT
            system = probes[part][:, :, columns].permute(0, 2, 1, 3).masked_fill(here[..., None], 0.0)
            found = _solved(system, differences[part][:, :, rows].mT)
            bad = torch.nonzero(~found.isfinite().all(-1))
            if len(bad):
                sample, row = bad[0].tolist()
                left = count - int(here[sample, row].sum())
                raise ValueError(
                    f"{left} usable probes do not determine output {int(rows[row])} of sample {low + sample}, which has "
                    f"{columns.shape[1]} nonzeros: ask for more probes, allow retries, or widen the bounds."
                )
            values[part, places.flatten()] = found.flatten(1)
    return Sparse(pattern, values)


def _solved(systems: Tensor, values: Tensor) -> Tensor:
    """Return the least-squares solutions of `(..., k, s)` and `(..., k)`, `(..., s)`: Inf where a system is singular."""
    if systems.shape[-2] < systems.shape[-1]:
        return torch.full((*systems.shape[:-2], systems.shape[-1]), math.inf, dtype=values.dtype, device=values.device)
    basis, triangle = torch.linalg.qr(systems)
    diagonal = triangle.diagonal(dim1=-2, dim2=-1).abs()
    singular = diagonal.amin(-1) <= 1e-10 * diagonal.amax(-1).clamp(min=1e-300)
    triangle = torch.where(singular[..., None, None], torch.eye(triangle.shape[-1], dtype=triangle.dtype), triangle)
    found = torch.linalg.solve_triangular(triangle, basis.mT @ values[..., None], upper=True)[..., 0]
    return found.masked_fill(singular[..., None], math.inf)
