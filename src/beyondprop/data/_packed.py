"""Arrays in `.npy` and `.npz`, and compressed streams, read within bounds: claims are checked before memory is taken."""

from __future__ import annotations

import io
import math
import os
import struct
import zipfile
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from beyondprop.errors import DataIntegrityError

Array = NDArray[Any]

_DEFLATE_RATIO = 1032
"""The most that deflate, the compression of gzip and zip, can expand a byte to."""

_CHUNK = 1 << 20
_END = struct.Struct("<4s4H2LH")  # the record at the end of a zip archive
_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


def most_bytes(path: Path) -> int:
    """Return how many bytes the content of a compressed file may have: 100 for each of its own, 1 GiB or more."""
    return max(1 << 30, 100 * os.path.getsize(path))


def read_npz(path: Path) -> dict[str, Array]:
    """Read all arrays of a `.npz` file by their names, after a check of the sizes and checksums in it.

    Raises:
        OSError: The file cannot be opened.
        DataIntegrityError: It is no archive of plain arrays, is damaged, or claims more than `most_bytes`; the message begins
            with the file's name and has that of the array.
    """
    found: dict[str, Array] = {}
    place = ""
    with open(path, "rb") as stream:
        try:
            with zipfile.ZipFile(stream) as archive:
                members = archive.infolist()
                claimed, most = sum(member.file_size for member in members), most_bytes(path)
                if claimed > most:
                    raise ValueError(
                        f"its arrays claim {claimed:,} bytes, more than {most:,}; write such arrays uncompressed"
                    )
                # zipfile compares no count: a damaged length in the directory can hide the entries after it.
                stream.seek(-_END.size - len(archive.comment), os.SEEK_END)
                count = _END.unpack(stream.read(_END.size))[4]
                if count not in (len(members), 0xFFFF):  # 0xFFFF: it is in a record for large archives
                    raise ValueError(f"its directory should have {count} entries and has {len(members)}")
                for member in members:
                    name = member.filename.removesuffix(".npy")
                    place = f"array {name[:60]!r}: "
                    if name in found:
                        raise ValueError("there are two of this name")
                    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                        raise ValueError("NumPy writes no such compression")
                    ratio = _DEFLATE_RATIO if member.compress_type == zipfile.ZIP_DEFLATED else 1
                    if member.file_size > ratio * member.compress_size:
                        raise ValueError(
                            f"{member.compress_size:,} bytes cannot hold the {member.file_size:,} that it claims"
                        )
                    with archive.open(member) as inside:
                        if member.filename.endswith(".npy"):
                            found[name] = read_npy(inside, member.file_size)
                        while inside.read(_CHUNK):  # what is no array is checked, and left out
                            pass
        except Exception as error:  # a damaged archive can raise nearly everything
            raise DataIntegrityError(
                f"{path.name} must be a .npz file of plain arrays: {place}{brief(error)}. It is damaged or another file: "
                "put the original there, or write it anew with np.savez."
            ) from None
    return found


def read_npy(stream: IO[bytes], size: int) -> Array:
    """Read one array, whose header and values must fill `size` bytes.

    Raises:
        Exception: Of nearly any kind, where the content is something else; callers name the file.
    """
    version = np.lib.format.read_magic(stream)
    if version not in _HEADERS:
        raise ValueError(f"version {version} of the format is none of plain arrays")
    # The header's own length is bounded by the stream's.
    shape, is_fortran, dtype = _HEADERS[version](stream)
    if dtype.hasobject or not dtype.itemsize:
        raise ValueError(f"values of {dtype} are not read")
    left, claimed = size - stream.tell(), math.prod(shape) * dtype.itemsize
    if claimed != left or min(shape, default=0) < 0:
        raise ValueError(f"its shape {shape} of {dtype} needs {claimed:,} bytes, and there are {left:,}")
    array = np.empty(shape, dtype, order="F" if is_fortran else "C")
    values = array.reshape(-1, order="A").view(np.uint8)
    done = 0
    while chunk := stream.read(_CHUNK):  # to the end: only there is the checksum of an archive looked at
        values[done : done + len(chunk)] = np.frombuffer(chunk, np.uint8)
        done += len(chunk)
    if done != claimed:
        raise EOFError(f"it ends after {done:,} of {claimed:,} bytes")
    return array


class BoundedReader(io.RawIOBase):
    """Reads a stream up to `most` bytes in all, and raises `ValueError` for more: small files can hold no end of zeros."""

    def __init__(self, stream: Any, most: int) -> None:
        self._stream, self._left, self._most = stream, most, most

    def readable(self) -> bool:
        """Return True."""
        return True

    def read(self, size: int = -1, /) -> bytes:
        """Return at most `size` bytes, or all of them."""
        found = self._stream.read(self._left + 1 if size < 0 else min(size, self._left + 1))
        self._left -= len(found)
        if self._left < 0:
            raise ValueError(f"it expands to more than {self._most:,} bytes")
        return found


def brief(error: BaseException) -> str:
    """Return what an error of another library says in one line of at most 200 characters."""
    return " ".join(str(error).split())[:200].rstrip(".") or type(error).__name__
