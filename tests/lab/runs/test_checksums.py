"""Checksums of a run directory: what was changed is named, what has none is said, and old directories go on."""

from __future__ import annotations

import contextlib
import json
import math
import re
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import InterruptAt
from safetensors import safe_open
from safetensors.torch import save_file

from beyondprop.cli import main
from beyondprop.lab import Settings, Task, compare, resume
from beyondprop.lab.comparing.member import Member, Observer
from beyondprop.lab.report import read_run, to_json
from beyondprop.lab.runs.config import read_config
from beyondprop.lab.runs.directory import RunDirectory, slug
from beyondprop.lab.runs.recorded import read_rows
from beyondprop.lab.runs.sums import SUMS, read_sums

SETTINGS = Settings(nets=("mlp:6x1",), rules=("adam", "sgd"), seeds=(0,), epochs=3, batch_size=20, alignment=False)
TUNED = Settings(nets=("mlp:6x1",), rules=("sgd",), seeds=(0,), epochs=1, batch_size=20, alignment=False, tune=True)


def stopped(path: Path, task: Any) -> Path:
    """Stop in the second contender's training, two epochs before its end."""
    with pytest.raises(KeyboardInterrupt):
        compare(SETTINGS, task=task, out=path, observer=InterruptAt(7))
    return path


def timeless(path: Path) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if key != "seconds"} for row in read_rows(path)[0]]


@pytest.fixture
def task() -> Task:
    g = torch.Generator().manual_seed(0)
    x, y = torch.rand(60, 5, generator=g), torch.arange(60) % 3
    return Task.from_arrays(x.numpy(), y.numpy(), name="small")  # type: ignore[attr-defined]


@pytest.fixture
def tuned(tmp_path: Path, task: Task) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the edge of the grid
        return compare(TUNED, task=task, out=tmp_path / "tuned")


def edit(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new, 1))


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("config.toml", "epochs = 1.0", "epochs = 2.0"),
        ("config.toml", 'schedule = "linear"', 'schedule = "constant"'),
        ("env.json", '"threads": 1', '"threads": 2'),
    ],
)
def test_an_edit_is_refused_and_can_be_meant(
    name: str, old: str, new: str, tuned: Path, task: Task, tmp_path: Path
) -> None:
    file = tuned / name
    edit(file, old, new)
    said = (
        rf"{name}' is damaged or was edited: .*Put the original back, or delete the lines of {name} in 'checksums\.txt'"
    )
    for read in (lambda: read_run(tuned), lambda: resume(tuned, task=task)):
        with pytest.raises(ValueError, match=said):
            read()
    edit(file, new, old)
    assert read_run(tuned).notes == ()
    edit(file, old, new)
    kept = [line for line in (tuned / SUMS).read_text().splitlines(keepends=True) if not line.endswith(f"{name}\n")]
    (tuned / SUMS).write_text("".join(kept))
    assert read_run(tuned).notes[0].startswith(f"{name} has no checksum")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        resume(tuned, task=task)
    assert f"{name} has no checksum" in str(caught[0].message)
    assert read_run(tuned).notes == ()  # it was gone on with as it stood


def test_form_and_comments_are_no_edit(tuned: Path) -> None:
    for name, line in (("config.toml", "# a comment\n"), ("env.json", "\n\n")):
        (tuned / name).write_text(line + (tuned / name).read_text())
    assert read_run(tuned).notes == ()


def last_line_lost(content: bytes) -> bytes:
    return b"".join(content.splitlines(keepends=True)[:-1])


def digit_changed(content: bytes) -> bytes:
    at = content.rindex(b"1")
    return content[:at] + b"2" + content[at + 1 :]


def emptied(content: bytes) -> bytes:
    return b""


def no_row(content: bytes) -> bytes:
    return content[:1] + b"'" + content[2:]


