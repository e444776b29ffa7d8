"""What surrounds a training: Ctrl-C between two steps, so that it finds a whole state to save, and warnings that are kept."""

from __future__ import annotations

import signal
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


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


@contextmanager
def recorded_warnings(seen: list[str], record: Callable[[str], None]) -> Iterator[None]:
    """Call `record(message)` for every new warning inside, and show it as it would have been.

    Args:
        seen: messages recorded before, which are not recorded again; new ones are appended.
        record: gets the text of a warning.
    """
    with warnings.catch_warnings():
        show = warnings.showwarning

        def both(message: Warning | str, *where: Any, **more: Any) -> None:
            if str(message) not in seen:
                seen.append(str(message))
                record(str(message))
            show(message, *where, **more)

        warnings.showwarning = both
        yield
