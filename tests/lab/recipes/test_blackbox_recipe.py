"""The recipe of the noisy black box: what is measured, and what would be judged as missed."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from beyondprop import data
from beyondprop.data import Dataset
from beyondprop.lab.recipes import blackbox_mnist, get
from beyondprop.lab.recipes._base import Context
from beyondprop.lab.recipes.blackbox_mnist import COLORING, DENSE, EXACT, NETS, TITLES
from beyondprop.lab.runs.recorded import Run

pytestmark = pytest.mark.filterwarnings("ignore::beyondprop.FrozenStageWarning")


def _toy() -> Dataset:
    g = torch.Generator().manual_seed(0)
    y = torch.arange(240) % 10
    x = torch.rand(240, 1, 8, 8, generator=g) + torch.rand(10, 1, 8, 8, generator=g)[y]
    return Dataset("mnist", x[:200], y[:200], x[200:], y[200:], tuple(map(str, range(10))))


def _run(rows: list[dict[str, Any]]) -> Run:
    usual = {"kind": "eval", "seed": 0, "epoch": 1.0, "samples": 50}
    config = {"data": "mnist", "nets": list(NETS), "seeds": [0], "epochs": 1.0, "contenders": []}
    return Run(Path("nowhere"), config, {}, [usual | row for row in rows])


def test_the_full_version_counts_what_was_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "load", lambda *_, **__: _toy())
    monkeypatch.setattr(blackbox_mnist, "EPOCHS", 1.0)
    monkeypatch.setattr(blackbox_mnist, "GOAL", 5.0)
    said: list[str] = []
    rows, settings = get("blackbox-mnist").measure(Context(tmp_path, False, said.append))
    found = {row.label: row for row in rows}
    assert len(found) == len(rows)
    assert all(len(row.measured) == 3 and not math.isnan(row.mean) for row in rows)
    for net, each in ((COLORING, 9), (DENSE, 129)):
        calls = found[f"{TITLES[net]}: calls a training row"]
        assert all(each < value < each + 2 for value in calls.measured)  # a step for the noise is found, too
        assert calls.at_most == (10.0 if net == COLORING else None)
    ratio = found[f"calls to 5 %, {TITLES[DENSE]} over {TITLES[COLORING]}"]
    assert ratio.at_least == 5.0
    assert found[f"{TITLES[COLORING]} minus {TITLES[EXACT]}"].at_least == -0.3
    assert settings["mnist"]["lr"] == dict.fromkeys((blackbox_mnist.name(net) for net in NETS), blackbox_mnist.RATE)
    assert (tmp_path / "figure.png").stat().st_size > 10_000


def test_a_seed_that_failed_or_never_got_there_is_nan() -> None:
    row: dict[str, Any] = {"contender": blackbox_mnist.name(COLORING), "step": 1, "counters": {"calls": 450}}
    run = _run([
        row | {"accuracy": 0.4},
        row | {"accuracy": 0.98, "step": 2, "counters": {"calls": 900}, "samples": 100},
    ])
    assert blackbox_mnist.calls_to(run, COLORING, 97.0) == (900.0,)
    assert blackbox_mnist.calls_a_row(run, COLORING) == (9.0,)
    assert math.isnan(*blackbox_mnist.calls_to(run, COLORING, 99.0))
    assert math.isnan(*blackbox_mnist.calls_to(run, DENSE, 97.0))
    assert math.isnan(*blackbox_mnist.calls_a_row(run, DENSE))
