"""Warnings that are both shown and recorded."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO


@contextmanager
def recorded_warnings(seen: list[str], record: Callable[[str], None]) -> Iterator[None]:
    """Call `record(message)` for every new warning inside, and show it as it would have been.

    Args:
        seen: messages recorded before, which are not recorded again; new ones are appended.
        record: gets the text of a warning.
    """
    with warnings.catch_warnings():
        show = warnings.showwarning

        def both(
            message: Warning | str,
            category: type[Warning],
            filename: str,
            lineno: int,
            file: TextIO | None = None,
            line: str | None = None,
        ) -> None:
            if str(message) not in seen:
                seen.append(str(message))
                record(str(message))
            show(message, category, filename, lineno, file, line)

        warnings.showwarning = both
        yield
