"""How far each stage's update points along the true gradient: the figure and its numbers."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from beyondprop.lab.report import _words as words
from beyondprop.lab.report._curves import Band, band, curve
from beyondprop.lab.report._style import Entry, plain
from beyondprop.lab.report._summary import Spread
from beyondprop.lab.runs.recorded import Row, number

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MARKERS = "osD^vPXp"
_MOST_IN_LEGEND = len(_MARKERS)


def final_alignment(shown: Sequence[Entry]) -> list[tuple[str, str, float, list[Spread | None]]]:
    """Return label, stage, epoch, and the spreads of cosine, angle and norm ratio, at the last record of each stage."""
    found = []
    for entry in shown:
        for stage in _stages(entry):
            rows = [r[-1] for seed in _seeds(entry) if (r := _rows(entry, seed, stage))]
            keys = ("cosine", "angle", "norm_ratio")
            spreads = [Spread.over(number(row, key) for row in rows if key in row) for key in keys]
            found.append((entry.label, stage, min(row["epoch"] for row in rows), spreads))
    return found


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
    marker = {stage: _MARKERS[i % len(_MARKERS)] for i, stage in enumerate(stages)}
    columns = min(4, len(aligned))
    rows = -(-len(aligned) // columns)
    width = 11 if columns > 2 else 4.2 * columns + 1.2
    figure = Figure(figsize=(width, 0.7 + 2.7 * rows), dpi=150, layout="constrained")
    axes = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for axis in axes.flat[len(aligned) :]:
        axis.set_axis_off()
    for axis, (label, found) in zip(axes.flat, aligned.items(), strict=False):
        for stage, b in found.items():
            many: dict[str, Any] = {"marker": marker[stage], "markevery": b.marks}
            axis.fill_between(b.x, b.low, b.high, color=shade[stage], alpha=0.15, linewidth=0)
            axis.plot(b.x, b.mean, color=shade[stage], **(many if len(stages) <= _MOST_IN_LEGEND else {}))
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
    if len(stages) <= _MOST_IN_LEGEND:
        handles = [Line2D([], [], color=shade[stage], marker=marker[stage]) for stage in stages]
        labels = [plain(_name(i, stage, len(stages))) for i, stage in enumerate(stages)]
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
    bar.set_ticks(
        [0, len(stages) - 1],
        labels=[plain(f"stage {stages[0]}\n(first)"), plain(f"stage {stages[-1]}\n(last)")],
    )


def _caption(shown: Sequence[Entry], aligned: Mapping[str, object]) -> str:
    with_rows = [entry for entry in shown if entry.label in aligned]
    said = words.over_seeds(len(_seeds(entry)) for entry in with_rows)
    stopped = [entry.label for entry in with_rows if not entry.counted]
    return (
        "Cosine between each stage's update and the descent direction of the true gradient: 1 is the "
        f"gradient's own direction, 0 is at right angles to it, below 0 is against it. {said.capitalize()}."
        + (f" Every seed of {', '.join(stopped)} was stopped; what was recorded before is shown." if stopped else "")
    )


def _name(i: int, stage: str, count: int) -> str:
    place = " (first)" if i == 0 and count > 1 else " (last)" if i == count - 1 and count > 1 else ""
    return f"stage {stage}{place}"


def _seeds(entry: Entry) -> list[int]:
    """Return the seeds that count, or the stopped ones where none does: their alignment may say why."""
    seeds = entry.counted or entry.failed
    return [seed for seed in seeds if entry.run.of("alignment", entry.contender.name, seed)]


def _stages(entry: Entry) -> list[str]:
    rows = [row for seed in _seeds(entry) for row in entry.run.of("alignment", entry.contender.name, seed)]
    return list(dict.fromkeys(stage for row in rows for stage in row["stages"]))


def _rows(entry: Entry, seed: int, stage: str) -> list[Row]:
    rows = entry.run.of("alignment", entry.contender.name, seed)
    return [{"epoch": row["epoch"]} | row["stages"][stage] for row in rows if stage in row["stages"]]


def _bands(entry: Entry) -> dict[str, Band]:
    found = {
        stage: band([curve(_rows(entry, seed, stage), "epoch", "cosine") for seed in _seeds(entry)])
        for stage in _stages(entry)
    }
    return {stage: b for stage, b in found.items() if b is not None}
