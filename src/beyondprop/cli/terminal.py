"""The one way to the terminal: what others wrote is shown without escape sequences and control characters."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

from beyondprop.lab.runs.text import clean, clipped

_MOST = 1900  # characters of an error


class Terminal(Console):
    """A console that cleans every text before it is laid out; its own colours and movements are not text."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Render as rich does."""
        if isinstance(renderable, str):
            renderable = clean(renderable)
        elif isinstance(renderable, Text) and (plain := clean(renderable.plain)) != renderable.plain:
            renderable = renderable.copy()
            renderable.plain = plain
        return super().render(renderable, options)


def write_error(text: str) -> None:
    """Write an error, which may hold text of files, plugins and other packages, to the error stream."""
    sys.stderr.write(f"beyondprop: {clipped(clean(text), _MOST)}\n")


def write_line(text: Any) -> None:
    """Write a line to the standard output."""
    sys.stdout.write(f"{clean(str(text))}\n")


def escaped(json_text: str) -> str:
    """Return JSON with what a terminal may take for a command, and what UTF-8 does not have, as JSON escapes it."""
    return re.sub(
        "[\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]", lambda m: f"\\u{ord(m[0]):04x}", json_text
    )
