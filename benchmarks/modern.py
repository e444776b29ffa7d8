"""Local optimization in modern nets: ResNet-20 on CIFAR-10, a character-level transformer on Python's documentation.

    python benchmarks/modern.py {resnet20,transformer} [--seeds 0 1 2] [--budget-epochs E] [--out FILE.jsonl] [--figure FILE]

Every contender has four learning rates, chosen on held-out training rows after a third of the budget, and the CPU time of the
same number of AdamW's epochs; curves and finals are the error rate (ResNet) or the cross-entropy of the next character in nats
(transformer) on test rows. No augmentation; 5 % warm-up, then linear decay.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

import torch
import transformer
from contenders import CONTENDERS
from race import Problem, Results, figure, race, table, tune
from torch import Tensor, nn
from torch.nn import functional as F

from beyondprop import data
from beyondprop.lab import nets

NAMES = {
    "resnet20": ["adamw-default", "nesterov-decayed", "muon-inside", "locoprop-s-small", "projection-small"],
    "transformer": ["adamw-default", "muon-inside", "locoprop-m-small", "locoprop-s-small", "projection-small"],
}


def error_rate(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the share of wrong classes in percent."""
    return 100 * (logits.argmax(1) != labels).double().mean()


def next_character(logits: Tensor, codes: Tensor) -> Tensor:
    """Return the cross-entropy of the next character."""
    return F.cross_entropy(logits.flatten(0, 1), codes.flatten())


def resnet20() -> Problem:
    """Return CIFAR-10, with test images to score on."""
    cifar = data.load("cifar10")
    return Problem(
        name="cifar10, resnet20",
        build=partial(nets.build, "resnet20", cifar.input_shape, cifar.num_classes),
        loss=nn.CrossEntropyLoss(),
        measure=error_rate,
        label="test error (%)",
        x=cifar.x_train,
        y=cifar.y_train,
        scored=(cifar.x_test, cifar.y_test),
        batch=128,
        curve_rows=1000,
        pacemaker="adamw-default",
    )


def characters() -> Problem:
    """Return Python's documentation; its last tenth is scored."""
    codes, alphabet = transformer.documentation()
    cut = len(codes) * 9 // 10
    x, y = transformer.windows(codes[:cut])
    return Problem(
        name="documentation, transformer",
        build=partial(transformer.Transformer, alphabet),
        loss=next_character,
        measure=next_character,
        label="cross-entropy of the next character (nats)",
        x=x,
        y=y,
        scored=transformer.windows(codes[cut:]),
        batch=32,
        curve_rows=250,
        pacemaker="adamw-default",
    )


PROBLEMS = {"resnet20": (resnet20, 1.0, (40.0, 80.0)), "transformer": (characters, 2.0, (1.5, 3.5))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("problem", choices=list(PROBLEMS))
    parser.add_argument("--contenders", nargs="+", choices=list(CONTENDERS), metavar="NAME")
    parser.add_argument("--budget-epochs", type=float, help="time of this many AdamW epochs")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("modern.jsonl"))
    parser.add_argument("--figure", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    build, epochs, limits = PROBLEMS[arguments.problem]
    epochs = arguments.budget_epochs or epochs
    task, results = build(), Results(arguments.out)
    names = arguments.contenders or NAMES[arguments.problem]
    costs = results.costs(task, names, arguments.rounds)
    rates = tune(results, task, names, epochs=epochs, timed=True, held_out=len(task.x) // 10)
    runs = race(results, task, rates, epochs=epochs, timed=True, seeds=arguments.seeds)
    title = f"{task.name}: {epochs:g} epochs of AdamW's time"
    print(f"\n{title}\n{table(runs, costs, task)}")
    if arguments.figure:
        figure(runs, arguments.figure, title, limits, task)


if __name__ == "__main__":
    main()
