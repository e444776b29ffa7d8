"""Checksums of what a run directory holds, so that damage and edits are noticed; older directories have none.

`checksums.txt` has a line `SHA256  BYTES  NAME` for every file of rows that is done: of a training that has ended, of tuning,
of the whole run. It comes after the rows; the last of a name counts. The rows of a training that goes on are covered by its
checkpoint. For settings and environment there is `SHA256  values  NAME`, over their values in whatever form. It comes before
the file is replaced, so that each of a name may be the right one.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from beyondprop.lab.runs.checkpoint import load_checkpoint, read_notes
from beyondprop.lab.runs.files import append

SUMS = "checksums.txt"


@dataclass
class Sums:
    """What `checksums.txt` has.

    Attributes:
        rows: bytes and checksum by file of rows.
        values: checksums by file of values.
        found: whether there is the file.
    """

    rows: dict[str, tuple[int, str]] = field(default_factory=dict)
    values: dict[str, set[str]] = field(default_factory=dict)
    found: bool = True

    def check(self, values: Mapping[str, Any], file: Path) -> bool:
        """Return whether there is a checksum of a file's values.

        Raises:
            ValueError: if they have another one; the message names the file, and what to do.
        """
        known = self.values.get(file.name, ())
        if known and _of_values(values) not in known:
            raise ValueError(
                f"{str(file)!r} is damaged or was edited: its values are not those that {SUMS!r} has a checksum of. Put the "
                f"original back, or delete the lines of {file.name} in {SUMS!r}: it is taken as it stands then, which reports "
                "note."
            )
        return bool(known)

    def lacking(self) -> list[str]:
        """Return a note on what has no checksum."""
        names = [name for name in ("config.toml", "env.json") if name not in self.values] + ["metrics"] * (
            not self.found
        )
        have = "has no checksum" if len(names) == 1 else "have no checksums"
        older = "as in directories of older versions: what was changed there and can be read is not noticed"
        return [f"{', '.join(names)} {have}, {older}."] if names else []


def values_line(values: Mapping[str, Any], name: str) -> bytes:
    """Return the line of a file of values."""
    return f"{_of_values(values)}  values  {name}\n".encode()


def rows_line(size: int, digest: str, name: str) -> bytes:
    """Return the line of a file of rows."""
    return f"{digest}  {size}  {name}\n".encode()


def append_sum(path: Path, line: bytes) -> None:
    """Append a line to the checksums of a run directory, on the disk when this returns."""
    append(path / SUMS, line, to_disk=True)


def read_sums(path: Path) -> Sums:
    """Return the checksums of a run directory.

    Raises:
        ValueError: if their file is damaged; the message says what to delete, and what that does.
    """
    file, sums = path / SUMS, Sums()
    if not file.is_file():
        return Sums(found=False)
    for i, line in enumerate(
        file.read_bytes().split(b"\n")[:-1], start=1
    ):  # what follows the last newline is half-written
        try:
            digest, size, name = line.decode().split("  ", 2)
            is_right = len(digest) == 64 and int(digest, 16) >= 0
            if size == "values" and name in ("config.toml", "env.json"):
                sums.values.setdefault(name, set()).add(digest)
            else:
                sums.rows[name] = int(size), digest
                is_right &= rows_line(*sums.rows[name], name) == line + b"\n" and len(name.encode()) <= 255
                is_right &= re.fullmatch(r"[\w.=+-]+\.jsonl", name) is not None  # no way out of the folder
        except ValueError:
            is_right = False
        if not is_right:
            raise ValueError(
                f"{str(file)!r}, line {i}, is damaged: {line[:100]!r} is not SHA256  BYTES  NAME. Delete the file: settings "
                "and rows are taken as they stand then, which reports note."
            )
    return sums


def check_rows(path: Path, sums: Sums) -> list[str]:
    """Return notes on files of rows that have a checksum and are not there.

    Raises:
        ValueError: if a file is not as it was when its checksum was written; the message says what to delete, and what that
            does.
    """
    notes = []
    for name, (size, digest) in sorted(sums.rows.items()):
        file = path / "metrics" / name
        if not file.is_file():
            notes.append(f"metrics/{name} is missing; --resume makes it again.")
            continue
        content = file.read_bytes()
        more = is_training(file) and len(content) > size  # nothing follows its end
        if more or hashlib.sha256(content[:size]).hexdigest() != digest:
            kept = changed(content, size)
            also = f" and, where it is there, checkpoints/{file.stem}.safetensors" if is_training(file) else ""
            raise ValueError(
                f"{str(file)!r} is damaged: {kept}, by what {str(path / SUMS)!r} says. Delete it{also}: --resume makes it "
                "again from the beginning, and leaves the others as they are."
            )
    return notes


def sealed(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return values with their checksum among them, for a file that is alone."""
    return {**values, "checksum": _of_values(values)}


def unsealed(values: dict[str, Any]) -> bool:
    """Take the checksum out of values that were read, and return whether there was one; another than theirs raises."""
    found = values.pop("checksum", None)
    if found not in (None, _of_values(values)):
        raise ValueError("its values are not those of its checksum")
    return found is not None


def is_training(file: Path) -> bool:
    """Return whether a file of rows is of a training of the comparison, which has a checkpoint beside it."""
    _, dot, seed = file.stem.rpartition(".seed")
    return bool(dot) and seed.isdecimal()


def changed(content: bytes, size: int) -> str:
    """Return how rows differ from what they were when they had so many bytes, with the line where that can be seen."""
    for i, line in enumerate(content.split(b"\n"), start=1):
        try:
            is_row = not line or isinstance(json.loads(line), dict)
        except (ValueError, RecursionError):
            is_row = False
        if not is_row:
            return f"line {i} is no row, {len(content)} bytes are there for {size}"
    return f"{len(content)} of {size} bytes are left" if len(content) < size else "its rows were changed"


def _of_values(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()


def rows_before_checkpoints(path: Path) -> tuple[dict[str, int], list[str]]:
    """Return the bytes of rows that each training's checkpoint was saved after, by the name of both, and what is unreadable.

    Raises:
        ValueError: if these bytes are no longer there as they were; the message says what to delete, and what that does.
    """
    found: dict[str, int] = {}
    notes: list[str] = []
    for saved in sorted((path / "checkpoints").glob("*.safetensors")):
        file = path / "metrics" / f"{saved.stem}.jsonl"
        try:
            covered, _, digest = read_notes(saved).get("rows", "").partition(":")
            size = int(covered or -1)
        except ValueError:
            notes.append(f"{saved.name} is damaged, so that {file.name} could not be checked against it.")
            continue
        if size < 0:  # of an older version
            continue
        content = file.read_bytes()[:size] if file.is_file() else b""
        if hashlib.sha256(content).hexdigest() != digest:
            load_checkpoint(saved)  # is it that which is damaged?
            kept = changed(content, size)
            raise ValueError(
                f"{str(file)!r} is damaged: {kept}, by what {str(saved)!r} says. Delete both: --resume trains this one "
                "again from its beginning, and leaves the others as they are."
            )
        found[saved.stem] = size
    return found, notes
