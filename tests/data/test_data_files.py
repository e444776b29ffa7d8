from __future__ import annotations

import gzip
import hashlib
import itertools
import os
import resource
import struct
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch

from beyondprop.data import _catalog, _files, load
from beyondprop.data._files import DataFile, Source, user_cache
from beyondprop.errors import DataIntegrityError, DataUnavailableError

_CONTENT = bytes(range(256)) * 20_000  # several chunks
_SHA256 = hashlib.sha256(_CONTENT).hexdigest()


@pytest.fixture(autouse=True)
def _isolated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BEYONDPROP_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("no_proxy", "*")


@dataclass
class _Server:
    """What a local HTTP server answers, by path: the bytes, and how many of them it promises."""

    url: str
    answers: dict[str, tuple[bytes | Iterator[bytes], int | str | None]]
    asked: list[str]
    redirects: dict[str, str] = field(default_factory=dict)


@pytest.fixture
def server() -> Iterator[_Server]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            state.asked.append(self.path)
            if self.path not in state.answers:
                self.send_error(404)
                return
            content, promised = state.answers[self.path]
            self.send_response(302 if self.path in state.redirects else 200)
            if self.path in state.redirects:
                self.send_header("Location", state.redirects[self.path])
            if promised is not None:
                self.send_header("Content-Length", str(promised))
            self.end_headers()
            with suppress(OSError):  # where the other side has enough
                for piece in [content] if isinstance(content, bytes) else content:
                    self.wfile.write(piece)

        def log_message(self, format: str, *args: object) -> None:
            del format, args

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state = _Server(f"http://127.0.0.1:{http.server_address[1]}", {}, [])
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield state
    http.shutdown()
    thread.join()
    http.server_close()


def _file(server: _Server, *paths: str) -> DataFile:
    return DataFile("set", "file.bin", _SHA256, tuple(server.url + path for path in paths))


def _tree(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_download_goes_to_the_cache_with_progress(server: _Server, tmp_path: Path) -> None:
    server.answers["/a"] = (_CONTENT, len(_CONTENT))
    calls: list[tuple[int, int | None, str]] = []
    path = Source(progress=lambda *call: calls.append(call)).obtain(_file(server, "/a", "/b"))
    assert path == tmp_path / "xdg" / "beyondprop" / "set" / "file.bin"
    assert path.read_bytes() == _CONTENT
    assert server.asked == ["/a"]
    assert _tree(tmp_path) == ["xdg/beyondprop/set/file.bin"]
    done = [call[0] for call in calls]
    assert (done[0], done[-1]) == (0, len(_CONTENT))
    assert done == sorted(set(done))
    assert len(done) > 3
    assert {call[1:] for call in calls} == {(len(_CONTENT), "file.bin")}
    Source().obtain(_file(server, "/a"))
    assert server.asked == ["/a"]  # found, not fetched again


def test_download_goes_to_root_and_total_may_be_unknown(server: _Server, tmp_path: Path) -> None:
    server.answers["/a"] = (_CONTENT, None)
    totals: list[int | None] = []
    source = Source(root=tmp_path / "root", progress=lambda done, total, name: totals.append(total))
    assert source.obtain(_file(server, "/a")) == tmp_path / "root" / "set" / "file.bin"
    assert set(totals) == {None}
    assert _tree(tmp_path) == ["root/set/file.bin"]


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (None, "HTTP Error 404"),
        (
            (_CONTENT[:-1] + b"x", len(_CONTENT)),
            f"the download has SHA-256 .*, expected {_SHA256}; it was deleted",
        ),
        ((_CONTENT[:3_000_000], len(_CONTENT)), f"(3000000 of|IncompleteRead|{len(_CONTENT)} bytes)"),
    ],
)
def test_a_failed_download_leaves_nothing_and_the_next_mirror_serves(
    server: _Server, tmp_path: Path, answer: tuple[bytes, int] | None, reason: str
) -> None:
    if answer is not None:
        server.answers["/bad"] = answer
    with pytest.raises(DataUnavailableError, match=f"(?s)Downloads failed:\n  {server.url}/bad: .*{reason}"):
        Source().obtain(_file(server, "/bad"))
    assert _tree(tmp_path) == []
    server.answers["/good"] = (_CONTENT, len(_CONTENT))
    path = Source().obtain(_file(server, "/bad", "/good"))
    assert path.read_bytes() == _CONTENT
    assert server.asked == ["/bad", "/bad", "/good"]
    assert _tree(tmp_path) == ["xdg/beyondprop/set/file.bin"]


