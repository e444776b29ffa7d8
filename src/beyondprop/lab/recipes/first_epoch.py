"""The first epoch, batch by batch: whether alternating minimization learns faster at first."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from beyondprop.lab.recipes._base import Context, Recipe, Row
from beyondprop.lab.recipes._compared import compared, curves, recorded_rules, summary, usual
from beyondprop.lab.recipes._drawing import panels
from beyondprop.lab.report._curves import draw_band
from beyondprop.lab.report._style import entries
from beyondprop.lab.runs.recorded import Run, number

BATCHES = (5, 10, 20, 50, 100)
PUBLISHED = {  # LeNet-5, batch 128: accuracy in % after so many batches
    "adam": {5: "33.6", 10: "55.1", 20: "74.9", 50: "88.5", 100: "93.6"},
    "am-adam": {5: "24.1", 10: "44.8", 20: "61.3", 50: "82.6", 100: "90.6"},
}
RULES = ("am-adam", "am-paper-lenet", "adam")
LINES = {"adam": (0, (3, 1.2)), "am-paper-lenet": "-."}
"""Lines that stay apart where curves lie on each other; all others are whole."""


def measure(context: Context) -> tuple[Sequence[Row], dict[str, Any]]:
    """Train for the share of an epoch that 100 batches are, LeNet-5 and a fully connected net."""
    quick, rows, settings, runs = context.quick, [], {}, []
    for net, rules in (("lenet5", RULES), ("mlp:100x2", (RULES[0], "am-mem", RULES[2]))):
        run = compared(
            context,
            net.replace(":", "-"),
            usual(
                context,
                seeds=5,
                data="mnist",
                nets=(net,),
                epochs=(20 if quick else 100) / 469,
                tune_epochs=100 / 391,  # held-out rows make the epoch shorter
                batch_size=128,
                evaluate_every=5,
                schedule="constant",
            ),
            recorded_rules(rules),
        )
        titles = {rule.name: rule.title for rule in run.contenders}
        for name in rules:
            known = PUBLISHED.get(name, {}) if net == "lenet5" else {}
            rows += [
                Row(
                    f"{net}, {titles[name]}, after {count} batches",
                    after(run, name, count),
                    "%",
                    known.get(count, ""),
                    digits=1,
                )
                for count in BATCHES[: 3 if quick else None]
            ]
        settings[net] = summary(run)
        runs.append(run)
    _draw(context, runs)
    return rows, settings


def after(run: Run, rule: str, batches: int) -> tuple[float, ...]:
    """Return the test accuracy of every seed after so many batches, in percent."""
    seeds = ([row for row in run.of("eval", rule, seed) if row["step"] == batches] for seed in run.config["seeds"])
    return tuple(100 * number(rows[0], "accuracy") if rows else math.nan for rows in seeds)


def _draw(context: Context, runs: Sequence[Run]) -> None:
    labels: dict[str, Any] = {"xlabel": "batches of 128 rows", "ylabel": "test accuracy (%), mean and range of seeds"}
    labels["titles"] = [run.config["nets"][0] for run in runs]
    with panels(context, len(runs), size=(9, 4.2), legend=-1, sharey=True, whole_x=True, **labels) as axes:
        for panel, run in zip(axes[0], runs, strict=True):
            for entry in entries([run]):
                name, title = entry.contender.name, entry.contender.title
                seeds = curves(run, name, x="step", before=True)
                draw_band(panel, seeds, color=entry.color, linestyle=LINES.get(name, "-"), label=title)


RECIPE = Recipe(
    title="The first hundred batches on MNIST",
    source='Choromanska et al., ICML 2019, arXiv 1806.09077: "learns faster initially"; numbers from the authors\' logs',
    about=(
        "Batch 128, constant learning rates, chosen by validation accuracy after the same 100 batches, five seeds. Published: "
        "accuracy of the mini-batch itself; here: of the 10,000 test images."
    ),
    measure=measure,
    minutes=17,
    needs=("mnist",),
)
