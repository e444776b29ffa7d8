"""Comparisons of nets whose box counts its calls: as many as were asked for, to the last one, and none on the side."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases import InterruptAt
from sweeps import assert_same, files_of
from torch import nn

from beyondprop import data
from beyondprop.cli import main
from beyondprop.data import Dataset
from beyondprop.errors import BlackBoxError
from beyondprop.lab import Settings, compare, fit, registry, resume
from beyondprop.lab.comparing.member import Member, Observer
from beyondprop.lab.nets.blackbox import Oscillators, TorchOscillators
from beyondprop.lab.report import _figures, figures, summary
from beyondprop.lab.report._style import entries
from beyondprop.lab.runs.recorded import Run, read_run
from beyondprop.lab.tasks.forms import from_arrays
from beyondprop.nn import BlackBox

pytestmark = [
    pytest.mark.filterwarnings("ignore::beyondprop.FrozenStageWarning"),
    pytest.mark.filterwarnings("ignore:.*(at the edge of|Tuning failed at every):UserWarning"),
]

FEATURES, WIDTH = 12, 7
RULES = ("adam", "am-adam", "fa", "locoprop-m", "dtp", "dfa")
CALLS = 1 + 2 * 4
"""Of a training row: its value, and two for each of four colours."""


class Counted:
    """The box, and how many rows all of its copies in this process were asked for."""

    def __init__(self) -> None:
        self.rows = 0

    def __call__(self, x: np.ndarray) -> np.ndarray:
        self.rows += len(x)
        return Oscillators()(x)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counted:
    """The boxes of all nets by form, counted."""
    found, original = Counted(), Oscillators.__call__

    def call(self: Oscillators, phases: np.ndarray) -> np.ndarray:
        found.rows += len(phases)
        return original(self, phases)

    monkeypatch.setattr(Oscillators, "__call__", call)
    forward = TorchOscillators.forward

    def passed(self: TorchOscillators, phases: torch.Tensor) -> torch.Tensor:
        found.rows += len(phases)
        return forward(self, phases)

    monkeypatch.setattr(TorchOscillators, "forward", passed)
    return found


def _task(rows: int = 60, test: int = 20) -> Any:
    g = torch.Generator().manual_seed(0)
    x = torch.rand(rows + test, FEATURES, generator=g)
    return from_arrays(x.numpy(), x[:, :4].argmax(1).numpy(), name="small", test=test / (rows + test))


def _settings(nets: tuple[str, ...], **own: Any) -> Settings:
    usual: dict[str, Any] = {"rules": ("adam",), "epochs": 2, "batch_size": 16, "seeds": (0, 1), "alignment": True}
    return Settings(nets=nets, **usual | own)


def _run(path: Path, nets: tuple[str, ...], **own: Any) -> Run:
    return read_run(compare(_settings(nets, **own), task=_task(), out=path / "run"))


def _last(run: Run) -> dict[str, dict[str, Any]]:
    return {
        c.name: run.of("eval", c.name, seed)[-1]["counters"] for c in run.contenders for seed in run.config["seeds"]
    }


# Calls


@pytest.mark.parametrize("batch_size", [16, 1, 59, 1000])
def test_a_comparison_spends_the_calls_of_its_steps_and_evaluations_alone(
    counted: Counted, tmp_path: Path, batch_size: int
) -> None:
    """With alignment asked for, which costs calls and is left out; short last batches and batches of one row among them."""
    nets = tuple(f"blackbox:{WIDTH}:{how}" for how in ("coloring", "exact", "stopped"))
    run = _run(tmp_path, nets, rules=RULES, batch_size=batch_size, seeds=(0,))
    assert not run.failures
    trained, evaluated = 2 * 60, 3 * 20
    total = 0
    for name, found in _last(run).items():
        each = CALLS if name.endswith("coloring") else 2 if name.startswith("dfa") else 1
        assert found == {"calls": trained * each, "evaluation_calls": evaluated}, name
        total += sum(found.values())
    assert counted.rows == total
    assert not [row for row in run.rows if row["kind"] == "alignment"]


def test_tuning_spends_its_steps_and_its_last_evaluation_alone(counted: Counted, tmp_path: Path) -> None:
    run = _run(tmp_path, (f"blackbox:{WIDTH}:coloring",), rules=("adam", "fa"), tune=True, tune_epochs=1, seeds=(0,))
    tuned = [row for row in run.rows if row["kind"] == "tuning"]
    assert len(tuned) == 8
    for row in tuned:  # a sixth of the rows is held out
        assert row["counters"] == {"calls": 50 * CALLS, "evaluation_calls": 10}
    trained = [sum(found.values()) for found in _last(run).values()]
    assert counted.rows == 8 * (50 * CALLS + 10) + sum(trained)


def test_a_warm_start_counts_in(counted: Counted, tmp_path: Path) -> None:
    run = _run(tmp_path, (f"blackbox:{WIDTH}:coloring",), rules=("adam", "fa"), warm_start="sgd:0.5", seeds=(0,))
    for found in _last(run).values():
        assert found["calls"] == 2 * 60 * CALLS
    first = run.of("eval", "adam", 0)[0]
    assert first["counters"]["calls"] == 32 * CALLS  # two batches
    warm, own = 32, 2 * 60 - 32
    assert counted.rows == (warm + 2 * own) * CALLS + sum(
        20 * len(run.of("eval", name, 0)) for name in ("warm-start=sgd", "adam", "fa")
    )


def test_an_early_stop_ends_the_calls(counted: Counted, tmp_path: Path) -> None:
    own: dict[str, Any] = {"lr": {"adam": 1e-12}, "early_stop": 2, "epochs": 9, "seeds": (0,)}
    run = _run(tmp_path, (f"blackbox:{WIDTH}",), **own)
    rows = run.of("eval", "adam", 0)
    assert len(rows) == 3
    assert rows[-1]["counters"]["calls"] == 2 * 60 * CALLS
    assert counted.rows == 2 * 60 * CALLS + 3 * 20


def test_a_box_that_was_handed_over_is_counted_anew_by_every_training(tmp_path: Path) -> None:
    """All copies of a module call the same function, and each training has calls of its own."""
    box = Counted()
    layer = BlackBox(box, WIDTH, pattern=Oscillators.pattern(WIDTH), max_calls=3000)
    model = nn.Sequential(nn.Linear(FEATURES, WIDTH), layer, nn.Linear(WIDTH, 4))
    model(torch.rand(3, FEATURES))
    given: dict[str, Any] = {"a": model, "b": lambda shape, outputs: nn.Sequential(*model)}
    settings = _settings(("a", "b"), rules=("adam", "fa"))
    run = read_run(compare(settings, task=_task(), nets=given, out=tmp_path / "run"))
    assert not run.failures
    for c in run.contenders:
        for seed in (0, 1):
            rows = run.of("eval", c.name, seed)
            assert [r["counters"]["calls"] for r in rows] == [0, 60 * CALLS, 120 * CALLS]
            assert [r["counters"]["evaluation_calls"] for r in rows] == [20, 40, 60]
    assert box.rows == 3 + 8 * (120 * CALLS + 60)


def test_fit_evaluates_a_costly_model_at_the_start_only_where_others_follow(counted: Counted) -> None:
    for every, expected in ((None, [0, 4, 8]), (3, [0, 3, 6, 8]), (8, [8]), (100, [8])):
        counted.rows = 0
        model = _task().net(f"blackbox:{WIDTH}")
        rule = registry.rules.get("adam").build(model, nn.CrossEntropyLoss(), 1e-2)
        history = fit(rule, _task(), epochs=2, batch_size=16, evaluate_every=every)
        assert [row["step"] for row in history.evaluations] == expected
        assert counted.rows == 2 * 60 * CALLS + 20 * len(expected)


# Failures


def test_a_box_whose_budget_is_spent_fails_alone(tmp_path: Path) -> None:
    given: dict[str, Any] = {
        name: lambda shape, outputs, most=most: nn.Sequential(
            nn.Linear(FEATURES, WIDTH),
            BlackBox(Oscillators(), WIDTH, pattern=Oscillators.pattern(WIDTH), max_calls=most),
            nn.Linear(WIDTH, outputs),
        )
        for name, most in (("poor", 700), ("rich", 2000))
    }
    run = read_run(compare(_settings(("poor", "rich")), task=_task(), nets=given, out=tmp_path / "run"))
    assert run.seeds("adam poor") == {"done": (), "failed": (0, 1), "unfinished": ()}
    assert run.seeds("adam rich")["done"] == (0, 1)
    assert "its budget is max_calls=700" in run.failures[0]["message"]


def test_a_box_that_breaks_fails_alone_in_tuning_too(tmp_path: Path) -> None:
    class Breaking(Oscillators):
        def __call__(self, phases: np.ndarray) -> np.ndarray:
            if np.abs(phases).max() > 50:
                raise ArithmeticError("the ring burst")
            return super().__call__(phases)

    def build(shape: Any, outputs: int) -> nn.Module:
        box = BlackBox(Breaking(), WIDTH, pattern=Oscillators.pattern(WIDTH))
        return nn.Sequential(nn.Linear(FEATURES, WIDTH), box, nn.Linear(WIDTH, outputs))

    wild = replace(registry.rules.get("sgd"), name="wild", grid=(1e-2, 1e6), least_batch=1)
    settings = _settings(("mine",), rules=("wild",), tune=True, tune_epochs=1, seeds=(0,))
    run = read_run(compare(settings, task=_task(), nets={"mine": build}, rules=[wild], out=tmp_path / "run"))
    failed = [row for row in run.rows if row["kind"] == "tuning" and "message" in row]
    assert [row["lr"] for row in failed] == [1e6]
    assert "the ring burst" in failed[0]["message"]
    assert run.seeds("wild")["done"] == (0,)
    rule = wild.build(build(None, 4), nn.CrossEntropyLoss(), 1e6)
    with pytest.raises(BlackBoxError, match="the ring burst"):
        fit(rule, _task(), epochs=2, batch_size=16)


# Going on


class Kills(Observer):
    """Ends the process's work at the n-th row, as a kill does: nothing is saved any more."""

    def __init__(self, count: int) -> None:
        self.count = count

    def row(self, member: Member, row: dict[str, Any]) -> None:
        self.count -= 1
        if self.count == 0:
            raise SystemExit(9)