@pytest.mark.parametrize("damage", [last_line_lost, digit_changed, emptied, no_row], ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", ["tuning-sgd-0.1", "run", "sgd.seed0"])
def test_rows_that_no_checkpoint_covers_have_checksums(
    name: str, damage: Callable[[bytes], bytes], tuned: Path, task: Task, tmp_path: Path
) -> None:
    files = {file.stem: file for file in (tuned / "metrics").glob("*.jsonl")}
    file = files[next(stem for stem in sorted(files) if stem.startswith(name.rpartition("-")[0] or name))]
    before = timeless(tuned)
    file.write_bytes(damage(file.read_bytes()))
    where = "line 1 is no row" if damage is no_row else ""
    with pytest.raises(ValueError, match=rf"{file.name}' is damaged: {where}.*Delete .*--resume"):
        read_run(tuned)
    with pytest.raises(ValueError, match="is damaged"):
        resume(tuned, task=task)
    file.unlink()
    (tuned / "checkpoints" / f"{file.stem}.safetensors").unlink(missing_ok=True)
    assert any(file.name in note for note in read_run(tuned).notes)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        resume(tuned, task=task)
    assert sorted(map(str, timeless(tuned))) == sorted(map(str, before))


def test_rows_behind_their_checksum_are_left_out_and_come_again(tuned: Path, task: Task) -> None:
    """As after a kill between a row and its checksum."""
    before = timeless(tuned)
    lines = (tuned / SUMS).read_text().splitlines(keepends=True)
    tuning = next(line for line in lines if "tuning-" in line)
    ended = next(line for line in lines if line.endswith("sgd.seed0.jsonl\n"))
    (tuned / SUMS).write_text("".join(line for line in lines if line not in (tuning, ended)) + "0123  half")
    assert any("has no checksum and was left out" in note for note in read_run(tuned).notes)
    begun: list[tuple[bool, float]] = []

    class Watch(Observer):
        def begin(self, member: Member) -> None:
            begun.append((member.tuning, member.lr))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        resume(tuned, task=task, observer=Watch())
    assert [is_tuning for is_tuning, _ in begun] == [True]  # its end is known by the row alone
    assert "sgd.seed0.jsonl" in read_sums(tuned).rows
    assert sorted(map(str, timeless(tuned))) == sorted(map(str, before))


def test_a_damaged_file_of_checksums_is_named(tuned: Path) -> None:
    lines = (tuned / SUMS).read_text().splitlines(keepends=True)
    odd = [lines[-1].replace("  sgd", f"  {name}") for name in ("../sgd", "s" * 300, "s\0", "sgd  ")]
    for bad in (*odd, "x" + lines[0], lines[-1].replace("  ", " "), lines[-1].replace(".jsonl", ".json"), "\n"):
        (tuned / SUMS).write_text("".join([*lines, bad]))
        with pytest.raises(ValueError, match=rf"checksums\.txt', line {len(lines) + 1}, is damaged: .*Delete the file"):
            read_run(tuned)
    (tuned / SUMS).unlink()
    assert "config.toml, env.json, metrics have no checksums" in read_run(tuned).notes[0]


def aged(path: Path) -> Path:
    """Make a directory what older versions wrote: no checksums, and checkpoints that do not know of their rows."""
    (path / SUMS).unlink()
    for file in (path / "checkpoints").iterdir():
        with safe_open(file, framework="pt") as content:
            tensors = {key: content.get_tensor(key).clone() for key in content.keys()}  # noqa: SIM118
            notes = {key: content.metadata()[key] for key in ("format", "tree")}
        save_file(tensors, file, notes)
    return path


def test_a_directory_without_checksums_goes_on_and_says_so(tmp_path: Path, task: Task) -> None:
    whole = compare(SETTINGS, task=task, out=tmp_path / "whole")
    path = aged(stopped(tmp_path / "part", task))
    with (path / "metrics" / "sgd.seed0.jsonl").open("a") as file:  # after the checkpoint: it comes again
        file.write('{"kind": "warning", "contender": "sgd", "seed": 0, "step": 999, "message": "later"}\n{"ki')
    assert "config.toml, env.json, metrics have no checksums, as in directories of older versions" in "".join(
        read_run(path).notes
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        resume(path, task=task)
    said = " ".join(str(w.message) for w in caught)
    assert "metrics have no checksums" in said
    assert "sgd.seed0.safetensors' has no checksum, as those of older versions" in said
    assert timeless(path) == timeless(whole)
    assert to_json(read_run(path))["notes"] == []
    assert read_sums(path).rows.keys() == {"adam.seed0.jsonl", "sgd.seed0.jsonl"}


def test_rows_that_an_old_checkpoint_goes_on_after_are_missed(tmp_path: Path, task: Task) -> None:
    path = aged(stopped(tmp_path / "part", task))
    (path / "metrics" / "sgd.seed0.jsonl").unlink()
    with (
        pytest.warns(UserWarning, match="no checksum"),
        pytest.raises(
            ValueError, match=r"sgd\.seed0\.jsonl', the rows before .* is missing or empty\. Delete the check"
        ),
    ):
        resume(path, task=task)


@pytest.mark.parametrize(
    ("file", "old", "new", "said"),
    [
        ("config.toml", 'schedule = "linear"', 'schedule = ["linear"]', "schedule must be str, got"),
        ("config.toml", "batch_size = 20", "batch_size = true", "batch_size must be int, got True"),
        ("config.toml", "lr = 0.003", "lr = -0.5", "lr of 'adam' must be a finite number > 0, got -0.5"),
        ("config.toml", 'title = "', 'title = 1 # "', "title of 'adam' in contenders must be str, got 1"),
        (
            "config.toml",
            "higher_is_better = true",
            'higher_is_better = "x"',
            "higher_is_better of 'accuracy' in metrics",
        ),
        ("config.toml", "nets = [", "nets = " + "[" * 3000, r"is damaged: .*Put the original back"),
        ("env.json", "{", "[" * 5000 + "{", r"is no JSON: .*Put \{\} in its place"),
        ("env.json", "{", '{"resumed": 1, ', "resumed must be a list, got 1"),
        (
            "metrics/sgd.seed0.jsonl",
            '"epoch": 0.0',
            '"epoch": NaN',
            r"line 1: .* needs epoch .*got nan.*delete the file",
        ),
        ("metrics/sgd.seed0.jsonl", '"seed": 0', '"seed": true', "line 1: .* needs seed .*got True"),
        ("metrics/sgd.seed0.jsonl", '"step": 0', '"step": 1' + "0" * 30, "line 1: .* needs step"),
        ("metrics/sgd.seed0.jsonl", '"loss": ', '"loss": ' + "[" * 9000, r"line 1, is no JSON: .*delete the file"),
    ],
)
def test_what_cannot_be_read_without_checksums_is_named(
    file: str, old: str, new: str, said: str, tmp_path: Path, task: Task
) -> None:
    path = aged(stopped(tmp_path / "part", task))
    edit(path / file, old, new)
    with pytest.raises(ValueError, match=rf"{file.rpartition('/')[2]}'.*{said}"):
        read_run(path)


def test_rows_of_unknown_kinds_need_a_training_to_go_on(tmp_path: Path, task: Task) -> None:
    path = aged(stopped(tmp_path / "part", task))
    with (path / "metrics" / "adam.seed0.jsonl").open("a") as file:
        file.write('{"kind": "other", "seed": 0, "huge": 1' + "0" * 400 + "}\n")
    assert read_run(path).rows
    with (
        pytest.warns(UserWarning, match="no checksum"),
        pytest.raises(ValueError, match=r"adam\.seed0\.jsonl', line \d+: a row needs kind, contender and seed"),
    ):
        resume(path, task=task)


def test_numbers_beyond_floats_are_none(tmp_path: Path, task: Task) -> None:
    from beyondprop.lab.runs.recorded import number

    assert math.isnan(number({"a": 10**400}, "a"))
    assert math.isnan(number({"a": True}, "a"))
    assert number({"counters": {"a": 3}}, "a") == 3.0


def test_a_training_that_finished_without_rows_is_not_done(tmp_path: Path, task: Task) -> None:
    path = aged(compare(SETTINGS, task=task, out=tmp_path / "run"))
    file = path / "metrics" / "sgd.seed0.jsonl"
    file.write_text("".join(line for line in file.read_text().splitlines(keepends=True) if '"finished"' in line))
    assert read_run(path).seeds("sgd")["unfinished"] == (0,)
    assert to_json(read_run(path))["contenders"][1]["final"] is None


def test_long_names_and_lone_surrogates_are_written_and_read(tmp_path: Path, task: Task) -> None:
    long = "mlp:" + "x".join(["6"] * 60)
    assert len(slug(long)) < 200
    name = "n" * 5000
    assert slug(name) != slug(name + "n")
    assert len(slug(name)) == len(slug(name + "n")) <= 190
    settings = Settings(nets=(name,), rules=("adam", "sgd"), seeds=(0,), epochs=2, batch_size=20, alignment=False)

    def net(shape: tuple[int, ...], outputs: int) -> torch.nn.Module:
        return torch.nn.Linear(shape[0], outputs)

    both = Settings(**{**vars(settings), "nets": (name, "small")})
    nets = {name: net, "small": net}
    with contextlib.suppress(KeyboardInterrupt):
        compare(both, task=task, nets=nets, out=tmp_path / "run", observer=InterruptAt(6))
    resume(tmp_path / "run", task=task, nets=nets)
    run = read_run(tmp_path / "run")
    assert [run.seeds(info.name)["done"] for info in run.contenders] == [(0,)] * 4
    assert all(len(info.title) <= 120 for info in run.contenders)
    with RunDirectory.create(
        tmp_path / "odd", {"data": "d\udc80", "nets": [], "contenders": []}, {"cpu": "\udc80"}
    ) as odd:
        odd.append({"kind": "warning", "contender": "a", "message": "lone \ud83d, \x1b[31mred"})
    assert json.loads((tmp_path / "odd" / "metrics" / "run.jsonl").read_text())["message"] == "lone \ud83d, \x1b[31mred"
    run = read_run(tmp_path / "odd")
    assert run.warnings[0]["message"] == r"lone \ud83d, red"
    assert (run.task, run.env, run.notes) == (r"d\udc80", {"cpu": r"\udc80"}, ())
    assert read_config(tmp_path / "odd")["data"] == r"d\udc80"
    shutil.rmtree(tmp_path / "odd")


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('device = "cpu"', 'device = "gpu"', r"config\.toml': device must be one of .*got 'gpu'"),
        ('rule = "sgd"', 'rule = "sgdx"', r"config\.toml': rule must be one of .*got 'sgdx'"),
        ("batch_size = 500", "batch_size = 50", r"config\.toml' and a file of checkpoints/ do not.*batch_size 500 then"),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("default")
def test_settings_that_cannot_be_gone_on_with_have_their_file(
    old: str, new: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = Settings(nets=("mlp:6x1",), rules=("adam", "sgd"), seeds=(0,), epochs=3, batch_size=500, alignment=False)
    with pytest.raises(KeyboardInterrupt):
        compare(settings, out=tmp_path / "run", observer=InterruptAt(7))
    edit(aged(tmp_path / "run") / "config.toml", old, new)
    assert main(["compare", "--resume", str(tmp_path / "run"), "--quiet"]) in (1, 2)
    assert re.search(said, capsys.readouterr().err)
