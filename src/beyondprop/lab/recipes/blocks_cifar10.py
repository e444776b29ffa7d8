"""Modern nets on CIFAR-10 with whole blocks as stages: ResNet-20, a small conv net, a small transformer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from beyondprop.lab.recipes._base import Context, Recipe, Row
from beyondprop.lab.recipes._compared import at_epoch, compared, curves, summary, usual
from beyondprop.lab.recipes._drawing import OURS, THEIRS, panels
from beyondprop.lab.report._curves import draw_band
from beyondprop.lab.runs.recorded import Run

BASELINE = "adam"
TUNE_EPOCHS = 0.5


@dataclass(frozen=True, slots=True)
class Part:
    """One comparison; parts of one net have the same batches, weights and schedule."""

    net: str
    title: str
    rules: tuple[str, ...]
    epochs: float
    lead: float | None = None
    """Points by which alternating minimization must be ahead of the baseline, in a part of its net so far."""


RESNET, TRANSFORMER = "ResNet-20, blocks as stages", "transformer, 2 blocks of 64"
UNIT, AM = "am-adam-unit", "am-adam"
PARTS = {
    "resnet20-unit": Part("resnet20", RESNET, (UNIT, BASELINE), 5.0, -1.5),
    "resnet20": Part("resnet20", RESNET, (AM,), 5.0, -1.5),
    "conv": Part("conv:32x4:bn", "4 convolutions with BatchNorm", (AM, BASELINE), 2.0),
    "transformer-unit": Part("transformer:64x2", TRANSFORMER, (UNIT, BASELINE), 1.0),
    "transformer": Part("transformer:64x2", TRANSFORMER, (AM,), 1.0),
}


def measure(context: Context) -> tuple[Sequence[Row], dict[str, Any]]:
    """Train every net by alternating minimization and by backpropagation on the same schedule."""
    rows, leads, settings, runs = [], [], {}, []
    baselines: dict[str, tuple[float, ...]] = {}
    for name, part in PARTS.items():
        own: dict[str, Any] = {"data": "cifar10", "nets": (part.net,), "rules": part.rules, "batch_size": 128}
        epochs = 0.005 if context.quick else part.epochs
        run = compared(context, name, usual(context, seeds=2, epochs=epochs, tune_epochs=TUNE_EPOCHS, **own))
        after = f"after epoch {run.config['epochs']:g}"
        found = {rule.name: at_epoch(run, rule.name, run.config["epochs"]) for rule in run.contenders}
        if BASELINE in found:
            baselines[part.net] = found[BASELINE]
        for rule in run.contenders:
            rows.append(Row(f"{part.title}, {rule.title}, {after}", found[rule.name], "%"))
            if rule.name != BASELINE:
                label = f"{part.title}, {rule.title} minus Adam, {after}"
                leads.append(Row.lead(label, found[rule.name], baselines[part.net], at_least=part.lead))
        settings[name] = summary(run)
        runs.append(run)
    _draw(context, dict(zip(PARTS, runs, strict=True)))
    return rows + leads, settings


def _draw(context: Context, runs: dict[str, Run]) -> None:
    looks = {AM: OURS, UNIT: ("#CC79A7", "-."), BASELINE: THEIRS}
    nets = {part.net: part.title for part in PARTS.values()}
    labels: dict[str, Any] = {
        "xlabel": "epochs; mean and range of the seeds",
        "ylabel": "test accuracy (%)",
        "whole_x": True,
    }
    titles = list(nets.values())
    with panels(context, len(nets), size=(10, 3.8), titles=titles, legend=-1, sharey=True, **labels) as axes:
        found = dict(zip(nets, axes[0], strict=True))
        for name, run in runs.items():
            for rule in run.contenders:
                color, line = looks[rule.name]
                seeds = curves(run, rule.name, before=True)
                look = {"color": color, "linestyle": line, "marker": "o", "label": rule.title}
                draw_band(found[PARTS[name].net], seeds, **look)
        axes[0, 0].set_ylim(0, 100)


RECIPE = Recipe(
    title="Modern nets on CIFAR-10, blocks as stages",
    source="no published number: alternating minimization was published on LeNet-5 and smaller nets",
    about=(
        "Batch 128, no augmentation, linear decay; learning rates chosen on held-out training rows after half an epoch. A "
        "residual or attention block is one stage with one code at its output, held by 4 times the block's mean squared gain "
        "(of 1 and 4, by held-out rows, one seed), which is the default. Unit damping is the published objective, 1 for every "
        "code. Asked of ResNet-20: within 1.5 points of Adam."
    ),
    measure=measure,
    minutes=260,
    needs=("cifar10",),
)
