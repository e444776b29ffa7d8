"""`beyondprop reproduce`: recipes run and shown in the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from beyondprop import data
from beyondprop.lab import recipes
from beyondprop.lab.recipes._base import MISSED, REACHED, Context, Recipe, Result
from beyondprop.lab.runs.files import write_atomically

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

_STYLES = {REACHED: "green", MISSED: "bold red"}


def chosen(names: Sequence[str]) -> list[tuple[str, Recipe]]:
    """Return the recipes of these ids.

    Raises:
        ValueError: if there is none of an id; the message lists those that there are.
    """
    return [(name, recipes.get(name)) for name in names]


def load_data(chosen: Sequence[tuple[str, Recipe]], console: Console) -> None:
    """Find, or download, what the recipes need before anything is trained.

    Raises:
        DataUnavailableError: if a data set is not at hand and cannot be downloaded.
    """
    for needed in dict.fromkeys(name for _, recipe in chosen for name in recipe.needs):
        if not data.at_hand(needed):
            if data.describe(needed).has_download:
                say(console, f"{needed} is not at hand; downloading it")
            data.load(needed)


def say(console: Console, line: str) -> None:
    """Print a line as it is."""
    console.print(line, style="dim", markup=False, highlight=False, soft_wrap=True)


def reproduce(
    name: str, recipe: Recipe, out: Path, *, quick: bool, record: Path | None, console: Console, quiet: bool
) -> tuple[Result, Path]:
    """Run one recipe in its own directory and return its result and the result's file."""
    path = out / (f"{name}-quick" if quick else name)

    def tell(line: str) -> None:
        if not quiet:
            say(console, f"{name}: {line}")

    result = recipe.run(name, Context(path, quick, tell))
    if record is not None and not quick:
        result.write(record / f"{name}.json")
        if (figure := path / "figure.png").is_file():
            write_atomically(record / f"{name}.png", figure.read_bytes())
    return result, path / "result.json"


def show(result: Result, recipe: Recipe, page: Path, console: Console) -> None:
    """Print a result as a table, with the figure's path below."""
    console.print(_table(result, recipe))
    for file in (page.parent / "figure.png", page):
        if file.is_file():
            console.print(str(file), soft_wrap=True, markup=False, highlight=False)


def inventory() -> list[dict[str, Any]]:
    """Return what can be reproduced, as JSON has it."""
    found = [(name, recipes.get(name)) for name in recipes.names()]
    return [
        {"id": name, **{key: getattr(recipe, key) for key in ("title", "source", "about", "minutes", "needs")}}
        for name, recipe in found
    ]


def show_recipes(console: Console) -> None:
    """Print what can be reproduced."""
    from rich import box
    from rich.table import Table

    table = Table(title="Recipes", title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("id", no_wrap=True)
    for header in ("what it is", "source"):
        table.add_column(header)
    table.add_column("minutes", justify="right")
    for name in recipes.names():
        recipe = recipes.get(name)
        table.add_row(name, recipe.title, recipe.source, f"{recipe.minutes:.0f}")
    console.print(table)


def _table(result: Result, recipe: Recipe) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    title = f"{recipe.title}\n{recipe.source}"
    if result.quick:
        title += "\nShort version: it shows that all works; its numbers are no reproduction."
    table = Table(title=Text(title), title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    columns = [("", [row.label for row in result.rows]), ("published", [row.published for row in result.rows])]
    columns += [("asked for", [row.asked for row in result.rows]), ("measured", [row.shown for row in result.rows])]
    if not result.quick:
        columns.append(("verdict", [row.verdict for row in result.rows]))
    columns.append(("note", [row.note for row in result.rows]))
    columns = [column for column in columns if any(column[1])]
    for header, _ in columns:
        table.add_column(header, overflow="fold")
    for cells in zip(*(texts for _, texts in columns), strict=True):
        table.add_row(*(Text(cell, style=_STYLES.get(cell, "")) for cell in cells))
    return table
