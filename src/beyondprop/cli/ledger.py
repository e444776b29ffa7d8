"""`beyondprop ledger`: the table of published and measured numbers."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import arg

from beyondprop.cli.usage import Debug, usage


@dataclass(frozen=True, kw_only=True)
class Ledger:
    """Write the table of published and measured numbers from recorded results."""

    recorded: Annotated[Path, arg(metavar="DIR", help_behavior_hint="")] = Path("reproduction")
    """Where the results are."""
    output: Annotated[Path, arg(metavar="FILE", help_behavior_hint="")] = Path("docs/reproduction.md")
    """The Markdown file."""
    debug: Debug = False

    def run(self) -> int:
        """Do it; return the exit code."""
        from beyondprop.lab.recipes._ledger import ledger
        from beyondprop.lab.runs.files import write_atomically

        with usage():
            text = ledger(self.recorded, self.output)
        sys.stdout.write(f"{write_atomically(self.output, text.encode())}\n")
        return 0
