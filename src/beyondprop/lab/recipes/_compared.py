"""Recipes made of comparisons: run directories inside the recipe's own, resumed where they were stopped."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from beyondprop.data import Dataset
from beyondprop.lab import registry
from beyondprop.lab.built_in import nesterov
from beyondprop.lab.comparing import comparison
from beyondprop.lab.comparing.member import Member, Observer
from beyondprop.lab.comparing.settings import Settings
from beyondprop.lab.recipes._base import Context
from beyondprop.lab.registry import Build, RuleSpec
from beyondprop.lab.report._curves import Curve, curve
from beyondprop.lab.report._figures import draw
from beyondprop.lab.report._style import entries
from beyondprop.lab.runs.files import write_atomically
from beyondprop.lab.runs.recorded import Run, number, read_run
from beyondprop.optim.factories import adam
from beyondprop.rules import AltMin
from beyondprop.solvers import Memory
from beyondprop.stages import LossFunction


class _Said(Observer):
    """Tells a recipe's context when a training ends."""

    def __init__(self, context: Context, part: str) -> None:
        self.context, self.part, self.done, self.total = context, part, 0, 0

    def start(self, path: Path, members: Sequence[Member]) -> None:
        self.total = len(members)

    def said(self, text: str) -> None:
        self.context.say(f"{self.part}: {text}")

    def end(self, member: Member) -> None:
        self.done += 1
        what = "tuning" if member.tuning else f"seed {member.seed}"
        self.context.say(f"{self.part}: {member.spec.name} lr {member.lr:g} {what} ({self.done} of {self.total})")


def usual(context: Context, seeds: int = 3, **own: Any) -> Settings:
    """Return settings as recipes have them: rates are tuned, but not in the short version, which has a single seed."""
    count = 1 if context.quick else seeds
    return Settings(**{"seeds": tuple(range(count)), "tune": not context.quick, "alignment": False} | own)


def _adam(model: nn.Module, loss: LossFunction, lr: float) -> AltMin:
    return AltMin(model, loss, adam(lr), code_solver="line_search")


def _adam_unit(model: nn.Module, loss: LossFunction, lr: float) -> AltMin:
    return AltMin(model, loss, adam(lr), damping=1.0, code_solver="line_search")


def _sgd(model: nn.Module, loss: LossFunction, lr: float) -> AltMin:
    return AltMin(model, loss, nesterov(lr), code_solver="line_search")


def _unbounded(model: nn.Module, loss: LossFunction, lr: float) -> AltMin:
    return AltMin(model, loss, Memory(lr=lr, max_gain=None), code_solver="line_search")


EXACT: dict[str, Build] = {"am-adam": _adam, "am-adam-unit": _adam_unit, "am-sgd": _sgd, "am-mem": _unbounded}
"""Alternating minimization as recorded runs have it: every line search is exact, and the gain of a memory has no bound."""


def recorded_rules(names: Sequence[str]) -> tuple[RuleSpec, ...]:
    """Return registered rules as recorded runs have them."""
    specs = map(registry.rules.get, names)
    return tuple(replace(spec, build=EXACT.get(spec.name, spec.build)) for spec in specs)


def compared(context: Context, part: str, settings: Settings, rules: Sequence[RuleSpec] = (), **own: Any) -> Run:
    """Return a comparison's recorded run; it is run, or goes on, where it is not done.

    Args:
        context: whose directory has the run's, named `part`.
        part: what the run goes by.
        settings: what is compared.
        rules: rules of the recipe's own; where there are any, they are what is compared. Default: those of the settings, as
            `recorded_rules` has them.
        **own: its own `task` and `nets`, as `compare` takes them.

    Raises:
        ValueError: if the directory holds a comparison of other settings.
    """
    path = context.out / part
    observer = _Said(context, part)
    rules = rules or recorded_rules(settings.rules)
    settings = replace(settings, rules=tuple(spec.name for spec in rules))
    if (path / "config.toml").is_file():
        recorded = Settings.from_config(read_run(path).config)
        if recorded != replace(settings, device=recorded.device):
            raise ValueError(f"{str(path)!r} holds a run with other settings; choose another directory, or remove it.")
        comparison.resume(path, rules=rules, observer=observer, workers=context.workers, **own)
    else:
        comparison.compare(settings, out=path, rules=rules, observer=observer, workers=context.workers, **own)
    return read_run(path)


def first_rows(dataset: Dataset, count: int) -> Dataset:
    """Return a data set with the first of its training rows alone."""
    return replace(dataset, x_train=dataset.x_train[:count], y_train=dataset.y_train[:count])


def chosen(run: Run) -> tuple[dict[str, float], list[str]]:
    """Return the learning rates by contender, and the contenders whose rate is at the edge of those that were tried."""
    rates = {one.name: one.settings["lr"] for one in run.contenders}
    grids = {one.name: one.settings.get("lr_tuned_over", ()) for one in run.contenders}
    return rates, [name for name, grid in grids.items() if len(grid) > 1 and rates[name] in (min(grid), max(grid))]


def curves(
    run: Run,
    name: str,
    key: str = "accuracy",
    *,
    x: str = "epoch",
    start: float = 0.0,
    scale: float = 100.0,
    before: bool = False,
) -> list[Curve]:
    """Return `start + scale * metric` over the epochs or steps for every seed, also before training where that is wanted."""
    rows = ([row for row in run.of("eval", name, seed) if row["step"] or before] for seed in run.config["seeds"])
    return [Curve(c.x, start + scale * c.y) for c in (curve(own, x, key) for own in rows)]


def at_epoch(run: Run, rule: str, epoch: float, key: str = "accuracy", scale: float = 100.0) -> tuple[float, ...]:
    """Return a metric of every seed at its evaluation nearest to an epoch; NaN for a seed that failed before.

    At the last epoch, or later, only seeds that were trained to the end count.
    """
    done = run.seeds(rule)["done"]
    is_last = epoch >= run.config["epochs"]
    found = []
    for seed in run.config["seeds"]:
        rows = [row for row in run.of("eval", rule, seed) if row["step"] and math.isfinite(number(row, key))]
        nearest = min(rows, key=lambda row: abs(row["epoch"] - epoch), default=None)
        if nearest is None:
            found.append(math.nan)
            continue
        is_there = seed in done if is_last else abs(nearest["epoch"] - epoch) <= 0.02 * max(epoch, 1.0)
        found.append(scale * number(nearest, key) if is_there else math.nan)
    return tuple(found)


def summary(run: Run) -> dict[str, Any]:
    """Return what the ledger says of a run's settings: everything but what is usual, and the learning rates."""
    kept = ("data", "nets", "epochs", "batch_size", "seeds", "schedule", "tune", "tune_epochs")
    rates, at_edge = chosen(run)
    return {key: run.config[key] for key in kept if key in run.config} | {"lr": rates, "at_edge": at_edge}


def figure(runs: Sequence[Run], path: Path) -> Path:
    """Draw accuracy (or loss) of the runs' rules into one PNG file.

    Not against seconds: the parts of a long recipe may have run on different days, beside other work.
    """
    return write_atomically(path, draw(entries(runs), ["png"], xs=("epoch", "work"))[0].files["png"])
