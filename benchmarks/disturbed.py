"""Forks a process that dies, or whose calls fail, at a chosen call that changes a file; see `kills.py`."""

from __future__ import annotations

import builtins
import errno
import fcntl
import io
import json
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

WHEN = ("before", "inside", "after", "fails")
KILLED = 137
_NEED_ROOM = ("create", "write", "mkdir", "fsync")
_TIMES = ("seconds", "started", "resumed", "date", "checksum")


class Calls:
    """Counts the calls that change something below `root`, and lets this process die, or the call fail, at one of them.

    Args:
        root: what lies elsewhere is none of its concern.
        at: the call, counted from 1; None: all are done, and listed.
        when: `before`, `inside`, `after` or `fails`.
    """

    def __init__(self, root: Path, at: int | None = None, when: str = "") -> None:
        self.root, self.at, self.when = os.path.realpath(root), at, when
        self.seen: list[str] = []
        self.past: Counter[str] = Counter()  # calls that the interpreter reports, by what they should be seen as

    def is_below(self, path: Any) -> bool:
        if isinstance(path, int):
            path = os.readlink(f"/proc/self/fd/{path}")
        return os.path.realpath(os.fspath(path)).startswith(self.root)

    def __call__(self, name: str, path: Any, do: Callable[[], Any], half: Callable[[], Any] | None = None) -> Any:
        if not self.is_below(path):
            return do()
        self.seen.append(f"{name} {self._short(path)}")
        count = len(self.seen)
        if self.when == "fails" and self.at is not None and count >= self.at:
            is_it = count == self.at
            if is_it and half is not None:
                return half()
            if is_it or name in _NEED_ROOM:
                code = errno.ENOSPC if name in (*_NEED_ROOM, "replace") else errno.EIO
                where = () if isinstance(path, int) else (os.fspath(path),)
                raise OSError(code, os.strerror(code), *where)
        elif count == self.at:
            try:
                if self.when != "before":
                    (do if half is None or self.when == "after" else half)()
            finally:  # an error that the call ends with is never learned, either
                os._exit(KILLED)
        return do()

    def _short(self, path: Any) -> str:
        path = os.readlink(f"/proc/self/fd/{path}") if isinstance(path, int) else os.path.realpath(os.fspath(path))
        parts = os.path.relpath(path, self.root).split(".")
        return ".".join("*" if len(part) == 32 else part for part in parts)  # of a part's name

    def install(self) -> None:
        """Take the place of the calls, for the rest of this process."""
        calls, opened, os_open = self, io.open, os.open

        class Raw(io.FileIO):
            def write(self, data: Any) -> Any:
                data = bytes(data)
                whole, half = partial(super().write, data), partial(super().write, data[: len(data) // 2])
                return calls("write", self.fileno(), whole, half if len(data) > 1 else None)

        def open_(
            file: Any, mode: str = "r", buffering: int = -1, encoding: Any = None, *rest: Any, **more: Any
        ) -> Any:
            if isinstance(file, int) or mode in ("r", "rt", "rb") or not self.is_below(file):
                return opened(file, mode, buffering, encoding, *rest, **more)
            do = partial(Raw, file, mode.replace("b", "").replace("t", ""))
            raw = do() if mode[0] == "r" else self("create", file, do)
            stream: Any = (io.BufferedRandom if "+" in mode else io.BufferedWriter)(raw)
            return stream if "b" in mode else io.TextIOWrapper(stream, encoding or "utf-8", *rest)

        def os_open_(path: Any, flags: int, *rest: Any, **more: Any) -> Any:
            changes = flags & (os.O_CREAT | os.O_TRUNC)
            do = partial(os_open, path, flags, *rest, **more)
            return self("create", path, do) if changes else do()

        builtins.open = io.open = open_
        os.open = os_open_
        named = {"rename": "replace", "remove": "unlink"}
        of_os = (
            "mkdir",
            "replace",
            "rename",
            "unlink",
            "remove",
            "rmdir",
            "link",
            "symlink",
            "truncate",
            "ftruncate",
            "fsync",
        )
        for module, names in ((os, of_os), (fcntl, ("flock",))):
            for name in names:
                setattr(module, name, self._wrapped(named.get(name, name), getattr(module, name)))

        events = {"os.mkdir": "mkdir", "os.rename": "replace", "os.remove": "unlink", "os.rmdir": "rmdir", "os.link": "link",
                  "os.symlink": "symlink", "os.truncate": "truncate", "fcntl.flock": "flock"}  # fmt: skip

        def audit(event: str, args: tuple[Any, ...]) -> None:
            changes = event == "open" and isinstance(args[2], int) and args[2] & (os.O_CREAT | os.O_TRUNC)
            if (changes or event in events) and self.is_below(args[0]):
                self.past["create" if changes else events[event]] += 1

        sys.addaudithook(audit)

    def _wrapped(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(path: Any, *rest: Any, **more: Any) -> Any:
            path = path.fileno() if hasattr(path, "fileno") else path
            return self(name, path, partial(call, path, *rest, **more))

        return wrapped

    def missed(self) -> dict[str, int]:
        """Return how many calls the interpreter reports that were not counted here."""
        own = Counter(line.split()[0] for line in self.seen)
        return {name: count - own[name] for name, count in self.past.items() if count != own[name]}


@dataclass
class Command:
    """What is killed.

    Attributes:
        run: does it in a folder, and returns the exit code; what it prints is looked at.
        again: does it once more, given what the killed one left; default: the same, or what that names.
        before: makes what must be there.
        calls, expected, seconds: of an undisturbed run, see `counted`.
    """

    run: Callable[[Path], int]
    again: Callable[[Path], int] | None = None
    before: Callable[[Path], None] = lambda folder: None
    calls: list[str] = field(default_factory=list)
    expected: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0


def forked(do: Callable[[], int], said: Path, kill_after: float | None = None) -> int:
    """Run in a process of its own, its output in a file, and return its exit code."""
    child = os.fork()
    if child == 0:
        code = 70
        os.fsync = lambda _: None  # it matters when the machine dies, not the process
        try:
            out = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            for stream in (1, 2):
                os.dup2(out, stream)
            for name, number in (("stdout", 1), ("stderr", 2)):
                stream = io.TextIOWrapper(io.FileIO(number, "w", closefd=False), "utf-8", write_through=True)
                setattr(sys, name, stream)
            code = do()
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(code)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def counted(command: Command, folder: Path, notes: Path) -> None:
    """Run undisturbed; keep the calls and what is there at the end."""

    def do() -> int:
        calls = Calls(folder)
        calls.install()
        code = command.run(folder)
        notes.write_text(json.dumps([calls.seen, calls.missed()]))
        return code

    command.before(folder)
    said = notes.with_suffix(".said")
    if forked(do, said) != 0:
        raise RuntimeError(f"the undisturbed run failed:\n{said.read_text()}")
    command.calls, missed = json.loads(notes.read_text())
    if missed:
        raise RuntimeError(f"calls went past the counting: {missed}")
    command.expected = content(folder)


def case(command: Command, at: int, when: str, show: bool = False) -> str:
    """Disturb a run at one call and run it again; return what is wrong, "" where nothing is."""
    with tempfile.TemporaryDirectory(prefix="kills-") as temporary:
        folder, said = Path(temporary, "here"), Path(temporary, "said")
        folder.mkdir()
        command.before(folder)

        def do() -> int:
            Calls(folder, at, when).install()
            return command.run(folder)

        code = forked(do, said)
        text = said.read_text()
        if show:
            print(f"exit {code}\n{text}\n" + "\n".join(map(str, sorted(folder.rglob("*")))))
        if when != "fails" and code != KILLED:
            return f"was not killed, but ended with exit {code}: {text[-300:]}"
        if when == "fails" and (wrong := badly_said(code, text, folder)):
            return wrong
        return afterwards(command, folder, said, show)


def at_random(command: Command, seed: int, longest: float) -> str:
    """Kill a run from outside, and run it again."""
    with tempfile.TemporaryDirectory(prefix="kills-") as temporary:
        folder, said = Path(temporary, "here"), Path(temporary, "said")
        folder.mkdir()
        command.before(folder)
        forked(lambda: command.run(folder), said, kill_after=random.Random(seed).uniform(0, longest))
        return afterwards(command, folder, said, False)


def afterwards(command: Command, folder: Path, said: Path, show: bool) -> str:
    """Run again; return what is wrong."""
    code = forked(lambda: (command.again or command.run)(folder), said)
    text = said.read_text()
    if show:
        print(f"then exit {code}\n{text}")
    if code != 0:
        return f"again: exit {code}: {text[-500:]}"
    found = content(folder)
    differing = sorted(k for k in found.keys() | command.expected.keys() if found.get(k) != command.expected.get(k))
    if show:
        print(*(f"{k}:\n  {found.get(k)}\n  {command.expected.get(k)}" for k in differing), sep="\n")
    return f"differs from the undisturbed run: {', '.join(differing)}" if differing else ""


def badly_said(code: int, text: str, folder: Path) -> str:
    """Return what is wrong with how a failure was told; nothing where it did no harm."""
    lines = [line for line in text.splitlines() if line.startswith("beyondprop: ")]
    if code == 0:
        return ""
    if code != 1 or "Traceback" in text or len(lines) != 1:
        return f"exit {code}, no single sentence: {text[-500:]}"
    told = text[text.index(lines[0]) :]  # what is not found is told in several lines
    return "" if str(folder) in told else f"no path: {told}"


def content(folder: Path) -> dict[str, Any]:
    """Return the files of a folder by name: what is in them, without times."""
    from beyondprop.lab.runs.checkpoint import load_checkpoint

    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_dir():
            found[name] = "a folder"
        elif path.suffix == ".safetensors":
            found[name] = timeless(load_checkpoint(path))
        elif path.suffix == ".jsonl":
            found[name] = [timeless(json.loads(line)) for line in path.read_text().splitlines()]
        elif path.suffix == ".json":
            found[name] = timeless(json.loads(path.read_text()))
        elif path.suffix == ".png":  # draws seconds
            found[name] = path.read_bytes()[-8:-4]
        elif path.suffix == ".html":
            found[name] = path.read_text().rstrip()[-7:]
        elif path.name == "checksums.txt":
            found[name] = {line.split()[-1] for line in path.read_text().splitlines()}
        else:
            found[name] = path.read_bytes()
    return found


def timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: timeless(v) for key, v in value.items() if key not in _TIMES}
    if isinstance(value, list | tuple):
        return [timeless(v) for v in value]
    return value.tolist() if hasattr(value, "tolist") else value
