"""A sweep that has everything, rules that kill the process that trains them, and whether two run directories are the same."""

from __future__ import annotations

import json
import tomllib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import equal
from torch import nn

from beyondprop import Backprop
from beyondprop.lab import Settings, registry
from beyondprop.lab.comparing.member import Member, Observer
from beyondprop.lab.registry import RuleSpec
from beyondprop.lab.runs.checkpoint import load_checkpoint
from beyondprop.lab.runs.recorded import read_rows
from beyondprop.lab.tasks.forms import from_arrays

PLUGIN = """
import os, pathlib, signal
from beyondprop import Backprop
from beyondprop.errors import NonFiniteError
from beyondprop.lab import registry
from beyondprop.lab.built_in import nesterov
from dataclasses import replace
from functools import partial

MARKS = pathlib.Path(__file__).parent / "marks"  # a file there kills one worker, once, at the step of its name


class Fragile(Backprop):
    def step(self, x, y):
        mark = MARKS / str(self.watchdog.steps)  # the first step is that of a twin whose work is counted
        if mark.exists():
            mark.unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().step(x, y)


class Failing(Backprop):
    def step(self, x, y):
        if self.watchdog.steps == 5 and self.optimizers[0].defaults["lr"] == 0.3:
            raise NonFiniteError("The loss is not finite.", "loss")
        return super().step(x, y)


def fragile(model, loss, lr):
    return Fragile(model, loss, nesterov(lr))


def failing(model, loss, lr):
    return Failing(model, loss, nesterov(lr))


sgd = registry.rules.get("sgd")
registry.register(replace(sgd, name="fragile", build=fragile, least_batch=1, grid=(0.03, 0.1)))
registry.register(replace(sgd, name="failing", build=failing, least_batch=1, lr=0.3, grid=(0.3, 0.1)))
"""


def small_net(input_shape: tuple[int, ...], outputs: int) -> nn.Module:
    return nn.Sequential(nn.Linear(input_shape[0], 6), nn.Tanh(), nn.Dropout(0.2), nn.Linear(6, outputs))


PLAIN = RuleSpec(
    "plain", "Plain", "", "", lambda m, loss, lr: registry.rules.get("sgd").build(m, loss, lr), 0.1, (0.1,)
)


def small_task() -> Any:
    g = torch.Generator().manual_seed(0)
    x = torch.rand(160, 8, generator=g)
    return from_arrays(x.numpy(), (x[:, :4].argmax(1)).numpy(), name="small")


@pytest.fixture
def plugin(tmp_path: Path) -> Iterator[Path]:
    registry.rules.names()
    before = dict(registry.rules.rows)
    (tmp_path / "marks").mkdir()
    (tmp_path / "fragile.py").write_text(PLUGIN)
    yield tmp_path / "fragile.py"
    registry.rules.rows.clear()
    registry.rules.rows.update(before)


def files_of(path: Path) -> dict[str, list[dict[str, Any]]]:
    """All rows but their seconds, file by file, in the order that they have there."""
    read_rows(path)  # raises where a checksum is another
    return {
        file.name: [
            {k: v for k, v in json.loads(line).items() if k != "seconds"} for line in file.read_text().splitlines()
        ]
        for file in sorted((path / "metrics").glob("*.jsonl"))
    }


def assert_same(path: Path, whole: Path) -> None:
    assert files_of(path) == files_of(whole)
    for one in (path, whole):
        assert read_rows(one)[1] == ()
    assert tomllib.loads((path / "config.toml").read_text()) == tomllib.loads((whole / "config.toml").read_text())
    states = sorted(file.name for file in (whole / "checkpoints").iterdir())
    assert sorted(file.name for file in (path / "checkpoints").iterdir()) == states
    for name in states:
        mine, theirs = (load_checkpoint(one / "checkpoints" / name) for one in (path, whole))
        assert equal(mine | {"seconds": 0}, theirs | {"seconds": 0}), name


class Saying(Observer):
    """Keeps what is said, and which trainings began and ended."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.began: list[Member] = []
        self.ended: list[Member] = []

    def said(self, text: str) -> None:
        self.lines.append(text)

    def begin(self, member: Member) -> None:
        self.began.append(member)

    def end(self, member: Member) -> None:
        self.ended.append(member)


def everything(plugin: Path) -> dict[str, Any]:
    """Two nets, tuning with two seeds, a warm start, a rule that fails and one that kills its worker where it is told to."""
    rules = ("plain", "fragile", "failing")
    own: dict[str, Any] = {"epochs": 3, "batch_size": 32, "seeds": (0, 1), "threads": 1, "warm_start": "fragile:1"}
    settings = Settings(
        nets=("small", "mlp:5x1"),
        rules=rules,
        tune=True,
        tune_epochs=2,
        tune_seeds=(7, 8),
        plugins=(str(plugin),),
        **own,
    )
    return {"settings": settings, "task": small_task(), "nets": {"small": small_net}, "rules": [PLAIN]}


def count_rows(path: Path) -> list[int]:
    return [file.read_bytes().count(b"\n") for file in (path / "metrics").glob("*.jsonl")]


class Broken(Backprop):
    """Meets what fails no member alone."""

    def step(self, *args: Any, **options: Any) -> Any:
        raise KeyError("lost")


def _broken(model: nn.Module, loss: Any, lr: float) -> Broken:
    return Broken(model, loss, torch.optim.SGD(model.parameters(), lr=lr))


def _warning(model: nn.Module, loss: Any, lr: float) -> Any:
    warnings.warn("it is made of glass", RuntimeWarning, stacklevel=1)
    return registry.rules.get("sgd").build(model, loss, lr)


BROKEN = RuleSpec("broken", "Broken", "", "", _broken, 0.1, (0.1,))
WARNING = RuleSpec("glass", "Glass", "", "", _warning, 0.1, (0.1,))
