"""Damaged files: mutations of each format that gave errors of other libraries, took memory or changed values in silence."""

from __future__ import annotations

import gzip
import io
import json
import pickle
import struct
import subprocess
import sys
import tarfile
import time
import tracemalloc
import warnings
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from beyondprop.data import _catalog, _images, _packed, from_arrays, load, read_file
from beyondprop.errors import DataIntegrityError

FUZZER = Path(__file__).parents[2] / "benchmarks" / "mutations.py"
X, Y = np.arange(36.0).reshape(12, 3), np.arange(12) % 2


@contextmanager
def _no_memory() -> Iterator[None]:
    """Fail where the block uses 64 MB at once; untouched memory counts, too."""
    tracemalloc.start(1)
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < 64 << 20
    finally:
        tracemalloc.stop()


def _npy(array: Any, shape: str | None = None) -> bytes:
    """The bytes of an array, whose header may claim another shape of equal length in text."""
    out = io.BytesIO()
    np.save(out, array)
    content = out.getvalue()
    if shape is None:
        return content
    start, end = content.index(b"'shape': ") + 9, content.index(b"\n")
    return content[:start] + f"{shape}, }}".encode().ljust(end - start) + content[end:]


def _npz(*members: tuple[str, bytes], packed: bool = True) -> bytes:
    out = io.BytesIO()
    form = zipfile.ZIP_DEFLATED if packed else zipfile.ZIP_STORED
    with warnings.catch_warnings(action="ignore"), zipfile.ZipFile(out, "w", form) as archive:  # of two of one name
        for name, content in members:
            archive.writestr(name, content)
    return out.getvalue()


def _good_npz(packed: bool = True) -> bytes:
    return _npz(("x.npy", _npy(X)), ("y.npy", _npy(Y)), packed=packed)


def _patched(content: bytes, at: int, form: str, value: int) -> bytes:
    piece = struct.pack(form, value)
    return content[:at] + piece + content[at + len(piece) :]


def _in_directory(offset: int, form: str, value: int) -> bytes:
    """A good archive whose first directory entry is changed."""
    content = _good_npz()
    return _patched(content, content.index(b"PK\1\2") + offset, form, value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "File is not a zip file"),
        (_good_npz()[:-30], "File is not a zip file"),
        (_in_directory(10, "<H", 99), "array 'x': NumPy writes no such compression"),
        (_in_directory(10, "<H", 14), "array 'x': NumPy writes no such compression"),
        (_in_directory(8, "<H", 1), "array 'x': .*(password|encrypted)"),
        (_in_directory(6, "<H", 99), "zip file version"),
        (_in_directory(16, "<L", 1), "array 'x': .*CRC"),
        (_in_directory(24, "<L", 4_000_000_000), "claim 4,000,000,.* bytes, more than 1,073,741,824"),
        (_in_directory(24, "<L", 900_000_000), r"array 'x': \d+ bytes cannot hold the 900,000,000 that it claims"),
        (_in_directory(32, "<H", 53), "its directory should have 2 entries and has 1"),  # the second is its comment
        (_npz(("x.npy", b"text"), ("y.npy", _npy(Y))), "array 'x': .*magic"),
        (_npz(("x.npy", _npy(X)[:40]), ("y.npy", _npy(Y))), "array 'x': "),
        (_npz(("x.npy", _npy(X, "(12, 3")), ("y.npy", _npy(Y))), "array 'x': "),
        (_npz(("x.npy", _npy(X, "(10, 3)")), ("y.npy", _npy(Y))), r"array 'x': its shape \(10, 3\) of float64 needs 240 bytes"),
        (_npz(("x.npy", _npy(X, "(-12, -3)")), ("y.npy", _npy(Y))), r"array 'x': its shape"),
        (_npz(("x.npy", _npy(X, "(1000000000000, 3)")), ("y.npy", _npy(Y))), "needs 24,000,000,000,000 bytes, and there"),
        (_npz(("x.npy", _npy(X)[:-1]), ("y.npy", _npy(Y))), "needs 288 bytes, and there are 287"),
        (_npz(("x.npy", _npy(X) + b"x"), ("y.npy", _npy(Y))), "needs 288 bytes, and there are 289"),
        (_npz(("x.npy", _npy(np.array([{}]))), ("y.npy", _npy(Y))), "array 'x': values of object are not read"),
        (_npz(("x.npy", _npy(np.zeros(3, "V0"))), ("y.npy", _npy(Y))), "array 'x': values of .* are not read"),
        (_npz(("x.npy", _npy(X)), ("x.npy", _npy(X))), "array 'x': there are two of this name"),
    ],
)  # fmt: skip
def test_npz(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "bad.npz").write_bytes(content)
    with (
        _no_memory(),
        pytest.raises(DataIntegrityError, match=rf"^bad.npz must be a .npz file.*{message}.*write it anew"),
    ):
        read_file(f"{tmp_path}/bad.npz")


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("order", ["C", "F"])
def test_good_npz(tmp_path: Path, packed: bool, order: Any) -> None:
    for value in (
        np.asarray(X, order=order),
        X.astype(">f4"),
        X > 3,
        np.float16(2),
        np.array(["a", "ü"]),
        np.zeros((0, 3)),
    ):
        (tmp_path / "a.npz").write_bytes(_npz(("v.npy", _npy(value)), ("note.txt", b"no array"), packed=packed))
        ((name, found),) = _packed.read_npz(tmp_path / "a.npz").items()
        assert name == "v"
        assert np.array_equal(found, value)
        assert (found.dtype, found.shape, found.flags.f_contiguous) == (
            value.dtype,
            value.shape,
            value.flags.f_contiguous,
        )


