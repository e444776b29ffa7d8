"""Members in workers: the same rows as one process, whoever is killed, and refusals by name."""

from __future__ import annotations

import importlib
import os
import pkgutil
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import equal
from sweeps import BROKEN, PLAIN, WARNING, Saying, assert_same, everything, plugin, small_task
from torch import nn

from beyondprop.cli import main
from beyondprop.lab import Settings, compare, recipes, registry, resume
from beyondprop.lab.comparing import comparison, handed, scheduler, workers
from beyondprop.lab.comparing.handed import Setup
from beyondprop.lab.comparing.member import Observer
from beyondprop.lab.comparing.plan import prepare
from beyondprop.lab.comparing.worker import Job, Message, do
from beyondprop.lab.comparing.workers import Crew
from beyondprop.lab.recipes import _compared, dtp_discrete, higgs
from beyondprop.lab.runs.checkpoint import dumped, restored
from beyondprop.lab.runs.recorded import read_rows

__all__ = ["plugin"]
pytestmark = [
    pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals"),
    pytest.mark.filterwarnings("ignore:.*(at the edge of|Tuning failed at every):UserWarning"),
]


def test_two_processes_give_the_rows_of_one_and_a_killed_worker_changes_nothing(plugin: Path, tmp_path: Path) -> None:
    given = everything(plugin)
    whole = compare(**given, out=tmp_path / "whole")
    for step in ("0", "6"):  # before the first checkpoint, and after it
        (plugin.parent / "marks" / step).touch()
    seen = Saying()
    path = compare(**given, out=tmp_path / "two", workers=2, observer=seen)
    assert not list((plugin.parent / "marks").iterdir())
    assert seen.lines[0] == f"2 workers of 1 thread each: 2 threads on {os.cpu_count()} cores"
    lost = [line for line in seen.lines if "its worker was ended by SIGKILL; it goes on in another" in line]
    assert 1 <= len(lost) <= 2  # a warm start of tuning is no training of the comparison
    assert_same(path, whole)
    rows, _ = read_rows(path)
    assert {row["contender"] for row in rows if row["kind"] == "failed"} <= {"failing small", "failing mlp:5x1"}
    assert any(row.get("message") == "The loss is not finite." for row in rows)
    assert len(seen.ended) == len({*seen.ended}) == 2 * (1 + 2 + 2) * 2 + 2 * 2 * (3 + 1)


class Here(Crew):
    """Workers inside this process: they send the same messages, and die after so many of them, or are asked to stop."""

    description = "here"

    def __init__(self, plan: Any, dies_after: int = -1, times: int = 1, room: int = 3) -> None:
        self.plan = Setup.of(plan).prepared()
        self.dies_after, self.times, self.most = dies_after, times, room
        self.jobs: dict[int, list[Message]] = {}
        self.sent = 0
        self.stopped = False

    def open(self, jobs: int) -> None: ...
    def close(self) -> None: ...

    @property
    def room(self) -> int:
        return self.most - len(self.jobs)

    def send(self, *message: Any) -> None:
        self.messages.append(message)

    def submit(self, key: int, job: Job) -> None:
        self.messages: list[Message] = []
        do(job, self.plan, self)
        self.jobs[key] = self.messages

    def poll(self, timeout: float) -> list[tuple[int | None, Message]]:
        """One message of each that goes on, the last begun first: members end in another order than they began."""
        found: list[tuple[int | None, Message]] = []
        for key in sorted(self.jobs, reverse=True):
            self.sent += 1
            if self.times and self.dies_after >= 0 and self.sent > self.dies_after:
                self.times -= 1
                self.sent = 0
                message: Message = ("died", "was ended", True)
            else:
                message = self.jobs[key].pop(0)
            found.append((key, message))
            if message[0] in ("done", "stopped", "error", "died"):
                del self.jobs[key]
        return found

    def stop(self, key: int) -> bool:
        return False

    def drop(self, key: int) -> None:
        del self.jobs[key]


def run_here(given: dict[str, Any], path: Path, crew: Callable[[Any], Here], observer: Observer | None = None) -> Here:
    plan = prepare(**given)
    with comparison._created(plan, path) as directory:
        found = crew(plan)
        comparison._run(plan, directory, observer or Observer(), found)
    return found


