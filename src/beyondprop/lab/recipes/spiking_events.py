"""Recordings of an event camera: HM2-BP beside surrogate gradients on the small copy of N-MNIST."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from beyondprop import data
from beyondprop.data import Dataset
from beyondprop.lab.recipes._base import Context, Recipe, Row
from beyondprop.lab.recipes._compared import at_epoch, compared, curves, summary, usual
from beyondprop.lab.recipes._drawing import OURS, THEIRS, panels
from beyondprop.lab.runs.recorded import Run, number
from beyondprop.lab.tasks import Classification

HM2BP, SURROGATE = NETS = ("spiking:800:hm2bp:events", "spiking:800:surrogate:events")
TITLES = {HM2BP: "HM2-BP", SURROGATE: "surrogate gradients"}
RULE, EPOCHS, FOLDS = "adam", 20.0, 5


def measure(context: Context) -> tuple[Sequence[Row], dict[str, Any]]:
    """Train both nets with the same budget on four fifths of the recordings, and test on the last, five times."""
    quick = context.quick
    epochs, every = (1.0, 25) if quick else (EPOCHS, 110)
    recordings = data.load("nmnist-small")
    runs = []
    for fold in range(1 if quick else FOLDS):
        task = Classification.task(_fold(recordings, fold))
        own: dict[str, Any] = {"data": "nmnist-small", "nets": NETS, "rules": (RULE,), "tune_epochs": epochs}
        settings = usual(context, 1, epochs=epochs, evaluate_every=every, batch_size=20, **own)
        runs.append(compared(context, f"fold-{fold}", replace(settings, seeds=(fold,)), task=task))
    end = {net: tuple(at_epoch(run, f"{RULE} {net}", epochs)[0] for run in runs) for net in NETS}
    rows = [Row(f"{TITLES[net]}, after epoch {epochs:g}", end[net], "%") for net in NETS]
    rows.append(Row.lead("HM2-BP minus surrogate gradients", end[HM2BP], end[SURROGATE], at_least=0.0))
    for key, label, digits in (("spikes_a_row", "spikes a recording", 0), ("seconds", "seconds of training", 0)):
        rows += [Row(f"{TITLES[net]}: {label}", _last(runs, net, key), digits=digits) for net in NETS]
    _draw(context, runs)
    return rows, {f"fold {fold}": summary(run) for fold, run in enumerate(runs)}


def _fold(recordings: Dataset, fold: int) -> Dataset:
    """Return all recordings, every fifth one in the test."""
    x = torch.cat([recordings.x_train, recordings.x_test])
    y = torch.cat([recordings.y_train, recordings.y_test])
    test = torch.arange(len(y)) % FOLDS == fold
    return replace(recordings, x_train=x[~test], y_train=y[~test], x_test=x[test], y_test=y[test])


def _last(runs: Sequence[Run], net: str, key: str) -> tuple[float, ...]:
    return tuple(number(run.of("eval", f"{RULE} {net}", run.config["seeds"][0])[-1], key) for run in runs)


def _draw(context: Context, runs: Sequence[Run]) -> None:
    with panels(
        context, size=(7, 4.2), xlabel="epochs", ylabel="accuracy on recordings of the test (%)", legend=-1
    ) as axes:
        axis = axes[0, 0]
        for net, (color, line) in zip(NETS, (OURS, THEIRS), strict=True):
            found = [curves(run, f"{RULE} {net}")[0] for run in runs]
            for one in found:
                axis.plot(one.x, one.y, color=color, linestyle=line, linewidth=0.7, alpha=0.4)
            middle = [statistics.fmean(values) for values in zip(*(one.y for one in found), strict=True)]
            axis.plot(
                found[0].x, middle, color=color, linestyle=line, label=f"{TITLES[net]}, mean of {len(runs)} folds"
            )


RECIPE = Recipe(
    title="The small copy of N-MNIST",
    source=(
        "after Jin, Zhang & Li, NeurIPS 2018, arXiv 1805.07866, Table 2: 2312-800-10 on N-MNIST, 98.84 % with 60,000; "
        "here the first 1,000 of those, and the first 100 of its test"
    ),
    about=(
        "2312-800-10 on 50 frames of 6.7 ms, 1 where an event fell, without time compression. Each of five folds trains on "
        "880 of the 1,100 recordings and tests on the other 220, so that every recording is in one test: 100 alone would "
        "decide by two of them. Both nets begin with the same weights and are shown the same batches of 20, for 20 epochs: "
        "Adam, linear decay, the rate from four by recordings held out of a fold's training ones. Spreads are over folds, "
        "each with a seed of its own. The loss is that of counts, 10 for the label and 1 for the others."
    ),
    measure=measure,
    minutes=40,
    needs=("nmnist-small",),
)
