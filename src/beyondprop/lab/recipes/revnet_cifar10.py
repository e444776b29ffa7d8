"""RevNet-38 against ResNet-32 on CIFAR-10 with the published schedule."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from beyondprop.lab.recipes import _revnet
from beyondprop.lab.recipes._base import Context, Recipe, Row
from beyondprop.lab.recipes._compared import at_epoch, compared, curves, summary, usual
from beyondprop.lab.recipes._drawing import OURS, THEIRS, panels
from beyondprop.lab.report._curves import draw_band
from beyondprop.lab.runs.recorded import Run

REVNET, RESNET = "revnet38", "resnet32:preact"
EPOCHS = 160.0
"""80,000 steps of 100 rows; a tenth of the rate from step 40,000 and from 60,000 on."""
QUICK_STEPS = 4
PUBLISHED = {REVNET: "7.24; 6.86 (run again by MemCNN)", RESNET: "7.14; 7.26 (run again by MemCNN)"}
TITLES = {REVNET: "RevNet-38", RESNET: "ResNet-32"}


def measure(context: Context) -> tuple[Sequence[Row], dict[str, Any]]:
    """Train both nets; in the short version RevNet-38 reversible and stored, whose curves coincide."""
    if context.quick:
        return _short(context)
    own: dict[str, Any] = {
        "task": _revnet.TASK,
        "nets": tuple(TITLES),
        "rules": (_revnet.RULE,),
        "lr": {_revnet.RULE: _revnet.RATE},
        "schedule": "tenth:0.5,0.75",
        "batch_size": _revnet.BATCH,
        "tune": False,
    }
    run = compared(context, "schedule", usual(context, seeds=1, epochs=EPOCHS, **own))
    errors = {net: tuple(100 - a for a in at_epoch(run, f"{_revnet.RULE} {net}", EPOCHS)) for net in TITLES}
    rows = [
        Row(f"{title}, test error after epoch {EPOCHS:g}", errors[net], "%", PUBLISHED[net], at_most=8.0)
        for net, title in TITLES.items()
    ]
    lead = Row.lead(
        "RevNet-38 minus ResNet-32, error", errors[REVNET], errors[RESNET], published="0.10; -0.40", at_most=0.6
    )
    _draw(context, run)
    return [*rows, lead], {"schedule": summary(run)}


def _draw(context: Context, run: Run) -> None:
    with panels(context, size=(6, 4), legend=-1, xlabel="epochs", ylabel="test error (%)") as axes:
        for net, (color, line) in zip(TITLES, (OURS, THEIRS), strict=True):
            seeds = curves(run, f"{_revnet.RULE} {net}", start=100.0, scale=-100.0)
            draw_band(axes[0, 0], seeds, color=color, linestyle=line, label=TITLES[net])
        axes[0, 0].set_ylim(0, 60)


def _short(context: Context) -> tuple[Sequence[Row], dict[str, Any]]:
    found = {
        what: _revnet.train(context, what, QUICK_STEPS, 1, torch.float64)
        for what in (_revnet.REVERSIBLE, _revnet.STORED)
    }
    titles = ["loss on training batches", "loss on 500 test rows"]
    with panels(context, 2, size=(8.4, 3.8), titles=titles, legend=-1, xlabel="steps", whole_x=True) as axes:
        for axis, key in zip(axes[0], ("train_loss", "loss"), strict=True):
            _revnet.draw(axis, found, key)
    rows = [
        Row(f"RevNet-38, {what}: training loss at step {rows[-1]['step']}", (rows[-1]["train_loss"],), digits=10)
        for what, rows in found.items()
    ]
    return [
        *rows,
        Row(
            "largest relative difference",
            (max(_revnet.gaps(found[_revnet.REVERSIBLE], found[_revnet.STORED])),),
            digits=16,
        ),
    ], {}


RECIPE = Recipe(
    title="RevNet-38 and ResNet-32 on CIFAR-10",
    source=f"{_revnet.SOURCE}, Table 3",
    about=(
        "As published: batch 100, 80,000 steps, momentum 0.9, rate 0.1, 0.01 and 0.001, weight decay 2e-4 on convolutions and "
        "the last layer, images less the mean image (of the training rows alone), random crops from a frame of 2, mirroring, "
        "one seed. On a CPU that takes days. The short version is another thing: RevNet-38 for a few steps in float64, once "
        "reversible and once stored, whose losses coincide; `revnet-angle` has that, too, and judges it."
    ),
    measure=measure,
    minutes=9000,
    needs=("cifar10",),
)
