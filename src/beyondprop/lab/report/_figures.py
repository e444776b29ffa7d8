"""Figures of accuracy and loss against epochs, work and seconds."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from beyondprop.lab.report import _words as words
from beyondprop.lab.report._alignment import draw_alignment
from beyondprop.lab.report._curves import Band, band, curve, end_limits
from beyondprop.lab.report._run import Run, number
from beyondprop.lab.report._style import Entry, drawing, entries, plain, warm_entries
from beyondprop.lab.runs.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_X = {
    "epoch": "epochs",
    "work": "work (gradient-equivalents)",
    "seconds": "training time (s)",
}


# Name, heading, figure and caption.
_Sheet: TypeAlias = "tuple[str, str, Figure, str]"


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
        The files: `accuracy.png` (classification only), `loss.png`, and `alignment.png` where alignment was
        recorded; none where nothing was evaluated.
    """
    folder = Path(folder)
    return [
        write_atomically(folder / f"{d.name}.png", d.files["png"])
        for d in draw(entries([run]), ["png"], warm_entries([run]))
    ]


def draw(
    shown: Sequence[Entry], formats: Sequence[str], warm: Sequence[Entry] = (), xs: Sequence[str] = tuple(_X)
) -> list[Drawing]:
    """Draw every figure that the entries have numbers for, as files of the formats (`png`, `svg`).

    What the rules started with (`warm`) is drawn beside them; it decides about no axis. `xs` are what curves are drawn
    against, of `epoch`, `work` and `seconds`.
    """
    found: list[_Sheet] = []
    with drawing():
        axes = [x for x in xs if _bands(shown, x, "test_loss") or _bands(shown, x, "test_accuracy")]
        if axes and any(_bands(shown, axes[0], "test_accuracy")):
            found.append(_accuracy(shown, axes, warm))
        if axes and (_bands(shown, axes[0], "test_loss") or _bands(shown, axes[0], "train_loss")):
            found.append(_loss(shown, axes, warm))
        aligned = draw_alignment(shown)
        if aligned is not None:
            found.append(("alignment", "Alignment with the gradient", *aligned))
        return [Drawing(n, h, caption, _files(figure, formats)) for n, h, figure, caption in found]


def split_of(shown: Sequence[Entry]) -> str:
    """Name the split that the held-out numbers are from, `"held-out"` where the runs differ."""
    splits = {entry.run.split for entry in shown}
    return splits.pop() if len(splits) == 1 else "held-out"


def _accuracy(shown: Sequence[Entry], xs: Sequence[str], warm: Sequence[Entry]) -> _Sheet:
    figure, axes = _panels([*warm, *shown], 2, xs)
    split = split_of(shown)
    beyond: dict[str, str] = {}
    for column, x in enumerate(xs):
        for row in range(2):
            _plot(axes[row, column], [*warm, *shown], x, "test_accuracy", scale=100)
    bands = _bands(shown, xs[0], "test_accuracy", scale=100)  # one range for the row, which has one axis
    limits = end_limits(list(bands.values()), higher_is_better=True)
    if limits is not None:
        axes[1, 0].set_ylim(limits[0], min(limits[1], 100.5))
        for label, b in bands.items():
            if b.high[-1] < limits[0]:
                beyond.setdefault(label, f"{label}, which ends at {b.mean[-1]:.1f} %")
    for row, name in enumerate(("whole course", "the end, enlarged")):
        axes[row, 0].set_ylabel(f"{split} accuracy (%)\n{name}")
    caption = f"{split.capitalize()} accuracy: the whole course above, the end enlarged below. {_seeds(shown)}"
    caption += _stops(shown)
    return ("accuracy", "Accuracy", figure, caption + _sentence("Below the enlarged range: ", beyond))


def _loss(shown: Sequence[Entry], xs: Sequence[str], warm: Sequence[Entry]) -> _Sheet:
    keys = [key for key in ("test_loss", "train_loss") if _bands(shown, xs[0], key)]
    figure, axes = _panels([*warm, *shown], len(keys), xs)
    split = split_of(shown)
    beyond: dict[str, str] = {}
    for row, key in enumerate(keys):
        name = "training loss" if key == "train_loss" else f"{split} loss"
        log = False
        for column, x in enumerate(xs):
            _plot(axes[row, column], [*warm, *shown], x, key)
            log = _loss_axis(axes[row, column], [*warm, *shown], x, key)
            bands, top = _bands(shown, x, key), axes[row, column].get_ylim()[1]
            for label, b in bands.items():
                if b.mean[-1] > top:
                    beyond.setdefault(label + key, f"{label}, whose {name} ends at {b.mean[-1]:.3g}")
        axes[row, 0].set_ylabel(name + (" (log scale)" if log else ""))
    caption = f"{split.capitalize()} and training loss. {_seeds(shown)}{_stops(shown)}"
    return ("loss", "Loss", figure, caption + _sentence("Above the panel: ", beyond))


