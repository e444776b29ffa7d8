from __future__ import annotations

import gzip
import hashlib
import io
import pickle
import struct
import tarfile
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from beyondprop.data import _images
from beyondprop.errors import DataIntegrityError, DataUnavailableError


def _idx(array: NDArray[np.uint8]) -> bytes:
    return b"\0\0\x08" + bytes([array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def _random(*shape: int) -> NDArray[np.uint8]:
    return np.random.default_rng(sum(shape)).integers(0, 256, shape, np.uint8)


@pytest.mark.parametrize("shape", [(5,), (3, 4, 6), (0,)])
def test_idx_round_trip(tmp_path: Path, shape: tuple[int, ...]) -> None:
    array = _random(*shape)
    (tmp_path / "a.gz").write_bytes(gzip.compress(_idx(array)))
    found = _images.read_idx(tmp_path / "a.gz")
    assert found.dtype == np.uint8
    assert np.array_equal(found, array)
    assert found.flags.writeable


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (gzip.compress(b"\0\0\x0d\1" + struct.pack(">I", 1) + bytes(4), mtime=0), "begins with bytes 00 00 0d 01"),
        (gzip.compress(b"\0\0", mtime=0), "begins with bytes 00 00;"),
        (gzip.compress(b"\0\0\x08\3" + bytes(6), mtime=0), "10 bytes, too few for an IDX header of 16"),
        (gzip.compress(_idx(_random(2, 3))[:-1], mtime=0), "has 5 values after its header, expected 6"),
        (gzip.compress(_idx(_random(2, 3)) + b"x", mtime=0), "has 7 values after its header, expected 6"),
        (gzip.compress(_idx(_random(200)), mtime=0)[:-20], "not a complete gzip file"),
        (b"<html>", "not a complete gzip file"),
    ],
)
def test_idx_of_another_form_is_refused_by_name(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "bad.gz").write_bytes(content)
    with pytest.raises(DataIntegrityError, match="bad.gz.*" + message):
        _images.read_idx(tmp_path / "bad.gz")


def _python2_batch(images: NDArray[np.uint8], labels: list[int]) -> bytes:
    """A batch in the exact bytes of the canonical archive, which Python 2 wrote with an old NumPy."""

    def string(text: bytes) -> bytes:
        return b"U" + bytes([len(text)]) + text

    count, data = len(images), images.tobytes()
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\nq\x06cnumpy\nndarray\nq\x07K\x00\x85" + string(b"b") + b"\x87Rq\x08"
        b"(K\x01K" + bytes([count]) + b"M\x00\x0c\x86cnumpy\ndtype\nq\x09" + string(b"u1") + b"K\x00K\x01\x87Rq\x0a"
        b"(K\x03" + string(b"|") + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
        b"\x89T" + struct.pack("<i", len(data)) + data + b"tb"
    )
    return (
        b"\x80\x02}q\x01("
        + (string(b"batch_label") + b"q\x02" + string(b"training batch 1 of 5") + b"q\x03")
        + (string(b"labels") + b"q\x04]q\x05(" + b"".join(b"K" + bytes([k]) for k in labels) + b"e")
        + (string(b"data") + array)
        + (string(b"filenames") + b"]q\x0bu.")
    )


def test_canonical_batches_are_read() -> None:
    images, labels = _random(4, 3, 32, 32), [3, 9, 0, 3]
    found = _images.read_batch(_python2_batch(images, labels), "batch")
    assert np.array_equal(found[0], images)
    assert found[1].tolist() == labels


@pytest.mark.parametrize("order", ["C", "F"])
def test_batches_of_a_newer_numpy_are_read(order: str) -> None:
    images = _random(4, 3, 32, 32)
    data = np.array(images.reshape(4, -1), order="C" if order == "C" else "F")
    found, _ = _images.read_batch(pickle.dumps({"data": data, "labels": [0, 1, 2, 3]}, protocol=4), "batch")
    assert np.array_equal(found, images)


