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
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from beyondprop.data._files import REMEDY, atomic_file, verify
from beyondprop.data._packed import Array, BoundedReader, brief, most_bytes, read_npy, read_npz
from beyondprop.errors import DataIntegrityError, DataUnavailableError

Bytes = NDArray[np.uint8]

_IDX_DIMENSIONS = 4
_CHUNK = 1 << 20

STRIP_IMAGES = 500
"""Images in one WebP strip, stacked vertically."""

STRIP_SHA256 = {
    "train": "47af8b02cfcfb6cdf3dbbd1969ad7f1b70f4413f6f80f437b020ee4e5bc8304a",
    "test": "f9b1e2130bab680db56eb06d886f7f1ad0f1183907ceff4659d1735c890f5b04",
    "labels": "100457827cb30b2869dbdce3761c5279714820de9a8c6fa4d0dcc7cbc3037527",
}
"""SHA-256 of the decoded images, uint8 `(N, 32, 32, 3)` in C order, and of the file `labels.npz`."""

STRIP_CRC32 = {
    "train": bytes.fromhex(
        "4657227bce536b8be970ef91aeadcea069a6f1e539ae47124f53ae4bba9598af9f65d14eae9b1dd9d5a295bff6304a0ab0b6933d33559503"
        "d1b0b003199f3140d8a530305cb52cd452563556bc751eb2fd5fe72fea7ff1839bbbc76f7dfefa25581420ab777b71484f74cf81641fe0b8"
        "506b00bd48ee3b97d1af2a440edf38e83186668e07d7a4275595152ef4291ad5695bfabb06371b5117e31f65e9781d3918805c3b73875086"
        "db82ad5f7cc059f5426825dd60d22335aa64e030ec0483a79ec56fbcc13e9a3205ae9dd808a5dcfba1adaf7f98d3eecc651e7848654bcce2"
        "390228ee8b1d32a522ffffe61f5a27dbfb3061099c9e647d4b18cafa8060b8f0335fa135379835c53c63e50601362e83f84bd0f7edfeb3f4"
        "1b64e302e1c2b18de0d4bb7f5bc2bed4d4769afa09697c3bb2f99b536f51081c39a41abf2609747658e09d8ff452348dc89d56e921d33307"
        "237be574b07fc500c360e008a80c6d168d3c0c8dca9018c931697e3e6ed72b4ac414e969a94193ee1cc0d78cc4380831d9f7d8fe9bab8054"
        "a8f0351727224806"
    ),
    "test": bytes.fromhex(
        "f99a6992dfea16a0266f440c5bb3d82dee0e75a21f1888cdba45665cae63d911b4d899e8f3d341cd12d3e0146825e81af74652d262067845"
        "66bc9712e1f076e3ea72c6e1cdd4e0c4c2a946304c2811c3"
    ),
}
"""CRC-32 of the images of each strip: they tell which of the files is damaged."""


def read_idx(path: Path) -> Bytes:
    """Read a gzipped IDX file of unsigned bytes: images `(N, rows, columns)` or labels `(N,)`.

    The format: bytes 0 0 8 n (8 for uint8, n dimensions), n big-endian 32-bit sizes, the values in C order.

    Raises:
        DataIntegrityError: The file is not gzip, not IDX of unsigned bytes, too short, too long or too large.
    """
    try:
        with gzip.open(path) as stream:
            return _idx(stream, most_bytes(path))
    except Exception as error:  # zlib and gzip have errors of many kinds
        if isinstance(error, OSError) and error.filename is not None:
            raise
        what = brief(error) if type(error) is ValueError else f"is not a complete gzip file: {brief(error)}"
        raise DataIntegrityError(f"{path} {what}. {REMEDY}") from None


def _idx(stream: Any, most: int) -> Bytes:
    """Read one array of at most `most` bytes; its header is looked at before anything else is read."""
    magic = stream.read(4)
    if len(magic) < 4 or magic[:3] != b"\0\0\x08":
        raise ValueError(f"begins with bytes {magic.hex(' ')}; IDX of uint8 begins with 00 00 08")
    if not 1 <= magic[3] <= _IDX_DIMENSIONS:
        raise ValueError(f"has {magic[3]} dimensions in its header, expected 1 … {_IDX_DIMENSIONS}")
    header = stream.read(4 * magic[3])
    if len(header) < 4 * magic[3]:
        raise ValueError(f"has {4 + len(header)} bytes, too few for an IDX header of {4 + 4 * magic[3]}")
    shape = struct.unpack(f">{magic[3]}I", header)
    if (count := math.prod(shape)) > most:
        raise ValueError(f"has the shape {shape} in its header, {count:,} values, more than the {most:,} it can have")
    # A bytearray: the array on it must be writable. To the end and no further: only there gzip looks at its checksum.
    data = bytearray()
    while len(data) <= count and (chunk := stream.read(_CHUNK)):
        data += chunk
    if len(data) != count:
        more = " or more" if len(data) > count and stream.read(1) else ""
        raise ValueError(f"has {len(data)}{more} values after its header, expected {count} for shape {shape}")
    return np.frombuffer(data, np.uint8).reshape(shape)


def _uint8(kind: str, *args: object) -> _Array:
    """Stands for `numpy.dtype` while a pickle is read: uint8 and no other."""
    del args
    if kind != "u1":
        raise pickle.UnpicklingError(f"only arrays of uint8 are accepted, this one is {kind!r}")
    return _Array()


class _Array:
    """Stands for an array, or a dtype, while a pickle is read: it keeps the state that the pickle sets."""

    state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def array(self) -> Bytes:
        """The array of `state`: version, shape, dtype, whether in Fortran order, bytes."""
        _, shape, _, is_fortran, data = self.state
        data = data.encode("latin1") if isinstance(data, str) else data
        return np.frombuffer(bytearray(data), np.uint8).reshape(shape, order="F" if is_fortran else "C")


