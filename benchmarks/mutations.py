"""What loaders do with damaged files: seeded mutations of every format that `beyondprop.data` reads.

    python benchmarks/mutations.py [--count 2000] [--seed 0] [--only idx npz] [--show 5]

Every loader reads a small good file once, then `count` damaged copies of it: flipped bits, cuts, insertions, removed and
repeated pieces and lines, emptied files, changed numbers, sizes of 10^12. Half of the copies of a compressed file are damaged
inside and packed anew, so that its checksums are right. Mutation i of a loader goes by `(seed, name, i)`; `--at i` runs one of
them alone. Prints a line a loader:

- refused: errors with the file's name; read: no error;
- foreign: other errors: not ValueError, OSError or this library's, without the file's name, or above 2,000 characters;
- hangs: longer than `--limit` seconds; memory: 256 MB or more in use at once;
- changed: read without an error, with other values, though the file has a checksum of its own or `load` knows its SHA-256.

Exits with 1 where one of the last four is not 0.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import io
import json
import pickle
import random
import re
import resource
import signal
import struct
import sys
import tarfile
import tempfile
import tracemalloc
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from beyondprop import data
from beyondprop.data import _catalog, _images
from beyondprop.errors import DataIntegrityError

SIZES = [10**12, 2**31, 2**32 - 1, 2**63 - 1, 10**6]
NUMBERS = [b"-1", b"0", b"1e999", b"nan", b"inf", b"9" * 25, b"1000000000000", b"1_0", b"", b"x", b"0x10", b"1e-320"]


@dataclass(frozen=True)
class Loader:
    """A format: its good file, how it is read, and how to get at what is packed in it."""

    path: Path
    read: Callable[[], Any]
    checked: bool = False  # whether other values than the good file's are a fault
    inner: Callable[[bytes, Callable[[bytes], bytes]], bytes] | None = None  # damages the content, not its checksums


def damaged(content: bytes, rng: random.Random) -> bytes:
    """Return `content` after one to three mutations."""
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        content = rng.choice(MUTATIONS)(bytearray(content), rng)
    return content


def _span(content: bytearray, rng: random.Random) -> slice:
    start = rng.randrange(len(content) + 1)
    return slice(start, start + rng.choice((1, 2, 4, 8, 64, 1024)))


def _flips(content: bytearray, rng: random.Random) -> bytes:
    """Flip bits anywhere, or at an end: headers are at the start, directories of archives at the end."""
    reach = rng.choice((10**9, 256, -256))
    for _ in range(rng.randint(1, 8) if content else 0):
        at = rng.randrange(min(abs(reach), len(content)))
        content[at if reach > 0 else -at - 1] ^= 1 << rng.randrange(8)
    return bytes(content)


def _cut(content: bytearray, rng: random.Random) -> bytes:
    at = rng.randrange(len(content) + 1)
    return bytes(rng.choice((content[:at], content[at:])))


def _insertion(content: bytearray, rng: random.Random) -> bytes:
    at = rng.randrange(len(content) + 1)
    piece = rng.choice((
        rng.randbytes(rng.randint(1, 32)),
        b"\0" * 16,
        b"\n",
        b'"',
        b"\r",
        b"\x1b[31m",
        b"\xff\xfe",
        b",",
    ))
    content[at:at] = piece
    return bytes(content)


def _removal(content: bytearray, rng: random.Random) -> bytes:
    del content[_span(content, rng)]
    return bytes(content)


def _repetition(content: bytearray, rng: random.Random) -> bytes:
    span = _span(content, rng)
    content[span.start : span.start] = content[span] * rng.choice((1, 1, 50))
    return bytes(content)


def _lines(content: bytearray, rng: random.Random) -> bytes:
    lines = bytes(content).split(b"\n")
    at, other = rng.randrange(len(lines)), rng.randrange(len(lines))
    line = lines[at]
    many = [line * (5000 if len(line) < 1000 else 2)]
    lines[at : at + 1] = rng.choice(([], [line, line], [lines[other]], many))
    return b"\n".join(lines)


def _empty(content: bytearray, rng: random.Random) -> bytes:
    return rng.choice((b"", b"\n", b"\0" * len(content), b"<html>not found</html>"))


def _number(content: bytearray, rng: random.Random) -> bytes:
    found = [*re.finditer(rb"[0-9.]+", content)]
    if found:
        start, end = rng.choice(found).span()
        content[start:end] = rng.choice(NUMBERS)
    return bytes(content)


def _size(content: bytearray, rng: random.Random) -> bytes:
    at = rng.randrange(min(len(content), rng.choice((16, 128, 10**9))) + 1)
    value, (form, limit) = rng.choice(SIZES), rng.choice(((">I", 2**32), ("<I", 2**32), ("<Q", 2**64), (">Q", 2**64)))
    piece = struct.pack(form, min(value, limit - 1))
    content[at : at + len(piece)] = piece
    return bytes(content)


MUTATIONS = [
    _flips, _flips, _flips, _cut, _insertion, _removal, _repetition, _lines, _empty, _number, _number, _size,
]  # fmt: skip


def _in_gzip(content: bytes, damage: Callable[[bytes], bytes]) -> bytes:
    return gzip.compress(damage(gzip.decompress(content)), 1)


def _in_zip(content: bytes, damage: Callable[[bytes], bytes]) -> bytes:
    """Damage one member; its length and its checksum are made right."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as new:
        members = {name: old.read(name) for name in old.namelist()}
        chosen = sorted(members)[len(damage(b"0123456789")) % len(members)]
        for name, inside in members.items():
            new.writestr(name, damage(inside) if name == chosen else inside)
    return out.getvalue()


