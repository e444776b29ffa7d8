"""Rows of a Jacobian with few nonzeros in unknown places, from fewer directional derivatives than there are inputs.

The problem of basis pursuit and the LASSO. Two solvers find the sparse row more often than least l1 norm does, and without
its bias: greedy columns, of which those without significance are dropped again, and for rows that these do not explain sparse
Bayesian learning (Tipping, J. Machine Learning Research 1, 2001). Both end in least squares on the support.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from beyondprop._checks import at_least, non_negative
from beyondprop.func.sensing._greedy import CHUNK, Selection

_LEVEL = 1e-2  # the chance of one false column in a row: one costs no more than the noise
_DOUBT = 1e-3  # the chance that a row is looked at again although its support was right
_EXPLAINED = 1e-2  # the residual's share of a row of unknown noise above which its support is not believed
_SLIGHT = 1e-3  # the noise's share of a row below which it is left to the residuals
_TINY = 1e-300

# Expectation-maximisation, over-relaxed, while the noise falls to the one announced.
_STEPS = 70
_RELAX = 1.7  # the power of an EM factor; 2.5 diverges
_COOLING = 0.3
_LEAST = 1e-6  # the variance of the noise, in units of the values', below which nothing is gained
_TRIED = 32  # rows of a second round that must show that it helps
_HELPED = 0.05


def default_probes(n: int, sparsity: int) -> int:
    """Return how many probes find rows of `sparsity` nonzeros among n nearly always: 2.2 s ln(n / s), between s + 2 and n.

    Raises:
        ValueError: numbers below 1, or more nonzeros than columns.
    """
    if not 1 <= sparsity <= n:
        raise ValueError(f"sparsity must be between 1 and n = {n}, the number of columns, got {sparsity!r}.")
    return min(n, max(sparsity + 2, math.ceil(2.2 * sparsity * math.log(n / sparsity))))


def recover_rows(probes: Tensor, differences: Tensor, *, noise: float = 0.0, sparsity: int | None = None) -> Tensor:
    """Return the sparse z `(R, n)` of `differences = z @ probes.T + noise`.

    Args:
        probes: `(k, n)`, from a continuous distribution or of random signs.
        differences: `(R, k)`, each row of any scale.
        noise: standard deviation of one difference; below 1e-3 of a row it is not used: there may be curvature, too.
        sparsity: the most nonzeros of a row; None: one more than half as many as probes, or all where k > n.

    Returns:
        Rows exact to rounding without noise, and as least squares on their supports with it. One that is not sparse enough
        has the most likely values, shrunk: better than nothing, and not exact.

    Raises:
        ValueError: shapes that do not belong together, values that are not finite.
    """
    if probes.ndim != 2 or differences.ndim != 2 or probes.shape[0] != differences.shape[1]:
        raise ValueError(
            "probes must be (k, n) and differences (R, k) of the same k, got "
            f"{tuple(probes.shape)} and {tuple(differences.shape)}."
        )
    if not bool(probes.isfinite().all() and differences.isfinite().all()):
        raise ValueError("probes and differences must be finite: leave out the calls that returned NaN or infinity.")
    non_negative("noise", noise)
    if sparsity is not None:
        at_least("sparsity", sparsity, 1)
    k, n = probes.shape
    lengths = probes.square().mean(0).sqrt()
    lengths = torch.where(lengths > 0, lengths, 1.0)
    probes = probes / lengths
    if sparsity is None:
        sparsity = n if n < k else k // 2 + 1  # more cannot be told apart
    bound = min(k - 1, n, sparsity)
    if bound < 1:
        return differences.new_zeros(len(differences), n)
    found = differences.new_zeros(len(differences), n)
    # What little noise was announced need not be all: curvature is more of it. Then the residuals know better.
    loud = noise > _SLIGHT * differences.square().mean(-1).sqrt()
    for rows, spread in ((loud.nonzero().squeeze(1), noise), ((~loud).nonzero().squeeze(1), 0.0)):
        for some in rows.split(max(1, CHUNK // max(n, k * bound))) if len(rows) else ():
            found[some] = _recovered(probes, differences[some], spread, bound)
    return found / lengths


def _recovered(probes: Tensor, differences: Tensor, noise: float, bound: int) -> Tensor:
    first = Selection(probes[None], differences[None], bound).forward(noise).back(_LEVEL, noise)
    found = first.solve()[0]
    doubtful = _doubtful(first, noise).nonzero().squeeze(1)
    if not len(doubtful):
        return found
    score = _score(first, noise)
    few = doubtful[:: max(1, len(doubtful) // _TRIED)]
    others = doubtful[~torch.isin(doubtful, few)]
    for rows in (few, *others.split(max(1, CHUNK // probes.numel()))):
        mean = _most_likely(probes, differences[rows], noise)
        places = mean.abs().topk(bound, dim=-1).indices
        second = Selection(probes[None], differences[rows][None], bound).fill(places).back(_LEVEL, noise)
        better = _score(second, noise) < score[rows]
        found[rows[better]] = second.solve()[0][better]
        helped = ~_doubtful(second, noise)
        found[rows[~helped]] = mean[~helped]
        if float(helped.double().mean()) < _HELPED:
            break
    return found


def _doubtful(selection: Selection, noise: float) -> Tensor:
    """Which rows have a residual beyond their noise."""
    if not noise:
        return selection.rest / selection.degrees > _EXPLAINED**2 * selection.energy / selection.k
    from scipy import special  # loaded where it is needed, as all of SciPy

    degrees = selection.degrees.cpu().double().numpy()
    limit = torch.as_tensor(special.chdtri(degrees, _DOUBT), device=selection.rest.device)
    return selection.rest > noise**2 * limit + selection.floor


def _score(selection: Selection, noise: float) -> Tensor:
    """The information criterion of a support: the less the better. One column of n costs 2 ln n (Foster & George 1994)."""
    rest = selection.rest + selection.floor
    fit = rest / noise**2 if noise else selection.k * (rest / selection.degrees).log()
    return fit + 2 * math.log(selection.n) * selection.taken.sum(-1)


def _most_likely(probes: Tensor, values: Tensor, noise: float) -> Tensor:
    """Return the mean of z `(R, n)` where every unknown has a prior variance of its own, at the most likely variances."""
    scale = values.square().mean(-1, keepdim=True).sqrt().clamp_min(_TINY)
    values = (values / scale).unsqueeze(-1)
    floor = (noise / scale).square().clamp_min(_LEAST).unsqueeze(-1)
    heat, eye = torch.ones_like(floor), torch.eye(len(probes)).to(probes)
    variances = values.new_ones(len(values), probes.shape[1])
    mean = variances
    for _ in range(_STEPS):
        heat = torch.maximum(floor, heat * _COOLING)
        weighed = probes.mT * variances.unsqueeze(-1)  # (R, n, k)
        factor, _ = torch.linalg.cholesky_ex(probes @ weighed + heat * eye)
        gain = weighed @ torch.cholesky_inverse(factor)
        mean = (gain @ values).squeeze(-1)
        left = (1 - (gain * probes.mT).sum(-1)).clamp_min(0)
        variances = variances * ((mean.square() + variances * left) / variances.clamp_min(_TINY)) ** _RELAX
    return mean * scale
