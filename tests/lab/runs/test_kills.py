"""Killed, or out of room, at every call that changes a file; `benchmarks/kills.py` does it to whole commands."""

from __future__ import annotations

import errno
import importlib
import os
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from made_up_runs import config, curves, write_run

from beyondprop.data import _catalog, _files
from beyondprop.data._files import atomic_file, remove_parts
from beyondprop.lab.recipes._base import Context
from beyondprop.lab.recipes._kept import Kept
from beyondprop.lab.report import _html, write_report
from beyondprop.lab.report._figures import Drawing
from beyondprop.lab.runs.directory import RunDirectory
from beyondprop.lab.runs.files import append, synced
from beyondprop.lab.runs.recorded import read_run

FOLDER = Path(__file__).parents[3] / "benchmarks"
if not FOLDER.is_dir():
    pytest.skip("the benchmarks are not here", allow_module_level=True)
fcntl = pytest.importorskip("fcntl")
sys.path.append(str(FOLDER))
disturbed, kills = map(importlib.import_module, ("disturbed", "kills"))
CONFIG: dict[str, Any] = {"data": "digits", "nets": [], "contenders": []}


def a_run(folder: Path) -> None:
    """Begin a run, or go on with it, train a step with a checkpoint before and after it, and end."""
    path = folder / "in" / "run"
    there = (path / "config.toml").is_file()
    with RunDirectory.open(path) if there else RunDirectory.create(path, CONFIG, {"python": "3"}) as run:
        if not run.ended("a", 0):
            state = run.load("a", 0)
            for step in range(0 if state is None else state["step"] + 1, 2):
                run.append({"kind": "eval", "contender": "a", "seed": 0, "step": step, "epoch": float(step)})
                run.append({"kind": "warning", "contender": "a", "seed": 0, "step": step, "message": f"{step}"})
                run.save("a", 0, {"step": step, "w": torch.full((2,), float(step))})
            run.append({"kind": "finished", "contender": "a", "seed": 0, "step": 1})
    assert read_run(path).notes == ()


def a_report(folder: Path) -> None:
    write_report(folder / "run")


def a_recipe(folder: Path) -> None:
    context = Context(folder / "out", quick=True, say=lambda line: None)
    kept = Kept(context.out / "numbers.json")
    for key in "12":
        kept.get(key, partial(float, key))


def said(do: Callable[[Path], None], folder: Path) -> int:
    """Do it as the command line does: an error is told in a line."""
    try:
        do(folder)
    except OSError as error:
        sys.stdout.write(f"beyondprop: {error}\n")
        return 1
    return 0


@pytest.mark.parametrize("do", [a_run, a_report, a_recipe], ids=lambda do: do.__name__)
def test_what_is_disturbed_at_any_call_is_done_by_the_same_again(
    do: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        _html, "draw", lambda *_: [Drawing("accuracy", "", "", {"svg": b"<svg/>", "png": b"\x89PNG IEND...."})]
    )

    def before(folder: Path) -> None:
        if do is a_report:
            write_run(folder / "run", config({"adam": "Adam"}, 1, 1.0), curves(["adam"], 1, 1))

    command = disturbed.Command(partial(said, do), before=before)
    (tmp_path / "whole").mkdir()
    disturbed.counted(command, tmp_path / "whole", tmp_path / "notes")
    assert len(command.calls) > 10
    when = ("before", "inside", "fails") if do is a_run else ("inside", "fails")  # after one is before the next
    wrong = {
        (at, call, how): fault
        for at, call in enumerate(command.calls, 1)
        for how in when
        if (fault := disturbed.case(command, at, how))
    }
    assert wrong == {}


def test_a_download_that_was_killed_is_begun_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("served", "whole"):
        (tmp_path / name).mkdir()
    monkeypatch.setitem(_catalog._CATALOG, "mnist", _catalog._CATALOG["mnist"])  # given back at the end
    monkeypatch.setenv("no_proxy", "*")
    command = kills.download(tmp_path / "served")
    try:
        disturbed.counted(command, tmp_path / "whole", tmp_path / "notes")
        faults = [disturbed.case(command, at, "inside") for at in range(1, len(command.calls) + 1, 2)]
    finally:
        os.kill(kills.SERVERS[-1], signal.SIGKILL)
        os.waitpid(kills.SERVERS.pop(), 0)
    assert len(faults) > 10
    assert set(faults) == {""}