def _in_tar(content: bytes, damage: Callable[[bytes], bytes]) -> bytes:
    """Damage one member of a compressed archive."""
    out = io.BytesIO()
    with (
        tarfile.open(fileobj=io.BytesIO(content)) as old,
        tarfile.open(fileobj=out, mode="w:gz", compresslevel=1) as new,
    ):
        members = old.getmembers()
        chosen = members[len(damage(b"0123456789")) % len(members)]
        for member in members:
            inside: Any = old.extractfile(member)
            inside = damage(inside.read()) if member is chosen else inside.read()
            member.size = len(inside)
            new.addfile(member, io.BytesIO(inside))
    return out.getvalue()


def _idx(array: np.ndarray) -> bytes:
    return gzip.compress(
        b"\0\0\x08" + bytes([array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()
    )


def _tensors(found: data.Dataset) -> list[np.ndarray]:
    parts = [found.x_train, found.y_train, found.x_test, found.y_test]
    return [part.numpy() for part in parts if part is not None]


def _of_form(form: str) -> list[np.ndarray]:
    return _tensors(data.read_file(form))


def _toy_table(path: Any) -> Any:
    """Stands for what pyarrow reads: columns of a JSON file, with whatever errors that has."""
    columns = {
        name: SimpleNamespace(to_numpy=partial(np.array, values, None))
        for name, values in json.loads(Path(path).read_text()).items()
    }
    return SimpleNamespace(column=columns.__getitem__, column_names=list(columns), items=columns.items)


def loaders(folder: Path) -> dict[str, Loader]:
    """Write a good file of every format into `folder`, and return how they are read."""
    rng = np.random.default_rng(0)
    pixels, labels = rng.integers(0, 256, (6, 28, 28), np.uint8), np.arange(6, dtype=np.uint8)
    found: dict[str, Loader] = {}

    def add(name: str, file: str, content: bytes, read: Callable[[Path], Any], **more: Any) -> None:
        path = folder / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        found[name] = Loader(path, partial(read, path), **more)

    def npz(save: Callable[..., None] = np.savez, **arrays: Any) -> bytes:
        out = io.BytesIO()
        save(out, **arrays)
        return out.getvalue()

    add("idx", "images.gz", _idx(pixels), _images.read_idx, checked=True, inner=_in_gzip)
    add("idx-labels", "labels.gz", _idx(labels), _images.read_idx, checked=True, inner=_in_gzip)

    batch = {"batch_label": "batch", "labels": labels[:3].tolist(), "data": rng.integers(0, 256, (3, 3072), np.uint8)}
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w:gz") as tar:
        for name in (*(f"data_batch_{k}" for k in range(1, 6)), "test_batch"):
            content = pickle.dumps(batch, 4)
            member = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    add("cifar-batch", "batch", pickle.dumps(batch, 4), lambda path: _images.read_batch(path.read_bytes(), str(path)))
    add("cifar-archive", "a.tar.gz", archive.getvalue(), lambda path: [*_images.read_archive(path).values()],
        checked=True, inner=_in_tar)  # fmt: skip

    x, y = rng.normal(size=(12, 3)), np.arange(12) % 3
    parts = {"x_train": x, "y_train": y, "x_test": x[:4], "y_test": y[:4]}

    of_npz = lambda path: _of_form(f"{path}")  # noqa: E731
    add("npz", "a.npz", npz(x=x, y=y), of_npz, checked=True, inner=_in_zip)
    add("npz-packed", "b.npz", npz(np.savez_compressed, **parts), of_npz, checked=True, inner=_in_zip)
    texts = np.array(["left", "right", "middle"])[y]
    add("npz-text", "c.npz", npz(x=x.astype(np.float16), y=texts), of_npz, checked=True, inner=_in_zip)

    rows = [["long name", "b", "kind"]]
    rows += [[*map(repr, row[:2].tolist()), str(text)] for row, text in zip(x, texts, strict=True)]
    for suffix, sep in (("csv", ","), ("tsv", "\t"), ("txt", ";")):
        content = "\n".join(sep.join(row) for row in rows).encode()
        add(suffix, f"a.{suffix}", content, lambda path: _of_form(f"{path}:target=kind"))
    numbers = "\r\n".join(f'"{a!r}" {b!r} {c!r}' for a, b, c in x.tolist())
    add("csv-space", "b.csv", b"\xef\xbb\xbf" + f'"a" b c\r\n{numbers}'.encode(),
        lambda path: _of_form(f"{path}:target=c:sep=space"))  # fmt: skip

    table = json.dumps({"a": x[:, 0].tolist(), "b": y.tolist(), "c": texts.tolist(), "d": [True, None] * 6}).encode()
    add("parquet", "a.parquet", table, lambda path: _of_form(f"{path}:target=c:drop=d"))
    parquet = SimpleNamespace(read_table=_toy_table)
    sys.modules |= {"pyarrow": SimpleNamespace(parquet=parquet), "pyarrow.parquet": parquet}  # type: ignore[dict-item]

    def by_name(name: str, _: Path) -> list[np.ndarray]:
        return _tensors(data.load(name, root=folder, download=False))  # which knows the SHA-256 of the small file

    higgs = {f"{key}_{part}": value[: 4 + k] for k, part in enumerate(("head", "train", "valid"))
             for key, value in (("x", rng.normal(size=(9, 28)).astype(np.float32)), ("y", labels[:9] % 2))}  # fmt: skip
    content = npz(np.savez_compressed, **higgs)
    _catalog._HIGGS = replace(_catalog._HIGGS, sha256=hashlib.sha256(content).hexdigest())
    add("higgs", "higgs/higgs.npz", content, partial(by_name, "higgs"), checked=True, inner=_in_zip)
    # The same past the check of the hash: what its reader does with a damaged file.
    add("higgs-reader", "higgs2/higgs.npz", content, partial(_past_the_hash, "higgs"), inner=_in_zip)
    files = [_idx(part) for part in (pixels, labels, pixels[:3], labels[:3])]
    info, family = _catalog._CATALOG["mnist"]
    assert isinstance(family, _catalog._MnistFamily)
    hashes = tuple(hashlib.sha256(file).hexdigest() for file in files)
    _catalog._CATALOG["mnist"] = info, replace(family, sha256=hashes, mirrors=())  # type: ignore[arg-type]
    stems = "train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"
    for stem, file in zip(stems, files, strict=True):
        name = f"{stem}-ubyte.gz"
        add(f"mnist {stem}", f"mnist/{name}", file, partial(by_name, "mnist"), checked=True, inner=_in_gzip)
        add(f"mnist-reader {stem}", f"mnist2/{name}", file, partial(_past_the_hash, "mnist"), inner=_in_gzip)

    _add_strips(folder, add, rng)
    return found


def _past_the_hash(name: str, path: Path) -> list[np.ndarray]:
    """Load a set by files of any hash, as if each had the right one."""
    info, loader = _catalog._CATALOG[name]
    source = SimpleNamespace(obtain=lambda file: path.parent / file.name)
    return _tensors(loader(info, source, True))  # type: ignore[arg-type]


def _add_strips(folder: Path, add: Callable[..., None], rng: np.random.Generator) -> None:
    from PIL import Image

    strips = folder / "strips"
    images = {part: rng.integers(0, 256, (3, 32, 32, 3), np.uint8) for part in ("train", "test")}
    _images.STRIP_IMAGES = 4

    def read(_: Path, kept: Path = folder / "nowhere" / "x") -> list[np.ndarray]:
        return [*_images.read_strips(strips, kept).values()]

    out = io.BytesIO()
    np.savez(out, train=np.arange(3, dtype=np.uint8), test=np.arange(3, dtype=np.uint8))
    for part, pixels in images.items():
        _images.STRIP_SHA256[part] = hashlib.sha256(pixels.tobytes()).hexdigest()
        _images.STRIP_CRC32[part] = zlib.crc32(pixels.tobytes()).to_bytes(4, "big")
        file = io.BytesIO()
        Image.fromarray(pixels.reshape(-1, 32, 3)).save(file, "webp", lossless=True)
        add(f"strip-{part}", f"strips/{part}_00.webp", file.getvalue(), read, checked=True)
    (folder / "nowhere").write_text("in the way, so that nothing is kept")
    _images.STRIP_SHA256["labels"] = hashlib.sha256(out.getvalue()).hexdigest()
    add("strip-labels", "strips/labels.npz", out.getvalue(), read, checked=True)
    kept = io.BytesIO()
    np.save(kept, images["train"])
    # A damaged copy is decoded anew: never an error, never another value.
    add("strip-cache", "cache/train_images.npy", kept.getvalue(), partial(read, kept=folder / "cache"), checked=True)


@contextmanager
def bounded(seconds: float) -> Iterator[None]:
    """Raise `Hang`, which no reader catches, after a time."""

    def ring(*_: Any) -> None:
        raise Hang

    signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


class Hang(BaseException):
    """A reader took too long."""


def judged(loader: Loader, good: Any, checked: bool, limit: float) -> tuple[str, str]:
    """Read once; return the kind of outcome, and what it was in words."""
    tracemalloc.reset_peak()
    try:
        with bounded(limit):
            found = loader.read()
    except Hang:
        return "hangs", f"more than {limit} s"
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
        is_own = type(error) in (ValueError, DataIntegrityError) or isinstance(error, OSError)
        outcome = "refused" if is_own and loader.path.name in text and len(text) < 2000 else "foreign"
    else:
        same = len(found) == len(good) and all(map(np.array_equal, found, good))
        outcome, text = ("changed", "other values") if checked and not same else ("read", "")
    if (peak := tracemalloc.get_traced_memory()[1]) > 256 << 20:
        return "memory", f"{peak >> 20} MB; {text}"
    return outcome, text


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--count", type=int, default=2000, help="mutations of each loader")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", default=[""], help="loaders whose names begin so")
    parser.add_argument("--show", type=int, default=3, help="faults shown of a loader and a kind")
    parser.add_argument("--at", type=int, help="run this mutation alone")
    parser.add_argument("--limit", type=float, default=10.0, help="seconds for one file")
    arguments = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_DATA, (16 << 30, resource.RLIM_INFINITY))  # a fault stays this script's own
    tracemalloc.start(1)
    kinds = ("refused", "read", "foreign", "hangs", "memory", "changed")
    print(f"seed {arguments.seed}\n{'loader':31}" + "".join(f"{kind:>9}" for kind in kinds))
    total: dict[str, int] = dict.fromkeys(kinds, 0)
    with tempfile.TemporaryDirectory() as folder:
        for name, loader in loaders(Path(folder)).items():
            if not name.startswith(tuple(arguments.only)):
                continue
            content, good = loader.path.read_bytes(), loader.read()
            counts: dict[str, int] = dict.fromkeys(kinds, 0)
            shown: list[str] = []
            for index in range(arguments.count) if arguments.at is None else [arguments.at]:
                rng = random.Random(f"{arguments.seed} {name} {index}")
                pack = loader.inner if rng.random() < 0.5 else None
                damage = partial(damaged, rng=rng)
                loader.path.write_bytes(pack(content, damage) if pack else damage(content))
                by_hash = name.startswith(("higgs", "mnist", "strip")) and "reader" not in name
                outcome, text = judged(loader, good, loader.checked and (by_hash or not pack), arguments.limit)
                counts[outcome] += 1
                if outcome not in kinds[:2] and counts[outcome] <= arguments.show:
                    shown.append(f"    {outcome}, mutation {index}: {text[:300]!r}")
            loader.path.write_bytes(content)
            print(f"{name:31}" + "".join(f"{count:>9}" for count in counts.values()), *shown, sep="\n", flush=True)
            total = {kind: total[kind] + counts[kind] for kind in kinds}
    print(f"{'all':31}" + "".join(f"{count:>9}" for count in total.values()))
    sys.exit(any(total[kind] for kind in kinds[2:]))


if __name__ == "__main__":
    main()
