"""How far each stage's update points along the true gradient: the figure and its numbers."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from beyondprop.lab.report import _words as words
from beyondprop.lab.report._curves import Band, band, curve
from beyondprop.lab.report._style import Entry, plain
from beyondprop.lab.report._summary import Spread
from beyondprop.lab.runs.recorded import Row, number

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MARKERS = "osD^vPXp"


def final_alignment(shown: Sequence[Entry]) -> list[list[str]]:
    """Return label, stage, epoch, and mean and range of cosine, angle and norm ratio, at the last record of each stage."""
    forms = {"cosine": "{:.3f}".format, "angle": "{:.1f}".format, "norm_ratio": "{:#.3g}".format}
    found = []
    for entry in shown:
        for stage, seeds in _stages(entry).items():
            last = [rows[-1] for rows in seeds]
            spreads = [Spread.over(number(row, key) for row in last if key in row) for key in forms]
            epoch = min(row["epoch"] for row in last)
            found.append([entry.label, stage, f"{epoch:.3g}", *map(_cell, spreads, forms.values())])
    return found


def _cell(spread: Spread | None, write: Callable[[float], str]) -> str:
    if spread is None:
        return words.DASH
    if not math.isfinite(spread.mean):
        return "undefined"  # in a seed whose update or gradient is 0
    return write(spread.mean) + (f" ({words.interval(spread, write)})" if spread.n > 1 else "")


def draw_alignment(shown: Sequence[Entry]) -> tuple[Figure, str] | None:
    """Return a figure with one panel per contender, the cosine of every stage over epochs, and its caption."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.ticker import MaxNLocator

    aligned = {entry.label: found for entry in shown if (found := _bands(entry))}
    if not aligned:
        return None
    stages = list(dict.fromkeys(stage for found in aligned.values() for stage in found))
    shade = {stage: colormaps["viridis"](0.9 * i / max(1, len(stages) - 1)) for i, stage in enumerate(stages)}
    few = len(stages) <= len(_MARKERS)  # else a bar of colours is the legend
    marker = dict(zip(stages, _MARKERS if few else [""] * len(stages), strict=False))
    columns = min(4, len(aligned))
    rows = -(-len(aligned) // columns)
    width = 11 if columns > 2 else 4.2 * columns + 1.2
    figure = Figure(figsize=(width, 0.7 + 2.7 * rows), dpi=150, layout="constrained")
    axes = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for axis in axes.flat[len(aligned) :]:
        axis.set_axis_off()
    for axis, (label, found) in zip(axes.flat, aligned.items(), strict=False):
        for stage, b in found.items():
            axis.fill_between(b.x, b.low, b.high, color=shade[stage], alpha=0.15, linewidth=0)
            axis.plot(b.x, b.mean, color=shade[stage], marker=marker[stage], markevery=b.marks)
        axis.set_title(plain(textwrap.fill(label, 30)), loc="left")
    lowest = min(b.low.min() for found in aligned.values() for b in found.values())
    axes[0, 0].set_ylim(lowest - 0.06 * (1.0 - lowest) - 0.01, 1.0 + 0.03 * (1.0 - lowest) + 0.01)
    figure.supxlabel("epochs", fontsize=10)
    figure.supylabel("cosine to the gradient", fontsize=10)
    for axis in axes.flat[: len(aligned)]:
        axis.set_xlim(left=0)
        axis.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
        if lowest < 0:
            axis.axhline(0, color="#444444", linewidth=0.8, zorder=1)
    for axis in axes.flat[max(0, len(aligned) - columns) : len(aligned)]:
        axis.tick_params(labelbottom=True)  # also where the panel below is empty
    if few:
        handles = [Line2D([], [], color=shade[stage], marker=marker[stage]) for stage in stages]
        ends = {stages[-1]: " (last)", stages[0]: " (first)"} if len(stages) > 1 else {}
        labels = [plain(f"stage {stage}{ends.get(stage, '')}") for stage in stages]
        figure.legend(handles, labels, loc="outside upper center", ncols=min(5, len(stages)))
    else:
        _depth_bar(figure, axes, stages)
    return figure, _caption(shown, aligned)


def _depth_bar(figure: Figure, axes: Any, stages: Sequence[str]) -> None:
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap, Normalize

    colors = ListedColormap([colormaps["viridis"](0.9 * i / 255) for i in range(256)])
    bar = figure.colorbar(ScalarMappable(Normalize(0, len(stages) - 1), colors), ax=axes, pad=0.01, aspect=30)
    ends = [plain(f"stage {stages[0]}\n(first)"), plain(f"stage {stages[-1]}\n(last)")]
    bar.set_ticks([0, len(stages) - 1], labels=ends)


def _caption(shown: Sequence[Entry], aligned: Mapping[str, object]) -> str:
    with_rows = [entry for entry in shown if entry.label in aligned]
    said = words.over_seeds(len(_seeds(entry)) for entry in with_rows)
    stopped = [entry.label for entry in with_rows if not entry.counted]
    return (
        "Cosine between each stage's update and the descent direction of the true gradient: 1 is the "
        f"gradient's own direction, 0 is at right angles to it, below 0 is against it. {said.capitalize()}."
        + (f" Every seed of {', '.join(stopped)} was stopped; what was recorded before is shown." if stopped else "")
    )


def _seeds(entry: Entry) -> list[int]:
    """Return the seeds that count, or the stopped ones where none does: their alignment may say why."""
    return [seed for seed in entry.counted or entry.failed if entry.rows(seed, "alignment")]


def _stages(entry: Entry) -> dict[str, list[list[Row]]]:
    """Return the rows of every stage, of each seed that has some."""
    found: dict[str, dict[int, list[Row]]] = {}
    for seed in _seeds(entry):
        for row in entry.rows(seed, "alignment"):
            for stage, values in row["stages"].items():
                found.setdefault(stage, {}).setdefault(seed, []).append({"epoch": row["epoch"]} | values)
    return {stage: list(seeds.values()) for stage, seeds in found.items()}


def _bands(entry: Entry) -> dict[str, Band]:
    found = {s: band([curve(rows, "epoch", "cosine") for rows in seeds]) for s, seeds in _stages(entry).items()}
    return {stage: b for stage, b in found.items() if b is not None}
