"""Members on a Ray cluster: the same rows as one process, whoever is killed."""

from __future__ import annotations

import importlib.util
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sweeps import Saying, assert_same, count_rows, everything, plugin, small_task

from beyondprop.lab import Settings, compare, resume
from beyondprop.lab.comparing.member import Member

__all__ = ["plugin"]


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A cluster of this machine, as `ray start --head` begins one."""
    pytest.importorskip("ray", reason="needs the extra [ray]")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    command = [
        "start",
        "--head",
        "--block",
        "--num-cpus=2",
        "--include-dashboard=false",
        "--disable-usage-stats",
        "--port",
    ]
    process = subprocess.Popen(
        [Path(sys.executable).with_name("ray"), *command, address.rpartition(":")[2]],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    try:
        assert process.stdout is not None
        assert any("Ray runtime started" in line for line in process.stdout), process.wait()
        monkeypatch.setenv("RAY_ADDRESS", address)
        yield address
    finally:
        process.terminate()
        process.communicate(timeout=60)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_ray_cluster_gives_the_rows_of_one_process_and_a_killed_worker_changes_nothing(
    cluster: str, plugin: Path, tmp_path: Path
) -> None:
    given = everything(plugin)
    whole = compare(**given, out=tmp_path / "whole")
    for step in ("0", "6"):
        (plugin.parent / "marks" / step).touch()
    seen = Saying()
    path = compare(**given, out=tmp_path / "ray", workers="ray", observer=seen)
    assert not list((plugin.parent / "marks").iterdir())
    assert seen.lines[0] == "A Ray cluster of 1 node with room for 2 workers of 1 thread each: 2 threads"
    assert any("its worker ended by WorkerCrashedError" in line for line in seen.lines), seen.lines
    assert_same(path, whole)
    assert len(seen.ended) == len({*seen.ended})

    class Pressing(Saying):
        def row(self, member: Member, row: dict[str, Any]) -> None:
            if row["kind"] == "eval" and not member.warm_start and row["epoch"] > 1:
                signal.raise_signal(signal.SIGINT)

    settings = Settings(nets=("mlp:32x2",), rules=("am-adam", "sgd"), seeds=(0,), epochs=60)
    whole = compare(settings, task=small_task(), out=tmp_path / "w")
    with pytest.raises(KeyboardInterrupt):
        compare(settings, task=small_task(), out=tmp_path / "part", workers="ray", observer=Pressing())
    assert 2 < sum(count_rows(tmp_path / "part")) < sum(count_rows(whole))
    assert_same(resume(tmp_path / "part", task=small_task(), workers="ray"), whole)
    with pytest.raises(
        ValueError, match=r"A worker needs 64 CPU, which no node of the Ray cluster has; take fewer thr"
    ):
        compare(replace(settings, threads=64), task=small_task(), out=tmp_path / "no", workers="ray")
    assert not (tmp_path / "no").exists()


def test_without_ray_or_a_cluster_that_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    message = r"workers='ray' needs Ray: pip install 'beyondprop\[ray\]'"
    if importlib.util.find_spec("ray") is None:
        monkeypatch.setitem(sys.modules, "ray", None)
    else:
        message = (
            r"workers='ray' needs a Ray cluster; begin one by `ray start --head`, or set RAY_ADDRESS \(at 127.0.0.1:1: "
        )
        monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    with pytest.raises(ValueError, match=message):
        compare(Settings(epochs=1, nets=("mlp:5x1",)), task=small_task(), out=tmp_path / "run", workers="ray")
    assert not (tmp_path / "run").exists()