class _Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.path,)


def test_a_pickle_that_calls_something_is_refused_and_not_run(tmp_path: Path) -> None:
    with pytest.raises(DataIntegrityError, match=r"batch.*asks for pathlib"):
        _images.read_batch(pickle.dumps({"data": _Evil(tmp_path / "ran"), "labels": []}), "batch")
    assert not (tmp_path / "ran").exists()
    pickle.loads(pickle.dumps(_Evil(tmp_path / "ran")))  # the ordinary reader does run it: the test can fail
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"data": np.zeros((2, 3072)), "labels": [0, 0]}, "this one is 'f8'"),
        ({"data": np.array([[]], object), "labels": [0, 0]}, "only arrays of uint8"),
        ({"data": np.zeros((2, 3071), np.uint8), "labels": [0, 0]}, "reshape"),
        ({"data": np.zeros((2, 3072), np.uint8), "labels": [0]}, r"2 images and labels of shape \(1,\)"),
        ({"data": np.zeros((2, 3072), np.uint8)}, "labels"),
        ([1, 2], "not a CIFAR-10 batch"),
        (print, "asks for (builtins|__builtin__).print"),
    ],
)
def test_pickles_of_another_content_are_refused(content: object, message: str) -> None:
    with pytest.raises(DataIntegrityError, match=message):
        _images.read_batch(pickle.dumps(content, protocol=4), "batch")


def test_a_truncated_pickle_is_refused() -> None:
    with pytest.raises(DataIntegrityError, match="archive:name is not a CIFAR-10 batch"):
        _images.read_batch(_python2_batch(_random(2, 3, 32, 32), [0, 1])[:-100], "archive:name")


def _archive(path: Path, names: list[str]) -> dict[str, tuple[NDArray[np.uint8], list[int]]]:
    content = {name: (_random(2 + k, 3, 32, 32), [k] * (2 + k)) for k, name in enumerate(names)}
    with tarfile.open(path, "w:gz") as archive:
        for name, (images, labels) in content.items():
            data = _python2_batch(images, labels)
            member = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
        archive.addfile(tarfile.TarInfo("cifar-10-batches-py/readme.html"), io.BytesIO())
    return content


# In the canonical archive the batches are not in order either.
_MEMBERS = ["data_batch_4", "test_batch", "data_batch_3", "data_batch_2", "data_batch_5", "data_batch_1"]


def test_archive_is_read_in_the_order_of_the_batches(tmp_path: Path) -> None:
    content = _archive(tmp_path / "a.tar.gz", _MEMBERS)
    arrays = _images.read_archive(tmp_path / "a.tar.gz")
    train = [content[f"data_batch_{k}"] for k in range(1, 6)]
    assert np.array_equal(arrays["train_images"], np.concatenate([images for images, _ in train]))
    assert arrays["train_labels"].tolist() == [label for _, labels in train for label in labels]
    assert np.array_equal(arrays["test_images"], content["test_batch"][0])
    assert arrays["test_labels"].tolist() == content["test_batch"][1]
    assert all(array.flags.writeable for array in arrays.values())
    assert [path.name for path in tmp_path.iterdir()] == ["a.tar.gz"]


def test_archive_that_is_incomplete_or_damaged_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.tar.gz"
    _archive(path, _MEMBERS[1:])
    with pytest.raises(DataIntegrityError, match=r"a.tar.gz lacks data_batch_4\."):
        _images.read_archive(path)
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(DataIntegrityError, match=r"not a complete tar.gz archive"):
        _images.read_archive(path)
    path.write_bytes(b"no archive")
    with pytest.raises(DataIntegrityError, match=r"not a complete tar.gz archive"):
        _images.read_archive(path)


