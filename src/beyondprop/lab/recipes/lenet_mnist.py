"""LeNet-5 on MNIST: the published learning curves, and three epochs at batch 200."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from beyondprop.lab.recipes import _lenet
from beyondprop.lab.recipes._base import Context, Recipe, Row
from beyondprop.lab.recipes._compared import at_epoch, compared, figure, summary, usual

PUBLISHED: _lenet.Published = {
    "adam": {1: "97.66", 2: "98.38", 3: "98.62", 5: "98.70", 10: "98.85 +- 0.18"},
    "am-adam": {1: "96.85", 2: "97.83", 3: "98.16", 5: "98.47", 10: "98.66 +- 0.16"},
    "sgd": {1: "90.83", 2: "95.29", 3: "96.63", 5: "97.63", 10: "98.37 +- 0.14"},
}


def measure(context: Context) -> tuple[Sequence[Row], dict[str, Any]]:
    """Train for ten epochs at the published batch size, and for three at 200."""
    long, rows = _lenet.curves(context, "mnist", PUBLISHED, {})
    last = long.config["epochs"]
    rules = ("am-adam", "adam")
    ours, theirs = (at_epoch(long, rule, last) for rule in rules)
    rows.append(Row.lead(f"AM-Adam minus Adam, batch 128, after epoch {last:g}", ours, theirs, at_least=-0.2))
    epochs = 0.1 if context.quick else 3.0
    settings = usual(context, nets=("lenet5",), data="mnist", rules=rules, epochs=epochs, batch_size=200)
    short = compared(context, "batch-200", settings)
    figure([long], context.out / "figure.png")
    ours, theirs = (at_epoch(short, rule, epochs) for rule in rules)
    after = f"batch 200, after epoch {epochs:g}"
    rows += [
        Row(f"AM-Adam, {after}", ours, "%", "97.32 (published code)", at_least=98.4),
        Row(f"Backprop, Adam, {after}", theirs, "%", "98.74 (published code)"),
        Row.lead(f"AM-Adam minus Adam, {after}", ours, theirs, at_least=-0.3),
    ]
    return rows, {"batch 128": summary(long), "batch 200": summary(short)}


RECIPE = Recipe(
    title="LeNet-5 on MNIST",
    source=_lenet.SOURCE,
    about=f"{_lenet.ABOUT} The second comparison has batch 200 and 3 epochs, as the authors' release, which was run again.",
    measure=measure,
    minutes=25,
    needs=("mnist",),
)
