"""`beyondprop reproduce`: published experiments again."""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from beyondprop.cli.options import Flag, Folder
from beyondprop.cli.usage import UsageError, usage, warnings_to, write_json


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
    json: Flag = False
    """Print the results as JSON; progress goes to the error stream."""
    quiet: Flag = False
    """No progress."""
    debug: Flag = False
    """Show where an error comes from."""

    def run(self) -> int:
        """Do it; return the exit code."""
        from rich.console import Console

        from beyondprop.cli import reproduction

        if self.quick and self.record is not None:
            raise UsageError("--record keeps results of full runs; leave out --quick or --record.")
        console = Console(stderr=self.json)
        if not self.recipe:
            if self.json:
                write_json(reproduction.inventory())
            else:
                reproduction.show_recipes(console)
            return 0
        with usage():
            chosen = reproduction.chosen(self.recipe)
        results = []
        with warnings_to(lambda text: reproduction.say(console, text)):
            reproduction.load_data(chosen, console)
            for name, recipe in chosen:
                try:
                    result, page = reproduction.reproduce(
                        name, recipe, self.out, quick=self.quick, record=self.record, console=console, quiet=self.quiet
                    )
                except KeyboardInterrupt:
                    rest = ["--quick"] * self.quick + ["--out", str(self.out)]
                    rest += [] if self.record is None else ["--record", str(self.record)]
                    reproduction.say(console, "Stopped; what was measured is kept. Go on with:")
                    left = self.recipe[self.recipe.index(name) :]
                    reproduction.say(console, shlex.join(["beyondprop", "reproduce", *left, *rest]))
                    raise
                results.append(json.loads(page.read_text(encoding="utf-8")))
                for row, measured in zip(results[-1]["rows"], result.rows, strict=True):
                    row["verdict"] = measured.verdict
                reproduction.show(result, recipe, page, console)
        if self.json:
            write_json(results)
        return 0
