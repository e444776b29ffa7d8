"""What the commands share: types of options, wrong usage, warnings as lines, JSON on standard output."""

from __future__ import annotations

import contextlib
import json
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import arg
from tyro.constructors import PrimitiveConstructorSpec

from beyondprop.errors import DataIntegrityError, DataUnavailableError
from beyondprop.lab.comparing.settings import Flag, check_workers
from beyondprop.lab.runs.text import cleaned

if TYPE_CHECKING:
    from rich.console import Console

Debug = Annotated[Flag, arg(help="Show where an error comes from.")]
Json = Annotated[Flag, arg(help="Print the results as JSON; progress goes to the error stream.")]
Folder = Annotated[Path | None, arg(metavar="DIR", help_behavior_hint="")]


def _workers(texts: list[str]) -> int | str:
    workers = int(texts[0]) if texts[0].lstrip("-").isdecimal() else texts[0]
    check_workers(workers)
    return workers


if TYPE_CHECKING:
    Workers = int | str | None
else:
    Workers = Annotated[
        Any,
        PrimitiveConstructorSpec(
            nargs=1,
            metavar="N|ray",
            instance_from_str=_workers,
            is_instance=lambda value: value is None or isinstance(value, int | str),
            str_from_instance=lambda value: [str(value)],
        ),
        arg(help_behavior_hint="(default: this process)"),
    ]


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
def warnings_to(tell: Callable[[str], None]) -> Iterator[None]:
    """Tell every warning in a line instead of showing it."""
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_rest: tell(f"Warning: {message}")
        yield


def say(console: Console, line: str, style: str = "") -> None:
    """Print a line as it is."""
    from rich.text import Text

    console.print(Text(line, style=style), soft_wrap=True)


def write_json(value: Any) -> None:
    """Print a value as JSON."""
    from beyondprop.cli.terminal import escaped

    sys.stdout.write(escaped(json.dumps(value, indent=2, ensure_ascii=False)) + "\n")


def fields(thing: object, *names: str) -> dict[str, Any]:
    """Return some attributes by their names, with clean texts."""
    return {name: cleaned(getattr(thing, name)) for name in names}
