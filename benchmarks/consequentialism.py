"""The claims of the consequentialism paper on its kind of data: projection in front of SGD, NAG, RMSProp and Adam.

    python benchmarks/consequentialism.py [--tasks mnist fashion-mnist cifar10] [--seeds 0 1 2] [--out FILE.jsonl]

Paeedeh & Ghiasi-Shirazi (2021) claim that the amended update works with all four, needs fewer iterations, depends less on the
learning rate, and needs momentum less. Every optimizer runs with and without projection at the same five learning rates, half a
decade apart, constant during a run, each pair around its own middle; all seeds at all rates. Printed are the training loss and
test accuracy at the rate with the least training loss, how many of the five rates come within 1.5 times of it, and CPU time.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import nn

from beyondprop import AffineProjection, Backprop, NonFiniteError, data
from beyondprop.lab import nets
from beyondprop.lab.training import fit

TASKS = {"mnist": ("mlp:100x2", 2.0), "fashion-mnist": ("mlp:100x2", 2.0), "cifar10": ("lenet5", 1.0)}
BATCH = 100
STEPS = tuple(10 ** (k / 2) for k in range(-2, 3))  # around the middle

Build = Callable[..., torch.optim.Optimizer]
OPTIMIZERS: dict[str, tuple[Build, float, float]] = {  # with the middle of the rates, without and with projection
    "SGD": (torch.optim.SGD, 0.1, 1.0),
    "NAG": (partial(torch.optim.SGD, momentum=0.9, nesterov=True), 0.03, 0.3),
    "RMSProp": (torch.optim.RMSprop, 1e-3, 1e-3),
    "Adam": (torch.optim.Adam, 1e-3, 1e-3),
}


def run(dataset: data.Dataset, task: str, name: str, projected: bool, lr: float, seed: int) -> dict[str, Any]:
    """Train once; return the record."""
    net, epochs = TASKS[task]
    torch.manual_seed(seed)
    model = nets.build(net, dataset.input_shape, dataset.num_classes)
    optimizer = OPTIMIZERS[name][0](model.parameters(), lr=lr)
    preconditioner = AffineProjection(model) if projected else None
    rule = Backprop(model, nn.CrossEntropyLoss(), optimizer, preconditioner=preconditioner)
    record: dict[str, Any] = {"task": task, "optimizer": name, "projected": projected, "lr": lr, "seed": seed}
    start = time.process_time()
    steps = math.ceil(len(dataset.x_train) / BATCH)
    try:
        history = fit(
            rule, dataset, epochs=epochs, batch_size=BATCH, seed=seed, schedule="constant", evaluate_every=steps // 4
        )
    except NonFiniteError:
        return record | {"loss": None, "accuracy": None, "curve": [], "seconds": None}
    rows = history.evaluations
    return record | {
        "loss": rows[-1]["train_loss"],
        "accuracy": 100 * rows[-1]["accuracy"],
        "curve": [[row["step"], row["train_loss"], 100 * row["accuracy"]] for row in rows if row["step"]],
        "seconds": time.process_time() - start,
    }


def rates(name: str, projected: bool) -> list[float]:
    """Return the five learning rates."""
    _, plain, with_projection = OPTIMIZERS[name]
    middle = with_projection if projected else plain
    return [float(f"{middle * step:.3g}") for step in STEPS]


def summary(records: list[dict[str, Any]], task: str) -> str:
    """Return a text table of a task."""
    lines = [f"{task}: {TASKS[task][0]}, {TASKS[task][1]:g} epochs of batch {BATCH}"]
    lines.append(
        f"  {'':22} {'lr':>8} {'training loss':>24} {'test accuracy, %':>26} {'rates within 1.5x':>18} {'CPU s':>6}"
    )
    for name, projected in product(OPTIMIZERS, (False, True)):
        own = [r for r in records if (r["task"], r["optimizer"], r["projected"]) == (task, name, projected)]
        by_rate = {lr: [r for r in own if r["lr"] == lr] for lr in rates(name, projected)}
        by_rate = {lr: rows for lr, rows in by_rate.items() if rows}
        means = {
            lr: math.inf if any(r["loss"] is None for r in rows) else statistics.mean(r["loss"] for r in rows)
            for lr, rows in by_rate.items()
        }
        if not means or min(means.values()) == math.inf:
            continue
        best = min(means, key=lambda lr: means[lr])
        near = sum(mean <= 1.5 * means[best] for mean in means.values())
        losses, accuracies = ([r[key] for r in by_rate[best]] for key in ("loss", "accuracy"))
        lines.append(
            f"  {name + (' + projection' if projected else ''):22} {best:>8g} "
            f"{statistics.mean(losses):>8.4f} ({min(losses):.4f} to {max(losses):.4f}) "
            f"{statistics.mean(accuracies):>8.2f} ({min(accuracies):.2f} to {max(accuracies):.2f}) "
            f"{near:>13} of {len(means)} {statistics.median(r['seconds'] for r in by_rate[best]):>6.1f}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("consequentialism.jsonl"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    records = [json.loads(line) for line in arguments.out.read_text().splitlines()] if arguments.out.exists() else []
    done = {(r["task"], r["optimizer"], r["projected"], r["lr"], r["seed"]) for r in records}
    for task in arguments.tasks:
        dataset = data.load(task)
        for seed, name, projected in product(arguments.seeds, OPTIMIZERS, (False, True)):
            for lr in rates(name, projected):
                if (task, name, projected, lr, seed) in done:
                    continue
                records.append(run(dataset, task, name, projected, lr, seed))
                with arguments.out.open("a") as file:
                    file.write(json.dumps(records[-1]) + "\n")
        print(summary(records, task), flush=True)


if __name__ == "__main__":
    main()