def parts(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_a_killed_process_left_goes_and_what_is_being_written_stays(tmp_path: Path) -> None:
    left, of_others = f".a.{_files._HOST}{'0' * 24}.part", f".a.{'f' * 32}.part"
    for name in (left, of_others, ".config.toml.0123.part", "c.part"):
        (tmp_path / name).touch()
    with atomic_file(tmp_path / "a") as first:
        first.write(b"first")
        with atomic_file(tmp_path / "b") as second:
            second.write(b"second")
        assert left not in parts(tmp_path)
        assert of_others in parts(tmp_path)  # a lock on another machine need not be seen here
        remove_parts(tmp_path, of_all=True)  # as who has the lock of a run directory does
    assert parts(tmp_path) == ["a", "b", "c.part"]
    assert (tmp_path / "a").read_bytes() == b"first"


def test_a_report_that_is_being_written_outlasts_a_resume(tmp_path: Path) -> None:
    RunDirectory.create(tmp_path / "run", CONFIG, {}).close()
    with atomic_file(tmp_path / "run" / "report.html") as page:
        RunDirectory.open(tmp_path / "run").close()
        page.write(b"page")
    assert (tmp_path / "run" / "report.html").read_bytes() == b"page"


def test_a_file_that_was_deleted_before_it_was_locked_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flock, count = fcntl.flock, 0

    def late(stream: Any, kind: int) -> None:
        nonlocal count
        count += 1
        if count == 1:
            os.unlink(stream.name)
        flock(stream, kind)

    monkeypatch.setattr(fcntl, "flock", late)
    with atomic_file(tmp_path / "a") as stream:
        stream.write(b"content")
    assert count == 2
    assert parts(tmp_path) == ["a"]
    assert (tmp_path / "a").read_bytes() == b"content"


def test_a_file_that_is_closed_and_has_no_name_yet_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replace = os.replace

    def late(old: Path, new: Path) -> None:
        remove_parts(tmp_path)
        replace(old, new)

    monkeypatch.setattr(os, "replace", late)
    with atomic_file(tmp_path / "a") as stream:
        stream.write(b"content")
    assert parts(tmp_path) == ["a"]


def failing(code: int) -> Callable[..., None]:
    def flock(*_: Any) -> None:
        raise OSError(code, os.strerror(code))

    return flock


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK], ids=errno.errorcode.get)
def test_on_a_file_system_without_locks_a_run_warns_and_nothing_is_deleted(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = f".a.{_files._HOST}{'0' * 24}.part"
    (tmp_path / left).touch()
    monkeypatch.setattr(fcntl, "flock", failing(code))
    with atomic_file(tmp_path / "a") as stream:
        stream.write(b"content")
    assert parts(tmp_path) == [left, "a"]
    with pytest.warns(UserWarning, match=r"run' is on a file system without locks .*no other process writes it"):
        RunDirectory.create(tmp_path / "run", CONFIG, {}).close()
    with pytest.warns(UserWarning, match="without locks"):
        RunDirectory.open(tmp_path / "run").close()


def test_a_lock_that_fails_otherwise_blames_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fcntl, "flock", failing(errno.EIO))
    with pytest.raises(OSError, match=r"Input/output error: .*run'"):
        RunDirectory.create(tmp_path / "run", CONFIG, {})


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_is_named_by_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OSError, match=r"No space left on device: '/dev/full'"):
        append(Path("/dev/full"), b"x")
    (tmp_path / "rows").touch()
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", failing(errno.EDQUOT))
        with pytest.raises(OSError, match=r"quota exceeded: .*rows'"):
            synced(tmp_path / "rows")
    with RunDirectory.create(tmp_path / "run", CONFIG, {}) as run:
        (tmp_path / "run" / "metrics" / "run.jsonl").symlink_to("/dev/full")
        with pytest.raises(OSError, match=r"No space left on device: .*run\.jsonl'"):
            run.append({"kind": "note"})
