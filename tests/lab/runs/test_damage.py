"""What becomes of a run directory that was killed at any point, damaged, or taken by two at once."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import InterruptAt

from beyondprop.cli import main
from beyondprop.lab import Settings, Task, compare, resume
from beyondprop.lab.registry import rules
from beyondprop.lab.report import read_run
from beyondprop.lab.runs import directory as module
from beyondprop.lab.runs.checkpoint import load_checkpoint, save_checkpoint
from beyondprop.lab.runs.directory import RunDirectory
from beyondprop.lab.runs.recorded import read_rows

CONFIG: dict[str, Any] = {"data": "digits", "nets": [], "contenders": []}
SETTINGS = Settings(nets=("mlp:6x1",), rules=("adam", "sgd"), seeds=(0,), epochs=3, batch_size=20, alignment=False)


@pytest.fixture
def task() -> Task:
    g = torch.Generator().manual_seed(0)
    x, y = torch.rand(60, 5, generator=g), torch.arange(60) % 3
    return Task.from_arrays(x.numpy(), y.numpy(), name="small")  # type: ignore[attr-defined]


def stopped(path: Path, task: Any, at: int = 7) -> Path:
    """Stop in the second contender's training, two epochs before its end."""
    with pytest.raises(KeyboardInterrupt):
        compare(SETTINGS, task=task, out=path, observer=InterruptAt(at))
    with RunDirectory.open(path) as run:
        assert run.ended("adam", 0)
        assert not run.ended("sgd", 0)
    return path


def timeless(path: Path) -> list[dict[str, Any]]:
    rows, notes = read_rows(path)
    assert notes == ()
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def test_a_flipped_bit_in_any_byte_of_a_checkpoint_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    save_checkpoint(path, {"a": torch.arange(3.0), "text": '"sha256":"' + "0" * 64, "b": [1, (2.5, None)]}, rows="1:2")
    assert load_checkpoint(path)["b"] == [1, (2.5, None)]
    whole = path.read_bytes()
    for index in range(len(whole)):
        damaged = bytearray(whole)
        damaged[index] ^= 1 << index % 8
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"t\.safetensors' (is damaged|has format)"):
            load_checkpoint(path)
    for size in (0, 1, 8, 100, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"t\.safetensors' is damaged"):
            load_checkpoint(path)


def test_a_damaged_checkpoint_is_named_and_deleting_it_trains_that_one_again(tmp_path: Path, task: Task) -> None:
    whole = compare(SETTINGS, task=task, out=tmp_path / "whole")
    path = stopped(tmp_path / "part", task)
    checkpoint = path / "checkpoints" / "sgd.seed0.safetensors"
    damaged = bytearray(checkpoint.read_bytes())
    damaged[-3] ^= 1
    checkpoint.write_bytes(damaged)
    remedy = r"sgd\.seed0\.safetensors' is damaged.*Delete it: --resume trains sgd with seed 0 again from its beginning"
    with pytest.raises(ValueError, match=remedy):
        resume(path, task=task)
    checkpoint.unlink()
    before = (path / "metrics" / "adam.seed0.jsonl").read_bytes()
    resume(path, task=task)
    assert timeless(path) == timeless(whole)
    assert (path / "metrics" / "adam.seed0.jsonl").read_bytes() == before


def emptied(content: bytes) -> bytes:
    return b""


def without_a_row(content: bytes) -> bytes:
    return b"".join(content.splitlines(keepends=True)[:1])


def changed(content: bytes) -> bytes:
    return content.replace(b'"loss": ', b'"loss": 1', 1)


