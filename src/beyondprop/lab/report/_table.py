"""The results as a table for the terminal."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from beyondprop.lab.report import _words as words
from beyondprop.lab.report._summary import ContenderSummary, Spread, best_of, summary, warm_starts
from beyondprop.lab.runs.recorded import Run
from beyondprop.lab.runs.text import clipped

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions
    from rich.table import Table
    from rich.text import Text

_ROOM = 16  # characters for the contenders' names, before any column of numbers but the first


class Results:
    """A run's results; rich draws them as a table that fits the terminal, of up to 80 columns."""

    def __init__(self, run: Run) -> None:
        self.run = run

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Table]:
        yield _drawn(self.run, min(80, options.max_width))


def table(run: Run) -> Results:
    """Return the run's results as a table for rich; where the terminal is narrow, names stay and other columns go.

    The best mean among the contenders whose seeds all reached the end is bold and starred.
    """
    return Results(run)


def _drawn(run: Run, width: int) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    summaries = summary(run)
    result = Table(
        title=Text(words.title([run], summaries)),
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        show_edge=False,
        pad_edge=False,
        title_justify="left",
        caption=Text(_caption(run, summaries)),
        caption_justify="left",
    )
    # 80 columns are spent on a second number and a first counter. The report and the JSON have all.
    whole = words.columns(summaries, run.metrics[:2], run.counters[:1], run.split)
    final, spread, *_, first = list(whole)[:5]
    left_out = {"std", "best seen", *(["train loss"] if run.metrics[1:] else [])}
    left_out |= {header for header in (spread, "work") if set(whole[header]) <= {words.DASH}}
    columns = {header: [Text(cell) for cell in cells] for header, cells in whole.items() if header not in left_out}
    for header, of, star in ((final, "final", "★ "), (first, "first", "")):
        best = best_of(summaries, run.metric, of)
        columns[header] = [
            _marked(s, getattr(s, of), text, best, star) for s, text in zip(summaries, whole[header], strict=True)
        ]
    columns["seeds"] = [
        Text(f"{len(s.seeds_done)}/{s.seeds}", "red" if s.seeds_failed else "yellow" if s.seeds_unfinished else "")
        for s in summaries
    ]
    heads = {header: textwrap.wrap(header, 8, break_long_words=False) for header in columns}
    widths = {header: 2 + max(map(len, [*heads[header], *cells])) for header, cells in columns.items()}
    least = [header for header in columns if header not in (final, first, spread, "seconds", "seeds")]
    for header in (first, spread, *reversed(least), "seconds", "seeds"):
        if sum(widths[kept] for kept in columns) > width - _ROOM:
            columns.pop(header, None)
    names = max((len(s.title) for s in summaries), default=9)
    result.add_column("contender", overflow="fold", min_width=max(9, min(names, _ROOM, width - widths[final])))
    for header in columns:
        result.add_column(Text("\n".join(heads[header])), justify="right", no_wrap=True)
    for s, *cells in zip(summaries, *columns.values(), strict=True):
        result.add_row(Text(s.title), *cells)
    return result


def _marked(s: ContenderSummary, spread: Spread | None, text: str, best: float | None, star: str) -> Text:
    from rich.text import Text

    if star and spread is None and s.seeds_failed:
        return Text("failed", style="red")
    if spread is not None and s.comparable and spread.mean == best:
        return Text(star + text, style="bold green")
    return Text(text + ("†" if star and spread and not s.seeds_done else ""))


def _caption(run: Run, summaries: Sequence[ContenderSummary]) -> str:
    spread = words.over_seeds(len(run.counted(s.name)) for s in summaries).capitalize()
    lines = [
        f"{spread}; seconds, work and counts are medians. work: gradient-equivalents, 1 = one backpropagation step."
    ]
    lines += [
        f"† {s.title}: no seed reached the end, values at epoch {s.epochs:.4g}."
        for s in summaries
        if s.final and not s.seeds_done
    ]
    lines += [words.warm_start(s, run.metric) for s in warm_starts(run)]
    rows = [*run.failures, *run.warnings]
    if rows:
        counts = ((len(run.failures), "failure"), (len(run.warnings), "warning"))
        said = ", ".join(words.plural(n, noun) for n, noun in counts if n)
        row, more = rows[0], f" (and {len(rows) - 1} more)" if len(rows) > 1 else ""
        seed = f", seed {row['seed']}" if "seed" in row else ""
        # A plain name says enough in a narrow terminal; those of warm starts have an equals sign.
        name = run.title(row["contender"]) if "=" in row["contender"] else row["contender"]
        lines.append(f"{said} recorded: {clipped(name, 60)}{seed}: {clipped(row['message'], 300)}{more}")
    return "\n".join([*lines, *run.notes])
