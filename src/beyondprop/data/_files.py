"""Find the files of a data set, download those that are missing, and check every one against its SHA-256."""

from __future__ import annotations

import errno
import hashlib
import os
import platform
import queue
import re
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any, BinaryIO
from urllib.request import Request, urlopen

from beyondprop.errors import DataIntegrityError, DataUnavailableError

try:
    import fcntl
except ImportError:  # on this system, a file that is open cannot be deleted, and needs no lock for that
    fcntl = None

Progress = Callable[[int, int | None, str], None]
"""Called as `progress(done_bytes, total_bytes, file_name)`; the total is None where the server tells none."""

_CHUNK = 1 << 20
_TIMEOUT = 30.0  # seconds without a byte
_START = 60.0  # seconds until the answer to a request begins
_SLOWEST = 16 << 10  # bytes a second that a mirror must have on the average
_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.ESTALE}
_HOST = hashlib.sha256(platform.node().encode()).hexdigest()[:8]
_OWN_PART = re.compile(rf"\..+\.{_HOST}[0-9a-f]{{24}}\.part")

REMEDY = "It is damaged or another file: delete it, to have it fetched again, or put the original there."
"""The end of messages on a wrong file of a known data set."""


@dataclass(frozen=True, slots=True)
class DataFile:
    """One file of a data set.

    Attributes:
        folder: Its folder under a data root, for example `"mnist"`.
        sha256: Of its bytes, in hexadecimal.
        urls: Where it can be downloaded, tried in this order; empty where it is nowhere.
        hint: Where such a file comes from, for files without a download.
        also: What else would serve, for the message where nothing is found.
        most: Bytes that a download of it may have at most.
    """

    folder: str
    name: str
    sha256: str
    urls: tuple[str, ...]
    hint: str = ""
    also: str = ""
    most: int = 1 << 30


@dataclass(frozen=True, slots=True)
class Source:
    """Where a loader may take files from: the arguments of `load` in one piece."""

    root: Path | None = None
    download: bool = True
    progress: Progress | None = None

    def places(self) -> list[Path]:
        """The data roots to look in, in order: `root`, `$BEYONDPROP_DATA`, the user's cache."""
        environment = os.environ.get("BEYONDPROP_DATA")
        given = [self.root, Path(environment).expanduser() if environment else None, user_cache()]
        return list(dict.fromkeys(place for place in given if place is not None))

    def obtain(self, file: DataFile) -> Path:
        """Return the path of a verified copy of `file`; what is missing goes to `root` or the user's cache.

        Raises:
            DataIntegrityError: The first copy found has the wrong SHA-256.
            DataUnavailableError: There is no copy and none could be downloaded.
        """
        candidates = [place / file.folder / file.name for place in self.places()]
        for path in candidates:
            if os.path.isfile(path):  # unlike Path.is_file, no error where a folder may not be read
                verify(path, file.sha256)
                return path
        target = (self.root or user_cache()) / file.folder / file.name
        failures: list[str] = []
        for url in file.urls if self.download else ():
            try:
                download(url, target, file.sha256, self.progress, file.most)
                return target
            except (OSError, HTTPException, ValueError) as error:  # ValueError: a redirection to no address, too
                failures.append(f"{url}: {error or type(error).__name__}")
        looked = [*map(str, candidates), *filter(None, [file.also])]
        tried = "Downloads failed" if self.download else "Downloading is switched off (download=False)"
        source = f"Get it from {file.urls[0]}" if file.urls else f"It has no public download. {file.hint} Get it"
        raise DataUnavailableError(
            f"{file.folder}/{file.name} was not found. Looked for:"
            + "".join(f"\n  {line}" for line in looked)
            + (f"\n{tried}{':' if failures else '.'}" if file.urls else "")
            + "".join(f"\n  {line}" for line in failures)
            + f"\n{source} and put it at {target}, or set BEYONDPROP_DATA to a folder that "
            f"has {file.folder}/{file.name}."
        )


def user_cache() -> Path:
    """The folder for downloads and decoded copies: `$XDG_CACHE_HOME/beyondprop` or `~/.cache/beyondprop`."""
    # A relative XDG_CACHE_HOME is invalid by its specification; without a home directory "~" is not expanded.
    for base in (os.environ.get("XDG_CACHE_HOME", ""), os.path.expanduser("~/.cache")):
        if os.path.isabs(base):
            return Path(base, "beyondprop")
    return Path(tempfile.gettempdir(), "beyondprop")


