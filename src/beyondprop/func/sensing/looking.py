"""Directional derivatives of a black box along probes, at every sample of a batch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from beyondprop.func.sensing.calls import Outcome
from beyondprop.func.sensing.recoveries import Seen
from beyondprop.func.sensing.steps import StepSettings, bounds_of

_MOST_NUMBERS = 32_000_000

Evaluate = Callable[[Tensor, Tensor, str, Callable[[int, int], str], bool], Outcome]
"""`evaluate(points (G, B, n), samples (B,), kind, where(group, sample), may_drop)`: one leaf, `(G * B, m)` float64."""


def look(
    steps: StepSettings,
    x: Tensor,
    y: Tensor | None,
    probes: Tensor,
    unit: Tensor,
    size: float,
    evaluate: Evaluate,
    kind: str,
) -> Seen:
    """Return directional derivatives along probes.

    The directions are those between the points that the box was given: rounding and bounds move these.

    Args:
        steps: central or forward differences, and bounds.
        x: inputs `(B, n)`.
        y: outputs there, which forward differences start from; None: central ones are taken.
        probes: `(k, n)` or `(B, k, n)`.
        unit: scale of every input, in which probes are given, `(B, n)`.
        size: how far they go.
        evaluate: calls the box.
        kind: what the calls are counted as.
    """
    central = steps.difference == "central" or y is None
    points = points_of(steps, x, probes, size * unit, both=central)
    count = probes.shape[-2]

    def where(group: int, sample: int) -> str:
        side = "" if not central else (" ahead" if group < count else " behind")
        return f"sample {sample}, probe {group % count} of {count}{side}"

    # Set-up decides for good: it does without no call.
    values, missing = evaluated(points, evaluate, kind, where, may_drop=kind != "setup")
    taken = points.to(torch.float64)
    if central:
        moved, change = taken[:count] - taken[count:], values[:count] - values[count:]
    else:
        assert y is not None
        moved, change = taken - x.to(torch.float64), values - y
    width = (2 if central else 1) * size
    gone = None if missing is None else (missing[:count] | missing[-count:]).T
    return Seen((moved / (width * unit)).transpose(0, 1), change.transpose(0, 1) / width, gone)


def points_of(steps: StepSettings, x: Tensor, probes: Tensor, reach: Tensor, *, both: bool) -> Tensor:
    """Return the points ahead, `(k, B, n)`, and those behind after them, in the box's own precision."""
    start = x.to(torch.float64)
    change = (probes[:, None] if probes.ndim == 2 else probes.transpose(0, 1)) * reach
    low, high = bounds_of(steps, x)
    if low is None or high is None:
        return (torch.cat([start + change, start - change]) if both else start + change).to(x.dtype)
    ahead, behind = (start + change).clamp(low, high), (start - change).clamp(low, high)
    if both:
        return torch.cat([ahead, behind]).to(x.dtype)
    # One side alone goes where there is more room.
    return torch.where((behind - start).abs() > (ahead - start).abs(), behind, ahead).to(x.dtype)


def evaluated(
    points: Tensor, evaluate: Evaluate, kind: str, where: Callable[[int, int], str], *, may_drop: bool = True
) -> tuple[Tensor, Tensor | None]:
    """Return the outputs at points `(G, B, n)`, `(G, B, m)`, and which are missing, `(G, B)`; in parts that memory holds."""
    groups, batch = points.shape[:2]
    samples = torch.arange(batch)
    step = max(1, _MOST_NUMBERS // max(1, points[0].numel()))
    values, missing = [], []
    for low in range(0, groups, step):
        part = points[low : low + step]
        found = evaluate(part, samples, kind, lambda g, b, low=low: where(low + g, b), may_drop)
        values.append(found.leaves[0].view(len(part), batch, -1))
        missing.append(None if found.missing is None else found.missing.view(len(part), batch))
    if all(each is None for each in missing):
        return torch.cat(values), None
    none = [torch.zeros(v.shape[:2], dtype=torch.bool) for v in values]
    return torch.cat(values), torch.cat([n if m is None else m for m, n in zip(missing, none, strict=True)])
