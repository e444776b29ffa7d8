"""RNN-15: sequential MNIST pixel by pixel; and by rows with the last state read out, which needs memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from beyondprop.lab.recipes._base import Context, Recipe, Row
from beyondprop.lab.recipes._compared import at_epoch, compared, figure, summary, usual

PUBLISHED = {
    "adam": {1: "90.9", 2: "between 90.9 (epoch 1) and 92.5 (epoch 10)"},
    "am-adam": {1: "88.5", 2: "between 88.5 (epoch 1) and 91.6 (epoch 10)"},
}
RULES = ("am-adam", "adam")


def measure(context: Context) -> tuple[Sequence[Row], dict[str, Any]]:
    """Train both nets by both rules."""
    quick = context.quick
    shared: dict[str, Any] = {"data": "mnist", "rules": RULES}
    own = {"nets": ("rnn:15",), "batch_size": 1024, "tune_epochs": 1.0, "schedule": "constant"}
    pixels = compared(context, "pixels", usual(context, epochs=2 / 59 if quick else 2.0, **shared, **own))
    own = {"nets": ("rnn:100:rows",), "batch_size": 100, "tune_epochs": 2.0}
    rows_ = compared(context, "rows", usual(context, epochs=0.02 if quick else 2.0, **shared, **own))
    figure([pixels, rows_], context.out / "figure.png")
    titles = {rule.name: rule.title for rule in pixels.contenders}
    rows = [
        Row(
            f"RNN-15, pixel by pixel, {titles[name]}, after epoch {epoch:.2g}",
            at_epoch(pixels, name, epoch),
            "%",
            PUBLISHED[name].get(int(epoch), ""),
            at_least=92.0 if (name, epoch) == ("am-adam", 2) else None,
        )
        for name in RULES
        for epoch in ((pixels.config["epochs"],) if quick else (1, 2))
    ]
    last = rows_.config["epochs"]
    ours, theirs = (at_epoch(rows_, name, last) for name in RULES)
    rows += [
        Row(f"100 units, row by row, last state, AM-Adam, after epoch {last:g}", ours, "%"),
        Row(f"100 units, row by row, last state, Backprop through time, Adam, after epoch {last:g}", theirs, "%"),
        Row.lead("AM-Adam minus Adam, row by row", ours, theirs, at_least=-0.5),
    ]
    return rows, {"pixels": summary(pixels), "rows": summary(rows_)}


RECIPE = Recipe(
    title="RNN-15 on sequential MNIST, and rows with the last state read out",
    source="Choromanska et al., ICML 2019, arXiv 1806.09077, figure 6 (14 to 16 seeds; read off the figure)",
    about=(
        "RNN-15: 15 tanh units, one pixel a step, one output a step, a ReLU on the 784 outputs and a linear layer, as deduced "
        "from the figure's curves; the output unit starts rising with its pixel, as with random signs it is often silent for "
        "all. Batch 1024, constant learning rates, chosen on held-out training rows after one epoch. All outputs are read, so "
        "that it tests little memory; the net that reads rows of 28 pixels and shows its last state only does: batch 100, "
        "linear decay, rates chosen after as many epochs as are reported."
    ),
    measure=measure,
    minutes=26,
    needs=("mnist",),
)
