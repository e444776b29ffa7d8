"""What a run ran on: versions, machine and commit, for `env.json`."""

from __future__ import annotations

import platform
import subprocess
from contextlib import suppress
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch


def environment(device: str) -> dict[str, Any]:
    """Return the versions, the hardware, the commit of this package's source tree and the time.

    Args:
        device: where the run computes, such as `"cpu"`.
    """
    found: dict[str, Any] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "beyondprop": _version(),
        "platform": f"{platform.system()} {platform.release()} {platform.machine()}".strip(),
        "cpu": _cpu(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else device,
        "commit": _commit(),
        "started": now(),
    }
    return {key: value for key, value in found.items() if value}


def now() -> str:
    """Return the local time in ISO form, to the second, with its offset."""
    return datetime.now().astimezone().isoformat(timespec="seconds")


def _version() -> str:
    try:
        return version("beyondprop")
    except PackageNotFoundError:
        return ""


def _cpu() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _commit() -> str:
    """Return the commit of the source tree, `+` appended where files differ from it; empty without one."""
    try:
        # An installed package may lie inside somebody else's repository, which does not track it.
        if not _git("ls-files", "--", Path(__file__).name):
            return ""
        commit = _git("rev-parse", "--short=12", "HEAD")
        return commit + ("+" if _git("status", "--porcelain", "--", ".") else "")
    except (OSError, subprocess.SubprocessError):
        return ""


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(Path(__file__).parent), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout.strip()
