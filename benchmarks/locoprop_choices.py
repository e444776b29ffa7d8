"""Which of LocoProp's settings pay: one is changed at a time, at equal CPU time, on the deep autoencoder of MNIST.

    python benchmarks/locoprop_choices.py [--budget-epochs 5] [--out FILE.jsonl]

Every variant has four learning rates and the CPU time of the same number of RMSProp's epochs, on 50,000 training images; the
loss is that of the other 10,000. One seed: differences below half a nat are noise.
"""

from __future__ import annotations

import argparse
import math
from functools import partial
from pathlib import Path
from typing import Any

import torch
from autoencoder import problem
from contenders import CONTENDERS, Contender
from race import Results, tune

from beyondprop import LocoProp

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
    "T = 3 inside, 9 at both ends": {"layers": {f"{k}": {"local_steps": 3} for k in (2, 4, 6, 7, 9, 11)}},
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


def build(settings: dict[str, Any], model: torch.nn.Module, lr: float) -> tuple[torch.optim.Optimizer, None]:
    """Return LocoProp with some settings changed."""
    return LocoProp(model, lr=lr, **BASE | settings), None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget-epochs", type=float, default=5.0, help="time of this many RMSProp epochs")
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS), metavar="NAME")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("locoprop_choices.jsonl"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for name in arguments.variants:
        CONTENDERS[name] = Contender(
            name, "beyondprop", partial(build, VARIANTS[name]), (1e-5, 2e-5, 5e-5, 1e-4), "locoprop"
        )
    task, results = problem("mnist", "standard", "tanh"), Results(arguments.out)
    costs = results.costs(task, arguments.variants, arguments.rounds)
    tune(results, task, arguments.variants, epochs=arguments.budget_epochs, timed=True, share=1.0)
    print(
        f"\n{arguments.budget_epochs:g} epochs of RMSProp's time\n{'':42} {'lr':>6} {'step':>5} {'epochs':>7} {'loss':>7}"
    )
    rows = []
    for name in arguments.variants:
        runs = results.find(kind="run", contender=name, budget=f"{arguments.budget_epochs:g} pacemaker epochs")
        best = min(runs, key=lambda run: math.inf if run["final"] is None else run["final"])
        if best["final"] is not None:
            line = f"{name:42} {best['lr']:>6g} {costs[name] / costs['adam']:>5.2f} {best['epochs']:>7.2f}"
            rows.append((best["final"], f"{line} {best['final']:>7.2f}"))
    print("\n".join(line for _, line in sorted(rows)))
    print("step: CPU time in steps of Adam")


if __name__ == "__main__":
    main()
