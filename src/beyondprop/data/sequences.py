"""Made sequences that need long memory."""

from __future__ import annotations

import torch
from torch import Tensor

from beyondprop import _checks

ADDING_CHANCE = 1 / 6
"""Mean squared error of always answering 1, the mean, in the adding problem."""


def adding(rows: int, steps: int = 100, *, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """Draw the adding problem: `(rows, steps, 2)` numbers in [0, 1) with marks, and `(rows, 1)` sums of the two marked ones.

    One mark is in the first half, one in the second, of 2 steps or more; a net that answers 1 throughout has the mean
    squared error 1/6. Numbers come from `generator`, by default from torch's global one.

    Source: Hochreiter & Schmidhuber, "Long Short-Term Memory", Neural Computation 9, 1997, with the marks of Le, Jaitly &
    Hinton 2015, arXiv 1504.00941.
    """
    _checks.at_least("rows", rows, 1)
    _checks.at_least("steps", steps, 2)
    x = torch.zeros(rows, steps, 2)
    x[..., 0] = torch.rand(rows, steps, generator=generator)
    half = steps // 2
    early = torch.randint(half, (rows,), generator=generator)
    late = torch.randint(half, steps, (rows,), generator=generator)
    each = torch.arange(rows)
    x[each, early, 1] = 1.0
    x[each, late, 1] = 1.0
    return x, (x[..., 0] * x[..., 1]).sum(1, keepdim=True)
