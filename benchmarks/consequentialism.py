"""The claims of the consequentialism paper on its kind of data: projection in front of SGD, NAG, RMSProp and Adam.

    python benchmarks/consequentialism.py [--tasks mnist fashion-mnist cifar10] [--seeds 0 1 2] [--out DIR]

Paeedeh & Ghiasi-Shirazi (2021) claim that the amended update works with all four, needs fewer iterations, depends less on the
learning rate, and needs momentum less. Every optimizer runs with and without projection at the same five learning rates, half a
decade apart, constant during a run, each pair around its own middle; all seeds at all rates. Printed are the training loss and
test accuracy at the rate with the least training loss, how many of the five rates come within 1.5 times of it, and the seconds
of training. Each task is a run directory, and goes on where it was stopped.

Older results, `results/consequentialism.jsonl`, have a JSON line a training: `loss` and `accuracy` (in percent) at its end,
`curve` of `[step, loss, accuracy]`, CPU `seconds` with evaluations; null where it failed.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path

import torch
from race import recorded
from torch import nn

from beyondprop import AffineProjection, Backprop
from beyondprop.lab import RuleSpec, Settings, tasks
from beyondprop.lab.report import Run
from beyondprop.stages.losses import LossFunction

TASKS = {"mnist": ("mlp:100x2", 2.0), "fashion-mnist": ("mlp:100x2", 2.0), "cifar10": ("lenet5", 1.0)}
BATCH = 100
STEPS = tuple(10 ** (k / 2) for k in range(-2, 3))  # around the middle

Make = Callable[..., torch.optim.Optimizer]
OPTIMIZERS: dict[str, tuple[Make, float, float]] = {  # with the middle of the rates, without and with projection
    "SGD": (torch.optim.SGD, 0.1, 1.0),
    "NAG": (partial(torch.optim.SGD, momentum=0.9, nesterov=True), 0.03, 0.3),
    "RMSProp": (torch.optim.RMSprop, 1e-3, 1e-3),
    "Adam": (torch.optim.Adam, 1e-3, 1e-3),
}


def contender(name: str, projected: bool) -> list[RuleSpec]:
    """Return an optimizer with or without projection, one rule for each of its learning rates."""
    make, plain, with_projection = OPTIMIZERS[name]

    def build(model: nn.Module, loss: LossFunction, lr: float) -> Backprop:
        optimizer = make(model.parameters(), lr=lr)
        return Backprop(model, loss, optimizer, preconditioner=AffineProjection(model) if projected else None)

    rates = [float(f"{(with_projection if projected else plain) * step:.3g}") for step in STEPS]
    title = name + " + projection" * projected
    return [RuleSpec(f"{title.replace(' ', '')}@{lr:g}", f"{title}, {lr:g}", "", "", build, lr, (lr,)) for lr in rates]


def compared(name: str, seeds: tuple[int, ...], path: Path) -> Run:
    """Train everything on a task, or what is left of it."""
    net, epochs = TASKS[name]
    task = tasks.load(name)
    specs = [spec for one in product(OPTIMIZERS, (False, True)) for spec in contender(*one)]
    settings = Settings(
        data=name,
        nets=(net,),
        rules=tuple(spec.name for spec in specs),
        epochs=epochs,
        seeds=seeds,
        batch_size=BATCH,
        schedule="constant",
        evaluate_every=math.ceil(len(task.x_train) / BATCH) // 4,
        alignment=False,
        device="cpu",
    )
    return recorded(settings, path, task=task, rules=specs)


def summary(run: Run, task: str) -> str:
    """Return a text table of a task."""
    lines = [f"{task}: {TASKS[task][0]}, {TASKS[task][1]:g} epochs of batch {BATCH}"]
    lines.append(
        f"  {'':22} {'lr':>8} {'training loss':>24} {'test accuracy, %':>26} {'rates within 1.5x':>18} {'s':>6}"
    )
    for name, projected in product(OPTIMIZERS, (False, True)):
        specs = contender(name, projected)
        means: dict[str, float] = {}
        for spec in specs:
            ended = run.seeds(spec.name)
            losses = [run.of("eval", spec.name, seed)[-1]["train_loss"] for seed in ended["done"]]
            means[spec.name] = math.inf if ended["failed"] or None in losses else statistics.fmean(losses)
        best = min(specs, key=lambda spec: means[spec.name])
        if means[best.name] == math.inf:
            continue
        near = sum(mean <= 1.5 * means[best.name] for mean in means.values())
        rows = [run.of("eval", best.name, seed)[-1] for seed in run.seeds(best.name)["done"]]
        losses, accuracies = [row["train_loss"] for row in rows], [100 * row["accuracy"] for row in rows]
        lines.append(
            f"  {best.title.partition(',')[0]:22} {best.lr:>8g} "
            f"{statistics.mean(losses):>8.4f} ({min(losses):.4f} to {max(losses):.4f}) "
            f"{statistics.mean(accuracies):>8.2f} ({min(accuracies):.2f} to {max(accuracies):.2f}) "
            f"{near:>13} of {len(means)} {statistics.median(row['seconds'] for row in rows):>6.1f}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("runs/consequentialism"), metavar="DIR")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for task in arguments.tasks:
        print(summary(compared(task, tuple(arguments.seeds), arguments.out / task), task), flush=True)


if __name__ == "__main__":
    main()
