"""How strongly a hidden code is held where the forward pass put it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from beyondprop import _checks
from beyondprop.stage import Stage


@dataclass(frozen=True, slots=True)
class RelativeDamping:
    """Damping as a share of a stage's mean squared gain along the gradient: `share * sum_n |J g_n|^2 / sum_n |g_n|^2`.

    Over a batch, line search's step factors then have the same proportions whatever the scale of the code, and no sample's
    is more than `1 + 1 / share` times the factor of a sample with the mean gain.

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

OF_LAYER, OF_BLOCK = 1.0, RelativeDamping(4.0)


def default(stage: Stage) -> Damping:
    """Return the damping of a code below `stage` where none is given: as published below a layer, relative below a block."""
    return OF_BLOCK if stage.is_block else OF_LAYER


def checked(damping: Damping | None) -> Damping | None:
    """Return `damping`, or raise `ValueError` if it is a number that is not >= 0."""
    if damping is None or isinstance(damping, RelativeDamping):
        return damping
    return _checks.non_negative("damping", damping)


def resolved(damping: Damping, squared: Tensor, curvature: Tensor) -> float | Tensor:
    """Return a damping as a number; a relative one as a 0-d tensor, for which nobody waits on a device.

    Args:
        damping: of one code.
        squared: `|g|^2`, `(N,)`.
        curvature: `|J g|^2`, `(N,)`.
    """
    if not isinstance(damping, RelativeDamping):
        return damping
    return damping.share * curvature.sum() / squared.sum().clamp_min(torch.finfo(squared.dtype).tiny)
