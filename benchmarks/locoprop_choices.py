"""Which of LocoProp's settings pay: one is changed at a time, at equal CPU time, on the deep autoencoder of MNIST.

    python benchmarks/locoprop_choices.py [--budget-epochs 5] [--out DIR]

Every variant has four learning rates and the CPU time of the same number of RMSProp's epochs, on 50,000 training images; the
loss is that of the other 10,000. One seed: differences below half a nat are noise.
"""

from __future__ import annotations

import argparse
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from autoencoder import problem
from race import TUNING_SEED, contenders, costs, race, timed
from torch import nn

from beyondprop import Backprop, LocoProp
from beyondprop.lab import RuleSpec
from beyondprop.stages.losses import LossFunction

# The contender of the race, and what differs from it.
BASE: dict[str, Any] = {"local_steps": 9, "rows": 32, "target_lr": 30.0, "momentum": 0.998}
VARIANTS: dict[str, dict[str, Any]] = {
    "as raced": {},
    "rows 8": {"rows": 8},
    "rows 125": {"rows": 125},
    "all rows": {"rows": None},
    "T = 1": {"local_steps": 1},
    "T = 5": {"local_steps": 5},
    "T = 13": {"local_steps": 13},
    "T = 3 inside, 9 at both ends": {"layers": {f"{k}": {"local_steps": 3} for k in (3, 5, 7, 8, 10, 12)}},
    "target_lr 10": {"target_lr": 10.0},
    "momentum 0.9": {"momentum": 0.9},
    "momentum 0.99": {"momentum": 0.99},
    "quadratic model by X^T X": {"loss": "quadratic", "rows": None},
    "quadratic model, 32 rows": {"loss": "quadratic"},
    "squared loss (S) by X^T X": {"loss": "squared", "rows": None},
    "squared loss (S), 32 rows": {"loss": "squared"},
    "published: T = 10, all rows, target_lr 10": {
        "local_steps": 10,
        "rows": None,
        "target_lr": 10.0,
        "momentum": 0.999,
    },
}
GRID = (1e-5, 2e-5, 5e-5, 1e-4)


def variant(title: str) -> RuleSpec:
    """Return LocoProp with some settings changed."""

    def build(model: nn.Module, loss: LossFunction, lr: float) -> Backprop:
        return Backprop(model, loss, LocoProp(model, lr=lr, **BASE | VARIANTS[title]))

    name = re.sub(r"[^\w.]+", "-", title).strip("-")
    return RuleSpec(name, title, "", "", build, lr=GRID[0], grid=GRID)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget-epochs", type=float, default=5.0, help="time of this many RMSProp epochs")
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS), metavar="NAME")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("runs/locoprop_choices"), metavar="DIR")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    task, epochs = problem(), arguments.budget_epochs
    contenders((), task)  # registers the pacemaker
    specs = list(map(variant, arguments.variants))
    cost = costs(task, specs, arguments.out / "costs.json", arguments.rounds)
    held = task.held_out()
    epochs_held = epochs * task.epoch / held.epoch  # an epoch of the rows that are left is shorter
    every_rate = [
        replace(spec, name=f"{spec.name}@{lr:g}", title=f"{spec.title}, {lr:g}", lr=lr)
        for spec in timed(held, specs, cost, epochs_held)
        for lr in GRID
    ]
    path = arguments.out / f"{epochs:g}-epochs-of-rmsprop"
    run = race(held, every_rate, path, epochs=epochs_held, seeds=[TUNING_SEED])
    print(f"\n{epochs:g} epochs of RMSProp's time\n{'':42} {'lr':>6} {'step':>5} {'epochs':>7} {'loss':>7}")
    rows = []
    for spec in specs:
        own = {lr: run.of("eval", f"{spec.name}@{lr:g}", TUNING_SEED)[-1] for lr in GRID}
        ended = {lr: row for lr, row in own.items() if run.seeds(f"{spec.name}@{lr:g}")["done"]}
        score, lr = min(((row["score"] or math.inf, lr) for lr, row in ended.items()), default=(math.inf, 0.0))
        if score < math.inf:
            steps, relative = own[lr]["step"] / task.epoch, cost[spec.name] / cost[task.reference]
            rows.append((score, f"{spec.title:42} {lr:>6g} {relative:>5.2f} {steps:>7.2f} {score:>7.2f}"))
    print("\n".join(line for _, line in sorted(rows)))
    print("step: CPU time in steps of Adam")


if __name__ == "__main__":
    main()
