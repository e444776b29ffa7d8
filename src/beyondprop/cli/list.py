"""`beyondprop list`: what there is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from tyro.conf import UseAppendAction, arg

from beyondprop.cli.options import Flag
from beyondprop.cli.usage import usage, write_json


@dataclass(frozen=True, kw_only=True)
class List:
    """Show the rules, networks and data sets that there are."""

    plugin: Annotated[UseAppendAction[tuple[str, ...]], arg(metavar="FILE", help_behavior_hint="(repeatable)")] = ()
    """Python file or module that registers rules of your own."""
    json: Flag = False
    """Print it as JSON."""
    debug: Flag = False
    """Show where an error comes from."""

    def run(self) -> int:
        """Do it; return the exit code."""
        from rich.console import Console

        from beyondprop.cli import listing

        with usage():
            found = listing.inventory(self.plugin)
        if self.json:
            write_json(found)
        else:
            listing.show(found, Console())
        return 0
