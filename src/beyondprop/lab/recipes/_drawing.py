"""Figures of recipes: panels with one legend above them."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from beyondprop.lab.recipes._base import Context
from beyondprop.lab.report._style import drawing
from beyondprop.lab.runs.files import write_atomically

OURS, THEIRS = ("#0072B2", "-"), ("#D55E00", (0, (3, 1.2)))
"""Colour and line of alternating minimization and of backpropagation, as reports have them."""


@contextmanager
def panels(
    context: Context,
    columns: int = 1,
    rows: int = 1,
    *,
    size: tuple[float, float],
    titles: Sequence[str] = (),
    xlabel: str = "",
    ylabel: str = "",
    whole_x: bool = False,
    legend: int = 0,
    **subplots: Any,
) -> Iterator[Any]:
    """Yield the axes of a recipe's `figure.png`, `(rows, columns)`; it is written at the end.

    Args:
        context: where the figure is written.
        columns: of panels.
        rows: of panels.
        size: of the figure, in inches.
        titles: of the panels, the upper row first.
        xlabel: below the last row.
        ylabel: beside the first column.
        whole_x: ticks of x are at whole numbers alone.
        legend: columns of the legend above the panels, which has each label once; 0: there is none, -1: as many as labels.
        **subplots: further arguments of `Figure.subplots`.
    """
    with drawing():
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator

        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False, **subplots)
        yield axes
        for panel, title in zip(axes.flat, titles, strict=False):
            panel.set_title(title)
        for panel in axes[-1] if xlabel else ():
            panel.set_xlabel(xlabel)
        for panel in axes[:, 0] if ylabel else ():
            panel.set_ylabel(ylabel)
        for panel in axes.flat if whole_x else ():
            panel.xaxis.set_major_locator(MaxNLocator(integer=True))
        if legend:
            found = [panel.get_legend_handles_labels() for panel in axes.flat]
            handles = {label: handle for pair in found for handle, label in zip(*pair, strict=True)}
            ncols = len(handles) if legend < 0 else legend
            where = {"loc": "outside upper center", "ncols": ncols, "handlelength": 3.0}
            figure.legend(list(handles.values()), list(handles), **where)
        content = io.BytesIO()
        figure.savefig(content, dpi=150, format="png")
        write_atomically(context.out / "figure.png", content.getvalue())
