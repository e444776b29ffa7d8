"""Colours, lines and markers: one look per contender, told apart without colour too."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from beyondprop.lab.runs.recorded import ContenderInfo, Row, Run
from beyondprop.lab.runs.text import clean, clipped

# Okabe and Ito's palette without its yellow (too pale on white); in black and white line and marker tell.
_KNOWN = {
    "am-adam": ("#0072B2", "-", "o"),
    "am-sgd": ("#56B4E9", (0, (6, 1.5)), "s"),
    "am-mem": ("#009E73", (0, (4, 1.2, 1, 1.2)), "D"),
    "adam": ("#D55E00", (0, (3, 1.2)), "^"),
    "sgd": ("#E69F00", (0, (1.2, 1.2)), "v"),
}
# The rest of that palette, then dark tones of Paul Tol's muted scheme.
_OTHERS = (
    ("#CC79A7", "-", "P"),
    ("#222222", (0, (6, 1.5)), "X"),
    ("#882255", (0, (4, 1.2, 1, 1.2)), "p"),
    ("#332288", (0, (3, 1.2)), "<"),
    ("#999933", (0, (1.2, 1.2)), ">"),
    ("#44AA99", "-", "h"),
    ("#777777", (0, (6, 1.5)), "*"),
)
_MOST = 100  # characters of a text in a figure
_LINES = ("-", (0, (4, 1.5)), (0, (1.2, 1.2)), (0, (5, 1.2, 1, 1.2)))

_RC: dict[str, Any] = {
    "font.size": 10,
    "axes.titlesize": 10,
    "axes.labelsize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#444444",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "lines.linewidth": 1.7,
    "lines.markersize": 4.5,
    "svg.hashsalt": "beyondprop",  # equal runs give equal files
}


@dataclass(frozen=True)
class Entry:
    """One contender of one run, with the label and the look that it has in every figure and table."""

    run: Run
    contender: ContenderInfo
    label: str
    color: str
    line: Any
    marker: str

    @property
    def counted(self) -> tuple[int, ...]:
        """The seeds that means and ranges are over."""
        return self.run.counted(self.contender.name)

    @property
    def failed(self) -> tuple[int, ...]:
        """The seeds that were stopped."""
        return self.run.seeds(self.contender.name)["failed"]

    @property
    def seen(self) -> list[int]:
        """The seeds that have evaluations, however they ended."""
        return [s for group in self.run.seeds(self.contender.name).values() for s in group if self.rows(s)]

    def rows(self, seed: int, kind: str = "eval") -> list[Row]:
        """Return the rows of a seed."""
        return self.run.of(kind, self.contender.name, seed)


def entries(runs: Sequence[Run]) -> list[Entry]:
    """Return every contender of every run with its label and look.

    A rule has one colour and marker wherever it appears; with several nets or runs, each has a line style, and its name
    is in the label. Where that would not tell all apart, each contender has a colour.
    """
    several = len({net for run in runs for net in run.config["nets"]}) > 1
    infos = [(i, info) for i, run in enumerate(runs) for info in run.contenders]
    rules, nets = {info.rule for _, info in infos}, {info.net for _, info in infos}
    # Whether a colour for each rule and a line for each net tell the contenders of every run apart.
    by_rule = len({(i, info.rule, info.net) for i, info in infos}) == len(infos) and (
        len(nets) == 1 or len(rules) > 1 < len(nets) <= len(_LINES)
    )
    # What has a colour, and what has a line, of every contender.
    keys = [info.rule if by_rule else info.name for _, info in infos]
    groups = [(i, info.net if several and by_rule else "") for i, info in infos]
    looks, lines = _looks(list(dict.fromkeys(keys))), list(dict.fromkeys(groups))
    titles, labels = Counter((i, info.title) for i, info in infos), beside(runs, " · {}")
    found: list[Entry] = []
    for (i, info), key, group in zip(infos, keys, groups, strict=True):
        color, line, marker = looks[key]
        # Two contenders of one title differ by their names.
        label = info.title if titles[i, info.title] == 1 else f"{info.title} [{clipped(info.name, 60)}]"
        if any(label + labels[i] == entry.label for entry in found):  # they differ in what was left out
            label += f" [{len(found) + 1}]"
        if len(lines) > 1:
            line = _LINES[lines.index(group) % len(_LINES)]
        found.append(Entry(runs[i], info, label + labels[i], color, line, marker))
    return found


def warm_entries(runs: Sequence[Run]) -> list[Entry]:
    """Return what the contenders of each run started with, in grey, where they did."""
    return [
        Entry(run, info, info.title + label, ("#888888", "#444444", "#b0b0b0")[i % 3], (0, (2, 1)), ".")
        for run, label in zip(runs, beside(runs, " · {}"), strict=True)
        for i, info in enumerate(run.warm_starts)
    ]


def _looks(names: Sequence[str]) -> dict[str, tuple[str, Any, str]]:
    """Give the known names their own look and the others, in order, what is left."""
    pool = [*_OTHERS, *(look for name, look in _KNOWN.items() if name not in names)]
    found: dict[str, tuple[str, Any, str]] = {name: _KNOWN[name] for name in names if name in _KNOWN}
    for i, name in enumerate(name for name in names if name not in _KNOWN):
        # Where colours run out they come again with the next one's marker and line.
        color, again = pool[i % len(pool)][0], pool[(i + i // len(pool)) % len(pool)]
        found[name] = (color, *again[1:])
    return found


def run_labels(runs: Sequence[Run]) -> list[str]:
    """Return one distinct label per run: its directory's name, the parent's or a number for namesakes."""
    labels = [run.name for run in runs]
    if len(set(labels)) < len(labels):
        labels = [f"{run.path.resolve().parent.name}/{run.name}" for run in runs]
    repeated = {label for label, count in Counter(labels).items() if count > 1}
    return [f"{label} ({i})" if label in repeated else label for i, label in enumerate(labels, start=1)]


def beside(runs: Sequence[Run], form: str) -> list[str]:
    """Return each run's label in a form such as `"{}: "` to stand beside a text; one run alone needs none."""
    return [form.format(label) for label in run_labels(runs)] if len(runs) > 1 else [""]


def plain(text: str) -> str:
    """Return text that matplotlib draws as it stands: no mathematics, no label hidden for an underscore."""
    text = clipped(clean(text), _MOST).replace("$", r"\$")
    return f"\u200a{text}" if text.startswith("_") else text


@contextmanager
def drawing() -> Iterator[None]:
    """Draw figures that look the same whatever the user's matplotlib settings are."""
    import warnings

    import matplotlib.style

    with warnings.catch_warnings(), matplotlib.style.context(["default", _RC]):
        # A rule's title may hold characters that the figure font lacks; the page shows them.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        yield
