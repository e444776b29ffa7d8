"""LeNet-5 on Fashion-MNIST: the published learning curves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from beyondprop.lab.recipes import _lenet
from beyondprop.lab.recipes._base import Context, Recipe, Row
from beyondprop.lab.recipes._compared import figure, summary

PUBLISHED: _lenet.Published = {
    "adam": {1: "83.55", 2: "86.06", 3: "87.23", 5: "88.41", 10: "89.37 +- 0.49"},
    "am-adam": {1: "82.63", 2: "84.91", 3: "86.00", 5: "86.82", 10: "87.85 +- 0.42"},
    "sgd": {1: "69.21", 2: "75.13", 3: "78.72", 5: "82.19", 10: "85.59 +- 0.81"},
}


def measure(context: Context) -> tuple[Sequence[Row], dict[str, Any]]:
    """Train for ten epochs at the published batch size."""
    run, rows = _lenet.curves(context, "fashion-mnist", PUBLISHED, {"am-adam": 89.0})
    figure([run], context.out / "figure.png")
    return rows, {"batch 128": summary(run)}


RECIPE = Recipe(
    title="LeNet-5 on Fashion-MNIST",
    source=_lenet.SOURCE,
    about=_lenet.ABOUT,
    measure=measure,
    minutes=25,
    needs=("fashion-mnist",),
)
