"""Probe directions: such that few of them determine every row of a Jacobian, and well."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from beyondprop.func.sensing.patterns import Pattern, Support

_DRAWS, _SWEEPS = 20, 100
_MOST_WORK = 4e8


def columns_of(probes: Tensor, columns: Tensor) -> Tensor:
    """Return the probes' entries at each row's columns: from `(k, n)` and `(r, s)` to `(r, k, s)`."""
    return probes[:, columns].permute(1, 0, 2)


def condition(probes: Tensor, pattern: Pattern) -> Tensor:
    """Return the condition number of every row's own system, `(m,)`: 1 where it is empty, Inf where the probes are too few."""
    found = torch.ones(pattern.shape[0], dtype=probes.dtype)
    for rows, columns, _ in pattern.supports:
        if columns.shape[1] > len(probes):
            found[rows] = math.inf
        else:
            values = torch.linalg.svdvals(columns_of(probes, columns))
            found[rows] = values[:, 0] / values[:, -1]
    return found


def general(count: int, inputs: int, generator: torch.Generator | None) -> Tensor:
    """Return Gaussian probes `(count, inputs)` whose columns have norm 1, as all of this module have."""
    generator = generator or torch.Generator().manual_seed(0)
    probes = torch.randn(count, inputs, dtype=torch.float64, generator=generator)
    return probes / probes.norm(dim=0)


def for_pattern(count: int, pattern: Pattern, generator: torch.Generator | None) -> Tensor:
    """Return probes `(count, n)` that determine the rows of a pattern with little noise.

    The best of 20 Gaussian draws (signs are singular on a few columns in a third of all cases), then descent on the sum of
    the variances of all entries (A-optimality): with one probe more than nonzeros a row, an entry's error is one and a half to
    two and a half times that of a probe of its own.

    Raises:
        ValueError: if there are fewer probes than nonzeros in a row.
    """
    if count < pattern.widest:
        raise ValueError(
            f"probes must be at least {pattern.widest}, the largest number of nonzeros in a row of the pattern, got {count}."
        )
    return _always(count, pattern).clone() if generator is None else _for_pattern(count, pattern, generator)


@lru_cache(maxsize=32)
def _always(count: int, pattern: Pattern) -> Tensor:
    return _for_pattern(count, pattern, torch.Generator().manual_seed(0))


def _for_pattern(count: int, pattern: Pattern, generator: torch.Generator) -> Tensor:
    supports = list(pattern.supports)
    draws = [general(count, pattern.shape[1], generator) for _ in range(_DRAWS)]
    if not supports:
        return draws[0]
    best = min(draws, key=lambda probes: float(condition(probes, pattern).max()))
    work = sum(columns.numel() * columns.shape[1] * count for _, columns, _ in supports)
    sweeps = int(min(_SWEEPS, _MOST_WORK / max(work, 1)))
    improved = _improved(best, supports, sweeps)
    return min((best, improved), key=lambda probes: float(condition(probes, pattern).max()))


def _improved(probes: Tensor, supports: list[Support], sweeps: int) -> Tensor:
    """Descend by Adam's steps, written out: torch's own takes a second to load where nobody has trained yet."""
    free = probes.clone().requires_grad_()
    first, second = torch.zeros_like(probes), torch.zeros_like(probes)
    for sweep in range(1, sweeps + 1):
        with torch.enable_grad():
            unit = free / free.norm(dim=0)
            variance = unit.new_zeros(())
            for _, columns, _ in supports:
                own = columns_of(unit, columns)
                inverse, info = torch.linalg.inv_ex(own.mT @ own)
                if bool(info.any()):
                    return probes
                variance = variance + inverse.diagonal(dim1=-2, dim2=-1).sum()
            (gradient,) = torch.autograd.grad(variance, free)
        first.lerp_(gradient, 0.1)
        second.lerp_(gradient.square(), 0.001)
        size = (second / (1 - 0.999**sweep)).sqrt_().add_(1e-8)
        free.data.sub_(0.05 * (first / (1 - 0.9**sweep)) / size)
    found = free.detach()
    found = found / found.norm(dim=0)
    return found if bool(found.isfinite().all()) else probes


def signs(batch: int, count: int, inputs: int, generator: torch.Generator | None) -> Tensor:
    """Return probes of random signs, `(batch, count, inputs)`, orthogonal within a sample where there are two or more."""
    drawn = torch.randint(0, 2, (batch, count, inputs), generator=generator).to(torch.float64) * 2 - 1
    if count == 1:
        return drawn
    blocks = []
    for low in range(0, count, inputs):  # at most `inputs` directions are orthogonal
        basis, triangle = torch.linalg.qr(drawn[:, low : low + inputs].mT)
        # Signs as Gram-Schmidt has them: the first direction stays as it was drawn.
        sides = torch.where(triangle.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0)
        blocks.append((basis * sides[:, None]).mT * math.sqrt(inputs))
    return torch.cat(blocks, dim=1)
