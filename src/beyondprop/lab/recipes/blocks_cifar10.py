"""Modern nets on CIFAR-10 with whole blocks as stages: ResNet-20, a small conv net, a small transformer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from beyondprop.lab.comparing.settings import Settings
from beyondprop.lab.recipes._base import Context, Recipe, Row
from beyondprop.lab.recipes._compared import at_epoch, compared, summary
from beyondprop.lab.report._curves import Curve, curve, draw_band
from beyondprop.lab.report._style import drawing
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
    seeds: tuple[int, ...]
    lead: float | None = None
    """Points by which alternating minimization must be ahead of the baseline, in a part of its net so far."""


RESNET, TRANSFORMER = "ResNet-20, blocks as stages", "transformer, 2 blocks of 64"
UNIT, AM = "am-adam-unit", "am-adam"
PARTS = {
    "resnet20-unit": Part("resnet20", RESNET, (UNIT, BASELINE), 5.0, (0, 1), -1.5),
    "resnet20": Part("resnet20", RESNET, (AM,), 5.0, (0, 1), -1.5),
    "conv": Part("conv:32x4:bn", "4 convolutions with BatchNorm", (AM, BASELINE), 2.0, (0, 1)),
    "transformer-unit": Part("transformer:64x2", TRANSFORMER, (UNIT, BASELINE), 1.0, (0, 1)),
    "transformer": Part("transformer:64x2", TRANSFORMER, (AM,), 1.0, (0, 1)),
}


def measure(context: Context) -> tuple[Sequence[Row], dict[str, Any]]:
    """Train every net by alternating minimization and by backpropagation on the same schedule."""
    rows, leads, settings, runs = [], [], {}, []
    baselines: dict[str, tuple[float, ...]] = {}
    for name, part in PARTS.items():
        quick = context.quick
        run = compared(
            context,
            name,
            Settings(
                data="cifar10",
                nets=(part.net,),
                rules=part.rules,
                epochs=0.005 if quick else part.epochs,
                tune_epochs=TUNE_EPOCHS,
                batch_size=128,
                seeds=(0,) if quick else part.seeds,
                tune=not quick,
                alignment=False,
            ),
        )
        after = f"after epoch {run.config['epochs']:g}"
        found = {rule.name: at_epoch(run, rule.name, run.config["epochs"]) for rule in run.contenders}
        if BASELINE in found:
            baselines[part.net] = found[BASELINE]
        for rule in run.contenders:
            rows.append(Row(f"{part.title}, {rule.title}, {after}", found[rule.name], "%"))
            if rule.name != BASELINE:
                lead = tuple(a - b for a, b in zip(found[rule.name], baselines[part.net], strict=True))
                leads.append(Row(f"{part.title}, {rule.title} minus Adam, {after}", lead, "points", at_least=part.lead))
        settings[name] = summary(run)
        runs.append(run)
    _draw(context, dict(zip(PARTS, runs, strict=True)))
    return rows + leads, settings


def _draw(context: Context, runs: dict[str, Run]) -> None:
    looks = {AM: ("#0072B2", "-"), UNIT: ("#CC79A7", "-."), BASELINE: ("#D55E00", (0, (3, 1.2)))}
    nets = {part.net: part.title for part in PARTS.values()}
    with drawing():
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator

        figure = Figure(figsize=(10, 3.8), layout="constrained")
        panels = dict(zip(nets, figure.subplots(1, len(nets), sharey=True), strict=True))
        handles: dict[str, Any] = {}
        for name, run in runs.items():
            panel = panels[PARTS[name].net]
            for rule in run.contenders:
                color, line = looks[rule.name]
                found = [curve(run.of("eval", rule.name, seed), "epoch", "accuracy") for seed in run.config["seeds"]]
                found = [Curve(c.x, 100 * c.y) for c in found]
                for handle in draw_band(panel, found, color=color, linestyle=line, marker="o"):
                    handles[rule.title] = handle
        for net, panel in panels.items():
            panel.set_title(nets[net])
            panel.set_xlabel("epochs; mean and range of the seeds")
            panel.set_ylim(0, 100)
            panel.xaxis.set_major_locator(MaxNLocator(integer=True))
        panels[next(iter(nets))].set_ylabel("test accuracy (%)")
        figure.legend(list(handles.values()), list(handles), loc="outside upper center", ncols=len(handles))
        figure.savefig(context.out / "figure.png", dpi=150)


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
