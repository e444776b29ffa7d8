"""Difference target propagation through signs on MNIST: the published settings, and how fast they learn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from beyondprop import data
from beyondprop.lab.recipes._base import Context, Recipe, Row
from beyondprop.lab.recipes._kept import accuracy_at, trained
from beyondprop.lab.report._style import drawing
from beyondprop.rules.targetprop import DifferenceTargetProp, discrete_network

ROWS, EPOCHS, SEEDS = 50_000, 10, (0, 1, 2)
QUICK_ROWS, QUICK_EPOCHS = 2000, 2
PUBLISHED = {5: "6.11", 10: "between 6.11 (epoch 5) and 3.59 (epoch 15)"}
ASKED = 4.6


def measure(context: Context) -> tuple[Sequence[Row], dict[str, Any]]:
    """Train with every seed; the test error after five epochs and at the end."""
    mnist = data.load("mnist", standardize=False)
    rows, epochs = (QUICK_ROWS, QUICK_EPOCHS) if context.quick else (ROWS, EPOCHS)
    mnist = replace(mnist, x_train=mnist.x_train[:rows], y_train=mnist.y_train[:rows])
    curves = [
        trained(
            context,
            f"seed-{seed}",
            lambda seed=seed: DifferenceTargetProp.paper_discrete(discrete_network(), nn.CrossEntropyLoss(), seed=seed),
            mnist,
            seed=seed,
            epochs=epochs,
            batch_size=100,
            schedule="constant",
        )
        for seed in (SEEDS[:1] if context.quick else SEEDS)
    ]
    _draw(context, curves)
    return [
        Row(
            f"test error after epoch {epoch}",
            tuple(100.0 - accuracy_at(curve, epoch) for curve in curves),
            "%",
            PUBLISHED.get(epoch, ""),
            at_most=ASKED if epoch == EPOCHS else None,
        )
        for epoch in ((epochs,) if context.quick else (1, 5, EPOCHS))
    ], {}


def _draw(context: Context, curves: Sequence[list[dict[str, Any]]]) -> None:
    with drawing():
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator

        figure = Figure(figsize=(6, 3.8), layout="constrained")
        axes = figure.subplots()
        for seed, rows in enumerate(curves):
            points = [(row["epoch"], 100 * (1 - row["accuracy"])) for row in rows if row["step"]]
            if points:
                label = None if seed else "here, one line a seed"
                axes.plot(*zip(*points, strict=True), color="#0072B2", marker="o", label=label)
        if not context.quick:
            axes.plot(5, 6.11, "x", color="#D55E00", ms=8, mew=2, label="published recipe, one seed")
        axes.set_ylim(bottom=0)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("epochs")
        axes.set_ylabel("test error (%)")
        axes.legend()
        figure.savefig(context.out / "figure.png", dpi=150)


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
