"""Figures of every metric against epochs, work, seconds and what the models counted."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from beyondprop.lab.report import _words as words
from beyondprop.lab.report._alignment import draw_alignment
from beyondprop.lab.report._curves import Band, band, curve, end_limits
from beyondprop.lab.report._style import Entry, drawing, entries, plain, warm_entries
from beyondprop.lab.runs.files import write_atomically
from beyondprop.lab.runs.recorded import Row, Run, number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from beyondprop.lab.tasks.base import Metric

_X = {"epoch": "epochs", "work": "work (gradient-equivalents)", "seconds": "training time (s)"}
_MOST_COLUMNS = 4
_FAR = 20  # times as many


@dataclass(frozen=True)
class Drawing:
    """A finished figure: its file name without suffix, heading, caption and files by format."""

    name: str
    heading: str
    caption: str
    files: dict[str, bytes]


def figures(run: Run, folder: str | Path) -> list[Path]:
    """Draw the run's figures as PNG files into `folder`, which is made where it is missing.

    Returns:
        The files: one for each metric, named by its key, `loss.png` with the training loss, and `alignment.png` where
        alignment was recorded; none where nothing was evaluated.
    """
    return write_png(draw(entries([run]), ["png"], warm_entries([run])), Path(folder))


def write_png(drawings: Sequence[Drawing], folder: Path) -> list[Path]:
    """Write the figures, which have been drawn as PNG, into a folder."""
    return [write_atomically(folder / f"{d.name}.png", d.files["png"]) for d in drawings]


def draw(
    shown: Sequence[Entry], formats: Sequence[str], warm: Sequence[Entry] = (), xs: Sequence[str] | None = None
) -> list[Drawing]:
    """Draw every figure that the entries have numbers for, as files of the formats (`png`, `svg`).

    What the contenders started with (`warm`) is drawn beside them; it decides about no axis. `xs` are what curves are
    drawn against, of `epoch`, `work`, `seconds` and the counters; by default all that are known.
    """
    from beyondprop.lab.tasks.base import LOSS

    metrics = metrics_of(shown)
    keys = [metric.key for metric in metrics]
    found: list[Drawing] = []
    with drawing():
        for metric in metrics if "loss" in keys else [*metrics, LOSS]:  # beside it is the training loss
            rows = ("loss", "train_loss") if metric.key == "loss" else (metric.key,)
            rows = [key for key in rows if _bands(shown, "step", key)]
            axes = [x for x in (_axes(shown) if xs is None else xs) if any(_bands(shown, x, key) for key in rows)]
            if axes:
                bounded = metric.higher_is_better or metric.scale == 100
                sheet = _course(shown, metric, axes, warm) if bounded else _log(shown, metric, rows, axes, warm)
                heading = words.capital(words.name_and_unit(metric)[0])
                found.append(Drawing(metric.key, heading, sheet[1], _files(sheet[0], formats)))
        aligned = draw_alignment(shown)
        if aligned is not None:
            found.append(Drawing("alignment", "Alignment with the gradient", aligned[1], _files(aligned[0], formats)))
    return found


def metrics_of(shown: Sequence[Entry]) -> list[Metric]:
    """Return the metrics of all runs, the deciding one of the first run first."""
    return list({metric.key: metric for entry in shown for metric in entry.run.metrics}.values())


def split_of(shown: Sequence[Entry]) -> str:
    """Name the split that the held-out numbers are from, `"held-out"` where the runs differ."""
    splits = {entry.run.split for entry in shown}
    return splits.pop() if len(splits) == 1 else "held-out"


def _axes(shown: Sequence[Entry]) -> list[str]:
    """Return what curves can be drawn against: a counter where it counts up, as spikes a row and bytes kept do not.

    What was counted in evaluations is what was looked at, not what was learned from.
    """
    found = list(_X)
    for name in dict.fromkeys(name for entry in shown for name in entry.run.counters):
        if name.startswith("evaluation_"):
            continue
        steps = [step for rows in _rows(shown) for step in np.diff([number(row, name) for row in rows])]
        found += [name] if any(step > 0 for step in steps) and not any(step < 0 for step in steps) else []
    return found


def _course(shown: Sequence[Entry], metric: Metric, xs: Sequence[str], warm: Sequence[Entry]) -> tuple[Figure, str]:
    """Draw the whole course of a metric above, and its end enlarged below."""
    key, scale, higher, percent = metric.key, metric.scale, metric.higher_is_better, metric.scale == 100
    figure, axes = _panels([*warm, *shown], xs, [(key, scale)] * 2)
    split, (name, unit) = split_of(shown), words.name_and_unit(metric)
    beyond: dict[str, str] = {}
    bands = _bands(shown, xs[0], key, scale)  # one range for the row, which has one axis
    limits = end_limits(list(bands.values()), higher_is_better=higher)
    if limits is not None:
        low, high = limits
        axes[1, 0].set_ylim(*((low, min(high, 100.5)) if higher else (max(low, -0.5), high)) if percent else limits)
        for label, b in bands.items():
            if b.high[-1] < low if higher else b.low[-1] > high:
                end = f"{b.mean[-1]:.1f} %" if percent else f"{b.mean[-1]:.3g} {unit}".rstrip()
                beyond.setdefault(label, f"{label}, which ends at {end}")
    if not percent:
        # A diverging contender must not squeeze the others: half as far below the start as the best is above it.
        values = [scale * curve(rows, xs[0], key).y for rows in _rows([*warm, *shown])]
        start, top = min(v[0] for v in values if v.size), max(v.max() for v in values if v.size)
        floor = start - (top - start) / 2
        if min(v.min() for v in values if v.size) < floor < top:
            axes[0, 0].set_ylim(floor, top + 0.05 * (top - floor))
    _label(axes, [f"{split} {metric.label}\n{part}" for part in ("whole course", "the end, enlarged")])
    caption = f"{words.capital(split)} {name}: the whole course above, the end enlarged below. "
    return figure, caption + _said(shown, f"{'Below' if higher else 'Above'} the enlarged range", beyond)


def _log(
    shown: Sequence[Entry], metric: Metric, keys: Sequence[str], xs: Sequence[str], warm: Sequence[Entry]
) -> tuple[Figure, str]:
    """Draw a metric whose lowest is best, and where `keys` has it the training loss, on logarithmic axes."""
    scales = [1.0 if key == "train_loss" else metric.scale for key in keys]
    figure, axes = _panels([*warm, *shown], xs, list(zip(keys, scales, strict=True)))
    split, name = split_of(shown), words.name_and_unit(metric)[0]
    beyond: dict[str, str] = {}
    labels = []
    for row, key, scale in zip(axes, keys, scales, strict=True):
        label, log = "training loss" if key == "train_loss" else f"{split} {metric.label}", False
        for panel, x in zip(row, xs, strict=True):
            log = _log_axis(panel, [*warm, *shown], x, key, scale, metric)
            for of, b in _bands(shown, x, key, scale).items():
                if b.mean[-1] > panel.get_ylim()[1]:
                    beyond.setdefault(of + key, f"{of}, whose {label} ends at {b.mean[-1]:.3g}")
        labels.append(label + (" (log scale)" if log else ""))
    _label(axes, labels)
    what = " and ".join("training loss" if key == "train_loss" else f"{split} {name}" for key in keys)
    what = what.replace(" loss and", " and")  # test and training loss
    return figure, f"{words.capital(what)}. {_said(shown, 'Above the panel', beyond)}"


def _log_axis(axes: Axes, shown: Sequence[Entry], x: str, y: str, scale: float, metric: Metric) -> bool:
    """Set the scale and limits of a panel; return whether it is logarithmic."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    rows = _rows(shown)
    values = scale * np.concatenate([curve(r, x, y).y for r in rows])
    # A diverging contender must not squeeze the others: three times the untrained loss is as high as it gets.
    starts = [scale * v for r in rows if r[0]["step"] == 0 and math.isfinite(v := number(r[0], metric.key))]
    low, high = float(values.min()), float(min(values.max(), 3 * max(starts, default=math.inf)))
    if not 0 < low < high:
        return False
    axes.set_yscale("log")
    margin = (high / low) ** 0.05
    axes.set_ylim(low / margin, high * margin)
    decades = np.log10(high / low)
    axes.yaxis.set_major_locator(
        MaxNLocator(5) if decades < 0.7 else LogLocator(subs=(1, 2, 5) if decades < 2.5 else (1,))
    )
    axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    return True


