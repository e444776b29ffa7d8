"""The real thing: a process killed in mid-training, and another that goes on with its run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from beyondprop.cli import main
from beyondprop.lab.comparing import comparison

TRAIN = [
    "--net",
    "mlp:64x2",
    "--rule",
    "am-mem",
    "--rule",
    "am-adam",
    "--seeds",
    "1",
    "--epochs",
    "10",
    *["--threads", "1"],
]


def rows_of(path: Path) -> list[dict[str, Any]]:
    """Whole lines only: the files may be being written."""
    files = sorted((path / "metrics").glob("*.jsonl"))
    lines = [line for file in files for line in file.read_bytes().split(b"\n")[:-1]]
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]


def start(*argv: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "beyondprop.cli", "compare", *argv],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(comparison.__file__).parent.parent)},
    )


def wait_for_rows(path: Path, count: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 60
    while len(rows_of(path)) < count or not list((path / "checkpoints").glob("*.safetensors")):
        assert process.poll() is None, process.stdout and process.stdout.read()
        assert time.monotonic() < deadline, "no rows came"
        time.sleep(0.002)


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")
def test_killed_and_resumed_equals_undisturbed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", *TRAIN, "--out", str(tmp_path / "whole"), "--quiet"]) == 0
    expected = rows_of(tmp_path / "whole")
    path = tmp_path / "killed"
    process = start(*TRAIN, "--out", str(path))
    wait_for_rows(path, 27, process)  # the second rule's training has begun
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    written = rows_of(path)
    assert 27 <= len(written) < len(expected)
    assert not (path / "report.html").exists()
    assert main(["compare", "--resume", str(path), "--quiet"]) == 0
    assert rows_of(path) == expected
    assert (path / "report.html").is_file()
    assert capsys.readouterr().err == ""


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")
def test_ctrl_c_in_a_process(tmp_path: Path) -> None:
    path = tmp_path / "stopped"
    process = start(*TRAIN, "--epochs", "300", "--out", str(path))
    wait_for_rows(path, 5, process)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert f"beyondprop compare --resume {path}" in output
    assert "Traceback" not in output
