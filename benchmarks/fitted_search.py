"""The fitted line search of alternating minimization beside the exact one and plain gradient codes, on MNIST.

    BEYONDPROP_DATA=... python benchmarks/fitted_search.py [--rows 100x2 ...] [--out DIR] [--text FILE]

Every contender gets the same grid of learning rates, tuned with one seed on held-out training rows; then five seeds train
with the chosen rate, decayed linearly to 0. Test rows decide nothing. A row is a run directory, and goes on where it stopped.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from statistics import fmean

from race import recorded
from torch import nn

from beyondprop import AltMin
from beyondprop.lab import RuleSpec, Settings
from beyondprop.lab.built_in import nesterov
from beyondprop.optim.factories import adam
from beyondprop.solvers import Memory
from beyondprop.stages import LossFunction


def memory(lr: float) -> Memory:
    """Return damped recursive least squares."""
    return Memory(lr=lr)


SOLVERS = ("fitted", "line_search", "gradient")
WEIGHTS = {
    "Adam": (adam, (1e-3, 3e-3, 8e-3)),
    "SGD": (nesterov, (0.01, 0.03, 0.1)),
    "memory": (memory, (0.5, 1.0, 2.0)),
}
# The net, batch size, epochs, what steps the weights.
ROWS = {
    "100x2": ("mlp:100x2", 200, 5.0, "Adam"),
    "500x2": ("mlp:500x2", 200, 2.0, "Adam"),
    "100x8": ("mlp:100x8", 200, 2.0, "Adam"),
    "lenet5": ("lenet5", 200, 1.0, "Adam"),
    "small-batch": ("mlp:100x2", 20, 1.0, "Adam"),
    "sgd": ("mlp:100x2", 200, 2.0, "SGD"),
    "memory": ("mlp:100x2", 200, 1.0, "memory"),
}
SEEDS, TUNING_SEED = (0, 1, 2, 3, 4), 100


def build(model: nn.Module, loss: LossFunction, lr: float, *, weights: str, solver: str) -> AltMin:
    """Return the rule."""
    return AltMin(model, loss, WEIGHTS[weights][0](lr), code_solver=solver)


def compared(row: str, path: Path) -> str:
    """Tune, train over the seeds, and return a line of test accuracies in percent."""
    net, batch, epochs, weights = ROWS[row]
    grid = WEIGHTS[weights][1]
    rules = [
        RuleSpec(solver, solver, "", "", partial(build, weights=weights, solver=solver), grid[1], grid)
        for solver in SOLVERS
    ]
    settings = Settings(
        data="mnist",
        nets=(net,),
        rules=SOLVERS,
        epochs=epochs,
        seeds=SEEDS,
        batch_size=batch,
        tune=True,
        tune_seeds=(TUNING_SEED,),
        evaluate_every=10**9,
        alignment=False,
        device="cpu",
        schedule="linear",
    )
    run = recorded(settings, path, rules=rules)
    parts = []
    for one in run.contenders:
        found = [100 * run.of("eval", one.name, seed)[-1]["accuracy"] for seed in SEEDS]
        spread = f"{min(found):.2f} to {max(found):.2f}"
        parts.append(f"{one.name} {fmean(found):.2f} ({spread}) at {one.settings['lr']:g}")
    return f"{row}: {net}, batch {batch}, {epochs:g} epochs, {weights}: " + "; ".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--out", type=Path, default=Path("fitted_search"))
    parser.add_argument("--text", type=Path)
    arguments = parser.parse_args()
    lines = []
    for row in arguments.rows:
        lines.append(compared(row, arguments.out / row))
        print(lines[-1], flush=True)
    if arguments.text is not None:
        arguments.text.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