def _plot(axes: Axes, shown: Sequence[Entry], x: str, y: str, scale: float) -> None:
    bands = _bands(shown, x, y, scale)
    for entry in shown:
        look: dict[str, Any] = {"color": entry.color, "linestyle": entry.line}
        for seed in entry.seen:
            if seed in entry.counted:
                continue
            points = curve(entry.rows(seed), x, y)
            axes.plot(points.x, scale * points.y, linewidth=0.9, alpha=0.8, **look)
            if seed in entry.failed:
                axes.plot(points.x[-1:], scale * points.y[-1:], "x", color=entry.color, ms=8, mew=2, zorder=5)
        if entry.label in bands:
            b = bands[entry.label]
            axes.fill_between(b.x, b.low, b.high, color=entry.color, alpha=0.17, linewidth=0)
            axes.plot(b.x, b.mean, marker=entry.marker, markevery=b.marks, **look)
    axes.set_xlim(left=0)


def _bands(shown: Sequence[Entry], x: str, y: str, scale: float = 1) -> dict[str, Band]:
    curves = {e.label: [curve(e.rows(seed), x, y) for seed in e.counted] for e in shown}
    return {label: b.scaled(scale) for label, found in curves.items() if (b := band(found)) is not None}


def _rows(shown: Sequence[Entry]) -> list[list[Row]]:
    return [e.rows(seed) for e in shown for seed in e.seen]


