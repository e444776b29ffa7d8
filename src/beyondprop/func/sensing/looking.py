"""Directional derivatives of a black box along probes, at every sample of a batch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from beyondprop.func.sensing.calls import Outcome
from beyondprop.func.sensing.recoveries import Seen
from beyondprop.func.sensing.steps import StepSettings, bounds_of

_MOST_NUMBERS = 8_000_000
"""What the points of one call hold, at most, but for a single probe of a batch."""

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
    own: Tensor | None = None,
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
        own: the probe that moves each input, `(n,)`, where none moves an input that another does.
    """
    central = steps.difference == "central" or y is None
    count, sides, start = probes.shape[-2], 2 if central else 1, x.to(torch.float64)
    width = sides * size
    parts: list[Tensor] = []
    changes: list[Tensor] = []
    missing: list[Tensor | None] = []
    single = None if own is None else torch.empty_like(start)
    magnitude = torch.zeros(())
    group = max(1, _MOST_NUMBERS // (sides * max(1, x.numel())))
    for low in range(0, count, group):
        part = probes[..., low : low + group, :]
        points = points_of(steps, x, part, size * unit, both=central)
        number = part.shape[-2]

        def where(place: int, sample: int, low: int = low, number: int = number) -> str:
            side = "" if not central else (" ahead" if place < number else " behind")
            return f"sample {sample}, probe {low + place % number} of {count}{side}"

        # Set-up decides for good: it does without no call.
        values, gone = evaluated(points, evaluate, kind, where, may_drop=kind != "setup")
        taken = points.to(torch.float64)
        if central:
            moved, change = taken[:number] - taken[number:], values[:number] - values[number:]
        else:
            assert y is not None
            moved, change = taken - start, values - y
        magnitude = torch.maximum(magnitude, values.nan_to_num(0.0).abs().amax((0, 1)))
        changes.append(change.transpose(0, 1) / width)
        missing.append(None if gone is None else (gone[:number] | gone[-number:]).T)
        if single is None or own is None:
            parts.append((moved / (width * unit)).transpose(0, 1))
        else:
            here = torch.nonzero((own >= low) & (own < low + number)).flatten()
            single[:, here] = moved[own[here] - low, :, here].T / (width * unit[:, here])
    seen = torch.cat(changes, 1)
    directions = probes.expand(len(x), -1, -1) if single is not None else torch.cat(parts, 1)
    none = [torch.zeros(c.shape[:2], dtype=torch.bool) for c in changes]
    gone = None
    if any(each is not None for each in missing):
        gone = torch.cat([n if m is None else m for m, n in zip(missing, none, strict=True)], 1)
    return Seen(directions, seen, gone, magnitude / width, single)


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
    """Return the outputs at points `(G, B, n)`, `(G, B, m)`, and which are missing, `(G, B)`; None: none is."""
    groups, batch = points.shape[:2]
    found = evaluate(points, torch.arange(batch), kind, where, may_drop)
    missing = None if found.missing is None else found.missing.view(groups, batch)
    return found.leaves[0].view(groups, batch, -1), missing
