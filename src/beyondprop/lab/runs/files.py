"""Writing a file whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

from beyondprop.data._files import atomic_file


def write_atomically(path: Path, *content: bytes | memoryview) -> Path:
    """Replace the file at `path` by `content`, on the disk when this returns; a reader or a crash meets the old or the new."""
    with atomic_file(path) as file:
        file.writelines(content)
        file.flush()
        os.fsync(file.fileno())
    return path


def is_part(path: Path) -> bool:
    """Return whether this is what a killed process left of a file that was being written."""
    return path.name.startswith(".") and path.name.endswith(".part")
