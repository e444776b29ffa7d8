"""The IDX format of the MNIST family."""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from beyondprop.errors import DataIntegrityError


def read_idx(path: Path) -> NDArray[np.uint8]:
    """Read a gzipped IDX file of unsigned bytes: images `(N, rows, columns)` or labels `(N,)`.

    The format: bytes 0 0 8 n (8 for uint8, n dimensions), n big-endian 32-bit sizes, the values in C order.

    Raises:
        DataIntegrityError: The file is not gzip, not IDX of unsigned bytes, too short or too long.
    """
    try:
        with gzip.open(path) as stream:
            data = bytearray(stream.read())  # a bytearray: the array on it must be writable
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataIntegrityError(f"{path} is not a complete gzip file: {error}.") from None
    if len(data) < 4 or data[:3] != b"\0\0\x08":
        raise DataIntegrityError(f"{path} begins with bytes {data[:4].hex(' ')}; IDX of uint8 begins with 00 00 08.")
    start = 4 + 4 * data[3]
    if len(data) < start:
        raise DataIntegrityError(f"{path} has {len(data)} bytes, too few for an IDX header of {start}.")
    shape = struct.unpack(f">{data[3]}I", data[4:start])
    if len(data) - start != math.prod(shape):
        raise DataIntegrityError(
            f"{path} has {len(data) - start} values after its header, expected {math.prod(shape)} for shape {shape}."
        )
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape)
