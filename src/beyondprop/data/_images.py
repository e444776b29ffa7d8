"""Formats of published images: IDX of the MNIST family; CIFAR-10 as an archive of pickles, or as lossless WebP strips.

CIFAR-10 is read as `train_images` and `train_labels`, `test_images` and `test_labels`, in this order, all uint8: images
`(N, 3, 32, 32)`, labels `(N,)`.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import math
import pickle
import struct
import tarfile
import zlib
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from beyondprop.data._files import atomic_file, verify
from beyondprop.errors import DataIntegrityError, DataUnavailableError

Bytes = NDArray[np.uint8]

STRIP_IMAGES = 500
"""Images in one WebP strip, stacked vertically."""

STRIP_SHA256 = {
    "train": "47af8b02cfcfb6cdf3dbbd1969ad7f1b70f4413f6f80f437b020ee4e5bc8304a",
    "test": "f9b1e2130bab680db56eb06d886f7f1ad0f1183907ceff4659d1735c890f5b04",
    "labels": "100457827cb30b2869dbdce3761c5279714820de9a8c6fa4d0dcc7cbc3037527",
}
"""SHA-256 of the decoded images, uint8 `(N, 32, 32, 3)` in C order, and of the file `labels.npz`."""


def read_idx(path: Path) -> Bytes:
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


def _uint8(kind: str, *args: object) -> np.dtype[np.uint8]:
    """Stands for `numpy.dtype` while a pickle is read: uint8 and no other."""
    del args
    if kind != "u1":
        raise pickle.UnpicklingError(f"only arrays of uint8 are accepted, this one is {kind!r}")
    return np.dtype(np.uint8, copy=True)  # whose state the pickle sets


_ADMITTED = {
    ("numpy", "ndarray"): None,  # NumPy pickles an empty array first, of this type, and then its state
    ("numpy", "dtype"): _uint8,
    ("numpy.core.multiarray", "_reconstruct"): lambda *args: np.empty(0, np.uint8),
    ("numpy._core.multiarray", "_reconstruct"): lambda *args: np.empty(0, np.uint8),
}


class _Unpickler(pickle.Unpickler):
    """Reads numbers, strings, containers and uint8 arrays; imports no name in the pickle, so runs nothing."""

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        if (module_name, global_name) not in _ADMITTED:
            raise pickle.UnpicklingError(f"it asks for {module_name}.{global_name}; only arrays of uint8 are accepted")
        return _ADMITTED[module_name, global_name]


def read_batch(data: bytes, where: str) -> tuple[Bytes, Bytes]:
    """Read images and labels of one batch, a pickle, without running anything that it may contain.

    Raises:
        DataIntegrityError: It is no dict with `data`, uint8 `(N, 3072)`, channels first, and `labels`, N integers;
            the message calls it `where`.
    """
    try:
        content = _Unpickler(io.BytesIO(data), encoding="latin1").load()  # as NumPy wants arrays from Python 2
        images = content["data"].reshape(-1, 3, 32, 32)
        labels = np.array(content["labels"], np.uint8)
    except Exception as error:  # a damaged pickle can raise nearly everything
        raise DataIntegrityError(f"{where} is not a CIFAR-10 batch: {error or type(error).__name__}.") from error
    if labels.shape != images.shape[:1]:
        raise DataIntegrityError(f"{where} has {len(images)} images and labels of shape {labels.shape}.")
    return images, labels


def read_archive(path: Path) -> dict[str, Bytes]:
    """Read `cifar-10-python.tar.gz` in one pass, without unpacking it to disk.

    Raises:
        DataIntegrityError: A batch is missing or not readable.
    """
    found: dict[str, tuple[Bytes, Bytes]] = {}
    wanted = [f"data_batch_{number}" for number in range(1, 6)] + ["test_batch"]
    try:
        with tarfile.open(path, "r|gz") as archive:
            for member in archive:
                name = member.name.rpartition("/")[2]
                if name in wanted and (stream := archive.extractfile(member)) is not None:
                    found[name] = read_batch(stream.read(), f"{path}:{member.name}")
    except (tarfile.TarError, EOFError, OSError) as error:
        raise DataIntegrityError(f"{path} is not a complete tar.gz archive: {error}.") from error
    if missing := [name for name in wanted if name not in found]:
        raise DataIntegrityError(f"{path} lacks {', '.join(missing)}.")
    images, labels = map(np.concatenate, zip(*(found[name] for name in wanted[:5]), strict=True))
    test_images, test_labels = found["test_batch"]
    return {"train_images": images, "train_labels": labels, "test_images": test_images, "test_labels": test_labels}


def read_strips(folder: Path, cache: Path) -> dict[str, Bytes]:
    """Read the layout of `train_00.webp`, …, `test_00.webp`, … and `labels.npz`, and check it.

    Decoding takes seconds, so the decoded arrays are kept in `cache` (184 MB) and taken from there the next
    time, after a check of their SHA-256. A cache that cannot be written is done without. Images are views of
    channels-last arrays.

    Raises:
        DataIntegrityError: A file is not what it must be; the message has its name.
        DataUnavailableError: A strip is missing.
    """
    verify(folder / "labels.npz", STRIP_SHA256["labels"])
    arrays: dict[str, Bytes] = {}
    with np.load(folder / "labels.npz") as file:
        for part in ("train", "test"):
            labels = file[part]
            images = _decoded(folder, part, len(labels), cache / f"{part}_images.npy")
            arrays |= {f"{part}_images": images.transpose(0, 3, 1, 2), f"{part}_labels": labels}
    return arrays


def decode_strips(folder: Path, part: str, count: int) -> Bytes:
    """Decode images `(count, 32, 32, 3)` from `folder/part_00.webp`, …: one strip in memory at a time."""
    from PIL import Image  # only this layout needs Pillow

    images = np.empty((count, 32, 32, 3), np.uint8)
    for start in range(0, count, STRIP_IMAGES):
        path = folder / f"{part}_{start // STRIP_IMAGES:02d}.webp"
        rows = images[start : start + STRIP_IMAGES]
        try:
            with Image.open(path) as strip:
                form, expected = (strip.mode, *strip.size), ("RGB", 32, 32 * len(rows))
                if form != expected:
                    raise DataIntegrityError(f"{path} has mode, width, height {form}, expected {expected}.")
                rows[:] = np.asarray(strip).reshape(rows.shape)
        except FileNotFoundError:
            raise DataUnavailableError(
                f"{path} was not found, though {folder / 'labels.npz'} is there. Put the missing strip there."
            ) from None
        except OSError as error:
            raise DataIntegrityError(f"{path} is not a readable WebP file: {error}.") from error
    return images


def _decoded(folder: Path, part: str, count: int, cached: Path) -> Bytes:
    """The array in the file `cached` if it is the right one, else decoded, and kept there if that can be."""
    with suppress(OSError, ValueError, EOFError):  # nothing there, or not this array: decode
        images = np.load(cached)
        _verify_images(images, part, cached)
        return images
    images = decode_strips(folder, part, count)
    _verify_images(images, part, folder / f"{part}_*.webp")
    with suppress(OSError), atomic_file(cached) as stream:
        np.save(stream, images)
    return images


def _verify_images(images: Bytes, part: str, where: Path) -> None:
    found, expected = hashlib.sha256(images.data).hexdigest(), STRIP_SHA256[part]
    if found != expected:
        raise DataIntegrityError(
            f"{where} gives an array of SHA-256 {found}, expected {expected}. A file of it is damaged or another one."
        )
