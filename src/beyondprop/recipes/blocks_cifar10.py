"""Modern nets on CIFAR-10 with whole blocks as stages: ResNet-20, a small conv net, a small transformer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from beyondprop.recipes._base import Context, Recipe, Row
from beyondprop.recipes._compared import at_epoch, compared, figure, summary
from beyondprop.settings import Settings

RULES = ("am-adam", "adam")
NETS = {  # with its name in rows, epochs, epochs of tuning, seeds, and the least lead that is asked for, in points
    "resnet20": ("ResNet-20, blocks as stages", 5.0, 0.5, (0, 1), -1.5),
    "conv:32x4:bn": ("4 convolutions with BatchNorm", 3.0, 0.5, (0, 1, 2), None),
    "transformer:64x4": ("transformer, 4 blocks of 64 features", 3.0, 0.5, (0, 1, 2), None),
}


def measure(context: Context) -> tuple[Sequence[Row], dict[str, Any]]:
    """Train every net by both rules on the same schedule."""
    rows, settings, runs = [], {}, []
    for net, (title, epochs, tune_epochs, seeds, asked) in NETS.items():
        quick = context.quick
        run = compared(
            context,
            net.partition(":")[0],
            Settings(
                data="cifar10",
                net=net,
                rules=RULES,
                epochs=0.005 if quick else epochs,
                tune_epochs=tune_epochs,
                batch_size=128,
                seeds=(0,) if quick else seeds,
                tune=not quick,
                alignment=False,
            ),
        )
        titles = {rule.name: rule.title for rule in run.rules}
        ours, theirs = (at_epoch(run, rule, run.config["epochs"]) for rule in RULES)
        after = f"after epoch {run.config['epochs']:g}"
        lead = tuple(a - b for a, b in zip(ours, theirs, strict=True))
        rows += [
            Row(f"{title}, {titles[RULES[0]]}, {after}", ours, "%"),
            Row(f"{title}, {titles[RULES[1]]}, {after}", theirs, "%"),
            Row(f"{title}, AM-Adam minus Adam, {after}", lead, "points", at_least=asked),
        ]
        settings[net] = summary(run)
        runs.append(run)
    figure(runs, context.out / "figure.png")
    return rows, settings


RECIPE = Recipe(
    title="Modern nets on CIFAR-10, blocks as stages",
    source="no published number: alternating minimization was published on LeNet-5 and smaller nets",
    about=(
        "Batch 128, no augmentation, linear decay; learning rates chosen on held-out training rows after half an epoch. A "
        "residual or attention block is one stage with one code at its output."
    ),
    measure=measure,
    minutes=300,
    needs=("cifar10",),
)
