"""`beyondprop ledger`: the table of published and measured numbers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import arg

from beyondprop.cli.usage import Debug, usage, warnings_to


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
        from beyondprop.cli.terminal import write_error, write_line
        from beyondprop.lab.recipes._ledger import ledger
        from beyondprop.lab.runs.files import write_atomically

        with usage(), warnings_to(write_error):
            text = ledger(self.recorded, self.output)
        write_line(write_atomically(self.output, text.encode("utf-8", "backslashreplace")))
        return 0
