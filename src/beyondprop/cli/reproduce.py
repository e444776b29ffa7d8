"""`beyondprop reproduce`: published experiments again."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import Positional, arg

from beyondprop.cli.usage import (
    Debug,
    Flag,
    Folder,
    Json,
    UsageError,
    Workers,
    fields,
    say,
    usage,
    warnings_to,
    write_json,
)

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from beyondprop.lab.recipes import Recipe, Result


@dataclass(frozen=True, kw_only=True)
class Reproduce:
    """Run a published experiment again, and show published and measured side by side.

    The exit status says whether it ran. Whether what is asked for was reached stands in the table's and the JSON's verdicts.
    """

    recipe: Positional[tuple[str, ...]] = ()
    """Recipes by id; without one, they are listed."""
    quick: Flag = False
    """The short version: it shows that all works; its numbers are no reproduction."""
    out: Annotated[Path, arg(metavar="DIR", help_behavior_hint="")] = Path("runs/reproduce")
    """Where each recipe has its directory; one that was stopped goes on from what is there."""
    record: Folder = None
    """Copy results and figures to this directory, as the ledger wants them."""
    workers: Workers = None
    """Train the comparisons that recipes are made of in N processes at once, or by `ray` on the Ray cluster that runs."""
    json: Json = False
    quiet: Flag = False
    """No progress."""
    debug: Debug = False

    def run(self) -> int:
        """Do it; return the exit code."""
        from beyondprop.cli.terminal import Terminal
        from beyondprop.lab import recipes

        if self.quick and self.record is not None:
            raise UsageError("--record keeps results of full runs; leave out --quick or --record.")
        console = Terminal(stderr=self.json)
        with usage():
            chosen = [(name, recipes.get(name)) for name in self.recipe or recipes.names()]
        if not self.recipe:
            if self.json:
                about = ("title", "source", "about", "minutes", "needs")
                write_json([{"id": name, **fields(recipe, *about)} for name, recipe in chosen])
            else:
                _show_recipes(chosen, console)
            return 0
        results = []
        with warnings_to(lambda text: say(console, text, "dim")):
            _load_data([recipe for _, recipe in chosen], console)
            for name, recipe in chosen:
                try:
                    results.append(self._reproduce(name, recipe, console))
                except KeyboardInterrupt:
                    rest = ["--quick"] * self.quick + ["--out", str(self.out)]
                    rest += [] if self.record is None else ["--record", str(self.record)]
                    rest += [] if self.workers is None else ["--workers", str(self.workers)]
                    left = self.recipe[self.recipe.index(name) :]
                    say(console, "Stopped; what was measured is kept. Go on with:", "dim")
                    say(console, shlex.join(["beyondprop", "reproduce", *left, *rest]), "dim")
                    raise
        if self.json:
            write_json(results)
        return 0

    def _reproduce(self, name: str, recipe: Recipe, console: Console) -> dict[str, Any]:
        """Run one recipe in its own directory, show its result and return it as JSON has it."""
        from beyondprop.lab.recipes._base import Context
        from beyondprop.lab.runs.files import write_atomically

        path = self.out / (f"{name}-quick" if self.quick else name)

        def tell(line: str) -> None:
            if not self.quiet:
                say(console, f"{name}: {line}", "dim")

        result = recipe.run(name, Context(path, self.quick, tell, self.workers))
        figure, page = path / "figure.png", path / "result.json"
        if self.record is not None:
            result.write(self.record / f"{name}.json")
            if figure.is_file():
                write_atomically(self.record / f"{name}.png", figure.read_bytes())
        console.print(_table(result, recipe))
        for file in (figure, page):
            if file.is_file():
                say(console, str(file))
        found = json.loads(page.read_text(encoding="utf-8"))
        for row, measured in zip(found["rows"], result.rows, strict=True):
            row["verdict"] = measured.verdict
        return found


def _load_data(chosen: Sequence[Recipe], console: Console) -> None:
    """Find, or download, what the recipes need before anything is trained."""
    from beyondprop import data

    for needed in dict.fromkeys(name for recipe in chosen for name in recipe.needs):
        if not data.at_hand(needed):
            if data.describe(needed).has_download:
                say(console, f"{needed} is not at hand; downloading it", "dim")
            data.load(needed)


def _show_recipes(chosen: Sequence[tuple[str, Recipe]], console: Console) -> None:
    from rich import box
    from rich.table import Table

    table = Table(title="Recipes", title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("id", no_wrap=True)
    for header in ("what it is", "source"):
        table.add_column(header)
    table.add_column("minutes", justify="right")
    for name, recipe in chosen:
        table.add_row(name, recipe.title, recipe.source, f"{recipe.minutes:.0f}")
    console.print(table)


def _table(result: Result, recipe: Recipe) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from beyondprop.lab.recipes._base import MISSED, REACHED

    title = f"{recipe.title}\n{recipe.source}"
    if result.quick:
        title += "\nShort version: it shows that all works; its numbers are no reproduction."
    table = Table(title=Text(title), title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    attributes = {"": "label", "published": "published", "asked for": "asked", "measured": "shown"}
    attributes |= {"note": "note"} if result.quick else {"verdict": "verdict", "note": "note"}
    columns = {header: [getattr(row, name) for row in result.rows] for header, name in attributes.items()}
    columns = {header: texts for header, texts in columns.items() if any(texts)}
    for header, texts in columns.items():
        table.add_column(header, overflow="fold", min_width=None if header else min(20, max(map(len, texts))))
    styles = {REACHED: "green", MISSED: "bold red"}
    for cells in zip(*columns.values(), strict=True):
        table.add_row(*(Text(cell, style=styles.get(cell, "")) for cell in cells))
    return table
