"""Ctrl-C between two steps, so that it finds a whole state to save."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def deferred_interrupt() -> Iterator[Callable[[], bool]]:
    """Make Ctrl-C set a flag, which the function that is yielded reads.

    A second Ctrl-C interrupts at once, and one that nobody acted on interrupts at the end. Outside the main thread,
    and where somebody else handles the signal, nothing changes.
    """
    asked = False

    def ask(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if asked:
            signal.default_int_handler(number, frame)
        asked = True

    ours = (
        threading.current_thread() is threading.main_thread()
        and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    )
    if ours:
        signal.signal(signal.SIGINT, ask)
    try:
        yield lambda: asked
    finally:
        if ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)
    if asked:  # too late for the one who reads the flag
        raise KeyboardInterrupt
