"""Rules handed over, several seeds of tuning, unequal costs: what races and recipes are made of."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch

from beyondprop import Backprop, data
from beyondprop.cli import main
from beyondprop.lab import registry, tasks
from beyondprop.lab.comparing import Settings, compare, resume
from beyondprop.lab.comparing.member import Member, Observer
from beyondprop.lab.registry import RuleSpec
from beyondprop.lab.runs.recorded import Run, read_config, read_run
from beyondprop.lab.tasks import RowsTask
from beyondprop.lab.training import schedules

pytestmark = pytest.mark.filterwarnings("ignore:.*at the edge of:UserWarning")


def _descent(name: str = "plain", **own: Any) -> RuleSpec:
    def build(model: Any, loss: Any, lr: float) -> Backprop:
        return Backprop(model, loss, partial(torch.optim.SGD, lr=lr))

    return RuleSpec(name, name.title(), "", "", build, **{"lr": 0.1, "grid": (0.01, 0.1, 0.3)} | own)


def _settings(**changed: Any) -> Settings:
    usual: dict[str, Any] = {"nets": ("mlp:8x1",), "epochs": 1.0, "seeds": (0,), "alignment": False, "batch_size": 100}
    return Settings(**usual | changed)


def _ends(run: Run, name: str) -> dict[str, Any]:
    (row,) = run.of("eval", name, 0)[-1:]
    return row


def test_rules_handed_over_are_compared_and_not_registered(tmp_path: Path) -> None:
    spec = _descent()
    run = read_run(compare(_settings(), rules=[spec], out=tmp_path / "a"))
    assert [(one.name, one.title) for one in run.contenders] == [("plain", "Plain")]
    assert "plain" not in registry.rules
    with pytest.raises(ValueError, match=r"rule must be one of .*'plain'"):
        resume(tmp_path / "a")
    assert resume(tmp_path / "a", rules=[spec]) == tmp_path / "a"


def test_a_rule_handed_over_comes_before_the_registered_one_of_its_name(tmp_path: Path) -> None:
    own = replace(_descent(), name="adam", title="not Adam")
    run = read_run(compare(_settings(rules=("adam", "sgd")), rules=[own], out=tmp_path / "a"))
    assert [one.title for one in run.contenders] == ["not Adam", registry.rules.get("sgd").title]
    assert registry.rules.get("adam").title != "not Adam"


def test_a_rate_is_chosen_by_the_mean_over_the_seeds_of_tuning(tmp_path: Path) -> None:
    settings = _settings(tune=True, tune_seeds=(7, 8))
    run = read_run(compare(settings, rules=[_descent(grid=(1e-4, 0.1, 0.2, 1e-3))], out=tmp_path / "a"))
    tried = [row for row in run.rows if row["kind"] == "tuning"]
    assert sorted((row["lr"], row["seed"]) for row in tried) == [
        (lr, s) for lr in (1e-4, 1e-3, 0.1, 0.2) for s in (7, 8)
    ]
    scores = {lr: fmean(row["accuracy"] for row in tried if row["lr"] == lr) for lr in (1e-4, 1e-3, 0.1, 0.2)}
    assert run.contenders[0].settings["lr"] == max(scores, key=lambda lr: scores[lr])
    assert Settings.from_config(read_config(tmp_path / "a")).tune_seeds == (7, 8)


def test_a_rate_that_fails_with_one_seed_is_not_chosen(tmp_path: Path) -> None:
    def build(model: Any, loss: Any, lr: float) -> Backprop:
        broken = lr == 0.1 and torch.initial_seed() == 8
        return Backprop(model, loss, partial(torch.optim.SGD, lr=1e30 if broken else lr))

    spec = replace(_descent(grid=(1e-3, 0.1, 2e-3)), build=build)
    settings = _settings(tune=True, tune_seeds=(7, 8))
    run = read_run(compare(settings, rules=[spec], out=tmp_path / "a"))
    assert [row["seed"] for row in run.rows if row["kind"] == "tuning" and row["accuracy"] is None] == [8]
    assert run.contenders[0].settings["lr"] == 2e-3


def test_seeds_of_tuning_on_the_command_line(tmp_path: Path) -> None:
    line = "--net mlp:8x1 --rule sgd --epochs 1 --seeds 1 --batch-size 200 --tune --tune-seeds 5,6"
    assert main(["compare", *line.split(), "--out", str(tmp_path / "a")]) == 0
    run = read_run(tmp_path / "a")
    assert {row["seed"] for row in run.rows if row["kind"] == "tuning"} == {5, 6}
    assert main(["compare", "--tune", "--tune-seeds", "5,x", "--out", str(tmp_path / "b")]) == 2
    assert main(["compare", "--tune", "--tune-seeds", "5,5", "--out", str(tmp_path / "b")]) == 2
    assert not (tmp_path / "b").exists()


def test_what_costs_more_trains_less_on_the_whole_of_its_schedule(tmp_path: Path) -> None:
    dear = _descent("dear", cost=2.5)
    settings = _settings(epochs=5.0, schedule="warmup:0.1")
    run = read_run(compare(settings, rules=[_descent(), dear], out=tmp_path / "a"))
    assert (_ends(run, "plain")["epoch"], _ends(run, "dear")["epoch"]) == (5.0, 2.0)
    alone = read_run(compare(replace(settings, epochs=2.0), rules=[_descent("dear")], out=tmp_path / "b"))
    assert _ends(run, "dear")["loss"] == _ends(alone, "dear")["loss"]
    assert run.seeds("dear")["done"] == (0,)
    assert [one.settings.get("cost") for one in run.contenders] == [None, 2.5]
    with pytest.raises(ValueError, match="warm_start is for rules that train equally long"):
        compare(replace(settings, warm_start="sgd:1"), rules=[dear], out=tmp_path / "c")
    with pytest.raises(ValueError, match="cost must be a finite number > 0"):
        _descent(cost=0.0)


def test_a_warm_up_rises_then_falls_to_zero() -> None:
    factor = schedules.factor("warmup:0.2", 20, 5)
    values = [factor(step) for step in range(21)]
    assert values[:4] == [0.25, 0.5, 0.75, 1.0]
    assert values[4:] == pytest.approx([(20 - step) / 16 for step in range(4, 21)])
    for bad in ("warmup:0", "warmup:1", "warmup:", "warmup:x", "warmup:nan"):
        with pytest.raises(ValueError, match=r"schedule must be one of .*warmup:S"):
            schedules.factor(bad, 10, 5)


def test_training_rows_are_measured_where_that_is_wanted(tmp_path: Path) -> None:
    task = tasks.Classification.task(data.load("digits"))
    both = replace(task, measures_training=True)
    assert [m.label for m in both.metrics] == ["accuracy (%)", "loss", "training accuracy (%)", "training loss"]
    run = read_run(compare(_settings(rules=("sgd",)), task=both, out=tmp_path / "a"))
    plain = read_run(compare(_settings(rules=("sgd",)), task=task, out=tmp_path / "b"))
    row = _ends(run, "sgd")
    assert row["accuracy"] == _ends(plain, "sgd")["accuracy"]
    model = both.net("mlp:8x1")
    swapped = RowsTask(
        name="x", x_train=task.x_train, y_train=task.y_train, x_test=task.x_train, y_test=task.y_train, kind=task.kind
    )
    assert both.evaluate(model)["training accuracy"] == swapped.evaluate(model)["accuracy"]
    assert 0 < row["training accuracy"] <= 1


def test_rates_shrink_with_batches_below_the_least_that_they_are_for(tmp_path: Path) -> None:
    spec = _descent(least_batch=40)
    assert (spec.rate(40), spec.rate(1000), spec.rate(10)) == (0.1, 0.1, 0.025)
    assert spec.rates(20) == (0.005, 0.05, 0.15)
    with pytest.raises(ValueError, match="least_batch"):
        _descent(least_batch=0)
    own = {"epochs": 0.1, "batch_size": 10}
    run = read_run(compare(_settings(**own, tune=True), rules=[spec], out=tmp_path / "tuned"))
    assert [row["lr"] for row in run.rows if row["kind"] == "tuning"] == [0.0025, 0.025, 0.075]
    assert run.config["contenders"][0]["settings"]["lr_tuned_over"] == [0.0025, 0.025, 0.075]
    usual = read_run(compare(_settings(**own), rules=[spec], out=tmp_path / "usual"))
    lr = {"plain": 0.025}
    given = read_run(compare(_settings(**own, rules=("plain",), lr=lr), rules=[_descent()], out=tmp_path / "given"))
    assert usual.config["contenders"][0]["settings"]["lr"] == 0.025
    assert _ends(usual, "plain")["loss"] == _ends(given, "plain")["loss"]


@pytest.mark.parametrize("name", ["sgd", "am-sgd"])
def test_steps_along_averaged_gradients_are_smaller_for_small_batches(name: str) -> None:
    spec = registry.rules.get(name)
    assert (spec.rate(1), spec.rate(10), spec.rate(50), spec.rate(200)) == (0.0006, 0.006, 0.03, 0.03)


class _StopAfter(Observer):
    """Presses Ctrl-C when the first training has ended."""

    def end(self, member: Member) -> None:
        raise KeyboardInterrupt


def test_a_run_goes_on_with_the_rates_it_was_begun_with(tmp_path: Path) -> None:
    settings = _settings(seeds=(0, 1), rules=("plain", "adam"), warm_start="plain:0.5")
    before, now = _descent(lr=0.2), _descent(lr=0.01)
    whole = read_run(compare(settings, rules=[before], out=tmp_path / "whole"))
    with pytest.raises(KeyboardInterrupt):
        compare(settings, rules=[before], out=tmp_path / "stopped", observer=_StopAfter())
    run = read_run(resume(tmp_path / "stopped", rules=[now]))
    assert [c["settings"]["lr"] for c in run.config["contenders"]] == [0.2, registry.rules.get("adam").lr]
    assert run.config["warm_start_rule"]["settings"]["lr"] == 0.2
    losses = [[row["loss"] for row in r.rows if row["kind"] == "eval"] for r in (run, whole)]
    assert losses[0] == losses[1]
