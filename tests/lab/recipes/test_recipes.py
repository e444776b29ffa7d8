from __future__ import annotations

import itertools
import json
import math
import signal
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from beyondprop import Backprop, data
from beyondprop.data import Dataset
from beyondprop.lab import recipes, registry
from beyondprop.lab.comparing.plan import DRAWN_SEED, VALIDATION
from beyondprop.lab.comparing.settings import Settings
from beyondprop.lab.recipes import (
    Recipe,
    Row,
    _revnet,
    adding_problem,
    bcd_3x1500,
    binary_mnist,
    first_epoch,
    fully_connected,
    higgs,
    streams,
    theorem_3_2,
)
from beyondprop.lab.recipes._base import Context
from beyondprop.lab.recipes._compared import at_epoch, compared, summary
from beyondprop.lab.recipes._kept import Kept, accuracy_at, trained
from beyondprop.lab.registry import RuleSpec
from beyondprop.lab.runs.recorded import Run, read_run
from beyondprop.lab.tasks import Classification, RowsTask
from beyondprop.optim.factories import adam

NAN = math.nan


def _classes(name: str, shape: tuple[int, ...], classes: int, rows: int = 240, tests: int = 60) -> Dataset:
    """Blobs in the shape of a real set."""
    g = torch.Generator().manual_seed(0)
    y = torch.arange(rows + tests) % classes
    x = torch.rand(rows + tests, *shape, generator=g) + 0.5 * torch.rand(classes, *shape, generator=g)[y]
    return Dataset(name, x[:rows], y[:rows], x[rows:], y[rows:], tuple(map(str, range(classes))))


@pytest.fixture
def small() -> Dataset:
    return _classes("digits", (1, 8, 8), 10, rows=100)


def _context(out: Path, said: list[str] | None = None, quick: bool = True) -> Context:
    return Context(out, quick, (said if said is not None else []).append)


# What recipes are made of


def test_a_comparison_of_a_recipe_goes_on_and_takes_no_other_settings(
    tmp_path: Path, small: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data, "load", lambda name, progress=None: small)
    settings = Settings(
        nets=("mlp:4x1",), rules=("adam", "sgd"), epochs=2, batch_size=20, seeds=(0, 1), lr={"sgd": 1e38}, alignment=False,
        schedule="constant", device="cpu",
    )  # fmt: skip
    said: list[str] = []
    run = compared(_context(tmp_path, said), "part", settings)
    assert len(said) == 4
    assert said[-1] == "part: sgd lr 1e+38 seed 1 (4 of 4)"
    again = compared(_context(tmp_path, said), "part", settings)
    assert len(said) == 4
    accuracies = at_epoch(run, "adam", 2)
    assert at_epoch(again, "adam", 2) == accuracies
    assert all(map(math.isnan, at_epoch(run, "sgd", 2)))
    assert all(map(math.isnan, at_epoch(run, "adam", 1.5)))
    with pytest.raises(ValueError, match="holds a run with other settings"):
        compared(_context(tmp_path), "part", replace(settings, batch_size=10))


def test_values_are_measured_once(tmp_path: Path) -> None:
    file = tmp_path / "runs.json"
    kept = Kept(file, {"seeds": (1, 2)})
    assert kept.get("a", lambda: [1.5, None]) == [1.5, None]
    again = Kept(file, {"seeds": (1, 2)})
    assert again.get("a", lambda: pytest.fail("measured twice")) == [1.5, None]
    with pytest.raises(ValueError, match=r"runs\.json' is of other settings"):
        Kept(file, {"seeds": (1,)})
    for content in ("{", "[]", '{"values": {}}'):
        file.write_text(content)
        with pytest.raises(ValueError, match=r"runs\.json' is damaged"):
            Kept(file)


