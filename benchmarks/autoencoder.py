"""Race optimizers on a deep autoencoder of MNIST: LocoProp's and consequentialism's benchmark beside strong contenders.

    python benchmarks/autoencoder.py --budget-epochs 25 --tune --seeds 0 1 2 --out FILE.jsonl --figure FILE.png

The network and its initialisation are LocoProp's published ones; the loss is the cross-entropy of a pixel in [0, 1], summed
over 784 pixels and averaged over the batch of 1000. Every contender has four learning rates: with `--tune` it gets the one
that is best on 10,000 held-out training images after a third of the budget (or `--tune-share`); `--lr` gives them by hand.
Finished runs are in the file of results, and are not done again. Final losses are over all 60,000 training images.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

import models
import torch
from contenders import CONTENDERS, MODERN, missing
from race import Problem, Results, figure, race, table, tune
from torch import Tensor
from torch.nn import functional as F

from beyondprop import data


def cross_entropy(logits: Tensor, images: Tensor) -> Tensor:
    """Return the binary cross-entropy of images in [0, 1], summed over pixels, averaged over the batch."""
    return F.binary_cross_entropy_with_logits(logits, images, reduction="sum") / len(images)


def problem(dataset: str, variant: str, activation: str) -> Problem:
    """Return the problem of reconstructing a set's training images."""
    width, depth = models.VARIANTS[variant]
    images = data.load(dataset, standardize=False).x_train.flatten(1)
    return Problem(
        name=f"{dataset}, {variant}, {activation}",
        build=partial(models.autoencoder, width, depth, activation),
        loss=cross_entropy,
        x=images,
        y=images,
        label="training loss per image (nats)",
        reference="adam",
    )


def rate(text: str) -> tuple[str, float]:
    """Read `name=lr`."""
    name, _, value = text.partition("=")
    if name not in CONTENDERS:
        raise argparse.ArgumentTypeError(f"{name!r} is no contender; there are {', '.join(CONTENDERS)}")
    return name, float(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=["mnist", "fashion-mnist"], default="mnist")
    parser.add_argument("--variant", choices=list(models.VARIANTS), default="standard")
    parser.add_argument("--activation", choices=list(models.ACTIVATIONS), default="tanh")
    everyone = [name for name in CONTENDERS if name not in MODERN]
    parser.add_argument("--contenders", nargs="+", choices=list(CONTENDERS), default=everyone, metavar="NAME")
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument("--budget-epochs", type=float, help="time of this many RMSProp epochs (default: 25)")
    budget.add_argument("--epochs", type=float, help="this many epochs, whatever they cost")
    parser.add_argument("--tune", action="store_true", help="choose learning rates on held-out training images")
    parser.add_argument(
        "--tune-share", type=float, default=1 / 3, metavar="SHARE", help="of the budget, for a tuning run"
    )
    parser.add_argument("--lr", nargs="+", type=rate, default=[], metavar="NAME=LR", help="learning rates by hand")
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--times", action="store_true", help="measure step times, and stop")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of the measurement of step times")
    parser.add_argument("--out", type=Path, default=Path("autoencoder.jsonl"))
    parser.add_argument("--figure", type=Path)
    parser.add_argument("--limits", nargs=2, type=float, default=(55.0, 250.0), help="of the figure's losses")
    arguments = parser.parse_args()

    torch.set_num_threads(1)
    names = []
    for name in arguments.contenders:
        if line := missing(name):
            print(f"skipping {name}: {line}")
        else:
            names.append(name)
    timed = arguments.epochs is None
    epochs = arguments.epochs or arguments.budget_epochs or 25.0
    task = problem(arguments.data, arguments.variant, arguments.activation)
    results = Results(arguments.out)

    costs = results.costs(task, names, arguments.rounds)
    for name in names:
        print(f"  {CONTENDERS[name].title:34} {costs[name] / costs['adam']:.2f} steps of Adam")
    if arguments.times:
        return
    rates = dict(arguments.lr)
    if arguments.tune:
        unrated = [name for name in names if name not in rates]
        rates |= tune(results, task, unrated, epochs=epochs, timed=timed, share=arguments.tune_share)
    unrated = [name for name in names if name not in rates]
    if unrated and not arguments.tune:
        parser.error(f"learning rates of {', '.join(unrated)}: give --tune, or --lr NAME=LR")
    rates = {name: rates[name] for name in names if name in rates}
    runs = race(results, task, rates, epochs=epochs, timed=timed, seeds=arguments.seeds)
    title = f"{task.name}: {epochs:g} epochs" + (f" of {CONTENDERS['rmsprop'].title}'s time" if timed else "")
    if runs:
        print(f"\n{title}\n{table(runs, costs, task)}")
        if arguments.figure:
            figure(runs, arguments.figure, title, tuple(arguments.limits), task)


if __name__ == "__main__":
    main()
