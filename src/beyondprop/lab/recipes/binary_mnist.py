"""Nets of signs on MNIST: alternating minimization against straight-through estimation, and the published code's settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from beyondprop import data
from beyondprop.lab import registry, tasks
from beyondprop.lab.recipes._base import Context, Recipe, Row
from beyondprop.lab.recipes._compared import EXACT, at_epoch, chosen, compared, curves, first_rows, usual
from beyondprop.lab.recipes._drawing import OURS, THEIRS, panels
from beyondprop.lab.report._curves import draw_band
from beyondprop.lab.runs.recorded import Run

EPOCHS = 20
RATES = (2e-3, 4e-3, 8e-3, 1.6e-2)
FITTED = 0.2
"""Training error in percent that the published claim is about."""

NETS = {
    "lower layer signs": "binary:500x2:first:dropout=0.2",
    "both layers signs": "binary:500x2:dropout=0.2",
}
PUBLISHED_NET = next(iter(NETS))
RULES = (
    replace(registry.rules.get("am-adam"), grid=RATES, lr=RATES[1], build=EXACT["am-adam"]),
    replace(registry.rules.get("adam"), grid=RATES, lr=RATES[1], title="straight-through"),
)
AM, BACKPROP = RULES
RELEASE = replace(registry.rules.get("am-paper-binary"), title="AM as published")
PUBLISHED = {BACKPROP.title: "1.77 (one seed, BatchNorm)", RELEASE.title: "2.08 (published code, one seed)"}
PUBLISHED_FIT = {AM.title: "0.2 before epoch 20", RELEASE.title: "0.20 at epoch 16 (published code, one seed)"}


def measure(context: Context) -> tuple[Sequence[Row], dict[str, Any]]:
    """Choose the learning rates on held-out rows, then train with every seed on all."""
    mnist, quick = data.load("mnist"), context.quick
    task = tasks.Classification.task(first_rows(mnist, 2000) if quick else mnist)
    task = replace(task, measures_training=True)
    epochs = 2 if quick else EPOCHS
    own: dict[str, Any] = {"data": "mnist", "epochs": float(epochs), "batch_size": 200}
    rows: list[Row] = []
    rates: dict[str, float] = {}
    edges: list[str] = []
    runs: dict[tuple[str, str], Run] = {}
    for title, net in NETS.items():
        settings = usual(context, seeds=8, nets=(net,), tune_epochs=5.0, tune_seeds=(100,), **own)
        run = compared(context, title.replace(" ", "-"), settings, RULES, task=task)
        lr, at_edge = chosen(run)
        for rule in RULES:
            rates[f"{title}, {rule.title}"] = lr[rule.name]
            edges += [f"{title}, {rule.title}"] * (rule.name in at_edge)
            runs[title, rule.title] = run
        if title == PUBLISHED_NET and not quick:
            settings = usual(context, seeds=1, nets=(net,), tune=False, **own)
            runs[title, RELEASE.title] = compared(context, "release", settings, (RELEASE,), task=task)
        final: dict[str, tuple[float, ...]] = {}
        for rule in (*RULES, RELEASE):
            if (title, rule.title) not in runs:
                continue
            run = runs[title, rule.title]
            final[rule.title] = tuple(100.0 - value for value in at_epoch(run, rule.name, epochs))
            fitted = tuple(100.0 * (1.0 - v) for v in at_epoch(run, rule.name, epochs - 1, "training accuracy", 1.0))
            known = [table.get(rule.title, "") * (title == PUBLISHED_NET) for table in (PUBLISHED, PUBLISHED_FIT)]
            bound = FITTED if rule is AM else None
            label = f"{title}, {rule.title}"
            rows += [
                Row(f"{label}: test error, epoch {epochs}", final[rule.title], "%", known[0]),
                Row(f"{label}: training error, epoch {epochs - 1}", fitted, "%", known[1], at_most=bound),
            ]
        label = f"{title}, {AM.title} minus {BACKPROP.title}: test error"
        rows.append(Row.lead(label, final[AM.title], final[BACKPROP.title], at_most=0.0))
    _draw(context, runs)
    return rows, {"batch 200": {"lr": rates, "at_edge": edges}}


def _draw(context: Context, runs: Mapping[tuple[str, str], Run]) -> None:
    from matplotlib.ticker import FixedLocator, NullLocator

    looks = {AM.title: OURS, BACKPROP.title: THEIRS, RELEASE.title: ("#777777", "-.")}
    names = {rule.title: rule.name for rule in (*RULES, RELEASE)}
    labels: dict[str, Any] = {"titles": list(NETS), "xlabel": "epochs; mean and range of the seeds", "whole_x": True}
    with panels(context, len(NETS), 2, size=(9, 6), legend=-1, sharex=True, sharey="row", **labels) as axes:
        for (net, title), run in runs.items():
            color, line = looks[title]
            for panel, key in zip(axes[:, list(NETS).index(net)], ("accuracy", "training accuracy"), strict=True):
                errors = curves(run, names[title], key, start=100.0, scale=-100.0)
                draw_band(panel, errors, color=color, linestyle=line, label=title)
        for above, below in axes.T:
            above.set_yscale("log")
            below.set_yscale("symlog", linthresh=0.1)
            below.set_ylim(bottom=0)
            below.axhline(FITTED, color="#777777", linewidth=1, linestyle=":")
        axes[0, 0].set_ylabel("test error (%)")
        axes[1, 0].set_ylabel("training error (%)")
        axes[0, 0].yaxis.set_major_locator(FixedLocator([1.5, 2, 3, 4, 5]))
        axes[0, 0].yaxis.set_minor_locator(NullLocator())
        for panel in axes[:, 0]:
            panel.yaxis.set_major_formatter("{x:g}")


RECIPE = Recipe(
    title="Nets of signs on MNIST",
    source="Choromanska et al., ICML 2019, arXiv 1806.09077, binary nets, and a re-run of the authors' release, one seed",
    about=(
        "784-500-500-10 with BatchNorm and dropout 0.2, batch 200, 20 epochs, eight seeds; the published net has tanh units "
        "in the upper hidden layer, the other one signs in both. Signs pass on wishes within [-1, 1]. Learning rates of both "
        "rules from 0.002, 0.004, 0.008, 0.016, chosen on 10,000 held-out training rows after five epochs, then a linear "
        "decay to 0; the published settings as they are, one seed. Training error is of the net as it is tested, without "
        "dropout. Asked: no more test error than straight-through estimation, and 0.2 % training error before epoch 20."
    ),
    measure=measure,
    minutes=50,
    needs=("mnist",),
)