def test_sweeps_go_on_where_they_were_stopped(tmp_path: Path, small: Dataset) -> None:
    widths = (64, 12, 11, 10)
    whole = bcd_3x1500.train(_context(tmp_path / "whole"), small, widths, 7, 3)
    said: list[str] = []

    def stopping(line: str) -> None:
        said.append(line)
        if "epoch 5" in line:
            raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        bcd_3x1500.train(Context(tmp_path / "parts", True, stopping), small, widths, 7, 3)
    assert not (tmp_path / "parts" / "64x12x11x10.json").exists()
    said.clear()
    parts = bcd_3x1500.train(_context(tmp_path / "parts", said), small, widths, 7, 3)
    assert [line.split(",")[0][-1] for line in said] == ["4", "5", "6", "7"]  # the checkpoint is of sweep 3
    for a, b in zip(whole, parts, strict=True):
        assert a | {"seconds": 0} == b | {"seconds": 0}
    assert [row["step"] for row in whole if "gaps" in row] == [1, 3, 6, 7]
    assert len(whole[-1]["gaps"]) == 3
    assert not list(tmp_path.rglob("*.safetensors"))
    assert bcd_3x1500.train(_context(tmp_path / "parts", said), small, widths, 7, 3) == parts
    assert len(said) == 4
    assert accuracy_at(parts, 7) == 100 * parts[-1]["accuracy"]
    assert math.isnan(accuracy_at(parts, 8))


def test_a_training_that_fails_ends_with_what_it_had(tmp_path: Path, small: Dataset) -> None:
    said: list[str] = []

    def build() -> Backprop:
        return Backprop(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), nn.CrossEntropyLoss(), adam(1e38))

    rows = trained(_context(tmp_path, said), "bad", build, small, seed=0, epochs=2, batch_size=50, schedule="constant")
    assert [row["step"] for row in rows] == [0]
    assert "not finite" in said[-1]
    assert math.isnan(accuracy_at(rows, 2))


# Whole recipes, on toy data in the shape of the real sets


_LAST = ("result.json", "parts.json", "env.json")  # written by every call


