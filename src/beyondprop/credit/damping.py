"""How strongly a hidden code is held where the forward pass put it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from beyondprop import _checks
from beyondprop.credit.code_problem import summed, tiny


@dataclass(frozen=True, slots=True)
class RelativeDamping:
    """Damping as a share of a stage's mean squared gain along the gradient: `share * sum_n |J g_n|^2 / sum_n |g_n|^2`.

    One number for the batch, which therefore no longer is the sum of its parts. Line search's step factors have the same
    proportions whatever the scale of the code, and none is more than `1 + 1 / share` times that of a sample with the mean gain.

    Args:
        share: > 0.

    Source: Marquardt, "An algorithm for least-squares estimation of nonlinear parameters", SIAM J. Appl. Math. 1963, which
    takes damping in the units of the curvature; here one number for all units of a code.
    """

    share: float

    def __post_init__(self) -> None:
        _checks.positive("share", self.share)

    def number(
        self,
        squared: Tensor,
        curvature: Tensor,
        weights: Tensor | None = None,
        group: dist.ProcessGroup | None = None,
    ) -> Tensor:
        """Return one code's damping, 0-d: nobody waits for the device.

        It is of `|g|^2`, `|J g|^2` and what the samples' gradients are multiplied by, each `(N,)`; `group` has the ranks that
        hold parts of the batch.
        """
        least = tiny(squared)
        if weights is not None:  # a ratio: only their proportions count, and the largest may be far below 1
            largest = weights.amax()
            if group is not None:
                dist.all_reduce(largest, dist.ReduceOp.MAX, group=group)
            shares = (weights / largest.clamp_min(least)).square_()
            squared, curvature = shares * squared, shares * curvature
        of_curvature, of_squared = curvature.sum(), squared.sum()
        if group is not None:
            of_curvature, of_squared = summed(torch.stack([of_curvature, of_squared]), group).unbind()
        return self.share * of_curvature / of_squared.clamp_min(least)


Damping = float | RelativeDamping

LAYER_DAMPING, BLOCK_DAMPING = 1.0, RelativeDamping(4.0)


def checked(damping: Damping | None) -> Damping | None:
    """Return `damping`, or raise `ValueError` if it is none."""
    if isinstance(damping, RelativeDamping | None):
        return damping
    try:
        return _checks.non_negative("damping", damping)
    except ValueError as error:
        raise ValueError(f"{error} A RelativeDamping and None are accepted, too.") from error