def test_a_zip_bomb_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "bomb.npz"
    with (
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open("x.npy", "w", force_zip64=True) as member,
    ):
        header = _npy(np.zeros(0, np.uint8), f"({1 << 30},)")
        member.write(header)
        for _ in range(1 << 10):
            member.write(bytes(1 << 20))
    assert path.stat().st_size < 2 << 20
    with (
        _no_memory(),
        pytest.raises(DataIntegrityError, match=r"bomb.npz .* claim 1,073,741,952 bytes, more than 1,073"),
    ):
        read_file(str(path))


def test_values_of_a_file_are_refused_with_its_name(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    for x, y, message in (
        (np.full((12, 3), np.nan), Y, "x has nan in row 0"),
        (X[:5], Y, "x has 5 rows and y has 12"),
        (X * 1j, Y, "x must hold numbers, got complex128"),
        (X, Y.astype("M8[s]"), "y must hold numbers or labels"),
        (X, Y * 0, "y has one class only"),
        (X[:0], Y[:0], "x must have rows"),
    ):
        np.savez(path, x=x, y=y)
        with pytest.raises(ValueError, match=rf"^a.npz: {message}"):
            read_file(str(path))
    (tmp_path / "a.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match=r"^a.csv: test must be a share"):
        read_file(f"{tmp_path}/a.csv:target=b")


def test_infinities_in_half_precision_are_refused() -> None:
    x = X.astype(np.float16)
    x[4, 1] = np.inf
    with pytest.raises(ValueError, match="x has inf in row 4, column 1; its values must be finite"):
        from_arrays(x, Y)


def _idx(*sizes: int, magic: bytes = b"\0\0\x08", values: int = 6) -> bytes:
    return gzip.compress(magic + bytes([len(sizes)]) + struct.pack(f">{len(sizes)}I", *sizes) + bytes(values), mtime=0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "begins with bytes ; IDX of uint8"),
        (_idx(), "has 0 dimensions in its header, expected 1 … 4"),
        (_idx(*[1] * 200), "has 200 dimensions in its header"),
        (_idx(2**32 - 1, 28, 28), "3,367,254,359,280 values, more than the 1,073,741,824 it can have"),
        (_idx(900_000_000), "has 6 values after its header, expected 900000000"),
        (_idx(2, 3, values=9 << 20), "has 1048576 or more values after its header, expected 6"),
        (_patched(_idx(2, 3), len(_idx(2, 3)) - 8, "<L", 1), "is not a complete gzip file: CRC check failed"),
        (_idx(2, 3) + b"more", "is not a complete gzip file"),
    ],
)
def test_idx(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "bad.gz").write_bytes(content)
    with (
        _no_memory(),
        pytest.raises(DataIntegrityError, match=f"bad.gz .*{message}.* delete it, to have it fetched again"),
    ):
        _images.read_idx(tmp_path / "bad.gz")


def _batch(data: Any = None, labels: Any = (0, 9)) -> dict[str, Any]:
    return {"data": np.zeros((2, 3072), np.uint8) if data is None else data, "labels": list(labels)}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\x80\x02]r\xff\xff\xff\x3f.", "not a CIFAR-10 batch"),  # a memo of 10^9 entries
        (b"\x80\x05\x96" + struct.pack("<Q", 1 << 33) + b".", "not a CIFAR-10 batch"),  # a bytearray of 8 GiB
        (b"\x80\x04\x8e" + struct.pack("<Q", 1 << 40) + b".", "not a CIFAR-10 batch"),
        (pickle.dumps(_batch(labels=[0, 10]), 4), "its labels must be a list of numbers 0 … 9"),
        (pickle.dumps(_batch(labels=[0, 1.7]), 4), "its labels must be a list of numbers 0 … 9"),
        (pickle.dumps(_batch(labels=[True, 0]), 4), "its labels must be a list of numbers 0 … 9"),
    ],
)
def test_pickles(content: bytes, message: str) -> None:
    with _no_memory(), pytest.raises(DataIntegrityError, match=f"where is {message}|where is not a .*{message}"):
        _images.read_batch(content, "where")


