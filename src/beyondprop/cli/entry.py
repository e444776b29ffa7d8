"""Parse, run, and say what went wrong.

Whatever imports torch is imported when a command runs: help is there at once.
"""

from __future__ import annotations

import contextlib
import errno
import importlib.metadata
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import tyro

from beyondprop.cli.compare import Compare
from beyondprop.cli.ledger import Ledger
from beyondprop.cli.list import List
from beyondprop.cli.report import Report
from beyondprop.cli.reproduce import Reproduce
from beyondprop.cli.usage import UsageError


def run(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code; `KeyboardInterrupt` and `BrokenPipeError` are left to `main`."""
    argv = sys.argv[1:] if argv is None else argv
    if list(argv) == ["--version"]:
        sys.stdout.write(f"beyondprop {importlib.metadata.version('beyondprop')}\n")
        return 0
    try:
        command: Any = tyro.cli(
            Compare | Report | List | Reproduce | Ledger,
            prog="beyondprop",
            args=argv,
            description="Train networks by what comes after plain backpropagation, side by side with it. Also: --version.",
        )
    except SystemExit as done:  # help, or what tyro has explained
        return done.code if isinstance(done.code, int) else int(done.code is not None)
    with _signals() as pressed:
        return _run(command, pressed)


def _run(command: Any, pressed: Callable[[], bool]) -> int:
    try:
        return command.run()
    except BrokenPipeError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno == errno.ENOSPC and error.filename is None:
            raise  # files are named where they are written: this is the standard output
        # In the middle of an import, packages make errors of their own of Ctrl-C.
        if pressed() and not isinstance(error, OSError):
            raise KeyboardInterrupt from error
        if command.debug:
            raise
        from beyondprop.cli.terminal import write_error

        known = isinstance(error, UsageError | OSError | ValueError | RuntimeError)
        text = str(error) if known and str(error) else f"{type(error).__name__}: {error}"
        hint = "" if known else "\n--debug shows where it comes from."
        write_error(text + hint)
        return 2 if isinstance(error, UsageError) else 1


@contextlib.contextmanager
def _signals() -> Iterator[Callable[[], bool]]:
    """Yield whether a signal has come, such as Ctrl-C; who handles it stays who did."""
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    heard, told = socket.socketpair()
    with heard, told:
        for end in (heard, told):
            end.setblocking(False)
        before = signal.set_wakeup_fd(told.fileno(), warn_on_full_buffer=False)
        try:
            yield lambda: signal.SIGINT in _received(heard)
        finally:
            signal.set_wakeup_fd(before)


def _received(heard: socket.socket) -> bytes:
    try:
        return heard.recv(4096)
    except BlockingIOError:
        return b""