@pytest.mark.parametrize("damage", [emptied, without_a_row, changed], ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", ["adam", "sgd"], ids=["ended", "unfinished"])
def test_rows_that_are_lost_or_changed_are_named(
    name: str, damage: Callable[[bytes], bytes], tmp_path: Path, task: Task, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = compare(SETTINGS, task=task, out=tmp_path / "whole")
    path = stopped(tmp_path / "part", task)
    file = path / "metrics" / f"{name}.seed0.jsonl"
    file.write_bytes(damage(file.read_bytes()))
    said = (
        rf"{name}\.seed0\.jsonl' is damaged: .*{name}\.seed0\.safetensors' says\. Delete both: --resume trains this one"
    )
    for read in (lambda: resume(path, task=task), lambda: read_run(path)):
        with pytest.raises(ValueError, match=said):
            read()
    assert main(["report", str(path)]) == 2
    assert "is damaged" in capsys.readouterr().err
    file.unlink()
    with pytest.raises(ValueError, match=said):
        read_run(path)
    (path / "checkpoints" / f"{name}.seed0.safetensors").unlink()
    resume(path, task=task)
    assert sorted(map(str, timeless(path))) == sorted(map(str, timeless(whole)))


def test_a_report_goes_by_rows_and_notes_a_damaged_checkpoint(tmp_path: Path, task: Task) -> None:
    path = compare(SETTINGS, task=task, out=tmp_path / "run")
    (path / "checkpoints" / "sgd.seed0.safetensors").write_bytes(b"x")
    run = read_run(path)
    assert run.notes == ("sgd.seed0.safetensors is damaged, so that sgd.seed0.jsonl could not be checked against it.",)
    assert run.seeds("sgd")["done"] == (0,)


def test_a_warning_between_a_checkpoint_and_a_kill_is_there_once(
    tmp_path: Path, task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    from beyondprop.rules.backprop import Backprop

    class Warned(Backprop):
        def step(self, *args: Any, **options: Any) -> Any:
            if self.watchdog.steps == 3:  # the first step after an evaluation, whose checkpoint is of that step, too
                warnings.warn("at the fourth", stacklevel=2)
            return super().step(*args, **options)

    def build(model: Any, loss: Any, lr: float) -> Warned:
        return Warned(model, loss, torch.optim.SGD(model.parameters(), lr))

    own = replace(rules.get("sgd"), name="own", build=build)
    settings = Settings(nets=("mlp:6x1",), seeds=(0,), epochs=3, batch_size=20, alignment=False, evaluate_every=3)
    with pytest.warns(UserWarning, match="at the fourth"):
        whole = compare(settings, task=task, rules=[own], out=tmp_path / "whole")
    saved: list[bytes] = []
    path = tmp_path / "part"
    checkpoint, append = path / "checkpoints" / "own.seed0.safetensors", RunDirectory.append

    class Killed(BaseException):
        pass

    def kill(self: RunDirectory, row: dict[str, Any]) -> None:
        append(self, row)
        if row["kind"] == "warning":
            saved.append(checkpoint.read_bytes())
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(RunDirectory, "append", kill)
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            with pytest.raises(Killed):
                compare(settings, task=task, rules=[own], out=path)
    assert checkpoint.read_bytes() == saved[0]
    assert load_checkpoint(checkpoint)["step"] == read_rows(path)[0][-1]["step"]
    with pytest.warns(UserWarning, match="at the fourth"):
        resume(path, task=task, rules=[own])
    # In the file itself: a reader drops lines that are equal.
    assert (path / "metrics" / "own.seed0.jsonl").read_text().count('"warning"') == 1
    assert timeless(path) == timeless(whole)


def test_the_lock_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("fcntl")
    path, write = tmp_path / "run", module._write_env
    tried: list[str] = []

    def second(*args: Any) -> None:
        monkeypatch.setattr(module, "_write_env", write)
        write(*args)
        for act in (lambda: RunDirectory.create(path, CONFIG, {"who": "second"}), lambda: RunDirectory.open(path)):
            with pytest.raises(RuntimeError, match="is being written by another process"):
                act()
            tried.append(json.loads((path / "env.json").read_text())["who"])

    monkeypatch.setattr(module, "_write_env", second)
    with RunDirectory.create(path, CONFIG, {"who": "first"}) as run:
        run.append({"kind": "note"})
    assert tried == ["first", "first"]
    with pytest.raises(FileExistsError, match="holds a run already"):
        RunDirectory.create(path, CONFIG, {"who": "third"})
    assert len(read_rows(path)[0]) == 1


def test_who_waited_for_the_lock_finds_the_run_of_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, lock = tmp_path / "run", module._lock

    def late(path: Path) -> Any:
        monkeypatch.setattr(module, "_lock", lock)
        RunDirectory.create(path, CONFIG, {"who": "first"}).close()
        return lock(path)

    monkeypatch.setattr(module, "_lock", late)
    with pytest.raises(FileExistsError, match="holds a run already"):
        RunDirectory.create(path, CONFIG, {"who": "second"})
    assert json.loads((path / "env.json").read_text()) == {"who": "first"}


def test_who_comes_second_to_a_default_name_takes_another(
    tmp_path: Path, task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    from beyondprop.lab.comparing import comparison

    names = iter([tmp_path / "a", tmp_path / "a", tmp_path / "b"])
    monkeypatch.setattr(comparison, "default_path", lambda *_: next(names))
    settings = Settings(nets=("mlp:6x1",), rules=("sgd",), seeds=(0,), epochs=0.1, alignment=False)
    assert compare(settings, task=task) == tmp_path / "a"
    assert compare(settings, task=task) == tmp_path / "b"


def test_a_run_killed_before_its_configuration_says_so(tmp_path: Path) -> None:
    (tmp_path / "begun" / "metrics").mkdir(parents=True)
    (tmp_path / "begun" / ".config.toml.0123.part").touch()
    with pytest.raises(FileNotFoundError, match=r"config.toml, env.json missing. Nothing was trained in it: begin it"):
        resume(tmp_path / "begun")
    RunDirectory.create(tmp_path / "begun", CONFIG, {}).close()
    assert not list(tmp_path.rglob("*.part"))
