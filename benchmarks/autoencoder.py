"""Race optimizers on a deep autoencoder of MNIST: LocoProp's and consequentialism's benchmark beside strong contenders.

    python benchmarks/autoencoder.py --budget-epochs 25 --tune --seeds 0 1 2 --out DIR

The network and its initialisation are LocoProp's published ones; the loss is the cross-entropy of a pixel in [0, 1], summed
over 784 pixels and averaged over the batch of 1000. Every contender has four learning rates: with `--tune` it gets the one
that is best on 10,000 held-out training images after a third of the budget (or `--tune-share`); `--lr` gives them by hand, and
what has none keeps its own. Final losses are over all 60,000 training images. A race that was stopped goes on by the same
command; contenders are all rules of contenders.py and of the package.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

import torch
from race import Problem, contenders, costs, race, show, timed

from beyondprop import data
from beyondprop.lab import nets
from beyondprop.lab.tasks.reconstruction import SummedCrossEntropy

VARIANTS = {"standard": "", "wide": ":wide", "deep": ":deep"}
EVERYONE = [
    *(
        "sgd-raced",
        "momentum",
        "nesterov",
        "adagrad",
        "rmsprop",
        "adam-raced",
        "adamw",
        "muon",
        "shampoo",
        "soap",
        "kfac",
    ),
    *("locoprop-m-raced", "locoprop-m-rows-raced", "locoprop-s-raced"),
    *("projection-momentum", "projection-nesterov", "projection-rmsprop", "projection-adam"),
]


def problem(dataset: str = "mnist", variant: str = "standard", activation: str = "tanh") -> Problem:
    """Return the problem of reconstructing a set's training images."""
    images = data.load(dataset, standardize=False).x_train.flatten(1)
    form = f"autoencoder{VARIANTS[variant]}:{activation}"
    return Problem(
        name=f"{dataset}, {variant}, {activation}",
        form=form,
        build=partial(nets.build, form, (784,), 784),
        criterion=SummedCrossEntropy(),
        x_train=images,
        y_train=images,
        label="training loss an image (nats)",
        reference="adam-raced",
        sample="image",
    )


def rate(text: str) -> tuple[str, float]:
    """Read `name=lr`."""
    name, _, value = text.partition("=")
    return name, float(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=["mnist", "fashion-mnist"], default="mnist")
    parser.add_argument("--variant", choices=list(VARIANTS), default="standard")
    parser.add_argument("--activation", choices=["tanh", "relu"], default="tanh")
    parser.add_argument("--contenders", nargs="+", default=EVERYONE, metavar="NAME")
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument(
        "--budget-epochs", type=float, default=25.0, help="time of this many RMSProp epochs (default: 25)"
    )
    budget.add_argument("--epochs", type=float, help="this many epochs, whatever they cost")
    parser.add_argument("--tune", action="store_true", help="choose learning rates on held-out training images")
    parser.add_argument(
        "--tune-share", type=float, default=1 / 3, metavar="SHARE", help="of the budget, for a tuning run"
    )
    parser.add_argument("--lr", nargs="+", type=rate, default=[], metavar="NAME=LR", help="learning rates by hand")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--times", action="store_true", help="measure step times, and stop")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of the measurement of step times")
    parser.add_argument("--out", type=Path, default=Path("runs/autoencoder"), metavar="DIR", help="of the race")
    arguments = parser.parse_args()

    torch.set_num_threads(1)
    task = problem(arguments.data, arguments.variant, arguments.activation)
    specs = contenders(arguments.contenders, task)
    cost = costs(task, specs, arguments.out / "costs.json", arguments.rounds)
    for spec in specs:
        print(f"  {spec.title:34} {cost[spec.name] / cost[task.reference]:.2f} steps of Adam")
    if arguments.times:
        return
    is_timed = arguments.epochs is None
    epochs = arguments.budget_epochs if is_timed else arguments.epochs
    run = race(
        task,
        timed(task, specs, cost if is_timed else dict.fromkeys(cost, 1.0), epochs),
        arguments.out / (f"{epochs:g}-epochs" + "-of-rmsprop" * is_timed),
        epochs=epochs,
        seeds=arguments.seeds,
        share=arguments.tune_share if arguments.tune else None,
        rates=dict(arguments.lr),
    )
    show(run, task, cost, f"{epochs:g} epochs" + " of RMSProp's time" * is_timed)


if __name__ == "__main__":
    main()
