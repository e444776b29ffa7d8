"""RevNet-38 in training: the angle between the reversible and the stored gradient, and both trainings side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from beyondprop.lab.recipes._base import Context, Recipe, Row
from beyondprop.lab.recipes._drawing import OURS, panels
from beyondprop.lab.recipes._revnet import REVERSIBLE, SHIFTED, SOURCE, STORED, draw, gaps, train

STEPS, EVERY = 60, 5
DOUBLE_STEPS = 10
QUICK = {"STEPS": 4, "EVERY": 2, "DOUBLE_STEPS": 2}


def measure(context: Context) -> tuple[Sequence[Row], dict[str, Any]]:
    """Train in both modes from the same weights on the same batches, in float32 and in float64."""
    steps, every, double_steps = QUICK.values() if context.quick else (STEPS, EVERY, DOUBLE_STEPS)
    single = {
        what: train(context, what, steps, every, angles=what == REVERSIBLE) for what in (REVERSIBLE, STORED, SHIFTED)
    }
    double = {what: train(context, what, double_steps, 1, torch.float64) for what in (REVERSIBLE, STORED)}
    angles = [row["angle"] for row in single[REVERSIBLE]]
    apart = {
        "float32, reversible and stored": (single[STORED], gaps(single[REVERSIBLE], single[STORED])),
        "float32, stored and stored from moved weights": (single[STORED], gaps(single[SHIFTED], single[STORED])),
        "float64, reversible and stored": (double[STORED], gaps(double[REVERSIBLE], double[STORED])),
    }
    rows = [
        Row(
            f"largest angle in {steps} steps",
            (max(angles),),
            "degrees",
            "below 1 (authors' test)",
            at_most=1.0,
            digits=5,
        ),
        Row("angle at the end", (angles[-1],), "degrees", digits=5),
    ]
    for label, (trained, found) in apart.items():
        most: dict[str, Any] = {"at_most": 1e-8, "digits": 16} if label.startswith("float64") else {"digits": 5}
        rows.append(
            Row(f"training loss, {label}: largest difference in {trained[-1]['step']} steps", (max(found),), **most)
        )
    _draw(context, single, apart)
    return rows, {"steps": steps}


def _draw(context: Context, single: dict[str, list[Any]], apart: dict[str, Any]) -> None:
    titles = [
        "angle of the gradients (degrees)",
        "loss on training batches, float32",
        "relative difference of that loss",
    ]
    with panels(context, 3, size=(12, 4.2), titles=titles, legend=3, xlabel="steps", whole_x=True) as axes:
        angle, loss, difference = axes[0]
        color, line = OURS
        rows = single[REVERSIBLE]
        angle.plot(
            [row["step"] for row in rows], [row["angle"] for row in rows], color=color, linestyle=line, marker="o"
        )
        angle.set_ylim(0)
        draw(loss, single)
        looks = (OURS, ("#777777", (0, (1.2, 1.2))), ("#009E73", "-."))
        for (label, (trained, values)), (color, line) in zip(apart.items(), looks, strict=True):
            steps = [row["step"] for row in trained if row.get("train_loss") is not None]
            if len(steps) == len(values):
                shown = [max(value, 1e-17) for value in values]  # what is equal has a place on the axis, too
                difference.plot(steps, shown, color=color, linestyle=line, marker="o", markersize=3.5, label=label)
        difference.set_yscale("log")


RECIPE = Recipe(
    title="RevNet-38 on CIFAR-10: the reversible gradient in training",
    source=f"{SOURCE}, section 4.3, and the authors' test of single variables",
    about=(
        "The first steps of the published training at its first rate, batch 100, with its augmentation and weight decay, from "
        "the same weights on the same batches: with activations computed again from each chain's output, and with all of them "
        "stored. At this rate training magnifies rounding: in float32 the losses part as they do between two stored trainings "
        "whose first weights differ in the last digit, in float64 they must coincide."
    ),
    measure=measure,
    minutes=15,
    needs=("cifar10",),
)
