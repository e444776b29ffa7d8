"""Recipes made of comparisons: run directories inside the recipe's own, resumed where they were stopped."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from beyondprop.lab.comparing import comparison
from beyondprop.lab.comparing.member import Member, Silent
from beyondprop.lab.comparing.settings import Settings
from beyondprop.lab.recipes._base import Context, is_at_edge
from beyondprop.lab.report._figures import draw
from beyondprop.lab.report._style import entries
from beyondprop.lab.runs.files import write_atomically
from beyondprop.lab.runs.recorded import Run, number, read_run


class _Said(Silent):
    """Tells a recipe's context when a training ends."""

    def __init__(self, context: Context, part: str) -> None:
        self.context, self.part, self.done, self.total = context, part, 0, 0

    def start(self, path: Path, members: Sequence[Member]) -> None:
        """See `Observer`."""
        del path
        self.total = len(members)

    def end(self, member: Member) -> None:
        """See `Observer`."""
        self.done += 1
        what = "tuning" if member.tuning else f"seed {member.seed}"
        self.context.say(f"{self.part}: {member.spec.name} lr {member.lr:g} {what} ({self.done} of {self.total})")


def compared(context: Context, part: str, settings: Settings) -> Run:
    """Return a comparison's recorded run; it is run, or goes on, where it is not done.

    Raises:
        ValueError: if the directory holds a comparison of other settings.
    """
    path = context.out / part
    observer = _Said(context, part)
    if (path / "config.toml").is_file():
        recorded = Settings.from_config(read_run(path).config)
        if recorded != replace(settings, device=recorded.device):
            raise ValueError(f"{str(path)!r} holds a run with other settings; choose another directory, or remove it.")
        comparison.resume(path, observer=observer)
    else:
        comparison.compare(settings, out=path, observer=observer)
    return read_run(path)


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
    settings = {key: run.config[key] for key in kept if key in run.config}
    tuned = {rule.name: rule.settings["lr_tuned_over"] for rule in run.contenders if "lr_tuned_over" in rule.settings}
    rates = {rule.name: rule.settings.get("lr") for rule in run.contenders}
    return settings | {"lr": rates, "at_edge": [name for name, grid in tuned.items() if is_at_edge(rates[name], grid)]}


def figure(runs: Sequence[Run], path: Path) -> Path:
    """Draw accuracy (or loss) of the runs' rules into one PNG file.

    Not against seconds: the parts of a long recipe may have run on different days, beside other work.
    """
    return write_atomically(path, draw(entries(runs), ["png"], xs=("epoch", "work"))[0].files["png"])