@pytest.mark.parametrize("length", ["many", "-5", "1e3", "9" * 5000])
def test_a_content_length_that_is_no_number_is_no_obstacle(server: _Server, length: str) -> None:
    server.answers |= {"/bad": (_CONTENT[:-1], length), "/good": (_CONTENT, length)}
    assert Source().obtain(_file(server, "/bad", "/good")).read_bytes() == _CONTENT
    assert server.asked == ["/bad", "/good"]


def test_a_redirection_to_no_address_leads_to_the_next_mirror(server: _Server) -> None:
    server.answers |= {"/bad": (b"", 0), "/good": (_CONTENT, None)}
    server.redirects["/bad"] = "http://[nowhere/a"
    assert Source().obtain(_file(server, "/bad", "/good")).read_bytes() == _CONTENT


@pytest.mark.parametrize("promised", [1 << 50, None])
def test_a_download_without_end_is_cut(server: _Server, tmp_path: Path, promised: int | None) -> None:
    server.answers |= {"/endless": (itertools.repeat(bytes(1 << 16)), promised), "/good": (_CONTENT, len(_CONTENT))}
    file = replace(_file(server, "/endless"), most=len(_CONTENT))
    begin = time.monotonic()
    with pytest.raises(DataUnavailableError, match=rf"the file has at most {len(_CONTENT):,} bytes, the server sends"):
        Source().obtain(file)
    assert time.monotonic() - begin < 10
    assert _tree(tmp_path) == []
    file = replace(_file(server, "/endless", "/good"), most=len(_CONTENT))
    assert Source().obtain(file).read_bytes() == _CONTENT  # of exactly as many bytes as are accepted


def test_a_download_that_drips_is_given_up(server: _Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_files, "_START", 0.3)
    monkeypatch.setattr(_files, "_SLOWEST", 1e12)

    def drops() -> Iterator[bytes]:
        for _ in range(400):
            time.sleep(0.01)
            yield b"x"

    server.answers["/slow"] = (drops(), len(_CONTENT))
    begin = time.monotonic()
    with pytest.raises(DataUnavailableError, match=r"/slow: \d+ bytes came in 0 s; the whole file must within 0 s"):
        Source().obtain(_file(server, "/slow"))
    assert time.monotonic() - begin < 3
    assert _tree(tmp_path) == []


def test_an_answer_that_does_not_begin_is_given_up(server: _Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_files, "_START", 0.3)
    answer = threading.Event()

    class Silent(dict[str, str]):
        def __getitem__(self, key: str) -> str:
            answer.wait(5)  # the status line is sent, the header's lines are not
            return super().__getitem__(key)

    server.answers |= {"/silent": (b"", 0), "/good": (_CONTENT, len(_CONTENT))}
    server.redirects = Silent({"/silent": "/good"})
    with pytest.raises(DataUnavailableError, match=r"/silent: no answer began within 0 s"):
        Source().obtain(_file(server, "/silent"))
    answer.set()
    assert Source().obtain(_file(server, "/good")).read_bytes() == _CONTENT


def test_a_full_disk_is_an_error_with_the_path(server: _Server, tmp_path: Path) -> None:
    server.answers["/a"] = (_CONTENT, len(_CONTENT))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, before[1]))  # as a disk that is full after 1 MiB
    try:
        with pytest.raises(
            DataUnavailableError, match=rf"/a: .*File too large: '{tmp_path}/xdg/beyondprop/set/file.bin'"
        ):
            Source().obtain(_file(server, "/a"))
        with pytest.raises(OSError, match="File too large") as caught, _files.atomic_file(tmp_path / "b") as stream:
            stream.write(_CONTENT)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert caught.value.filename == str(tmp_path / "b")
    assert _tree(tmp_path) == []


