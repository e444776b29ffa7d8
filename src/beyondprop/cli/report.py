"""`beyondprop report`: figures, table and page of recorded runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import Positional, arg

from beyondprop.cli.usage import Debug, Flag, UsageError, say, usage, warnings_to, write_json

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True, kw_only=True)
class Report:
    """Make the figures and the report of recorded runs again, several runs side by side."""

    runs: Positional[tuple[Path, ...]]
    """Run directories."""
    output: Annotated[Path | None, arg(metavar="FILE", help_behavior_hint="")] = None
    """The HTML file. Default: report.html in the first run directory."""
    json: Flag = False
    """Print the results as JSON."""
    debug: Debug = False

    def run(self) -> int:
        """Do it; return the exit code."""
        from beyondprop.cli.terminal import Terminal

        if not self.runs:
            raise UsageError(
                "report needs a run directory, such as: beyondprop report runs/20260131-174502-digits-mlp-100x2"
            )
        console = Terminal(stderr=self.json)
        with warnings_to(lambda text: say(console, text, "yellow")):
            show(self.runs, self.output, as_json=self.json, console=console)
        return 0


def show(paths: Sequence[Path], output: Path | None, *, as_json: bool, console: Console) -> int:
    """Write the report, show the results; return 1 where every training failed."""
    from beyondprop.lab import report

    with usage():
        runs = [report.read_run(path) for path in paths]
    page = report.write_report(*paths, output=output)
    if as_json:
        found = [
            {**report.to_json(run), "path": str(path), "report": str(page)}
            for run, path in zip(runs, paths, strict=True)
        ]
        write_json(found[0] if len(found) == 1 else found)
    else:
        for run in runs:
            console.print(report.table(run))
        figure = page.parent / "figures" / f"{runs[0].metric.key}.png"
        for file in (figure, page) if output is None and figure.is_file() else (page,):
            say(console, str(file))
    seeds = [run.seeds(rule.name) for run in runs for rule in run.contenders]
    return int(all(not s["done"] and not s["unfinished"] for s in seeds))