def _archive(path: Path, *, padding: int = 0) -> None:
    with tarfile.open(path, "w:gz") as tar:
        for name in (*(f"data_batch_{k}" for k in range(1, 6)), "test_batch", "readme"):
            content = bytes(padding) if name == "readme" else pickle.dumps(_batch(), 4)
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def test_an_archive_is_read_to_its_checksum(tmp_path: Path) -> None:
    path = tmp_path / "a.tar.gz"
    _archive(path)
    assert _images.read_archive(path)["train_labels"].tolist() == [0, 9] * 5
    content = path.read_bytes()
    path.write_bytes(_patched(content, len(content) - 8, "<L", 1))
    with pytest.raises(DataIntegrityError, match=r"a.tar.gz is not a complete tar.gz archive: CRC check failed"):
        _images.read_archive(path)


def test_an_archive_that_expands_without_end_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_images, "most_bytes", lambda path: 1 << 20)
    _archive(tmp_path / "a.tar.gz", padding=2 << 20)
    with pytest.raises(DataIntegrityError, match=r"a.tar.gz .*it expands to more than 1,048,576 bytes"):
        _images.read_archive(tmp_path / "a.tar.gz")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a" * 200_000 + ",b\n1,2\n", r"line 1 of a.csv cannot be read: field larger than field limit"),
        ("a,b\n1," + "x" * 100_000 + "\n", r"line 2 of a.csv has 'x{60}'… in column 'b'; inputs must be numbers"),
        ("x" * 10_000 + ",b\n1,2\n", r"Its columns: x{60}, b"),
        (
            ",".join(f"c{k}" for k in range(50_000)) + "\n1,2\n",
            r"line 2 of a.csv has 2 values; the first line has 50000 names",
        ),
        (
            ",".join(f"c{k}" for k in range(5_000)) + ",no\n" + "x," * 5_000 + "1\n",
            r"'x' in column 'c0'.*drop= can leave out all 5000",
        ),
        ("\x1b[31ma,b\n1,2\n", r"Its columns: \\x1b\[31ma, b"),
        ("a,b\n1,2\n\ud800,3\n", r"line 3 of a.csv must be text in UTF-8"),
    ],
)
def test_text(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "a.csv").write_bytes(text.encode("utf-8", "surrogatepass"))
    begin = time.monotonic()
    with pytest.raises(ValueError, match=message) as caught:
        read_file(f"{tmp_path}/a.csv:target={'a' if 'x' * 100_000 in text else 'no'}")
    assert len(str(caught.value)) < 2000
    assert time.monotonic() - begin < 5


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (OSError("Corrupt snappy compressed data."), "Corrupt snappy compressed data. It is damaged"),
        (KeyError("Field 'a' exists 2 times in schema"), "Field 'a' exists 2 times"),
        (NotImplementedError(""), "NotImplementedError"),
        (json.JSONDecodeError("Expecting value", "", 0), "Expecting value"),
        (MemoryError(), "MemoryError"),
        ({"a": [1.0, 2.0], "b": [1, 2, 3]}, r"column 'b' has the shape \(3,\), unlike a column of a table"),
        ({"a": [[1.0, 2.0]], "b": [1]}, r"column 'a' has the shape \(1, 2\)"),
        ({"a": [[1.0], [2.0, 3.0]], "b": [1, 2]}, "inhomogeneous"),
    ],
)
@pytest.mark.parametrize("library", ["pyarrow", "pandas"])
def test_parquet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, library: str, columns: Any, message: str) -> None:
    (tmp_path / "a.parquet").touch()

    def read(path: Path) -> Any:
        if isinstance(columns, Exception):
            raise columns
        found = {name: SimpleNamespace(to_numpy=lambda v=values: np.array(v)) for name, values in columns.items()}
        return SimpleNamespace(column=found.__getitem__, column_names=list(found), items=found.items)

    parquet = SimpleNamespace(read_table=read)
    monkeypatch.setitem(sys.modules, "pandas", SimpleNamespace(read_parquet=read))  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "pyarrow", SimpleNamespace(parquet=parquet) if library == "pyarrow" else None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=f"^a.parquet cannot be read as a parquet table: .*{message}"):
        read_file(f"{tmp_path}/a.parquet:target=b")


def test_a_parquet_table_of_claimed_rows_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.parquet").touch()
    parquet = SimpleNamespace(read_metadata=lambda path: SimpleNamespace(num_rows=10**12, num_columns=2))
    monkeypatch.setitem(sys.modules, "pyarrow", SimpleNamespace(parquet=parquet))  # type: ignore[arg-type]
    with pytest.raises(
        ValueError, match=r"a.parquet .*claims 1,000,000,000,000 rows of 2 columns, more than 1,073,741,824"
    ):
        read_file(f"{tmp_path}/a.parquet:target=b")


