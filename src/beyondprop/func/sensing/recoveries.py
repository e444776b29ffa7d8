"""Jacobians from what probes have shown, by the methods that need no system of their own."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from beyondprop.func.sensing.least_squares import check_moved
from beyondprop.func.sensing.linearised import Dense, Linearised, Probed, Sparse
from beyondprop.func.sensing.patterns import Pattern
from beyondprop.func.sensing.robust import least_absolute
from beyondprop.func.sensing.sparse_rows import recover_rows

_MOST_RESTARTED, _STARTS = 64, 40


class Seen(NamedTuple):
    """What probes have shown of a batch.

    Attributes:
        probes: the directions that were taken, in units of the inputs' scales, `(B, k, n)`.
        differences: directional derivatives along them, `(B, k, m)`.
        missing: which of them are not known, `(B, k)`; None: all are.
        magnitude: size of the outputs in units of a derivative, `(m,)`: what rounding takes its share of.
        moved: by how much each input was moved by the one probe that moves it, `(B, n)`, `probes` being those that were
            meant; None: several move it.
    """

    probes: Tensor
    differences: Tensor
    missing: Tensor | None
    magnitude: Tensor
    moved: Tensor | None = None


def unscaled(jacobians: Linearised, unit: Tensor) -> Linearised:
    """Return Jacobians of the inputs from those of inputs in units of their scales."""
    if isinstance(jacobians, Sparse):
        return Sparse(jacobians.pattern, jacobians.values / unit[:, jacobians.columns])
    if isinstance(jacobians, Probed):
        return Probed(jacobians.probes / unit[:, None], jacobians.differences, jacobians.weights)
    return Dense(jacobians.dense() / unit[:, None])


def by_color(seen: Seen, colors: Tensor, pattern: Pattern) -> Tensor:
    """Return the values of a pattern, `(B, nnz)`: each is the change of its output along the probe of its input's colour.

    Raises:
        ValueError: if a probe has no result, or did not move an input.
    """
    color = colors[pattern.columns]
    if seen.missing is not None and bool(seen.missing.any()):
        sample, probe = torch.nonzero(seen.missing)[0].tolist()
        raise ValueError(
            f"Probe {probe} of sample {sample} has no result, and colouring needs every one: allow retries, or take "
            "method='regression' with more probes."
        )
    assert seen.moved is not None
    moved = seen.moved[:, pattern.columns]
    check_moved(moved)
    return seen.differences[:, color, pattern.rows] / moved


def entry_by_entry(seen: Seen, pattern: Pattern | None) -> Linearised:
    """Return Jacobians along probes that move one input each, the entries outside a pattern 0.

    Raises:
        ValueError: if a probe has no result, or did not move its input.
    """
    if seen.missing is not None and bool(seen.missing.any()):
        sample, probe = torch.nonzero(seen.missing)[0].tolist()
        raise ValueError(
            f"Input {probe} of sample {sample} has no result, and dense differencing needs every one: allow retries."
        )
    moved = seen.moved
    assert moved is not None
    check_moved(moved)
    matrices = (seen.differences / moved[..., None]).mT
    return Dense(matrices) if pattern is None else Sparse(pattern, matrices[:, pattern.rows, pattern.columns])


def mean_of_probes(seen: Seen) -> Probed:
    """Return the unbiased estimate from random directions; those without a result are left out."""
    kept = torch.ones(seen.probes.shape[:2], dtype=torch.float64)
    if seen.missing is not None:
        kept = (~seen.missing).to(torch.float64)
    differences = seen.differences.masked_fill(kept[..., None] == 0, 0.0)
    weights = kept / kept.sum(1, keepdim=True).clamp(min=1.0)
    # By how far each input was moved: all alike where nothing cuts the probes short.
    moved = torch.einsum("bkn,bk->bn", seen.probes.square(), weights).clamp(min=1e-300)
    return Probed(seen.probes / moved[:, None], differences, weights)


def row_by_row(seen: Seen, blur: float, sparsity: int | None) -> Dense:
    """Return sparse rows whose supports are not known, from derivatives with an error of standard deviation `blur`.

    Raises:
        ValueError: if a probe has no result.
    """
    if seen.missing is not None and bool(seen.missing.any()):
        raise ValueError("method='l1' needs the result of every probe; allow retries.")
    batch, count, outputs = seen.differences.shape
    shared = seen.probes[:1]
    if float((seen.probes - shared).abs().max()) < 1e-3:
        flat = seen.differences.mT.reshape(-1, count)
        found = recover_rows(shared[0], flat, noise=blur, sparsity=sparsity).view(batch, outputs, -1)
    else:
        each = zip(seen.probes, seen.differences, strict=True)
        found = torch.stack([recover_rows(p, d.mT, noise=blur, sparsity=sparsity) for p, d in each])
    if sparsity is not None:
        full = torch.nonzero((found != 0).sum(2) > sparsity)
        for sample, row in full[:_MOST_RESTARTED].tolist():
            found[sample, row] = _restarted(seen.probes[sample], seen.differences[sample, :, row], sparsity)
    return Dense(found)


def _restarted(probes: Tensor, values: Tensor, sparsity: int) -> Tensor:
    """Return a row of at most so many nonzeros, greedily from each of the columns that fit best alone; the best of these."""
    norms = probes.norm(dim=0).clamp(min=1e-300)
    fitting = ((values @ probes) / norms).abs()
    support = fitting.topk(min(_STARTS, len(norms))).indices[:, None]  # (starts, 1)
    for size in range(1, sparsity + 1):
        systems = probes[:, support].permute(1, 0, 2)
        solution = torch.linalg.lstsq(systems, values.expand(len(support), -1)[..., None]).solution
        left = values - (systems @ solution)[..., 0]
        if size == sparsity:
            best = int(left.norm(dim=1).argmin())
            return torch.zeros_like(norms).index_copy(0, support[best], solution[best, :, 0])
        fitting = ((left @ probes) / norms).abs().scatter(1, support, 0.0)
        support = torch.cat([support, fitting.argmax(1, keepdim=True)], 1)
    raise AssertionError("sparsity is at least 1")


def decoded(seen: Seen, pattern: Pattern) -> Sparse:
    """Return the rows of a pattern by the least sum of absolute misfits, which some wrong derivatives leave alone.

    Raises:
        ValueError: if a probe has no result.
    """
    if seen.missing is not None and bool(seen.missing.any()):
        raise ValueError("method='rainbow' needs the result of every probe; allow retries, or take 'robust'.")
    parts = []
    for rows, columns, _ in pattern.supports:
        systems = seen.probes[:, :, columns].permute(0, 2, 1, 3)
        parts.append(least_absolute(systems, seen.differences[:, :, rows].mT))
    return Sparse(pattern, joined(parts, pattern, len(seen.differences)))


def joined(parts: list[Tensor], pattern: Pattern, batch: int) -> Tensor:
    """Return the values of a pattern, `(B, nnz)`, from those of its supports, `(B, r, s)` each."""
    values = torch.zeros(batch, pattern.nnz, dtype=torch.float64)
    for (_, _, places), part in zip(pattern.supports, parts, strict=True):
        values[:, places.flatten()] = part.flatten(1)
    return values
