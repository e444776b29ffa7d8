"""LeNet-5 on MNIST: the published learning curves, and three epochs at batch 200."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from beyondprop.recipes._base import Context, Recipe, Row
from beyondprop.recipes._compared import at_epoch, compared, figure, summary
from beyondprop.settings import Settings

PUBLISHED = {  # test accuracy in % after an epoch
    "adam": {1: "97.66", 2: "98.38", 3: "98.62", 5: "98.70", 10: "98.85 +- 0.18"},
    "am-adam": {1: "96.85", 2: "97.83", 3: "98.16", 5: "98.47", 10: "98.66 +- 0.16"},
    "sgd": {1: "90.83", 2: "95.29", 3: "96.63", 5: "97.63", 10: "98.37 +- 0.14"},
}


def measure(context: Context) -> tuple[Sequence[Row], dict[str, Any]]:
    """Train for ten epochs at the published batch size, and for three at 200."""
    quick = context.quick
    seeds = (0,) if quick else (0, 1, 2)
    usual: dict[str, Any] = {"net": "lenet5", "data": "mnist", "seeds": seeds, "alignment": False, "tune": not quick}
    rules = ("am-adam", "am-paper-lenet", "adam", "sgd")
    epochs = 0.1 if quick else 10.0
    long = compared(
        context, "batch-128", Settings(rules=rules, epochs=epochs, batch_size=128, tune_epochs=2.0, **usual)
    )
    epochs = 0.1 if quick else 3.0
    short = compared(context, "batch-200", Settings(rules=("am-adam", "adam"), epochs=epochs, batch_size=200, **usual))
    figure([long], context.out / "figure.png")
    titles = {rule.name: rule.title for rule in long.rules}
    rows = [
        Row(
            f"{titles[name]}, batch 128, after epoch {epoch}",
            at_epoch(long, name, long.config["epochs"] if quick else epoch),
            "%",
            published=PUBLISHED.get(name, PUBLISHED["am-adam"])[epoch],
        )
        for name in rules
        for epoch in ((10,) if quick else (1, 2, 3, 5, 10))
    ]
    last = short.config["epochs"]
    ours, theirs = at_epoch(short, "am-adam", last), at_epoch(short, "adam", last)
    rows += [
        Row("AM-Adam, batch 200, after epoch 3", ours, "%", published="97.3 (published code)", at_least=98.4),
        Row("Adam, batch 200, after epoch 3", theirs, "%", published="98.74 (published code)"),
        Row(
            "AM-Adam's lead over Adam, batch 200, after epoch 3",
            tuple(a - b for a, b in zip(ours, theirs, strict=True)),
            "points",
            at_least=-0.3,
        ),
    ]
    return rows, {"batch 128": summary(long), "batch 200": summary(short)}


RECIPE = Recipe(
    title="LeNet-5 on MNIST",
    source="Choromanska et al., ICML 2019, arXiv 1806.09077: LeNet curves, from the authors' logs (about 50 seeds)",
    about=(
        "Batch 128 and 10 epochs as published, three seeds; learning rates chosen on 10,000 held-out training rows after two "
        "epochs, then a linear decay to 0 (published: 0.002, constant, for Adam and AM-Adam). `am-paper-lenet` has the "
        "published settings of the codes. The second comparison has batch 200 and 3 epochs, as the authors' release."
    ),
    measure=measure,
    minutes=60,
    needs=("mnist",),
)
