"""Jacobian rows from calls of which some returned garbage: decoding with the l1 norm.

The least sum of absolute residuals has the right solution although a share of the measurements is arbitrary (Candes & Tao,
"Decoding by linear programming", IEEE Trans. IT 51, 2005). It is found for all rows at once by iteratively reweighted least
squares (Daubechies, DeVore, Fornasier & Gunturk 2010). A call that went wrong is wrong for most outputs together, so that the
median of a call's residuals speaks against it, too: `decode` weighs an entry by the worse of the two. What is left over is then
told by the scale of the residuals, and the rest solved by plain least squares.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from beyondprop._checks import non_negative

_STEPS = 48
_FIRST, _DECAY = 10.0, 0.6  # the smoothing of the absolute value, in units of a row's scale, and how it shrinks
_EXCHANGES = 5  # for each value and unknown, after which rounding is what is left
_HUGE = 1e100  # from here on a value is missing, as infinity is: its square is not a number
_MET = 1e-12  # a residual below this share of a row's scale is rounding
_POWER = 1.5  # of `decode`: below the l1 norm, which finds more once the smoothing starts from a wide one
_SCALES = 5.0
_QUANTILE = 0.25  # of the residuals that are not met exactly: up to three quarters of them may be wrong
_CLEANINGS = 4
_CHUNK = 2**23  # numbers in the largest temporaries: 64 MB in float64

Support = tuple[Tensor, Tensor]


def least_absolute(systems: Tensor, values: Tensor) -> Tensor:
    """Return the z of least `|systems z - values|_1`.

    Args:
        systems: `(..., q, s)`, q >= s.
        values: `(..., q)`; entries that are NaN, infinite or beyond 1e100 are missing.

    Returns:
        `(..., s)`: a solution of the linear program, at which s values are met exactly.

    Raises:
        ValueError: shapes that do not belong together, fewer finite values than unknowns.
    """
    if systems.ndim < 2 or values.shape != systems.shape[:-1]:
        raise ValueError(
            f"systems must be (..., q, s) and values (..., q), got {tuple(systems.shape)} and {tuple(values.shape)}."
        )
    shape, (q, s) = systems.shape[:-2], systems.shape[-2:]
    if not s or not values.numel():
        return systems.new_zeros(*shape, s)
    systems, values = systems.reshape(-1, 1, q, s), values.reshape(-1, 1, q)
    valid = values.abs() < _HUGE
    values = values.where(valid, values.new_zeros(()))
    least = int(valid.sum(-1).min())
    if least < s:
        raise ValueError(f"{least} of {q} values are finite, {s} unknowns need {s} or more: add probes.")
    scale = _scale(values, valid)
    values = values / scale
    near = _reweighted([systems], [values], [valid], power=1.0, by_call=False)[0]
    sizes = _residuals(systems, values, near).masked_fill(~valid, torch.inf)
    parts = (systems * valid.unsqueeze(-1), values, sizes, near)
    solution = _exchanged(*(part.squeeze(1) for part in parts))
    return (solution.unsqueeze(1) * scale).reshape(*shape, s)


def _exchanged(systems: Tensor, values: Tensor, sizes: Tensor, near: Tensor) -> Tensor:
    """Go from the values that are nearly met to those that the l1 solution meets, one exchange after the other.

    The simplex method in the form of Barrodale & Roberts 1973, for all problems `(P, q, s)` at once.
    """
    q, s = systems.shape[1:]
    solution, met = near.clone(), _nearest(systems, sizes)
    active = torch.arange(len(values), device=values.device)
    for _ in range(_EXCHANGES * (q + s)):
        a, y, base = systems[active], values[active], met[active]
        inverse, failed = torch.linalg.inv_ex(a.gather(1, base.unsqueeze(-1).expand(-1, -1, s)))
        now = (inverse @ y.gather(1, base).unsqueeze(-1)).squeeze(-1)
        fine = (failed == 0) & now.isfinite().all(-1)
        active, a, y, base, inverse, now = (part[fine] for part in (active, a, y, base, inverse, now))
        solution[active] = now
        rest = (y - (a @ now.unsqueeze(-1)).squeeze(-1)).scatter(1, base, 0.0)
        rest = rest.masked_fill(rest.abs() < _MET, 0.0)
        price = ((rest.sign().unsqueeze(1) @ a) @ inverse).squeeze(1)
        place = price.abs().argmax(-1, keepdim=True)
        leaving = price.gather(1, place)
        direction = inverse.gather(2, place.unsqueeze(1).expand(-1, s, 1)) * leaving.sign().unsqueeze(1)
        speed = (a @ direction).squeeze(-1).scatter(1, base, 0.0)
        # The slope along the way: up by twice its speed at each value that is passed, by once at those just met.
        start = 1 - leaving.abs() + (speed.abs() * (rest == 0)).sum(-1, keepdim=True)
        when = torch.where(rest * speed > 0, rest / speed, torch.inf)
        order = when.argsort(-1)
        slope = start + (2 * speed.abs()).gather(1, order).cumsum(-1)
        stop = (slope >= 0).to(torch.uint8).argmax(-1, keepdim=True)
        going = start.squeeze(1) < -1e-9
        active = active[going]
        if not len(active):
            break
        met[active] = base.scatter(1, place, order.gather(1, stop))[going]
    return solution


def _nearest(systems: Tensor, sizes: Tensor) -> Tensor:
    """Return the s values `(P, s)` of least residual whose measurements are independent: calls may be repeated."""
    rest, lengths, chosen = systems, systems.square().sum(-1), []
    for _ in range(systems.shape[-1]):
        tall = rest.square().sum(-1) > 1e-6 * lengths
        chosen.append(sizes.masked_fill(~tall, torch.inf).argmin(-1, keepdim=True))
        direction = rest.gather(1, chosen[-1].unsqueeze(-1).expand(-1, -1, systems.shape[-1]))
        direction = direction / direction.norm(dim=-1, keepdim=True).clamp_min(1e-300)
        rest = rest - (rest @ direction.mT) * direction
    return torch.cat(chosen, -1)


def decode(
    probes: Tensor, outcomes: Tensor, supports: Sequence[Support], *, intercept: bool, known_noise: float = 0.0
) -> tuple[list[Tensor], list[Tensor] | None, Tensor]:
    """Return Jacobian rows on their supports from outcomes of which a share is wrong.

    `outcomes[b, q, i] = c[b, i] + probes[b, q] @ J[b, i] + noise`, but for whole calls `(b, q)` or single entries that are
    anything at all. Up to a fifth of the calls is safe where there are 4 calls or more for each unknown.

    Args:
        probes: `(B, q, n)`, or `(1, q, n)` for all samples, of about unit size.
        outcomes: `(B, q, m)` of any scale; NaN, infinity and what is beyond 1e100 are missing.
        supports: for each number s of nonzeros the outputs `(r,)` that have it, and their columns `(r, s)`; each output once.
        intercept: whether c is unknown, too; otherwise it is 0.
        known_noise: standard deviation of an outcome; what is within 5 of it is not wrong.

    Returns:
        For each support the values `(B, r, s)`; the same of c, `(B, r)`, or None; and which outcomes were used, `(B, q, m)`,
        none of an output that is in no support.

    Raises:
        ValueError: shapes that do not belong together, an output with fewer finite outcomes than unknowns.
    """
    fits = probes.ndim == outcomes.ndim == 3 and len(probes) in (1, len(outcomes))
    if not fits or probes.shape[1] != outcomes.shape[1]:
        raise ValueError(
            "probes must be (B, q, n) or (1, q, n) and outcomes (B, q, m) of the same B and q, got "
            f"{tuple(probes.shape)} and {tuple(outcomes.shape)}."
        )
    non_negative("known_noise", known_noise)
    samples, q, m = outcomes.shape
    widest = sum(columns.shape[0] * (columns.shape[1] + 1) for _, columns in supports)
    parts = [
        _decode(probes if len(probes) == 1 else probes[some], outcomes[some], supports, intercept, known_noise)
        for some in torch.arange(samples, device=outcomes.device).split(max(1, _CHUNK // max(1, q * max(m, widest))))
    ]
    solved = [torch.cat(part) for part in zip(*(part[0] for part in parts), strict=True)]
    inliers = torch.cat([part[1] for part in parts])
    if not intercept:
        return solved, None, inliers
    return [part[..., :-1] for part in solved], [part[..., -1] for part in solved], inliers


def _decode(
    probes: Tensor, outcomes: Tensor, supports: Sequence[Support], intercept: bool, known_noise: float
) -> tuple[list[Tensor], Tensor]:
    samples = len(outcomes)
    systems, values, valid, scales, centres, floors = [], [], [], [], [], []
    for rows, columns in supports:
        system = probes[:, :, columns].transpose(1, 2).expand(samples, -1, -1, -1)  # (B, r, q, s)
        if intercept:
            system = torch.cat([system, system.new_ones(*system.shape[:-1], 1)], -1)
        value = outcomes[:, :, rows].mT
        mask = value.abs() < _HUGE
        _enough(mask, rows, system.shape[-1])
        value = value.where(mask, value.new_full((), torch.nan))
        centre = value.nanmedian(-1, keepdim=True).values if intercept else value.new_zeros(())
        value = (value - centre).nan_to_num(nan=0.0)
        scale = _scale(value, mask)
        systems.append(system)
        values.append(value / scale)
        valid.append(mask)
        scales.append(scale)
        centres.append(centre)
        # Below is rounding: of the outcome itself, not of what remains of it without the centre.
        floors.append((4e-15 * centre.abs() + known_noise) / scale + 1e-13)
    solutions = _reweighted(systems, values, valid, power=_POWER, by_call=True)
    kept = _cleaned(systems, values, valid, floors, solutions)
    inliers = outcomes.new_zeros(outcomes.shape, dtype=torch.bool)
    solved = []
    parts = zip(supports, systems, values, kept, scales, centres, strict=True)
    for (rows, _), system, value, keep, scale, centre in parts:
        inliers[:, :, rows] = keep.mT
        solution = _least_squares(system, value, keep) * scale
        if intercept:
            solution[..., -1:] += centre
        solved.append(solution)
    return solved, inliers


def _enough(mask: Tensor, rows: Tensor, unknowns: int) -> None:
    counts = mask.sum(-1)
    few = (counts < unknowns).nonzero()
    if len(few):
        b, r = few[0].tolist()
        raise ValueError(
            f"Output {int(rows[r])} of sample {b} has {int(counts[b, r])} finite outcomes of {mask.shape[-1]} calls, and "
            f"{unknowns} unknowns: spend more probes, or mend the function."
        )


def _scale(values: Tensor, valid: Tensor) -> Tensor:
    """The median size of the values `(..., 1)`, which a minority of wrong ones does not move."""
    sizes = values.abs().masked_fill(~valid, torch.nan).nanmedian(-1, keepdim=True).values
    mean = values.abs().mean(-1, keepdim=True)
    sizes = torch.where(sizes > 1e-300, sizes, mean.clamp_max(1.0))
    return torch.where(sizes > 1e-300, sizes, 1.0)


def _residuals(systems: Tensor, values: Tensor, solution: Tensor) -> Tensor:
    return (values - (systems @ solution.unsqueeze(-1)).squeeze(-1)).abs()


def _weighted(systems: Tensor, values: Tensor, weights: Tensor) -> Tensor:
    """Least squares with weights `(..., q)` by the normal equations: what steers the weights need not be exact."""
    weighed = systems * weights.unsqueeze(-1)
    gram = weighed.mT @ systems
    gram.diagonal(dim1=-2, dim2=-1).mul_(1 + 1e-13).add_(1e-300)
    factor, _ = torch.linalg.cholesky_ex(gram)
    return torch.cholesky_solve(weighed.mT @ values.unsqueeze(-1), factor).squeeze(-1)


def _least_squares(systems: Tensor, values: Tensor, kept: Tensor) -> Tensor:
    if not systems.shape[-1]:
        return systems.new_zeros(*systems.shape[:-2], 0)
    return torch.linalg.lstsq(systems * kept.unsqueeze(-1), (values * kept).unsqueeze(-1)).solution.squeeze(-1)


def _reweighted(
    systems: list[Tensor], values: list[Tensor], valid: list[Tensor], *, power: float, by_call: bool
) -> list[Tensor]:
    """Minimise the sum of `|residual|^(2 - power)`: at 1 the l1 norm."""
    solutions = [_weighted(a, y, ok.to(y)) for a, y, ok in zip(systems, values, valid, strict=True)]
    for step in range(_STEPS):
        sizes = [_residuals(a, y, z) for a, y, z in zip(systems, values, solutions, strict=True)]
        if by_call:
            joint = torch.cat([r.masked_fill(~ok, torch.nan) for r, ok in zip(sizes, valid, strict=True)], 1)
            call = joint.nanmedian(1, keepdim=True).values.nan_to_num(nan=1.0)
            sizes = [torch.maximum(r, call) for r in sizes]
        smooth = _FIRST * _DECAY**step
        solutions = [
            _weighted(a, y, r.clamp_min(smooth).div(smooth).pow(-power) * ok)
            for a, y, r, ok in zip(systems, values, sizes, valid, strict=True)
        ]
    return solutions


def _cleaned(
    systems: list[Tensor], values: list[Tensor], valid: list[Tensor], floors: list[Tensor], solutions: list[Tensor]
) -> list[Tensor]:
    """Return which values are used: those within some scales of the solution, in calls where most are."""
    kept = valid
    for cleaning in range(_CLEANINGS):
        sizes, wrong = [], []
        for a, y, ok, floor, z, keep in zip(systems, values, valid, floors, solutions, kept, strict=True):
            size = _residuals(a, y, z).masked_fill(~ok, torch.inf)
            spread = _first_spread(size, ok, a.shape[-1]) if cleaning == 0 else _spread(size, keep, a.shape[-1])
            # Of few spare values all may be met by chance, in one sample.
            spread = torch.maximum(spread, spread.median(0, keepdim=True).values)
            sizes.append(size)
            wrong.append(size > _SCALES * torch.maximum(spread, floor))
        votes = sum((bad & ok).sum(1, keepdim=True) for bad, ok in zip(wrong, valid, strict=True))
        outputs = sum(ok.sum(1, keepdim=True) for ok in valid)
        dropped = 2 * torch.as_tensor(votes) > torch.as_tensor(outputs)
        kept = [
            _kept(size, bad, dropped, a.shape[-1]) & ok
            for size, bad, ok, a in zip(sizes, wrong, valid, systems, strict=True)
        ]
        solutions = [_least_squares(a, y, keep) for a, y, keep in zip(systems, values, kept, strict=True)]
    return kept


def _first_spread(sizes: Tensor, valid: Tensor, unknowns: int) -> Tensor:
    """The noise, by a low quantile of the residuals: as many as there are unknowns are met exactly and say nothing."""
    spare = (valid.sum(-1, keepdim=True) - unknowns).clamp_min(0)
    place = (_QUANTILE * spare).round().long().clamp_min(1)
    ordered = sizes.sort(-1).values
    found = ordered.gather(-1, (unknowns + place - 1).clamp_max(sizes.shape[-1] - 1))
    share = place / (spare + 1)
    return torch.where(spare > 0, found / (torch.erfinv(share.to(sizes).clamp_max(0.99)) * 2**0.5), 0.0)


def _spread(sizes: Tensor, kept: Tensor, unknowns: int) -> Tensor:
    spare = (kept.sum(-1, keepdim=True) - unknowns).clamp_min(1)
    return (sizes.where(kept, sizes.new_zeros(())).square().sum(-1, keepdim=True) / spare).sqrt()


def _kept(sizes: Tensor, wrong: Tensor, dropped: Tensor, unknowns: int) -> Tensor:
    """What is neither wrong nor in a dropped call, and the best of the rest up to one value more than there are unknowns."""
    count = min(unknowns + 1, sizes.shape[-1])
    # From 0 to 1 by size, dropped calls from 1 to 2, what is missing behind both.
    order = 1 - 1 / (1 + sizes) + dropped.to(sizes)
    order = order.masked_fill(sizes.isinf(), 3.0)
    last = order.kthvalue(count, dim=-1, keepdim=True).values
    return ~(wrong | dropped) | (order <= last)
