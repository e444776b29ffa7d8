"""What the commands share: wrong usage, warnings as lines, JSON on standard output."""

from __future__ import annotations

import contextlib
import json
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

from beyondprop.errors import DataIntegrityError, DataUnavailableError


class UsageError(Exception):
    """What was asked for cannot be done; the message says what can."""


@contextlib.contextmanager
def usage() -> Iterator[None]:
    """Turn what is wrong with the arguments into a `UsageError`; damaged data is not the user's mistake."""
    try:
        yield
    except (ValueError, ImportError, FileExistsError, FileNotFoundError) as error:
        if isinstance(error, DataIntegrityError | DataUnavailableError):
            raise
        raise UsageError(str(error)) from error


@contextlib.contextmanager
def warnings_to(say: Callable[[str], None]) -> Iterator[None]:
    """Say every warning in a line instead of showing it."""
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_rest: say(f"Warning: {message}")
        yield


def write_json(value: Any) -> None:
    """Print a value as JSON."""
    sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")
