"""Alternating minimization on MNIST beside backpropagation: accuracy, depth, first batches, and whether every stage trains.

    BEYONDPROP_DATA=... python benchmarks/altmin_mnist.py [--rows accuracy depth8 ...] [--json FILE]

Every contender gets the same grid of learning rates, tuned with one seed on 10,000 of the training rows that are held out;
then three seeds train on all 60,000 with the chosen rate, decayed linearly to 0. Test rows decide nothing.
"""

from __future__ import annotations

import argparse
import json
import math
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import nn

from beyondprop import AltMin, Backprop, LearningRule, Memory, NonFiniteError, data
from beyondprop.lab import nets
from beyondprop.lab.training import fit
from beyondprop.optim.factories import adam

BATCH = 200
ADAM_GRID = (1e-3, 2e-3, 3e-3, 5e-3, 8e-3)
MEMORY_GRID = (0.5, 1.0, 2.0, 4.0)
SEEDS = (0, 1, 2)

Make = Callable[[nn.Module, float], LearningRule]
CONTENDERS: dict[str, tuple[Make, tuple[float, ...]]] = {
    "AM-Adam": (lambda model, lr: AltMin(model, nn.CrossEntropyLoss(), adam(lr)), ADAM_GRID),
    "Adam": (lambda model, lr: Backprop(model, nn.CrossEntropyLoss(), adam(lr)), ADAM_GRID),
    "AM-mem (RLS)": (lambda model, lr: AltMin(model, nn.CrossEntropyLoss(), Memory(lr=lr)), MEMORY_GRID),
}


def build(net: str, make: Make, lr: float, seed: int) -> LearningRule:
    """Return a rule on a freshly drawn network; a name with `@torch` keeps torch's own default initialisation."""
    torch.manual_seed(seed)
    name, _, initialisation = net.partition("@")
    model = nets.build(name, (1, 28, 28), 10)
    if initialisation:
        for module in model.children():
            if isinstance(module, nn.Linear):
                module.reset_parameters()
    return make(model, lr)


def train(dataset: data.Dataset, rule: LearningRule, epochs: float, seed: int, every: int | None = None) -> list[dict]:
    """Train and return the evaluations."""
    history = fit(rule, dataset, epochs=epochs, batch_size=BATCH, seed=seed, evaluate_every=every)
    return history.evaluations


def tuned(dataset: data.Dataset, net: str, epochs: float, names: list[str]) -> dict[str, float]:
    """Return every contender's best learning rate on held-out training rows."""
    held_out = dataset.split_validation(10_000, generator=torch.Generator().manual_seed(0))
    best = {}
    for name in names:
        make, grid = CONTENDERS[name]
        scores = {}
        for lr in grid:
            try:
                rows = train(held_out, build(net, make, lr, seed=100), epochs, seed=100, every=10**9)
            except NonFiniteError:
                scores[lr] = 0.0  # diverged
            else:
                scores[lr] = rows[-1]["accuracy"]
        best[name] = max(scores, key=lambda lr: scores[lr])
        print(f"  tuned {name}: " + ", ".join(f"{lr:g}: {100 * v:.2f}" for lr, v in scores.items()), flush=True)
    return best


def accuracy(dataset: data.Dataset, net: str, epochs: float, names: list[str], every: int | None = None) -> dict:
    """Tune, train over the seeds, print and return test accuracies in percent."""
    print(f"\n{net}, {epochs:.3g} epochs of batch {BATCH}")
    rates = tuned(dataset, net, epochs, names)
    results: dict = {"net": net, "epochs": epochs}
    for name in names:
        finals, curves = [], []
        for seed in SEEDS:
            rows = train(dataset, build(net, CONTENDERS[name][0], rates[name], seed), epochs, seed, every or 10**9)
            finals.append(100 * rows[-1]["accuracy"])
            curves.append({row["step"]: round(100 * row["accuracy"], 2) for row in rows})
        mean = sum(finals) / len(finals)
        print(f"  {name:14} lr {rates[name]:<6g} {mean:.2f} %  ({min(finals):.2f} to {max(finals):.2f})", flush=True)
        results[name] = {"lr": rates[name], "finals": finals, "mean": mean, "curves": curves if every else None}
    return results


def first_batches(dataset: data.Dataset) -> dict:
    """Return the results of one epoch of AM-mem and Adam, test accuracy after every 10 batches printed at a few of them."""
    results = accuracy(dataset, "mlp:100x2", 1.0, ["AM-mem (RLS)", "AM-Adam", "Adam"], every=10)
    for name in ("AM-mem (RLS)", "AM-Adam", "Adam"):
        curves = results[name]["curves"]
        shown = [f"{k}: {sum(c[k] for c in curves) / len(curves):.1f}" for k in (10, 20, 50, 100, 300)]
        print(f"  {name:14} after batches " + ", ".join(shown))
    return results


def stages(dataset: data.Dataset) -> dict:
    """Return every stage's relative weight change after 300 steps, by depth; prints the least and the most mobile."""
    print("\nrelative weight change of every stage after 300 steps, AM-Adam lr 0.002")
    results = {}
    for depth in (2, 4, 8, 12, 16):
        rule = build(f"mlp:100x{depth}", CONTENDERS["AM-Adam"][0], 2e-3, seed=0)
        before = {n: torch.cat([p.detach().flatten() for p in ps]).clone() for n, ps in rule.stage_parameters().items()}
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            train(dataset, rule, 1.0, seed=0, every=10**9)
        change = {}
        for name, parameters in rule.stage_parameters().items():
            now = torch.cat([p.detach().flatten() for p in parameters])
            change[name] = float((now - before[name]).norm() / before[name].norm())
        results[depth] = change
        print(f"  depth {depth:2}: least {min(change.values()):.3f}, most {max(change.values()):.3f}", flush=True)
    return results


ROWS: dict[str, Callable[[data.Dataset], dict]] = {
    "accuracy": partial(accuracy, net="mlp:100x2", epochs=5.0, names=["AM-Adam", "Adam"]),
    "depth8": partial(accuracy, net="mlp:100x8", epochs=1.0, names=["AM-Adam", "Adam"]),  # 300 steps
    "depth16": partial(accuracy, net="mlp:100x16", epochs=1.0, names=["AM-Adam", "Adam"]),
    "stages": stages,
    "depth8@torch": partial(accuracy, net="mlp:100x8@torch", epochs=1.0, names=["AM-Adam", "Adam"]),
    "depth16@torch": partial(accuracy, net="mlp:100x16@torch", epochs=1.0, names=["AM-Adam", "Adam"]),
    "memory": first_batches,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    dataset = data.load("mnist")
    assert math.ceil(len(dataset.x_train) / BATCH) == 300
    results = {}
    for row in arguments.rows:
        results[row] = ROWS[row](dataset)
        if arguments.json:
            arguments.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