def test_an_interrupt_during_a_download_leaves_nothing(server: _Server, tmp_path: Path) -> None:
    server.answers["/a"] = (_CONTENT, len(_CONTENT))

    def interrupt(done: int, total: int | None, name: str) -> None:
        del total, name
        if done:
            assert len(_tree(tmp_path)) == 1  # the partial file is there, under another name
            assert not (tmp_path / "xdg/beyondprop/set/file.bin").exists()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Source(progress=interrupt).obtain(_file(server, "/a", "/a"))
    assert _tree(tmp_path) == []
    assert server.asked == ["/a"]


def test_a_folder_that_cannot_be_written_is_named(server: _Server, tmp_path: Path) -> None:
    server.answers["/a"] = (_CONTENT, len(_CONTENT))
    (tmp_path / "taken").write_text("")
    with pytest.raises(DataUnavailableError, match=f"{server.url}/a: .*taken"):
        Source(root=tmp_path / "taken").obtain(_file(server, "/a"))


def test_places_are_looked_in_in_order(server: _Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BEYONDPROP_DATA", str(tmp_path / "env"))
    file = _file(server)
    places = [tmp_path / "root", tmp_path / "env", tmp_path / "xdg" / "beyondprop"]
    source = Source(root=places[0])
    assert source.places() == places
    for place in reversed(places):  # each one is preferred to those that come after it
        (place / "set").mkdir(parents=True)
        (place / "set" / "file.bin").write_bytes(_CONTENT)
        assert source.obtain(file) == place / "set" / "file.bin"


def test_a_missing_file_names_places_and_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BEYONDPROP_DATA", str(tmp_path / "env"))
    with pytest.raises(DataUnavailableError) as caught:
        load("mnist", root=tmp_path / "root", download=False)
    message = str(caught.value)
    name = "mnist/train-images-idx3-ubyte.gz"
    assert message.startswith(f"{name} was not found")
    for place in ("root", "env", "xdg/beyondprop"):
        assert f"\n  {tmp_path / place / name}" in message
    assert "download=False" in message
    assert "Get it from https://ossci-datasets.s3.amazonaws.com/mnist/train-images-idx3-ubyte.gz" in message
    assert f"put it at {tmp_path / 'root' / name}" in message
    assert "BEYONDPROP_DATA" in message
    assert isinstance(caught.value, FileNotFoundError)
    with pytest.raises(DataUnavailableError, match=r"(?s)cifar-10-python.tar.gz was not found.*labels.npz"):
        load("cifar10", download=False)


def test_a_file_with_the_wrong_hash_is_named(server: _Server, tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "file.bin").write_bytes(b"other")
    found = hashlib.sha256(b"other").hexdigest()
    with pytest.raises(DataIntegrityError, match=f"set/file.bin has SHA-256 {found}, expected {_SHA256}"):
        Source(root=tmp_path).obtain(_file(server, "/a"))
    assert (tmp_path / "set" / "file.bin").read_bytes() == b"other"  # the user's file is never deleted
    assert server.asked == []


def test_user_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert user_cache() == tmp_path / "xdg" / "beyondprop"
    monkeypatch.setenv("HOME", str(tmp_path))
    for invalid in ("", "relative/path"):
        monkeypatch.setenv("XDG_CACHE_HOME", invalid)
        assert user_cache() == tmp_path / ".cache" / "beyondprop"
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # a user without a home
    assert user_cache() == Path(tempfile.gettempdir()) / "beyondprop"


@pytest.fixture
def small_mnist(monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """Makes `mnist` a set of 5 + 3 images whose hashes are known, and returns its files."""
    rng = np.random.default_rng(0)
    files: dict[str, bytes] = {}
    for part, rows in (("train", 5), ("t10k", 3)):
        for kind, shape in (("images-idx3", (rows, 28, 28)), ("labels-idx1", (rows,))):
            values = rng.integers(0, 256 if "images" in kind else 10, shape, np.uint8).tobytes()
            header = bytes([0, 0, 8, len(shape)]) + struct.pack(f">{len(shape)}I", *shape)
            files[f"{part}-{kind}-ubyte.gz"] = gzip.compress(header + values)
    info, loader = _catalog._CATALOG["mnist"]
    assert isinstance(loader, _catalog._MnistFamily)
    hashes = tuple(hashlib.sha256(content).hexdigest() for content in files.values())
    small = replace(loader, sha256=hashes, mirrors=())
    monkeypatch.setitem(_catalog._CATALOG, "mnist", (info, small))
    return files


def _place(files: dict[str, bytes], folder: Path) -> None:
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)


@pytest.mark.parametrize("as_root", [Path, str])
def test_mnist_files_become_tensors(
    small_mnist: dict[str, bytes], tmp_path: Path, as_root: Callable[[Path], Path | str]
) -> None:
    _place(small_mnist, tmp_path / "mnist")
    mnist = load("mnist", root=as_root(tmp_path), download=False)
    raw = {name: gzip.decompress(content) for name, content in small_mnist.items()}
    pixels = torch.tensor(list(raw["train-images-idx3-ubyte.gz"][16:])).float().view(5, 1, 28, 28)
    assert torch.equal(mnist.x_train, (pixels / 255 - 0.1307) / 0.3081)
    assert mnist.x_test.shape == (3, 1, 28, 28)
    assert mnist.y_train.tolist() == list(raw["train-labels-idx1-ubyte.gz"][8:])
    assert mnist.y_test.tolist() == list(raw["t10k-labels-idx1-ubyte.gz"][8:])
    assert mnist.y_train.dtype == torch.int64


def test_tensors_do_not_depend_on_the_default_dtype(small_mnist: dict[str, bytes], tmp_path: Path) -> None:
    _place(small_mnist, tmp_path / "mnist")
    torch.set_default_dtype(torch.float64)
    try:
        assert load("mnist", root=tmp_path).x_train.dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)