def test_higgs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of the right hash and another content: what is wrong is named as well."""
    monkeypatch.setenv("BEYONDPROP_DATA", str(tmp_path))
    path = tmp_path / "higgs" / "higgs.npz"
    path.parent.mkdir()
    arrays: dict[str, Any] = {}
    for part in ("train", "head", "valid"):
        arrays |= {f"x_{part}": np.ones((2, 28), np.float32), f"y_{part}": np.array([0, 1], np.uint8)}
    arrays["x_head"][0] = 2

    def read(**other: Any) -> Any:
        np.savez(path, **{name: value for name, value in (arrays | other).items() if value is not None})
        monkeypatch.setattr(_catalog, "_HIGGS", replace(_catalog._HIGGS, sha256=sha256(path.read_bytes()).hexdigest()))
        return load("higgs", download=False, standardize=False)

    assert read().y_train.tolist() == [0, 1, 0, 1]
    assert read().x_train[:, 0].tolist() == [1, 1, 2, 1]
    for other in (
        {"y_head": None}, {"x_head": np.ones((2, 27), np.float32)}, {"y_head": np.array([0, 2], np.uint8)},
        {"y_head": np.zeros(3, np.uint8)}, {"x_head": np.full((2, 28), np.inf, np.float32)}, {"x_head": np.float32(1)},
    ):  # fmt: skip
        with pytest.raises(DataIntegrityError, match=r"higgs.npz must have x_head, finite float32"):
            read(**other)


@pytest.fixture
def strips(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, np.ndarray[Any, Any]]:
    folder, images = tmp_path / "strips", np.random.default_rng(0).integers(0, 256, (8, 32, 32, 3), np.uint8)
    folder.mkdir()
    for part in ("train", "test"):
        for k in range(2):
            Image.fromarray(images[4 * k : 4 * k + 4].reshape(-1, 32, 3)).save(
                folder / f"{part}_0{k}.webp", lossless=True
            )
        monkeypatch.setitem(_images.STRIP_SHA256, part, sha256(images.tobytes()).hexdigest())
        crcs = [zlib.crc32(images[k : k + 4].tobytes()) for k in (0, 4)]
        monkeypatch.setitem(_images.STRIP_CRC32, part, struct.pack(">2L", *crcs))
    np.savez(folder / "labels.npz", train=np.arange(8, dtype=np.uint8), test=np.arange(8, dtype=np.uint8))
    monkeypatch.setitem(_images.STRIP_SHA256, "labels", sha256((folder / "labels.npz").read_bytes()).hexdigest())
    monkeypatch.setattr(_images, "STRIP_IMAGES", 4)
    return folder, images


def test_a_damaged_strip_is_named(strips: tuple[Path, np.ndarray[Any, Any]], tmp_path: Path) -> None:
    folder, images = strips
    Image.fromarray((images[4:] ^ 1).reshape(-1, 32, 3)).save(folder / "train_01.webp", lossless=True)
    with pytest.raises(
        DataIntegrityError, match=r"train_\*.webp .*Damaged or another file: train_01.webp. Put the original"
    ):
        _images.read_strips(folder, tmp_path / "cache")


def test_a_strip_of_a_claimed_size_is_refused(
    strips: tuple[Path, np.ndarray[Any, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # Pillow's error for a bomb is of no kind that it has otherwise
    with pytest.raises(
        DataIntegrityError, match=r"train_00.webp is not a readable WebP file: .*could be decompression bomb"
    ):
        _images.read_strips(strips[0], tmp_path / "cache")


@pytest.mark.parametrize("shape", ["(8, 32, 32, 3", "(1000000000000, 32, 32, 3)", "(8, 32, 32, 3" + "[" * 20])
def test_a_damaged_cache_is_decoded_anew(strips: tuple[Path, np.ndarray[Any, Any]], tmp_path: Path, shape: str) -> None:
    folder, images = strips
    cached = tmp_path / "train_images.npy"
    cached.write_bytes(_npy(images, shape))
    with _no_memory():
        assert np.array_equal(_images.read_strips(folder, tmp_path)["train_images"], images.transpose(0, 3, 1, 2))
    assert np.array_equal(np.load(cached), images)


@pytest.mark.skipif(not FUZZER.is_file(), reason="the benchmarks are not here")
def test_seeded_mutations_of_every_format() -> None:
    """Twelve of each; the script runs as many as one likes."""
    found = subprocess.run([sys.executable, str(FUZZER), "--count", "12"], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout + found.stderr
    assert found.stdout.count("\n") > 20
