"""Writing a file whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

from beyondprop.data._files import atomic_file


def write_atomically(path: Path, content: bytes) -> Path:
    """Replace the file at `path` by `content`, on the disk when this returns; a reader or a crash meets the old or the new."""
    with atomic_file(path) as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return path