def test_load_downloads_what_is_missing(
    small_mnist: dict[str, bytes], server: _Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info, loader = _catalog._CATALOG["mnist"]
    assert isinstance(loader, _catalog._MnistFamily)
    mirrored = replace(loader, mirrors=(f"{server.url}/gone/", f"{server.url}/m/"))
    monkeypatch.setitem(_catalog._CATALOG, "mnist", (info, mirrored))
    server.answers |= {f"/m/{name}": (content, len(content)) for name, content in small_mnist.items()}
    seen: set[str] = set()
    mnist = load("mnist", progress=lambda done, total, name: seen.add(name))
    assert len(mnist.y_train) == 5
    assert seen == set(small_mnist)
    assert len(_tree(user_cache())) == 4


def test_standardization_is_by_channel_and_contiguous() -> None:
    channels_last = np.random.default_rng(0).integers(0, 256, (2, 4, 4, 3), np.uint8)
    x = _catalog._standardized(channels_last.transpose(0, 3, 1, 2), (0.1, 0.2, 0.3), (1.0, 2.0, 4.0))
    assert x.is_contiguous()
    expected = (channels_last / 255 - [0.1, 0.2, 0.3]) / [1.0, 2.0, 4.0]
    torch.testing.assert_close(x.permute(0, 2, 3, 1), torch.from_numpy(expected).float())


def test_atomic_file_keeps_the_old_content_on_failure(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def fail() -> None:
        with _files.atomic_file(path) as stream:
            stream.write(b"new")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        fail()
    assert path.read_text() == "old"
    assert _tree(tmp_path) == ["file"]


def test_a_file_without_a_download_says_where_it_comes_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BEYONDPROP_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(
        DataUnavailableError, match=r"It has no public download. It is a sample of UCI's HIGGS set"
    ) as found:
        load("higgs", root=tmp_path / "data")
    assert str(tmp_path / "data" / "higgs" / "higgs.npz") in str(found.value)
    assert "Downloads failed" not in str(found.value)
