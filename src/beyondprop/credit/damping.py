"""How strongly a hidden code is held where the forward pass put it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from beyondprop import _checks
from beyondprop.stages.stage import Stage


@dataclass(frozen=True, slots=True)
class RelativeDamping:
    """Damping as a share of a stage's mean squared gain along the gradient: `share * sum_n |J g_n|^2 / sum_n |g_n|^2`.

    One number for the batch, which therefore no longer is the sum of its parts. Line search's step factors have the same
    proportions whatever the scale of the code, and none is more than `1 + 1 / share` times that of a sample with the mean gain.

    Args:
        share: > 0.

    Raises:
        ValueError: if the share is no finite number > 0.

    Source: Marquardt, "An algorithm for least-squares estimation of nonlinear parameters", SIAM J. Appl. Math. 1963, which
    takes damping in the units of the curvature; here one number for all units of a code.
    """

    share: float

    def __post_init__(self) -> None:
        _checks.positive("share", self.share)


Damping = float | RelativeDamping

LAYER_DAMPING, BLOCK_DAMPING = 1.0, RelativeDamping(4.0)


def default(stage: Stage) -> Damping:
    """Return the damping of a code below `stage` where none is given: as published below a layer, relative below a block."""
    return BLOCK_DAMPING if stage.is_block else LAYER_DAMPING


def checked(damping: Damping | None) -> Damping | None:
    """Return `damping`, or raise `ValueError` if it is none."""
    if damping is None or isinstance(damping, RelativeDamping):
        return damping
    try:
        return _checks.non_negative("damping", damping)
    except ValueError as error:
        raise ValueError(f"{error} A RelativeDamping and None are accepted, too.") from error


def resolved(damping: Damping, squared: Tensor, curvature: Tensor, weights: Tensor | None = None) -> float | Tensor:
    """Return a damping as a number; a relative one as a 0-d tensor, for which nobody waits on a device.

    Args:
        damping: of one code.
        squared: `|g|^2`, `(N,)`.
        curvature: `|J g|^2`, `(N,)`.
        weights: what the samples' gradients are multiplied by, `(N,)`.
    """
    if not isinstance(damping, RelativeDamping):
        return damping
    least = torch.finfo(squared.dtype).tiny
    if weights is not None:  # a ratio: only their proportions count, and the largest may be far below 1
        shares = (weights / weights.amax().clamp_min(least)).square_()
        squared, curvature = shares * squared, shares * curvature
    return damping.share * curvature.sum() / squared.sum().clamp_min(least)