def verify(path: Path, sha256: str) -> None:
    """Raise `DataIntegrityError` unless the file at `path` has this SHA-256."""
    with disk_errors_name(path), open(path, "rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != sha256:
        raise DataIntegrityError(f"{path} has SHA-256 {found}, expected {sha256}. {REMEDY}")


def download(url: str, target: Path, sha256: str, progress: Progress | None, most: int = 1 << 30) -> None:
    """Download `url` to `target`, which appears only when it is complete and has this SHA-256.

    It may have `most` bytes, and take a minute and a second for each 16 KiB of these.

    Raises:
        DataIntegrityError: The download was complete but has another SHA-256; it was deleted.
        OSError: The server or the disk failed, the download is too long or too slow, or the connection ended early; nothing
            is left behind.
    """
    digest = hashlib.sha256()
    longest = _START + most / _SLOWEST
    begin = time.monotonic()
    with _answer(Request(url, headers={"User-Agent": "beyondprop"})) as response, atomic_file(target) as out:
        total: int | None = response.length  # None for a Content-Length that is no number
        done, report = 0, progress or (lambda *call: None)
        report(done, total, target.name)
        # read1 returns what has arrived, where read would wait for the whole chunk however slowly it comes.
        while chunk := response.read1(_CHUNK):
            done += len(chunk)
            if max(done, total or 0) > most:
                raise OSError(
                    f"the file has at most {most:,} bytes, the server sends {max(done, total or 0):,} or more"
                )
            if (seconds := time.monotonic() - begin) > longest:
                raise TimeoutError(
                    f"{done:,} bytes came in {seconds:.0f} s; the whole file must within {longest:.0f} s"
                )
            out.write(chunk)
            digest.update(chunk)
            report(done, total, target.name)
        # Inside the context, so that what is short or wrong is deleted and never gets its name.
        if total is not None and done < total:
            raise ConnectionError(f"the connection ended after {done} of {total} bytes")
        if digest.hexdigest() != sha256:
            raise DataIntegrityError(
                f"the download has SHA-256 {digest.hexdigest()}, expected {sha256}; it was deleted"
            )


def _answer(request: Request) -> Any:
    """Open a request. In a thread of its own: header lines that come byte by byte would outlast any timeout of a socket."""
    found: queue.SimpleQueue[Any] = queue.SimpleQueue()
    given_up = threading.Event()

    def ask() -> None:
        try:
            response = urlopen(request, timeout=_TIMEOUT)
        except Exception as error:
            found.put(error)
            return
        found.put(response)
        if given_up.is_set():
            response.close()

    threading.Thread(target=ask, daemon=True).start()
    try:
        answer = found.get(timeout=_START)
    except BaseException as error:
        given_up.set()
        if isinstance(error, queue.Empty):
            raise TimeoutError(f"no answer began within {_START:.0f} s") from None
        raise
    if not isinstance(answer, Exception):
        return answer
    try:
        raise answer
    finally:
        del answer  # whose traceback has this frame: a circle would keep the connection open


@contextmanager
def disk_errors_name(path: Path) -> Iterator[None]:
    """Give errors of a disk, which know no file, the path."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno in _DISK:
            raise OSError(error.errno, error.strerror, str(path)) from None
        raise


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Open a file for writing that gets its name if the block ends well, and is deleted if it does not.

    What killed processes left of such files in the folder is deleted, too.

    Raises:
        OSError: The disk is full or fails; it has the path.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_parts(path.parent)
    with disk_errors_name(path):
        part, stream = _new_part(path)
    lock = None if fcntl is None else os.dup(stream.fileno())  # it holds until the name is changed, after the close
    try:
        with disk_errors_name(path), stream:
            yield stream
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
        if lock is not None:
            os.close(lock)


def _new_part(path: Path) -> tuple[Path, BinaryIO]:
    """Make the file that will be `path`, locked as long as it is open: `remove_parts` deletes what nobody has open."""
    while True:
        part = path.with_name(f".{path.name}.{_HOST}{uuid.uuid4().hex[:24]}.part")
        stream = open(part, "xb")  # noqa: SIM115
        if fcntl is not None:
            with suppress(OSError):  # a file system without locks: there, nobody deletes it either
                fcntl.flock(stream, fcntl.LOCK_EX)
        if fcntl is None or os.fstat(stream.fileno()).st_nlink:
            return part, stream
        stream.close()  # deleted before it was locked


def remove_parts(folder: Path, *, of_all: bool = False) -> None:
    """Delete what killed processes left of files in a folder that they were writing; what is being written is locked.

    Args:
        folder: need not be there.
        of_all: those of other machines, too, whose locks need not be seen here, and of older versions, which had no locks.
    """
    try:
        with os.scandir(folder) as entries:
            parts = [entry for entry in entries if is_part(entry)]
    except OSError:
        return
    for part in parts:
        if not of_all and (fcntl is None or _OWN_PART.fullmatch(part.name) is None):
            continue
        with suppress(OSError), ExitStack() as stack:
            if fcntl is not None:
                fcntl.flock(stack.enter_context(open(part, "rb+")), fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.unlink(part)


def is_part(path: Path | os.DirEntry[str]) -> bool:
    """Return whether this is a file that is being written, or what a killed process left of one."""
    return path.name.startswith(".") and path.name.endswith(".part")
