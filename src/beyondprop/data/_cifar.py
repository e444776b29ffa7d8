"""CIFAR-10 in its two layouts: the canonical archive of pickles, and lossless WebP strips."""

from __future__ import annotations

import hashlib
import io
import pickle
import tarfile
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


class _Array:
    """Stands for `numpy.ndarray` while a pickle is read: makes nothing but uint8 arrays."""

    value: Bytes

    def __init__(self, *args: object) -> None:
        del args  # numpy pickles an empty array first; what it holds comes through __setstate__

    def __setstate__(self, state: tuple[int, tuple[int, ...], _Dtype, bool, bytes]) -> None:
        _, shape, dtype, fortran, data = state
        if not isinstance(dtype, _Dtype) or not isinstance(data, bytes):
            raise pickle.UnpicklingError("only arrays of uint8 are accepted")
        # A bytearray, so that the array is writable, as torch wants it.
        self.value = np.frombuffer(bytearray(data), np.uint8).reshape(shape, order="F" if fortran else "C")


class _Dtype:
    """Stands for `numpy.dtype` while a pickle is read: uint8 and no other."""

    def __init__(self, kind: str | bytes, *args: object) -> None:
        del args
        if kind not in {"u1", b"u1"}:
            raise pickle.UnpicklingError(f"only arrays of uint8 are accepted, this one is {kind!r}")

    def __setstate__(self, state: object) -> None:
        del state  # byte order and alignment say nothing about single bytes


_ADMITTED = {
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Dtype,
    ("numpy.core.multiarray", "_reconstruct"): _Array,
    ("numpy._core.multiarray", "_reconstruct"): _Array,
}


class _Unpickler(pickle.Unpickler):
    """Reads numbers, strings, containers and uint8 arrays; imports no name in the pickle, so runs nothing."""

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        try:
            return _ADMITTED[module_name, global_name]
        except KeyError:
            raise pickle.UnpicklingError(
                f"it asks for {module_name}.{global_name}; only arrays of uint8 are accepted"
            ) from None


def read_batch(data: bytes, where: str) -> tuple[Bytes, Bytes]:
    """Read one pickled CIFAR-10 batch without running anything that it may contain.

    Args:
        data: The pickle: a dict with `data`, uint8 `(N, 3072)`, channels first, and `labels`, N integers.
        where: Its name, for messages.

    Returns:
        Images `(N, 3, 32, 32)` and labels `(N,)`.

    Raises:
        DataIntegrityError: It is something else.
    """
    try:
        content = _Unpickler(io.BytesIO(data), encoding="bytes").load()
        content = {key.decode() if isinstance(key, bytes) else key: value for key, value in content.items()}
        images = content["data"].value.reshape(-1, 3, 32, 32)
        labels = np.array(content["labels"], np.uint8)
    except Exception as error:  # a damaged pickle can raise nearly everything
        raise DataIntegrityError(f"{where} is not a CIFAR-10 batch: {error or type(error).__name__}.") from error
    if labels.shape != images.shape[:1]:
        raise DataIntegrityError(f"{where} has {len(images)} images and labels of shape {labels.shape}.")
    return images, labels


def read_archive(path: Path) -> dict[str, Bytes]:
    """Read `cifar-10-python.tar.gz` in one pass, without unpacking it to disk.

    Returns:
        `train_images` and `test_images` `(N, 3, 32, 32)`, `train_labels` and `test_labels` `(N,)`.

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
    train = [found[name] for name in wanted[:5]]
    return {
        "train_images": np.concatenate([images for images, _ in train]),
        "train_labels": np.concatenate([labels for _, labels in train]),
        "test_images": found["test_batch"][0],
        "test_labels": found["test_batch"][1],
    }


def read_strips(folder: Path, cache: Path) -> dict[str, Bytes]:
    """Read the layout of `train_00.webp`, …, `test_00.webp`, … and `labels.npz`, and check it.

    Decoding takes seconds, so the decoded arrays are kept in `cache` (184 MB) and taken from there the next
    time, after a check of their SHA-256. A cache that cannot be written is done without.

    Returns:
        `train_images` and `test_images` `(N, 3, 32, 32)`, as views of channels-last arrays, `train_labels`
        and `test_labels` `(N,)`.

    Raises:
        DataIntegrityError: A file is not what it must be; the message has its name.
        DataUnavailableError: A strip is missing.
    """
    verify(folder / "labels.npz", STRIP_SHA256["labels"])
    arrays: dict[str, Bytes] = {}
    with np.load(folder / "labels.npz") as file:
        for part in ("train", "test"):
            labels = arrays[f"{part}_labels"] = file[part]
            images = _decoded(folder, part, len(labels), cache / f"{part}_images.npy")
            arrays[f"{part}_images"] = images.transpose(0, 3, 1, 2)
    return arrays


def decode_strips(folder: Path, part: str, count: int) -> Bytes:
    """Decode `count` images from `folder/part_00.webp`, …: one strip in memory at a time.

    Returns:
        uint8 `(count, 32, 32, 3)`.
    """
    from PIL import Image, UnidentifiedImageError  # only this layout needs Pillow

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
        except (UnidentifiedImageError, OSError) as error:
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
    found = hashlib.sha256(images.data).hexdigest()
    if found != STRIP_SHA256[part]:
        raise DataIntegrityError(
            f"{where} gives an array of SHA-256 {found}, expected {STRIP_SHA256[part]}. "
            "A file of it is damaged or another one."
        )
