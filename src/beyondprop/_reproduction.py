"""`beyondprop reproduce`: recipes run and shown in the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from beyondprop import data, recipes
from beyondprop.recipes._base import MISSED, REACHED, Context, Recipe, Result

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


def reproduce(
    name: str, recipe: Recipe, out: Path, *, quick: bool, record: Path | None, console: Console, quiet: bool
) -> tuple[Result, Path]:
    """Run one recipe in its own directory and return its result and the result's file."""
    for needed in recipe.needs:
        if not data.at_hand(needed):  # a missing data set is found before anything is trained
            data.load(needed)
    path = out / (f"{name}-quick" if quick else name)

    def say(line: str) -> None:
        if not quiet:
            console.print(f"{name}: {line}", style="dim", markup=False, highlight=False, soft_wrap=True)

    result = recipe.run(name, Context(path, quick, say))
    if record is not None and not quick:
        result.write(record / f"{name}.json")
    return result, path / "result.json"


def show(result: Result, recipe: Recipe, page: Path, console: Console) -> None:
    """Print a result as a table, with the figure's path below."""
    console.print(_table(result, recipe))
    for file in (page.parent / "figure.png", page):
        if file.is_file():
            console.print(str(file), soft_wrap=True, markup=False, highlight=False)


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
    columns = [column for column in columns if any(column[1])]
    for header, _ in columns:
        table.add_column(header, overflow="fold")
    for cells in zip(*(texts for _, texts in columns), strict=True):
        table.add_row(*(Text(cell, style=_STYLES.get(cell, "")) for cell in cells))
    notes = [f"{row.label}: {row.note}" for row in result.rows if row.note]
    if notes:
        table.caption = Text("\n".join(notes))
        table.caption_justify = "left"
    return table