def _loss_axis(axes: Axes, shown: Sequence[Entry], x: str, y: str) -> bool:
    """Set the scale and limits of a loss panel; return whether it is logarithmic."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    rows = [e.run.of("eval", e.rule.name, seed) for e in shown for seed in _seeds_seen(e)]
    values = np.concatenate([curve(r, x, y).y for r in rows])
    # A diverging rule must not squeeze the others: three times the untrained loss is as high as it gets.
    starts = [loss for r in rows if r[0]["step"] == 0 and math.isfinite(loss := number(r[0], "test_loss"))]
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


def _plot(axes: Axes, shown: Sequence[Entry], x: str, y: str, scale: float = 1) -> None:
    bands = _bands(shown, x, y, scale)
    for entry in shown:
        look: dict[str, Any] = {"color": entry.color, "linestyle": entry.line}
        for seed in _seeds_seen(entry):
            if seed in entry.counted:
                continue
            points = curve(entry.run.of("eval", entry.rule.name, seed), x, y)
            axes.plot(points.x, scale * points.y, linewidth=0.9, alpha=0.8, **look)
            if seed in entry.failed:
                axes.plot(points.x[-1:], scale * points.y[-1:], "x", color=entry.color, ms=8, mew=2, zorder=5)
        if entry.label in bands:
            b = bands[entry.label]
            axes.fill_between(b.x, b.low, b.high, color=entry.color, alpha=0.17, linewidth=0)
            axes.plot(b.x, b.mean, marker=entry.marker, markevery=b.marks, **look)
    axes.set_xlim(left=0)


def _bands(shown: Sequence[Entry], x: str, y: str, scale: float = 1) -> dict[str, Band]:
    found = {e.label: band([curve(e.run.of("eval", e.rule.name, seed), x, y) for seed in e.counted]) for e in shown}
    return {label: b.scaled(scale) for label, b in found.items() if b is not None}


def _seeds_seen(entry: Entry) -> list[int]:
    seeds = entry.run.seeds(entry.rule.name)
    return [seed for group in seeds.values() for seed in group if entry.run.of("eval", entry.rule.name, seed)]


def _panels(shown: Sequence[Entry], rows: int, xs: Sequence[str]) -> tuple[Figure, Any]:
    """Return a figure of `(rows, len(xs))` panels with x shared by column, y by row and the legend on top."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.ticker import MaxNLocator

    handles = [Line2D([], [], color=e.color, linestyle=e.line, marker=e.marker) for e in shown]
    labels = [plain(e.label) for e in shown]
    if any(entry.failed for entry in shown):
        handles.append(Line2D([], [], color="#444444", linestyle="none", marker="x", markersize=8, markeredgewidth=2))
        labels.append("a seed was stopped")
    # A line of legend holds about 140 characters and a handle takes the room of nine.
    lines = math.ceil(len(labels) / max(1, 140 // (max(map(len, labels)) + 9)))
    figure = Figure(figsize=(11, 0.5 + 2.75 * rows + 0.22 * lines), dpi=150, layout="constrained")
    axes = figure.subplots(rows, len(xs), sharex="col", sharey="row", squeeze=False)
    for column, x in enumerate(xs):
        axes[-1, column].set_xlabel(_X[x])
        axes[-1, column].xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    columns = math.ceil(len(labels) / lines)
    figure.legend(handles, labels, loc="outside upper center", ncols=columns, handlelength=3.6)
    return figure, axes


def _seeds(shown: Sequence[Entry]) -> str:
    said = words.over_seeds(len(entry.counted) for entry in shown)
    many = any(len(entry.counted) > 1 for entry in shown)
    return ("Lines and bands: " if many else "") + (said if many else said.capitalize()) + "."


def _stops(shown: Sequence[Entry]) -> str:
    thin = [e for e in shown if set(_seeds_seen(e)) - set(e.counted)]
    return (
        f" Thin lines are single seeds that did not reach the end: {', '.join(e.label for e in thin)}." if thin else ""
    )


def _sentence(start: str, parts: Mapping[str, str]) -> str:
    return f" {start}{'; '.join(parts.values())}." if parts else ""


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
