"""Difference target propagation through signs on MNIST: the published settings, and how fast they learn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from beyondprop import data
from beyondprop.lab import tasks
from beyondprop.lab.recipes._base import Context, Recipe, Row
from beyondprop.lab.recipes._compared import at_epoch, compared, curves, first_rows, usual
from beyondprop.lab.recipes._drawing import panels
from beyondprop.lab.registry import RuleSpec
from beyondprop.lab.runs.recorded import Run
from beyondprop.rules.base import LearningRule
from beyondprop.rules.targetprop import DifferenceTargetProp, discrete_network
from beyondprop.stages.losses import LossFunction

EPOCHS = 10
PUBLISHED = {5: "6.11", 10: "between 6.11 (epoch 5) and 3.59 (epoch 15)"}
ASKED = 4.6


def _published(model: nn.Module, loss: LossFunction, lr: float) -> LearningRule:
    del lr  # it has rates of its own
    return DifferenceTargetProp.paper_discrete(model, loss, seed=torch.initial_seed())


def _signs(input_shape: tuple[int, ...], outputs: int) -> nn.Module:
    del input_shape, outputs
    return discrete_network()


RULE = RuleSpec("dtp-discrete", "DTP, discrete", "", "", _published, lr=1.0, grid=(1.0,))


def measure(context: Context) -> tuple[Sequence[Row], dict[str, Any]]:
    """Train with every seed; the test error after five epochs and at the end."""
    rows, epochs = (2000, 2) if context.quick else (50_000, EPOCHS)
    own: dict[str, Any] = {"data": "mnist", "batch_size": 100, "schedule": "constant", "tune": False}
    settings = usual(context, nets=("signs",), epochs=float(epochs), **own)
    task = tasks.of_dataset(first_rows(data.load("mnist", standardize=False), rows))
    run = compared(context, "comparison", settings, (RULE,), task=task, nets={"signs": _signs})
    _draw(context, run)
    return [
        Row(
            f"test error after epoch {epoch}",
            tuple(100.0 - value for value in at_epoch(run, RULE.name, epoch)),
            "%",
            PUBLISHED.get(epoch, ""),
            at_most=ASKED if epoch == EPOCHS else None,
        )
        for epoch in ((epochs,) if context.quick else (1, 5, EPOCHS))
    ], {}


def _draw(context: Context, run: Run) -> None:
    with panels(context, size=(6, 3.8), xlabel="epochs", ylabel="test error (%)", whole_x=True) as ((panel,),):
        for seed, one in enumerate(curves(run, RULE.name, start=100.0, scale=-100.0)):
            panel.plot(one.x, one.y, color="#0072B2", marker="o", label=None if seed else "here, one line a seed")
        if not context.quick:
            panel.plot(5, 6.11, "x", color="#D55E00", ms=8, mew=2, label="published recipe, one seed")
        panel.set_ylim(bottom=0)
        panel.legend()


RECIPE = Recipe(
    title="Difference target propagation through signs on MNIST",
    source="Lee, Zhang, Fischer & Bengio, ECML 2015, arXiv 1412.7525, section 3.2; a port of the release, one seed",
    about=(
        "784-500-500-10 with signs between the hidden layers, published settings, nothing tuned: 50,000 training rows in "
        "[0, 1], batch 100, constant learning rates, the inverse trained one pass before each pass of the weights. Rows "
        "are shuffled, which the release does not do."
    ),
    measure=measure,
    minutes=29,
    needs=("mnist",),
)
