"""LeNet-5's published learning curves, for two data sets."""

from __future__ import annotations

from beyondprop.lab.recipes._base import Context, Row
from beyondprop.lab.recipes._compared import at_epoch, compared, usual
from beyondprop.lab.runs.recorded import Run

RULES = ("am-adam", "am-paper-lenet", "adam", "sgd")
EPOCHS = (1, 2, 3, 5, 10)

ABOUT = (
    "Batch 128 and 10 epochs as published, three seeds; learning rates chosen on 10,000 held-out training rows after two "
    "epochs, then a linear decay to 0 (published: 0.002, constant, for Adam and AM-Adam). `am-paper-lenet` has the published "
    "codes and a constant rate, which is chosen as the others' are."
)
SOURCE = "Choromanska et al., ICML 2019, arXiv 1806.09077: LeNet curves, from the authors' logs (about 50 seeds)"

Published = dict[str, dict[int, str]]
"""Test accuracy in percent by rule and epoch."""


def curves(context: Context, data: str, published: Published, asked: dict[str, float]) -> tuple[Run, list[Row]]:
    """Train at the published batch size; return the run, and a row for every rule and published epoch.

    `asked` has, by rule, what its accuracy after the last epoch must be at least.
    """
    quick = context.quick
    own = {"nets": ("lenet5",), "data": data, "rules": RULES, "batch_size": 128, "tune_epochs": 2.0}
    run = compared(context, "batch-128", usual(context, epochs=0.1 if quick else 10.0, **own))
    titles = {rule.name: rule.title for rule in run.contenders}
    rows = []
    for name in RULES:
        for epoch in (run.config["epochs"],) if quick else EPOCHS:
            measured = at_epoch(run, name, epoch)
            bound = asked.get(name) if epoch == EPOCHS[-1] else None
            known = published.get(name, published["am-adam"]).get(int(epoch), "")
            rows.append(Row(f"{titles[name]}, batch 128, after epoch {epoch:g}", measured, "%", known, at_least=bound))
    return run, rows