_ADMITTED = {
    ("numpy", "ndarray"): None,  # NumPy pickles an empty array first, of this type, and then its state
    ("numpy", "dtype"): _uint8,
    ("numpy.core.multiarray", "_reconstruct"): lambda *args: _Array(),
    ("numpy._core.multiarray", "_reconstruct"): lambda *args: _Array(),
}


class _Unpickler(pickle._Unpickler):
    """Reads numbers, strings, containers and uint8 arrays; imports no name in the pickle, so runs nothing.

    It is Python's own, not C's, which takes memory for whatever number of objects or bytes a damaged pickle claims; the one
    operation of Python's that does so, too, is left out.
    """

    dispatch: ClassVar = {key: load for key, load in pickle._Unpickler.dispatch.items() if key != pickle.BYTEARRAY8[0]}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ADMITTED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}; only arrays of uint8 are accepted")
        return _ADMITTED[module, name]


def read_batch(data: bytes, where: str) -> tuple[Bytes, Bytes]:
    """Read images and labels of one batch, a pickle, without running anything that it may contain.

    Raises:
        DataIntegrityError: It is no dict with `data`, uint8 `(N, 3072)`, channels first, and `labels`, N integers;
            the message calls it `where`.
    """
    try:
        content = _Unpickler(io.BytesIO(data), encoding="latin1").load()  # as NumPy wants arrays from Python 2
        images, labels = content["data"].array().reshape(-1, 3, 32, 32), content["labels"]
        if not isinstance(labels, list) or not all(type(label) is int and 0 <= label < 10 for label in labels):
            raise ValueError("its labels must be a list of numbers 0 … 9")
    except Exception as error:  # a damaged pickle can raise nearly everything
        raise DataIntegrityError(f"{where} is not a CIFAR-10 batch: {brief(error)}. {REMEDY}") from error
    if len(labels) != len(images):
        raise DataIntegrityError(f"{where} has {len(images)} images and labels of shape {(len(labels),)}. {REMEDY}")
    return images, np.array(labels, np.uint8)


def read_archive(path: Path) -> dict[str, Bytes]:
    """Read `cifar-10-python.tar.gz` in one pass, without unpacking it to disk.

    Raises:
        DataIntegrityError: A batch is missing or not readable.
    """
    found: dict[str, tuple[Bytes, Bytes]] = {}
    wanted = [f"data_batch_{number}" for number in range(1, 6)] + ["test_batch"]
    try:
        with gzip.open(path) as packed:
            content = BoundedReader(packed, most_bytes(path))
            with tarfile.open(fileobj=content, mode="r|") as archive:
                for member in archive:
                    name = member.name.rpartition("/")[2]
                    if name in wanted and (stream := archive.extractfile(member)) is not None:
                        found[name] = read_batch(stream.read(), f"{path}:{member.name}")
            while content.read(_CHUNK):  # to the end: only there is gzip's checksum looked at
                pass
    except DataIntegrityError:
        raise
    except Exception as error:  # a damaged archive can raise nearly everything
        if isinstance(error, OSError) and error.filename is not None:
            raise
        raise DataIntegrityError(f"{path} is not a complete tar.gz archive: {brief(error)}. {REMEDY}") from error
    if missing := [name for name in wanted if name not in found]:
        raise DataIntegrityError(f"{path} lacks {', '.join(missing)}. {REMEDY}")
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
    file = read_npz(folder / "labels.npz")
    for part in ("train", "test"):
        images = _decoded(folder, part, len(file[part]), cache / f"{part}_images.npy")
        arrays |= {f"{part}_images": images.transpose(0, 3, 1, 2), f"{part}_labels": file[part]}
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
                    raise ValueError(f"has mode, width, height {form}, expected {expected}")
                rows[:] = np.asarray(strip).reshape(rows.shape)
        except FileNotFoundError:
            raise DataUnavailableError(
                f"{path} was not found, though {folder / 'labels.npz'} is there. Put the missing strip there."
            ) from None
        except Exception as error:  # a damaged picture can raise nearly everything
            what = brief(error) if type(error) is ValueError else f"is not a readable WebP file: {brief(error)}"
            raise DataIntegrityError(f"{path} {what}. {REMEDY}") from error
    return images


def _decoded(folder: Path, part: str, count: int, cached: Path) -> Bytes:
    """The array in the file `cached` if it is the right one, else decoded, and kept there if that can be."""
    with suppress(Exception):  # nothing there, or not this array, in whatever way: decode
        with open(cached, "rb") as stream:
            images = read_npy(stream, cached.stat().st_size)
        _verify_images(images, part, cached)
        return images
    images = decode_strips(folder, part, count)
    _verify_images(images, part, folder / f"{part}_*.webp")
    with suppress(OSError), atomic_file(cached) as stream:
        np.save(stream, images)
    return images


def _verify_images(images: Array, part: str, where: Path) -> None:
    found, expected = hashlib.sha256(images.data).hexdigest(), STRIP_SHA256[part]
    if found != expected:
        strips = [images[start : start + STRIP_IMAGES] for start in range(0, len(images), STRIP_IMAGES)]
        known = np.frombuffer(STRIP_CRC32[part], ">u4")
        bad = [
            f"{part}_{k:02d}.webp" for k, strip in enumerate(strips) if zlib.crc32(strip.data) not in known[k : k + 1]
        ]
        raise DataIntegrityError(
            f"{where} gives an array of SHA-256 {found}, expected {expected}. Damaged or another file: "
            f"{', '.join(bad[:5]) or 'one of them'}{' and more' if len(bad) > 5 else ''}. Put the original there."
        )
