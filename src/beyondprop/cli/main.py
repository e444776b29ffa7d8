"""The entry: parse, run, and say what went wrong.

Whatever imports torch is imported when a command runs: help is there at once.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import tyro

from beyondprop.cli.compare import Compare
from beyondprop.cli.ledger import Ledger
from beyondprop.cli.list import List
from beyondprop.cli.report import Report
from beyondprop.cli.reproduce import Reproduce
from beyondprop.cli.usage import UsageError


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: 0 done, 1 failed, 2 wrong usage, 130 interrupted."""
    try:
        command: Any = tyro.cli(
            Compare | Report | List | Reproduce | Ledger,
            prog="beyondprop",
            args=argv,
            description="Train networks by what comes after plain backpropagation, side by side with it.",
        )
    except SystemExit as done:  # help, or what tyro has explained
        return done.code if isinstance(done.code, int) else int(done.code is not None)
    try:
        return command.run()
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader of our output is gone, as in `beyondprop list | head`; nothing is left to say.
        sys.stdout = None  # type: ignore[assignment]
        return 1
    except Exception as error:
        if command.debug:
            raise
        known = isinstance(error, UsageError | OSError | ValueError | RuntimeError)
        text = str(error) if known and str(error) else f"{type(error).__name__}: {error}"
        hint = "" if known else "\n--debug shows where it comes from."
        sys.stderr.write(f"beyondprop: {text}{hint}\n")
        return 2 if isinstance(error, UsageError) else 1
