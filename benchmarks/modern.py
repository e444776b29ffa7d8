"""Local optimization in modern nets: ResNet-20 on CIFAR-10, a character-level transformer on Python's documentation.

    python benchmarks/modern.py {resnet20,transformer} [--seeds 0 1 2] [--budget-epochs E] [--out DIR]

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
from race import Problem, contenders, costs, race, show, timed
from torch import Tensor, nn
from torch.nn import functional as F

from beyondprop import data
from beyondprop.lab import nets


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
        form="resnet20",
        build=partial(nets.build, "resnet20", cifar.input_shape, cifar.num_classes),
        criterion=nn.CrossEntropyLoss(),
        measure=error_rate,
        label="test error (%)",
        x_train=cifar.x_train,
        y_train=cifar.y_train,
        scored=(cifar.x_test, cifar.y_test),
        batch=128,
        held=len(cifar.x_train) // 10,
        points=5,  # 10,000 test images are much beside an epoch
        pacemaker="adamw-default",
        reference="adamw-default",
    )


def characters() -> Problem:
    """Return Python's documentation; its last tenth is scored."""
    codes, alphabet = transformer.documentation()
    cut = len(codes) * 9 // 10
    x, y = transformer.windows(codes[:cut])
    return Problem(
        name="documentation, transformer",
        form="transformer",
        build=partial(transformer.Transformer, alphabet),
        criterion=next_character,
        label="cross-entropy of the next character (nats)",
        x_train=x,
        y_train=y,
        scored=transformer.windows(codes[cut:]),
        batch=32,
        held=len(x) // 10,
        points=10,
        pacemaker="adamw-default",
        reference="adamw-default",
        sample="window",
    )


SHARED = ("adamw-default", "muon-inside", "locoprop-s-small", "projection-small")
PROBLEMS = {
    "resnet20": (resnet20, 1.0, (*SHARED, "nesterov-decayed")),
    "transformer": (characters, 2.0, (*SHARED, "locoprop-m-small")),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("problem", choices=list(PROBLEMS))
    parser.add_argument("--contenders", nargs="+", metavar="NAME")
    parser.add_argument("--budget-epochs", type=float, help="time of this many AdamW epochs")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: runs/PROBLEM")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    build, epochs, names = PROBLEMS[arguments.problem]
    epochs = arguments.budget_epochs or epochs
    task, out = build(), arguments.out or Path("runs") / arguments.problem
    specs = contenders(arguments.contenders or names, task)
    cost = costs(task, specs, out / "costs.json", arguments.rounds)
    path = out / f"{epochs:g}-epochs-of-adamw"
    run = race(task, timed(task, specs, cost, epochs), path, epochs=epochs, seeds=arguments.seeds, share=1 / 3)
    show(run, task, cost, f"{epochs:g} epochs of AdamW's time")


if __name__ == "__main__":
    main()
