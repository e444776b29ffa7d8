"""Curves over seeds: points of one seed, the mean and range of several, and limits that show the end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import numpy as np

from beyondprop.lab.runs.recorded import Row, number

Array = np.ndarray
_MOST_MARKS = 12


@dataclass(frozen=True)
class Curve:
    """Finite points by rising x, both of shape `(n,)`."""

    x: Array
    y: Array


@dataclass(frozen=True)
class Band:
    """The mean and range of several curves on one grid, each of shape `(n,)`.

    `marks` are the grid's indices that belong to one curve: one marker per evaluation, not one per seed.
    """

    x: Array
    mean: Array
    low: Array
    high: Array
    marks: list[int]

    def scaled(self, scale: float) -> Band:
        """Return the band with all its values multiplied by a positive number."""
        return replace(self, mean=scale * self.mean, low=scale * self.low, high=scale * self.high)


def curve(rows: Sequence[Row], x: str, y: str) -> Curve:
    """Return the points of the rows whose `x` and `y` are finite numbers."""
    points = np.array([(number(row, x), number(row, y)) for row in rows], dtype=float).reshape(-1, 2)
    points = points[np.isfinite(points).all(axis=1)]
    points = points[np.argsort(points[:, 0], kind="stable")]
    return Curve(points[:, 0], points[:, 1])


def band(curves: Sequence[Curve]) -> Band | None:
    """Return mean and range over the curves, where all of them are known.

    Where curves of one length have other x, as seconds do, the n-th points belong together, at their mean x. Where the
    lengths differ, each is interpolated linearly at the points of all the others, from the latest start to the earliest
    end; nothing is extrapolated.
    """
    curves = [c for c in curves if c.x.size]
    if not curves:
        return None
    if len({c.x.size for c in curves}) == 1:
        x, values = np.mean([c.x for c in curves], axis=0), np.stack([c.y for c in curves])
        marks = np.arange(x.size)
    else:
        start, end = max(c.x[0] for c in curves), min(c.x[-1] for c in curves)
        x = np.unique(np.concatenate([c.x for c in curves]))
        x = x[(x >= start) & (x <= end)]
        if not x.size:
            return None
        values = np.stack([np.interp(x, c.x, c.y) for c in curves])
        marks = np.flatnonzero(np.isin(x, min(curves, key=lambda c: c.x[-1]).x))
    marks = marks[:: max(1, len(marks) // _MOST_MARKS)]
    return Band(x, values.mean(axis=0), values.min(axis=0), values.max(axis=0), marks.tolist())


def draw_band(axes: Any, curves: Sequence[Curve], **look: Any) -> None:
    """Draw the mean of several curves as a line and their range as an area, where they have points."""
    if (found := band(curves)) is not None:
        axes.fill_between(found.x, found.low, found.high, color=look["color"], alpha=0.2, linewidth=0)
        axes.plot(found.x, found.mean, **look)


def end_limits(bands: Sequence[Band], *, higher_is_better: bool) -> tuple[float, float] | None:
    """Return y limits that show the differences at the end of training.

    They hold the last third of every curve but those of contenders that end far from the rest, by more than four
    times the median distance to the best.
    """
    if not bands:
        return None
    sign = 1.0 if higher_is_better else -1.0
    best = max(sign * b.mean[-1] for b in bands)
    gaps = [best - sign * b.mean[-1] for b in bands]
    near = [b for b, gap in zip(bands, gaps, strict=True) if gap <= 4 * median(gaps)]
    tails = [(b.low[late], b.high[late]) for b in near for late in [b.x >= (b.x[0] + 2 * b.x[-1]) / 3]]
    low, high = min(t[0].min() for t in tails), max(t[1].max() for t in tails)
    pad = 0.08 * (high - low) or 0.01 * abs(high) or 0.01
    return float(low - pad), float(high + pad)