# 100 batches are of the real set; that recipe has a test of its own.
@pytest.mark.parametrize("name", [name for name in recipes.names() if name != "first-epoch"])
def test_the_short_version_runs_and_goes_on(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    toy = _classes("mnist", (1, 28, 28), 10, rows=2000 if name == "fully-connected" else 240)
    monkeypatch.setattr(adding_problem, "LENGTH", 5)
    monkeypatch.setattr(bcd_3x1500, "QUICK_SWEEPS", 4)
    monkeypatch.setattr(theorem_3_2, "QUICK_STEPS", 40)
    monkeypatch.setattr(theorem_3_2, "QUICK_REPEATS", 3)
    if name == "higgs":
        toy = _classes("higgs", (28,), 2, rows=1200)
        monkeypatch.setattr(higgs, "COUNTS", (higgs.FEW,))
    if name == "rnn-15":
        toy = _classes("mnist", (1, 28, 28), 10, rows=60, tests=20)
    if name == "spiking-events":
        toy = _classes("nmnist-small", (50, 2, 6, 6), 10, rows=60, tests=20)
    if name.endswith("-published"):  # images in [0, 1]
        toy = replace(toy, x_train=toy.x_train / 2, x_test=toy.x_test / 2)
    monkeypatch.setattr(_revnet, "NET", "revnet14")
    if name in ("blocks-cifar10", "revnet-angle", "revnet-cifar10"):
        toy = _classes("cifar10", (3, 32, 32), 10, rows=20, tests=10)
    monkeypatch.setattr(data, "load", lambda *_, **__: toy)
    recipe, said = recipes.get(name), []
    result = recipe.run(name, _context(tmp_path, said))
    assert result.quick
    assert result.rows
    assert not any(math.isnan(row.mean) for row in result.rows)
    assert {row.verdict for row in result.rows} == {"shown"}  # a short version is not judged
    assert (tmp_path / "figure.png").stat().st_size > 10_000
    assert said
    trained_before = [file for file in tmp_path.rglob("*.json*") if file.name not in _LAST]
    contents = [file.read_bytes() for file in trained_before]
    (tmp_path / "result.json").unlink()
    again = recipe.run(name, _context(tmp_path))
    assert again.rows == result.rows
    assert [file.read_bytes() for file in trained_before] == contents


def test_seconds_are_those_of_all_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    stopped = [True]

    def measure(context: Context) -> tuple[list[Row], dict[str, Any]]:
        now[0] += 5.0
        if stopped.pop():
            raise KeyboardInterrupt
        return [Row("a", (1.0,))], {}

    recipe = Recipe("title", "source", "about", measure, 1)
    context = Context(tmp_path, False, lambda line: None)
    made = iter(["one", "two+"])
    monkeypatch.setattr("beyondprop.lab.recipes._base.environment", lambda device: {"commit": next(made)})
    with pytest.raises(KeyboardInterrupt):
        recipe.run("id", context)
    stopped.append(False)
    result = recipe.run("id", context)
    assert result.seconds == 10.0
    assert result.environment["commit"] == "one, two+"
    said: list[str] = []
    assert recipe.run("id", _context(tmp_path, said)) == result  # measured once, and said so
    assert "was finished before" in said[0]
    assert now == [10.0]


# What they choose on, and what they report


Values = Callable[[str, int, str], float | None]


def _comparing(value: Values, lr: float = 1e-3, seen: list[tuple[Settings, Any]] | None = None) -> Any:
    """Return what stands for `compared`: every training ends with `value(contender, seed, metric)`, None where it fails."""

    def fake(context: Context, part: str, settings: Settings, rules: Sequence[RuleSpec] = (), **own: Any) -> Run:
        specs = rules or [registry.rules.get(name) for name in settings.rules]
        if seen is not None:
            seen.append((replace(settings, rules=tuple(spec.name for spec in specs)), own.get("task")))
        several, contenders, rows = len(settings.nets) > 1, [], []
        for net, spec in itertools.product(settings.nets, specs):
            name = f"{spec.name} {net}" if several else spec.name
            own_settings = {"lr": lr, "lr_tuned_over": list(spec.grid)}
            contenders.append({"name": name, "rule": spec.name, "net": net, "settings": own_settings})
            for seed in settings.seeds:
                for epoch in range(1, int(settings.epochs or 1) + 1):
                    found = {key: value(name, seed, key) for key in ("accuracy", "training accuracy", "loss")}
                    usual = {"contender": name, "seed": seed, "step": epoch, "epoch": float(epoch)}
                    if None in found.values():
                        rows.append({"kind": "failed", "message": "overflow", **usual})
                        break
                    rows.append({"kind": "eval", **usual, **found})
        config = {"nets": list(settings.nets), "seeds": list(settings.seeds), "epochs": settings.epochs}
        config |= {"batch_size": settings.batch_size, "data": settings.data, "contenders": contenders}
        return Run(context.out / part, config, {}, rows)

    return fake


@pytest.mark.parametrize(
    ("recipe", "toy"),
    [
        (higgs, _classes("higgs", (28,), 2, rows=1200)),
        (binary_mnist, _classes("mnist", (1, 28, 28), 10, rows=400)),
        (streams, _classes("mnist", (1, 28, 28), 10, rows=400)),
        (adding_problem, None),
    ],
)
def test_what_is_reported_has_no_part_in_the_choice(
    recipe: Any, toy: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[Settings, Any]] = []
    monkeypatch.setattr(recipe, "compared", _comparing(lambda *_: 0.5, seen=seen))
    monkeypatch.setattr(recipe, "_draw", lambda *_: None)
    monkeypatch.setattr(higgs, "_beside", lambda *_: [])
    monkeypatch.setattr(streams, "accuracies", lambda *_: torch.eye(5, dtype=torch.float64))
    monkeypatch.setattr(data, "load", lambda name, progress=None: toy)
    recipe.measure(_context(tmp_path, quick=False))
    tuned = [(settings, task) for settings, task in seen if settings.tune]
    assert tuned
    for settings, task in tuned:
        plan_seeds = settings.tune_seeds or (DRAWN_SEED,)  # of sequences that every seed has its own of
        assert not set(plan_seeds) & set(settings.seeds)
        if isinstance(task, RowsTask):  # what tuning is tested on is none of the test rows
            held = task.held_out(VALIDATION)
            assert held.x_test is not None
            assert {tuple(r.flatten().tolist()) for r in held.x_test} <= {
                tuple(r.flatten().tolist()) for r in toy.x_train
            }


def test_higgs_takes_the_batch_size_that_is_best_on_held_out_rows(tmp_path: Path) -> None:
    def run(size: int, *scores: float | None) -> Run:
        rows = [
            {"kind": "tuning", "contender": "adam", "seed": seed, "lr": lr, "accuracy": score}
            for (lr, seed), score in zip(itertools.product((1e-3, 1e-2), (100, 101)), scores, strict=True)
        ]
        return Run(tmp_path, {"batch_size": size, "nets": ["a"], "contenders": []}, {}, rows)

    assert higgs.held_out(run(2, 0.5, 0.7, 0.9, None), "adam") == pytest.approx(0.6)  # a rate that failed once is none
    assert higgs.held_out(run(5, 0.5, 0.6, 0.7, 0.8), "adam") == pytest.approx(0.75)
    assert higgs.held_out(run(5, None, None, None, None), "adam") == -math.inf
    assert 1 not in higgs.FEW_BATCHES  # where alternating minimization is backpropagation


def test_nets_of_signs_are_judged_by_both_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    toy = _classes("mnist", (1, 28, 28), 10, rows=400)
    values = {"accuracy": 0.9, "training accuracy": 0.95, "loss": 0.1}
    monkeypatch.setattr(data, "load", lambda name: toy)
    monkeypatch.setattr(binary_mnist, "compared", _comparing(lambda name, seed, key: values[key], lr=4e-3))
    rows, settings = binary_mnist.measure(_context(tmp_path, quick=False))
    assert set(settings["batch 200"]["lr"].values()) == {4e-3}
    assert settings["batch 200"]["at_edge"] == []
    assert [row.verdict for row in rows if "minus" in row.label] == ["reached", "reached"]
    assert {row.verdict for row in rows if "AM-Adam: training error" in row.label} == {"missed"}
    assert {round(row.mean, 9) for row in rows} == {10.0, 5.0, 0.0}


def test_drawn_rows_know_no_others() -> None:
    toy = Classification.task(_classes("higgs", (28,), 2, rows=400))
    one = higgs.drawn(toy, 3, 50)
    assert one.x_train.mean(0).abs().max() < 1e-5
    torch.testing.assert_close(one.x_train.std(0), torch.ones(28))
    rows = torch.randperm(400, generator=torch.Generator().manual_seed(3))
    others = toy.x_train.clone()
    others[rows[50:]] += 100.0
    torch.testing.assert_close(higgs.drawn(replace(toy, x_train=others), 3, 50).x_train, one.x_train)


def test_a_stream_s_rows_are_measured_from_its_trainings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digits = data.load("digits")
    short = replace(digits, x_train=digits.x_train[:400], y_train=digits.y_train[:400])
    monkeypatch.setattr(data, "load", lambda name, progress=None: short)
    monkeypatch.setattr(streams, "STREAMS", dict(list(streams.STREAMS.items())[::2]))
    monkeypatch.setattr(streams, "CONTENDERS", tuple(s for s in streams.CONTENDERS if s.name in ("adam", "am-mem")))
    said: list[str] = []
    rows, settings = streams.measure(_context(tmp_path, said))
    assert len(said) == len(set(said)) == 2 * 2  # none of them twice
    for row in rows:
        title, what = row.label.split(": ")
        assert settings["chosen on a held-out stream"]["lr"][title] > 0
        stream, contender = title.rsplit(", ", 1)
        if contender == "forgetting 0":
            stream, contender = stream.removesuffix(", AM-mem"), "AM-mem, forgetting 0"
        run = read_run(tmp_path / streams.STREAMS[stream].replace(":", "-").replace("=", "-"))
        (last,) = (
            evaluated[-1]
            for spec in streams.CONTENDERS
            if spec.title == contender
            for evaluated in [run.of("eval", spec.name, 0)]
        )
        key = {"average accuracy": "average_accuracy", "forgetting": "forgetting"}[what]
        assert row.measured == (pytest.approx(100 * last[key], abs=2e-3),)
    assert streams.measure(_context(tmp_path, said))[0] == rows
    assert len(said) == 4


def test_a_failed_pass_is_no_forgetting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    toy = _classes("mnist", (1, 28, 28), 10, rows=400)
    monkeypatch.setattr(data, "load", lambda name, progress=None: toy)
    monkeypatch.setattr(streams, "compared", _comparing(lambda name, seed, key: None if seed == 1 else 0.5))
    whole = torch.full((5, 5), 0.5, dtype=torch.float64)
    monkeypatch.setattr(streams, "accuracies", lambda run, name, seed: None if run.seeds(name)["failed"] else whole)
    rows, _ = streams.measure(_context(tmp_path, quick=False))
    assert all(math.isnan(row.mean) for row in rows)


def test_the_adding_problem_asks_for_what_backpropagation_solves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (solvable, net), (other, _) = adding_problem.CELLS.items()
    theirs, ours = adding_problem.BACKPROP, adding_problem.AM

    def value(name: str, seed: int, key: str) -> float:
        return 0.001 if name == f"{theirs.name} {net}" else 0.1

    monkeypatch.setattr(adding_problem, "compared", _comparing(value, lr=1e-2))
    rows, settings = adding_problem.measure(_context(tmp_path, quick=False))
    verdicts = {row.label.partition(":")[0]: row.verdict for row in rows}
    assert verdicts == {
        f"{solvable}, {ours.title}": "missed",
        f"{solvable}, {theirs.title}": "reached",
        f"{other}, {ours.title}": "shown",
        f"{other}, {theirs.title}": "shown",
    }
    assert settings["batch 64"]["at_edge"] == list(verdicts)  # the largest rate that was tried


@pytest.mark.parametrize(
    ("errors", "verdicts"),
    [
        ((1e-4, 1e-4, 0.17), ["missed", "missed", "missed", "shown"]),  # one seed of backpropagation got nowhere
        ((1e-4, 0.17, 0.17), ["missed", "missed", "shown", "shown"]),
        ((None, 1e-4, 1e-4), ["missed", "missed", "missed", "shown"]),  # or failed
        ((None, None, None), ["missed", "missed", "shown", "shown"]),
    ],
)
def test_a_seed_that_fails_takes_no_bound_away(
    errors: tuple[float | None, ...], verdicts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def value(name: str, seed: int, key: str) -> float | None:
        return errors[seed] if name.startswith(f"{adding_problem.BACKPROP.name} ") else 0.17

    monkeypatch.setattr(adding_problem, "compared", _comparing(value))
    rows, _ = adding_problem.measure(_context(tmp_path, quick=False))
    assert [row.verdict for row in rows] == verdicts


def test_damaged_notes_on_parts_are_named(tmp_path: Path) -> None:
    (tmp_path / "parts.json").write_text('{"seconds')
    with pytest.raises(ValueError, match=r"parts\.json' is damaged: .*Remove it"):
        recipes.get("theorem-3-2").run("theorem-3-2", _context(tmp_path))


def test_a_seed_that_failed_in_its_last_sweep_has_no_last_number(tmp_path: Path) -> None:
    rows = [
        {"kind": "eval", "rule": "admm", "seed": seed, "step": step, "epoch": float(step), "accuracy": step / 100}
        for seed in (0, 1)
        for step in range(15 + (seed == 0))
    ]
    rows.append({"kind": "failed", "rule": "admm", "seed": 1, "step": 14, "message": "overflow"})
    rows.insert(16, {"kind": "finished", "rule": "admm", "seed": 0, "step": 15, "epoch": 15.0, "stopped_early": False})
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "env.json").write_text("{}")
    (tmp_path / "config.toml").write_text(
        'data = "mnist"\nnet = "mlp:8x2"\nepochs = 15.0\nseeds = [0, 1]\n[[rules]]\nname = "admm"\ntitle = "ADMM"\n'
        "[rules.settings]\nlr = 10.0\nlr_tuned_over = [1.0, 3.0, 10.0]\n"
    )
    run = read_run(tmp_path)
    assert summary(run)["at_edge"] == ["admm"]
    assert at_epoch(run, "admm", 15.0) == (15.0, pytest.approx(NAN, nan_ok=True))
    assert at_epoch(run, "admm", 7.0) == (7.000000000000001, 7.000000000000001)


def test_first_epoch_reads_the_batch_that_it_names(
    tmp_path: Path, small: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data, "load", lambda name, progress=None: small)
    settings = Settings(
        nets=("mlp:4x1",), rules=("adam",), epochs=2, batch_size=10, seeds=(0, 1), evaluate_every=5, alignment=False,
        device="cpu",
    )  # fmt: skip
    run = compared(_context(tmp_path), "part", settings)
    rows = [row for row in run.of("eval", "adam", 1) if row["step"] == 15]
    assert first_epoch.after(run, "adam", 15)[1] == 100 * rows[0]["accuracy"]
    assert all(map(math.isnan, first_epoch.after(run, "adam", 7)))


def test_the_lead_is_over_the_better_offline_rule(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    toy = _classes("mnist", (1, 28, 28), 10, rows=2000)
    monkeypatch.setattr(data, "load", lambda *_, **__: toy)
    rows, _ = fully_connected.measure(_context(tmp_path))
    by_label = {row.label: row for row in rows}
    (lead,) = (row for label, row in by_label.items() if "minus the better offline rule" in label)
    (ours,) = (row for label, row in by_label.items() if ", AM-Adam, " in label)
    offline = [row.mean for label, row in by_label.items() if label.endswith("sweeps")]
    assert len(offline) == 2
    assert lead.mean == pytest.approx(ours.mean - max(offline))


def test_an_interrupted_training_goes_on_with_the_next_step(tmp_path: Path, small: Dataset) -> None:
    def build() -> Backprop:
        return Backprop(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), nn.CrossEntropyLoss(), adam(1e-2))

    def go(out: Path, say: Callable[[str], None]) -> list[dict[str, Any]]:
        context = Context(out, True, say)
        usual: dict[str, Any] = {"seed": 0, "epochs": 3, "batch_size": 50, "schedule": "linear"}
        return trained(context, "one", build, small, every=1000, **usual)  # by the step, it would be saved at the end

    def stopping(line: str) -> None:
        if "epoch 1," in line:
            signal.raise_signal(signal.SIGINT)

    whole = go(tmp_path / "whole", lambda line: None)
    with pytest.raises(KeyboardInterrupt):
        go(tmp_path / "parts", stopping)
    assert (tmp_path / "parts" / "one.safetensors").is_file()
    said: list[str] = []
    parts = go(tmp_path / "parts", said.append)
    assert [line.split(",")[0][-1] for line in said] == ["2", "3"]
    assert [row["loss"] for row in parts] == [row["loss"] for row in whole]
