"""Writing a file whole or not at all, or at its end; errors of the disk have the path."""

from __future__ import annotations

import os
from pathlib import Path

from beyondprop.data._files import atomic_file, disk_errors_name, is_part, remove_parts

__all__ = ["append", "is_part", "remove_parts", "synced", "write_atomically"]


def write_atomically(path: Path, *content: bytes | memoryview) -> Path:
    """Replace the file at `path` by `content`, on the disk when this returns; a reader or a crash meets the old or the new."""
    with atomic_file(path) as file:
        file.writelines(content)
        file.flush()
        os.fsync(file.fileno())
    return path


def append(path: Path, content: bytes, *, to_disk: bool = False) -> None:
    """Write at the end of a file; it is in the file when this returns, and with `to_disk` on the disk."""
    with disk_errors_name(path), open(path, "ab") as file:
        file.write(content)
        if to_disk:
            file.flush()
            os.fsync(file.fileno())


def synced(path: Path) -> None:
    """Return when what a file has is on the disk."""
    with disk_errors_name(path), open(path, "rb") as file:
        os.fsync(file.fileno())