def _noisy(seeds: tuple[int, ...] = (0, 1)) -> Settings:
    how = ("coloring:noise=0.05", "exact:noise=0.05", "spsa:probes=2:noise=0.05", "discover")
    nets = tuple(f"blackbox:{WIDTH}:{each}" for each in how)
    return _settings(nets, rules=("adam", "am-adam"), evaluate_every=2, seeds=seeds)


@pytest.mark.parametrize("stops", [[Kills(7)], [InterruptAt(9)], [Kills(3), InterruptAt(20), Kills(8)]])
def test_counters_and_noise_go_on_from_the_checkpoint(tmp_path: Path, stops: list[Observer]) -> None:
    settings = _noisy((0,))
    whole = compare(settings, task=_task(), out=tmp_path / "whole")
    path = tmp_path / "part"
    given: dict[str, Any] = {"task": _task()}
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        compare(settings, out=path, observer=stops[0], **given)
    for observer in stops[1:]:
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            resume(path, observer=observer, **given)
    resume(path, task=_task())
    assert_same(path, whole)


def test_workers_count_alike(tmp_path: Path) -> None:
    settings = _noisy()
    box = BlackBox(Oscillators(0.05), WIDTH, pattern=Oscillators.pattern(WIDTH), noise=0.05)
    nets: dict[str, Any] = {"mine": nn.Sequential(nn.Linear(FEATURES, WIDTH), box, nn.Linear(WIDTH, 4))}
    settings = replace(settings, nets=(*settings.nets[:2], "mine"))
    paths = [
        compare(settings, task=_task(), nets=nets, out=tmp_path / str(workers), workers=workers)
        for workers in (None, 2)
    ]
    assert_same(*paths)
    assert len(files_of(paths[0])) == 12


