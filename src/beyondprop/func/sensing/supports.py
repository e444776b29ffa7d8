"""The columns on which each row of a Jacobian depends, from directional derivatives at several points.

The values differ from point to point and the support does not, so the evidence for a column is summed over the points: about
three probes more than a row has nonzeros are enough for each of 16 points or more, where a single point needs 2.2 s ln(n / s).
"""

from __future__ import annotations

import torch
from torch import Tensor

from beyondprop._checks import at_least, non_negative
from beyondprop.func.sensing._greedy import CHUNK, Selection

_LEVEL = 1e-4  # the chance of one false column in a row
_DOUBT = 1e-6  # the chance that a row is called unexplained for its noise alone
_SILENT = 1e-9  # a row below this share of the largest one may be nothing but rounding
_EXPLAINED = 0.3  # the residual's share of a row of unknown noise above which its support is not believed
_CURVED = 1e-3  # the same, of a row that need not be linear to its noise


def shared_supports(
    probes: Tensor, differences: Tensor, *, sparsity: int | None = None, noise: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Return the support of every row, and which rows it does not explain.

    Args:
        probes: `(B, k, n)`, of a continuous distribution, drawn for each sample by itself.
        differences: `(B, k, m)`: `probes[b] @ J[b].T` and noise.
        sparsity: the most columns of a row; None: one less than there are probes.
        noise: standard deviation of a difference; 0: there is none, or it is unknown.

    Returns:
        `(m, n)` bool, and `(m,)` bool, True where the residual is beyond the noise: the row has more nonzeros than k probes can
        tell, the function is not linear at the probes' size, or there are too few samples. Unknown noise may be up to 0.3 of a
        row, known noise of any size. A row below 1e-9 of the largest may be rounding and is not called unexplained.

    Raises:
        ValueError: shapes that do not belong together, fewer than 2 probes, values that are not finite.
    """
    _check(probes, differences)
    non_negative("noise", noise)
    samples, k, n = probes.shape
    bound = min(k - 1, n) if sparsity is None else min(at_least("sparsity", sparsity, 1), k - 1, n)
    energy = differences.square().sum((0, 1))
    pattern = torch.zeros(len(energy), n, dtype=torch.bool, device=probes.device)
    unexplained = torch.zeros_like(pattern[:, 0])
    awake = energy.nonzero().squeeze(1)
    for rows in awake.split(max(1, CHUNK // (samples * max(n, k * bound)))) if len(awake) else ():
        # No noise for the choice of columns: the residual knows it better than an estimate.
        found = Selection(probes, differences[..., rows].permute(0, 2, 1), bound).forward().back(_LEVEL)
        pattern[rows] = found.mask()
        unexplained[rows] = _unexplained(found, noise)
    return pattern, unexplained & (energy > energy.amax() * _SILENT**2)


def _unexplained(found: Selection, noise: float) -> Tensor:
    size = found.energy / (found.samples * found.k)
    if not noise:
        return found.rest > found.degrees * _EXPLAINED**2 * size
    from scipy import special  # loaded where it is needed, as all of SciPy

    limit = torch.as_tensor(special.chdtri(found.degrees.cpu().double().numpy(), _DOUBT), device=size.device)
    # An estimate of the noise may be a third too small.
    return found.rest > 1.8 * limit * noise**2 + found.degrees * _CURVED**2 * size


def _check(probes: Tensor, differences: Tensor) -> None:
    if probes.ndim != 3 or differences.ndim != 3 or probes.shape[:2] != differences.shape[:2]:
        raise ValueError(
            f"probes must be (B, k, n) and differences (B, k, m) of the same B and k, got {tuple(probes.shape)} and "
            f"{tuple(differences.shape)}."
        )
    if probes.shape[0] < 1 or probes.shape[1] < 2 or probes.shape[2] < 1 or differences.shape[2] < 1:
        raise ValueError(
            f"One sample, 2 probes for it, one input and one output are the least, got B = {probes.shape[0]}, "
            f"k = {probes.shape[1]}, n = {probes.shape[2]}, m = {differences.shape[2]}."
        )
    if not bool(probes.isfinite().all() and differences.isfinite().all()):
        raise ValueError("probes and differences must be finite: leave out the calls that returned NaN or infinity.")