@pytest.fixture
def strips(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, dict[str, NDArray[np.uint8]]]:
    """A folder of WebP strips of four images, the last ones short, and what is in it."""
    folder = tmp_path / "strips"
    folder.mkdir()
    content = {"train": _random(6, 32, 32, 3), "test": _random(3, 32, 32, 3)}
    for part, images in content.items():
        for k in range(0, len(images), 4):
            strip = Image.fromarray(images[k : k + 4].reshape(-1, 32, 3))
            strip.save(folder / f"{part}_{k // 4:02d}.webp", lossless=True)
    np.savez(folder / "labels.npz", train=np.arange(6, dtype=np.uint8), test=np.arange(3, dtype=np.uint8))
    hashes = {part: hashlib.sha256(images.tobytes()).hexdigest() for part, images in content.items()}
    hashes["labels"] = hashlib.sha256((folder / "labels.npz").read_bytes()).hexdigest()
    monkeypatch.setattr(_images, "STRIP_IMAGES", 4)
    monkeypatch.setattr(_images, "STRIP_SHA256", hashes)
    return folder, content


def test_strips_are_decoded_once_and_cached(
    strips: tuple[Path, dict[str, NDArray[np.uint8]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, content = strips
    cache = tmp_path / "cache"
    for decodes in (True, False):
        if not decodes:
            monkeypatch.delattr(_images, "decode_strips")
        arrays = _images.read_strips(folder, cache)
        for part, images in content.items():
            assert np.array_equal(arrays[f"{part}_images"], images.transpose(0, 3, 1, 2))
            assert arrays[f"{part}_labels"].tolist() == list(range(len(images)))
    assert sorted(path.name for path in cache.iterdir()) == ["test_images.npy", "train_images.npy"]


@pytest.mark.parametrize("content", [b"garbage", b"", None])
def test_a_wrong_cache_is_replaced(
    strips: tuple[Path, dict[str, NDArray[np.uint8]]], tmp_path: Path, content: bytes | None
) -> None:
    folder, images = strips
    cached = tmp_path / "train_images.npy"
    if content is None:
        np.save(cached, images["train"] ^ 1)
    else:
        cached.write_bytes(content)
    arrays = _images.read_strips(folder, tmp_path)
    assert np.array_equal(arrays["train_images"], images["train"].transpose(0, 3, 1, 2))
    assert np.array_equal(np.load(cached), images["train"])


def test_a_cache_that_cannot_be_written_is_done_without(
    strips: tuple[Path, dict[str, NDArray[np.uint8]]], tmp_path: Path
) -> None:
    folder, images = strips
    (tmp_path / "file").write_text("in the way of the folder")
    arrays = _images.read_strips(folder, tmp_path / "file" / "cache")
    assert np.array_equal(arrays["test_images"], images["test"].transpose(0, 3, 1, 2))


def test_strips_that_are_wrong_are_refused_by_name(
    strips: tuple[Path, dict[str, NDArray[np.uint8]]], tmp_path: Path
) -> None:
    folder, images = strips
    second = folder / "train_01.webp"
    Image.fromarray((images["train"][4:] ^ 1).reshape(-1, 32, 3)).save(second, lossless=True)
    with pytest.raises(DataIntegrityError, match=r"train_\*.webp gives an array of SHA-256"):
        _images.read_strips(folder, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()
    Image.fromarray(images["train"][4].reshape(-1, 32, 3)).save(second, lossless=True)
    with pytest.raises(DataIntegrityError, match=r"train_01.webp has mode, width, height \('RGB', 32, 32\)"):
        _images.read_strips(folder, tmp_path / "cache")
    second.write_bytes(b"RIFF....WEBPnothing")
    with pytest.raises(DataIntegrityError, match=r"train_01.webp is not a readable WebP file"):
        _images.read_strips(folder, tmp_path / "cache")
    second.unlink()
    with pytest.raises(DataUnavailableError, match=r"train_01.webp was not found, though .*labels.npz is there"):
        _images.read_strips(folder, tmp_path / "cache")
    (folder / "labels.npz").write_bytes(b"x")
    with pytest.raises(DataIntegrityError, match=r"labels.npz has SHA-256"):
        _images.read_strips(folder, tmp_path / "cache")