def _panels(shown: Sequence[Entry], xs: Sequence[str], rows: Sequence[tuple[str, float]]) -> tuple[Figure, Any]:
    """Draw a row of panels for each key and scale of `rows`, one panel for each of `xs`, with the legend on top.

    They share x by column and y by row. Where there are many columns they go on below, as a second block of rows.
    """
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.ticker import EngFormatter, MaxNLocator

    handles = [Line2D([], [], color=e.color, linestyle=e.line, marker=e.marker) for e in shown]
    labels = [plain(e.label) for e in shown]
    if any(entry.failed for entry in shown):
        handles.append(Line2D([], [], color="#444444", linestyle="none", marker="x", markersize=8, markeredgewidth=2))
        labels.append("a seed was stopped")
    # A line of legend holds about 140 characters and a handle takes the room of nine.
    lines = math.ceil(len(labels) / max(1, 140 // (max(map(len, labels)) + 9)))
    blocks = math.ceil(len(xs) / _MOST_COLUMNS)
    columns = math.ceil(len(xs) / blocks)
    figure = Figure(figsize=(11, 0.5 + 2.75 * len(rows) * blocks + 0.22 * lines), dpi=150, layout="constrained")
    grid = figure.subplots(len(rows) * blocks, columns, squeeze=False)
    grid = np.concatenate(np.split(grid, blocks), axis=1)  # blocks side by side
    for axis in grid[:, len(xs) :].flat:
        axis.remove()
    axes = grid[:, : len(xs)]
    for column, x in enumerate(xs):
        for row, (key, scale) in enumerate(rows):
            panel = axes[row, column]
            if row < len(rows) - 1:
                panel.sharex(axes[-1, column])
                panel.tick_params(labelbottom=False)
            if column:
                panel.sharey(axes[row, 0])
                panel.tick_params(labelleft=column % columns == 0)
            _plot(panel, shown, x, key, scale)
        label, starts = _X.get(x, x.replace("_", " ")), _starts(shown, x)
        for panel in axes[:, column] if starts else ():
            panel.set_xscale("log", nonpositive="mask")
            panel.set_xlim(left=min(starts) / 1.2)
        if not starts:
            axes[-1, column].xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
        if not starts and axes[-1, column].get_xlim()[1] >= 1e4:
            axes[-1, column].xaxis.set_major_formatter(EngFormatter(sep=""))  # 20k: whole numbers run into each other
        axes[-1, column].set_xlabel(plain(label + (" (log scale)" if starts else "")))
    figure.legend(handles, labels, loc="outside upper center", ncols=math.ceil(len(labels) / lines), handlelength=3.6)
    return figure, axes


def _starts(shown: Sequence[Entry], x: str) -> list[float]:
    """Return the first counts that are not 0, where contenders' last ones are so far apart that a plain axis hides some."""
    counts = [curve(rows, x, x).x for rows in _rows(shown)] if x not in _X else []
    counts = [c[c > 0] for c in counts if (c > 0).any()]
    ends = [float(c[-1]) for c in counts]
    return [float(c[0]) for c in counts] if ends and max(ends) > _FAR * min(ends) else []


def _label(axes: Any, labels: Sequence[str]) -> None:
    """Name the rows of panels, at the left of each block."""
    for row, label in zip(axes, labels, strict=True):
        for panel in row:
            if panel.get_subplotspec().is_first_col():
                panel.set_ylabel(plain(label))


def _said(shown: Sequence[Entry], start: str, parts: Mapping[str, str]) -> str:
    """Return what every caption ends with: what lines and bands are, and what lies beyond the panel."""
    said = words.over_seeds(len(entry.counted) for entry in shown)
    many = any(len(entry.counted) > 1 for entry in shown)
    said = f"Lines and bands: {said}." if many else f"{said.capitalize()}."
    thin = ", ".join(e.label for e in shown if set(e.seen) - set(e.counted))
    said += f" Thin lines are single seeds that did not reach the end: {thin}." if thin else ""
    return said + (f" {start}: {'; '.join(parts.values())}." if parts else "")


def _files(figure: Figure, formats: Sequence[str]) -> dict[str, bytes]:
    # No dates and versions: equal runs give equal files.
    metadata = {"png": {"Software": None}, "svg": {"Date": None, "Creator": None}}
    files: dict[str, bytes] = {}
    for form in formats:
        file = io.BytesIO()
        figure.savefig(file, format=form, metadata=metadata[form])
        figure.set_layout_engine("none")  # laid out by now; once more would cost as much as the drawing
        files[form] = file.getvalue()
    return files
