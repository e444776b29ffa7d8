"""What every test shares: one thread, a fixed seed, and skips that say why."""

from __future__ import annotations

import signal

import pytest
import torch

torch.set_num_threads(1)
# What a shell starts in the background ignores Ctrl-C; the tests of it, and the processes that they start, must not.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="no CUDA device on this machine")
    for item in items:
        if item.get_closest_marker("cuda"):
            item.add_marker(skip)