# What is shown


def test_calls_are_an_axis_and_a_column(tmp_path: Path) -> None:
    run = _run(tmp_path, tuple(f"blackbox:{WIDTH}:{how}" for how in ("coloring", "exact", "dense")))
    shown = entries([run])
    assert _figures._axes(shown) == ["epoch", "work", "seconds", "calls"]
    assert [path.name for path in figures(run, tmp_path / "figures")] == ["accuracy.png", "loss.png"]
    found = {s.net.split(":")[2]: s.counters for s in summary(run)}
    assert {name: each["calls"] for name, each in found.items()} == {
        "coloring": 120 * CALLS,
        "exact": 120,
        "dense": 120 * (1 + 2 * WIDTH),
    }
    assert {each["evaluation_calls"] for each in found.values()} == {60}


def test_counts_that_are_far_apart_have_a_logarithmic_axis(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = _run(tmp_path, tuple(f"blackbox:{WIDTH}:{how}" for how in ("exact", "dense")))
    shown = entries([run])
    assert _figures._starts(shown, "calls") == []  # 15 times as many
    monkeypatch.setattr(_figures, "_FAR", 14)
    assert set(_figures._starts(shown, "calls")) == {60, 60 * (1 + 2 * WIDTH)}
    assert _figures._starts(shown, "seconds") == _figures._starts(shown, "evaluation_calls") == []
    _, axes = _figures._panels(shown, ["epoch", "calls"], [("loss", 1.0)])
    assert [axis.get_xscale() for axis in axes[0]] == ["linear", "log"]
    assert axes[0, 1].get_xlabel() == "calls (log scale)"
    assert figures(run, tmp_path / "figures")


def test_the_command_shows_calls(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    x = torch.rand(80, 1, 6, 6, generator=torch.Generator().manual_seed(0))
    y = x.flatten(1)[:, :4].argmax(1)
    dataset = Dataset("digits", x[:60], y[:60], x[60:], y[60:], tuple("abcd"))
    monkeypatch.setattr(data, "load", lambda name, progress=None, **_: dataset)
    monkeypatch.chdir(tmp_path)
    named = ["--net", "blackbox:7:coloring", "--net", "blackbox:7:exact:conv", "--rule", "adam", "--rule", "am-adam"]
    usual = ["--data", "digits", "--epochs", "2", "--batch-size", "20", "--seeds", "2", "--out", "run"]
    assert main(["compare", *named, *usual, "--json"]) == 0
    found = {c["name"]: c for c in json.loads(capsys.readouterr().out)["contenders"]}
    for rule, work in (("adam", 6), ("am-adam", None)):
        sensed, exact = found[f"{rule} blackbox:7:coloring"], found[f"{rule} blackbox:7:exact:conv"]
        assert sensed["counters"] == {"calls": 120 * CALLS, "evaluation_calls": 60}
        assert exact["counters"] == {"calls": 120, "evaluation_calls": 60}
        assert sensed["work"] == exact["work"] == work  # what would have to be measured stays unknown
    page = Path("run/report.html").read_text()
    assert "evaluation calls" in page
    assert main(["report", "run"]) == 0
    shown = capsys.readouterr().out
    assert "calls" in shown
    assert "1,080" in shown
    assert main(["list"]) == 0
    assert "blackbox:WIDTH" in capsys.readouterr().out


# What it is for


def test_digits_are_learned_as_with_autograds_gradient(tmp_path: Path) -> None:
    """Within 0.3 points at 9 calls a row; 5 points and more are lost where the gradient stops."""
    nets = tuple(f"blackbox:64:{how}" for how in ("exact", "coloring", "stopped"))
    own: dict[str, Any] = {"lr": {"adam": 1e-2}, "epochs": 6, "batch_size": 50, "seeds": (0, 1, 2)}
    run = read_run(
        compare(Settings(data="digits", nets=nets, rules=("adam",), alignment=False, **own), out=tmp_path / "run")
    )
    found = {s.net.split(":")[2]: s for s in summary(run)}
    means = {name: s.final.mean for name, s in found.items() if s.final is not None}
    assert means["exact"] > 0.955
    assert means["coloring"] == pytest.approx(means["exact"], abs=0.003)
    assert means["stopped"] < means["exact"] - 0.05
    assert found["coloring"].counters["calls"] == 9 * 6 * 1437