def test_a_worker_may_die_after_any_message(plugin: Path, tmp_path: Path) -> None:
    given = everything(plugin)
    given["settings"] = replace(given["settings"], rules=("plain", "failing"), seeds=(0,), tune_seeds=(7, 8))
    given["nets"], given["settings"] = {}, replace(given["settings"], nets=("mlp:5x1:dropout=0.2",))
    whole = compare(**given, out=tmp_path / "whole")
    messages = run_here(given, tmp_path / "counted", Here).sent
    assert_same(tmp_path / "counted", whole)
    for after in [0, 1, 2, *range(5, messages, messages // 8)]:
        path = tmp_path / f"after{after}"
        run_here(given, path, lambda plan, after=after: Here(plan, after, times=2))
        assert_same(path, whole)
        shutil.rmtree(path)


@pytest.mark.parametrize("tune", [False, True], ids=["trainings", "tuning"])
def test_a_member_whose_workers_always_die_fails_alone_and_is_named(tune: bool, tmp_path: Path) -> None:
    settings = Settings(nets=("mlp:5x1",), rules=("plain",), epochs=1, seeds=(0, 1), tune=tune, warm_start="plain:0.5")
    given = {"settings": settings, "task": small_task(), "rules": [PLAIN]}
    seen = Saying()
    message = (
        r"3 workers one after the other ended without a step of it that was saved, the last was ended: it may take more"
    )
    run_here(given, tmp_path / "run", lambda plan: Here(plan, 0, scheduler.ATTEMPTS, room=1), seen)
    rows, _ = read_rows(tmp_path / "run")
    if tune:  # the warm start of tuning
        assert [row["message"][:23] for row in rows if row["kind"] == "tuning"] == ["The warm start failed: "]
    else:
        second, first = [row for row in rows if row["kind"] == "failed"]
        assert first["contender"] == "warm-start=plain"
        assert first["message"].startswith(message)
        assert second == first | {"contender": "plain", "message": f"The warm start failed: {first['message']}"}
    ended = {(r["contender"], r["seed"]) for r in rows if r["kind"] == "finished"}
    assert ("plain", 1) in ended
    assert sum("its worker was ended; it goes on" in line for line in seen.lines) == scheduler.ATTEMPTS - 1
    resume(tmp_path / "run", task=small_task(), rules=[PLAIN])


def test_what_fails_no_member_alone_is_raised_when_the_others_have_stopped(tmp_path: Path) -> None:
    settings = Settings(nets=("mlp:5x1",), rules=("sgd", "broken"), epochs=1, seeds=(0, 1))
    given = {"settings": settings, "task": small_task(), "rules": [BROKEN]}
    with pytest.raises(KeyError, match="lost") as caught:
        run_here(given, tmp_path / "run", lambda plan: Here(plan, room=2))
    (note,) = caught.value.__notes__
    assert note.startswith("In a worker, training broken with seed 0:\nTraceback")
    assert "in step" in note
    with pytest.raises(KeyError, match="lost"):
        resume(tmp_path / "run", task=small_task(), rules=[BROKEN])


def test_warnings_of_workers_are_recorded_as_ever_and_shown_once(tmp_path: Path) -> None:
    settings = Settings(nets=("mlp:5x1",), rules=("glass",), epochs=1, seeds=(0, 1))
    given = {"settings": settings, "task": small_task(), "rules": [WARNING]}
    with pytest.warns(RuntimeWarning, match="made of glass"):
        whole = compare(**given, out=tmp_path / "whole")
    with pytest.warns(RuntimeWarning, match="made of glass") as shown:
        run_here(given, tmp_path / "run", Here)
    assert len(shown) == 1
    assert_same(tmp_path / "run", whole)


def test_a_worker_that_stops_by_itself_is_gone_on_with(tmp_path: Path) -> None:
    class Stopping(Here):
        def poll(self, timeout: float) -> list[tuple[int | None, Message]]:
            return [(key, ("stopped",) if message[0] == "died" else message) for key, message in super().poll(timeout)]

    settings = Settings(nets=("mlp:5x1",), rules=("plain",), epochs=2, seeds=(0, 1))
    given = {"settings": settings, "task": small_task(), "rules": [PLAIN]}
    run_here(given, tmp_path / "run", lambda plan: Stopping(plan, 7))
    assert_same(tmp_path / "run", compare(**given, out=tmp_path / "whole"))


def test_an_idle_worker_ends_with_the_process_that_it_works_for() -> None:
    worker = workers._Process(0, {})
    assert worker.pipe.recv() == ("hello",)
    assert worker.process.is_alive()
    worker.pipe.close()
    worker.process.join(20)
    assert worker.process.exitcode == 0


def test_cuda_devices_are_taken_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []

    class Process:
        key, ready = -1, False

        def __init__(self, place: int, environment: dict[str, str]) -> None:
            self.place = place
            taken.append(environment)

    monkeypatch.setattr(workers, "_Process", Process)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    setup = Setup.of(prepare(Settings(epochs=1), task=small_task()))
    for device in ("cuda", "cpu"):
        crew = workers.Processes(replace(setup, settings=replace(setup.settings, device=device)), 3)
        for _ in range(3):
            crew._start()
    assert taken == [{"CUDA_VISIBLE_DEVICES": device} for device in "474"] + [{}] * 3


def test_states_go_to_workers_as_they_are() -> None:
    column = torch.arange(6.0).view(2, 3).t()
    tree = {"a": [column, torch.empty(0), torch.tensor(3, dtype=torch.uint8)], 3: (1.5, None, float("inf"), "x")}
    again = restored(dumped(tree))
    assert equal(again["a"], tree["a"])
    assert again["a"][0].stride() == column.stride()
    assert again[3] == tree[3]
    half = torch.tensor([1.0, -2.0], dtype=torch.bfloat16)
    assert torch.equal(restored(dumped(half)), half)


def test_what_cannot_be_handed_over_is_refused_by_name(tmp_path: Path) -> None:
    settings = Settings(epochs=1, seeds=(0,), nets=("mlp:5x1",), rules=("sgd",))
    local = replace(PLAIN, name="local", build=lambda m, loss, lr: registry.rules.get("sgd").build(m, loss, lr))
    task = small_task()
    unpicklable = replace(task, draw=lambda task, seed: task)
    for given, what in (
        ({"rules": [local], "settings": replace(settings, rules=("local",))}, "rule local"),
        ({"nets": {"mine": lambda *_: nn.Linear(8, 4)}, "settings": replace(settings, nets=("mine",))}, "net mine"),
        ({"task": unpicklable, "settings": settings}, "task"),
    ):
        with pytest.raises(ValueError, match=rf"^{what} cannot be handed to workers: .*Put it at the top of a module"):
            compare(**{"task": task, **given}, out=tmp_path / "run", workers=2)
    with pytest.raises(ValueError, match=r"^rule local is not known here: .*Put it at the top of a module"):
        replace(Setup.of(prepare(settings)), handed={"rule local": b"nonsense"}).prepared()
    for bad in (0, -1, 1.5, True, "rey", 10**6):
        with pytest.raises(ValueError, match=r"workers must be a whole number from 1 to 1024, or 'ray', got"):
            compare(settings, out=tmp_path / "run", workers=bad)  # pyright: ignore[reportArgumentType]
    assert main(["compare", "--workers", "none", "--out", str(tmp_path / "run")]) == 2
    assert not (tmp_path / "run").exists()


def test_a_script_may_compare_at_its_top_and_hands_nothing_of_itself_over(tmp_path: Path) -> None:
    lines = (
        "from torch import nn",
        "from sweeps import small_task",
        "from beyondprop.lab import Settings, compare",
        "def net(shape, outputs):",
        "    return nn.Linear(8, outputs)",
        "given = dict(task=small_task(), nets={'mine': net})",
        "try:",
        "    compare(Settings(nets=('mine',), rules=('sgd',), seeds=(0,), epochs=1), **given, out='no', workers=1)",
        "except ValueError as error:",
        "    print(error)",
        "settings = Settings(nets=('mlp:5x1',), rules=('sgd',), seeds=(0,), epochs=1)",
        "print(compare(settings, task=small_task(), out='run', workers=1))",
    )
    command = [sys.executable, "-"]  # a script that no file has
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        command, input="\n".join(lines), capture_output=True, text=True, cwd=tmp_path, env=env, check=False
    )
    refused, path = done.stdout.splitlines()
    assert refused.startswith(
        "net mine cannot be handed to workers: PicklingError: net is in the script, which workers"
    )
    assert path == "run"
    assert done.stderr == ""


def test_what_recipes_hand_over_goes_to_workers() -> None:
    found = 0
    for module in pkgutil.iter_modules(recipes.__path__):
        name = f"{recipes.__name__}.{module.name}"
        importlib.import_module(name)
        for place, spec in handed._held(name):
            assert handed._unpickled(place, handed._pickled(place, spec)) == spec
            found += 1
    assert found > 20
    (memory,) = _compared.recorded_rules(("am-mem",))
    things: list[Any] = [memory, dtp_discrete._signs, partial(higgs.drawn, count=3)]
    for thing in things:
        again = handed._unpickled("it", handed._pickled("it", thing))
        assert again == thing or again.func is thing.func


def test_what_only_this_process_knows_is_refused_before_anything_is_written(plugin: Path, tmp_path: Path) -> None:
    registry.register(replace(registry.rules.get("sgd"), name="here"))
    settings = Settings(epochs=1, seeds=(0,), nets=("mlp:5x1",), rules=("here",))
    with pytest.raises(ValueError, match=r"A worker cannot prepare the comparison: rule must be one of .* got 'here'"):
        compare(settings, task=small_task(), out=tmp_path / "run", workers=1)
    assert not (tmp_path / "run").exists()


def test_a_worker_notices_what_is_another_thing_there(plugin: Path) -> None:
    settings = Settings(epochs=1, seeds=(0,), nets=("mlp:5x1",), rules=("sgd",))
    setup = Setup.of(prepare(settings, task=small_task()))
    assert setup.prepared().config() == setup.config
    registry.register(replace(registry.rules.get("sgd"), name="sgd", lr=0.7), replace=True)
    with pytest.raises(ValueError, match=r"contenders is .*0\.7.* here and .*0\.03.* there"):
        setup.prepared()
    with pytest.raises(ValueError, match=r"rows of small are others here than there; put the same files"):
        replace(setup, rows=1, config=prepare(settings, task=small_task()).config()).prepared()
    with pytest.raises(ValueError, match=r"The folder '/no/such', .* is not there"):
        replace(setup, folder="/no/such").prepared()
