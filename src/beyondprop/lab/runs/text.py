"""Text that others wrote, as it may be shown: messages, titles of rules, names of files, what a received run directory has."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

_SEQUENCES = re.compile(
    "(?:\x1b[\\]PX^_]|[\x9d\x90\x98\x9e\x9f])[^\x07\x1b\x9c]*(?:\x07|\x1b\\\\|\x9c)"  # titles, links and other strings
    "|(?:\x1b\\[|\x9b)[0-?]*[ -/]*[@-~]"  # colours, movements
    "|\x1b[ -/]*[0-~]"
)
# Controls but tab and newline; marks that turn the direction of what follows.
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def clean(text: str) -> str:
    """Return text without escape sequences and control characters, for people to read."""
    if text.isprintable():
        return text
    return encodable(_CONTROLS.sub("", _SEQUENCES.sub("", text)))


def encodable(text: str) -> str:
    """Return text that UTF-8 has: lone surrogates, as names of files can hold, are written by their codes."""
    return text.encode("utf-8", "backslashreplace").decode()


def cleaned(values: Any, clean: Callable[[str], str] = clean) -> Any:
    """Return nested dicts and lists of plain values with all text in them clean."""
    if isinstance(values, str):
        return clean(values)
    if isinstance(values, dict):
        return {cleaned(key, clean): cleaned(value, clean) for key, value in values.items()}
    return [cleaned(value, clean) for value in values] if isinstance(values, list) else values


def clipped(text: str, most: int) -> str:
    """Return text of at most `most` characters: from a longer one the middle is left out."""
    if len(text) <= most:
        return text
    end = most // 3
    return f"{text[: most - end - 3]} … {text[len(text) - end :]}"
