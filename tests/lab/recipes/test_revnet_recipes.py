"""The recipes of reversible nets: what is measured, and what would be judged as missed."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from beyondprop import data
from beyondprop.data import Dataset
from beyondprop.lab import tasks
from beyondprop.lab.recipes import _revnet, get, revnet_angle, revnet_cifar10, revnet_memory
from beyondprop.lab.recipes._base import Context
from beyondprop.lab.recipes._revnet import REVERSIBLE, SHIFTED, STORED
from beyondprop.lab.runs.recorded import Run
from beyondprop.nn import ReversibleSequential


def _toy() -> Dataset:
    g = torch.Generator().manual_seed(0)
    y = torch.arange(30) % 10
    x = torch.rand(30, 3, 8, 8, generator=g) + torch.rand(10, 3, 8, 8, generator=g)[y]
    return Dataset("cifar10", x[:20], y[:20], x[20:], y[20:], tuple(map(str, range(10))))


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "load", lambda *_, **__: _toy())
    monkeypatch.setattr(_revnet, "NET", "revnet14")


def _context(out: Path, quick: bool = True) -> Context:
    out.mkdir(exist_ok=True)
    return Context(out, quick, lambda line: None)


def test_in_float64_both_modes_have_one_training(tmp_path: Path) -> None:
    ours, theirs = (_revnet.train(_context(tmp_path), what, 2, 1, torch.float64) for what in (REVERSIBLE, STORED))
    assert [[row["step"] for row in rows] for rows in (ours, theirs)] == [[0, 1, 2]] * 2
    assert max(_revnet.gaps(ours, theirs)) < 1e-9
    assert max(_revnet.gaps(ours, theirs, "loss")) < 1e-9
    assert ours[0]["loss"] != ours[-1]["loss"]


def test_what_is_called_reversible_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_revnet, "trained", lambda context, name, build, *_, **__: build())
    for what, mode in ((REVERSIBLE, "inverse"), (STORED, "store"), (SHIFTED, "store")):
        rule: Any = _revnet.train(_context(tmp_path), what, 1, 1)
        assert {m.mode for m in rule.model.modules() if isinstance(m, ReversibleSequential)} == {mode}


def test_gradients_agree_and_a_look_at_them_has_no_part_in_the_training(tmp_path: Path) -> None:
    looked, plain = (_revnet.train(_context(tmp_path / f"{a}"), REVERSIBLE, 2, 1, angles=a) for a in (True, False))
    assert [row["train_loss"] for row in looked] == [row["train_loss"] for row in plain]
    assert all(0 < row["angle"] < 0.5 for row in looked)  # float32: not 0, not much
    assert not any("angle" in row for row in plain)


def test_moved_weights_are_other_weights_and_hardly_so(tmp_path: Path) -> None:
    stored, moved = (_revnet.train(_context(tmp_path), what, 1, 1, torch.float64) for what in (STORED, SHIFTED))
    assert 0 < max(_revnet.gaps(stored, moved)) < 1e-5


def test_a_gap_is_relative_and_a_failed_training_has_none() -> None:
    rows = [{"loss": 2.0}, {"loss": 1.0}, {"loss": None}]
    assert _revnet.gaps([{"loss": 2.1}, {"loss": 1.0}], rows, "loss") == pytest.approx([0.05, 0.0])
    for ours, theirs in ((rows[:1], rows), ([], []), (rows, [])):
        assert math.isnan(*_revnet.gaps(ours, theirs, "loss"))


@pytest.mark.parametrize(
    ("double", "angle", "verdicts"),
    [(1.0, 0.1, "reached reached"), (1.0 + 1e-7, 0.1, "reached missed"), (1.0, 1.5, "missed reached")],
)
def test_what_parts_is_judged_as_missed(
    double: float, angle: float, verdicts: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fake(
        context: Context, what: str, steps: int, every: int, dtype: Any = torch.float32, *, angles: bool = False
    ) -> Any:
        loss = double if what == REVERSIBLE and dtype == torch.float64 else 1.0
        return [{"step": 1, "train_loss": loss, "loss": loss, "angle": angle}]

    monkeypatch.setattr(revnet_angle, "train", fake)
    rows, _ = revnet_angle.measure(_context(tmp_path, quick=False))
    assert " ".join(row.verdict for row in rows if row.asked) == verdicts


def test_memory_is_flat_in_depth_only_where_it_is_reversible(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(revnet_memory, "DEPTHS", (14, 38))
    rows, _ = revnet_memory.measure(_context(tmp_path, quick=False))
    named = {row.label: row for row in rows}
    flat = named["reversible: kept, 38 layers over 14"]
    assert (flat.mean, flat.verdict) == (1.0, "reached")
    assert named["stored: kept, 38 layers over 14"].mean > 2
    (kept,) = named["38 layers, reversible: kept for the backward pass"].measured
    (most,) = named["38 layers, reversible: at most in a step, with gradients"].measured
    (stored,) = named["38 layers, stored: at most in a step, with gradients"].measured
    assert kept < most < stored / 2


def test_a_peak_is_the_most_that_stood_at_once() -> None:
    def step() -> None:
        for _ in range(3):
            torch.zeros(1000)
        first = torch.zeros(2000)
        second = torch.zeros(500)
        del first, second

    assert revnet_memory.peak_bytes(step) == pytest.approx(4 * 2500, abs=200)  # allocators round up


def test_the_published_schedule_is_what_is_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def fake(context: Context, part: str, settings: Any) -> Run:
        seen.append(settings)
        names = [f"sgd-decay {net}" for net in settings.nets]
        rows = [
            {"kind": "eval", "contender": name, "seed": 0, "step": 80_000, "epoch": 160.0, "accuracy": accuracy}
            for name, accuracy in zip(names, (0.93, 0.94), strict=True)
        ]
        rows += [{"kind": "finished", "contender": name, "seed": 0, "step": 80_000, "epoch": 160.0} for name in names]
        contenders = [
            {"name": name, "rule": "sgd-decay", "net": name.split()[1], "settings": {"lr": 0.1}} for name in names
        ]
        config = {"epochs": settings.epochs, "seeds": [0], "nets": [*settings.nets], "contenders": contenders}
        return Run(tmp_path, config, {}, rows)

    monkeypatch.setattr(revnet_cifar10, "compared", fake)
    rows, _ = revnet_cifar10.measure(_context(tmp_path, quick=False))
    (settings,) = seen
    assert settings.epochs * 50_000 / settings.batch_size == 80_000
    assert (settings.schedule, settings.rates, settings.tune) == ("tenth:0.5,0.75", {"sgd-decay": 0.1}, False)
    assert settings.form == "images:cifar10:centered:pad=2:flip"
    assert isinstance(tasks.load(settings.form), tasks.AugmentedTask)
    found = {row.label: row for row in rows}
    assert found["RevNet-38, test error after epoch 160"].mean == pytest.approx(7.0)
    lead = found["RevNet-38 minus ResNet-32, error"]
    assert (lead.mean, lead.verdict) == (pytest.approx(1.0), "missed")
    assert (tmp_path / "figure.png").stat().st_size > 5_000


@pytest.mark.parametrize("name", ["revnet-memory", "revnet-angle", "revnet-cifar10"])
def test_recipes_say_what_they_are(name: str) -> None:
    recipe = get(name)
    assert "1707.04585" in recipe.source
    assert recipe.about
    assert recipe.minutes > 0
