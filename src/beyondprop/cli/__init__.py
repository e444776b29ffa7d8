"""The command line: `beyondprop compare`, `report`, `list`, `reproduce` and `ledger`, one file a command."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Sequence

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: 0 done, 1 failed, 2 wrong usage, 130 interrupted."""
    try:
        from beyondprop.cli.entry import run  # here, so that Ctrl-C meanwhile is no traceback

        code = run(argv)
        sys.stdout.flush()
    except KeyboardInterrupt:
        return 130
    except OSError as error:
        if not isinstance(error, BrokenPipeError):  # whatever is about a file was told; a full disk behind `>` is left
            sys.stderr.write(f"beyondprop: The standard output cannot be written: {error}\n")
        # The reader of our output may be gone, as in `beyondprop list | head`; nothing is left to flush at exit.
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return code
