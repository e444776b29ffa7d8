"""A comparison in workers that is stopped or killed as a whole, and goes on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from sweeps import assert_same, count_rows, files_of, small_task

import beyondprop
from beyondprop.lab import Settings, compare, resume
from beyondprop.lab.runs.checkpoint import load_checkpoint
from beyondprop.lab.runs.directory import RunDirectory
from beyondprop.lab.runs.recorded import read_rows

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")

# Trainings that are long beside the start of a process.
TRAIN = ["--net", "mlp:32x2:dropout=0.1", "--rule", "am-adam", "--rule", "sgd", "--seeds", "2", "--epochs", "900"]
TRAIN += ["--evaluate-every", "60", "--no-alignment"]


def start(*argv: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "beyondprop.cli", "compare", *argv],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(beyondprop.__file__).parent.parent)},
        start_new_session=True,  # Ctrl-C goes to a group
    )


def wait_until(is_so: Callable[[], Any], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 60
    while not is_so():
        assert process.poll() is None, process.stdout and process.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.005)


def workers_of(pid: int) -> list[int]:
    """Processes that a process started."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            name, _, rest = stat.read_text().partition(") ")
            if int(rest.split()[1]) == pid:
                found.append(int(name.partition(" ")[0]))
    return found


def is_alive(pid: int) -> bool:
    """Whether a process is there, and more than a note on how it ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] not in "ZX"
    except OSError:
        return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes in /proc")
def test_what_ctrl_c_or_a_kill_of_the_parent_stopped_goes_on_with_workers_or_without(tmp_path: Path) -> None:
    path, table = tmp_path / "run", tmp_path / "small.csv"
    task = small_task()
    lines = [[*map(str, x.tolist()), f"class{y}"] for x, y in zip(task.x_train, task.y_train, strict=True)]
    table.write_text("\n".join(map(",".join, [[*"abcdefgh", "y"], *lines])) + "\n")
    process = start("--data", f"{table}:target=y", *TRAIN, "--workers", "2", "--out", str(path))
    wait_until(lambda: sum(count > 3 for count in count_rows(path)) >= 2, process)
    os.killpg(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert f"beyondprop compare --resume {path} --workers 2" in output
    assert "Traceback" not in output
    assert len(files_of(path)) == 2
    for name, rows in files_of(path).items():
        state = load_checkpoint(path / "checkpoints" / name.replace(".jsonl", ".safetensors"))
        assert rows[-1]["kind"] == "eval"
        assert state["step"] >= rows[-1]["step"] > 0  # mostly where no row is due
    counted = count_rows(path)

    process = start("--resume", str(path), "--workers", "2")
    wait_until(lambda: sum(count_rows(path)) > sum(counted) + 5, process)
    pids = workers_of(process.pid)
    assert len(pids) >= 2
    process.kill()
    process.communicate()
    deadline = time.monotonic() + 20
    while any(map(is_alive, pids)):
        assert time.monotonic() < deadline, "a worker outlives its parent"
        time.sleep(0.02)
    before = files_of(path)
    assert any(rows[-1]["kind"] != "finished" for rows in before.values())
    resume(path)
    assert all(rows[: len(before[name])] == before[name] for name, rows in files_of(path).items() if name in before)
    own: dict[str, Any] = {"data": f"{table}:target=y", "nets": (TRAIN[1],), "rules": ("am-adam", "sgd"), "epochs": 900}
    own |= {"seeds": (0, 1), "evaluate_every": 60, "alignment": False}
    assert_same(path, compare(Settings(**own), out=tmp_path / "whole"))


def test_rewinding_drops_what_came_after_the_checkpoint(tmp_path: Path) -> None:
    def row(step: int, seed: int = 0, kind: str = "eval") -> dict[str, Any]:
        return {"kind": kind, "contender": "a", "seed": seed, "step": step, "epoch": float(step)}

    tuned = {"kind": "tuning", "contender": "a", "seed": 0, "lr": 0.1}
    with RunDirectory.create(tmp_path / "run", {"data": "digits", "nets": [], "contenders": []}, {}) as run:
        for one in (tuned, row(0), row(0, seed=1)):
            run.append(one)
        run.save("a", 0, {"step": 0})
        for one in (row(1), row(1, seed=1), row(1, kind="finished")):
            run.append(one)
        run.rewind("a", 0)
        assert not run.ended("a", 0)
        assert run.rows == [tuned, row(0, seed=1), row(1, seed=1), row(0)]
        run.rewind("a", 1)  # before its first checkpoint
        assert run.rows == [tuned, row(0)]
        for one in (row(1), row(1, kind="finished")):
            run.append(one)
    assert sorted(map(str, read_rows(tmp_path / "run")[0])) == sorted(map(str, run.rows))
