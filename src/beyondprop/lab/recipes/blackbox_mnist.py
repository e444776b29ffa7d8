"""A convolutional classifier of MNIST with a noisy simulator in the middle: ways to its gradient, and their calls."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from beyondprop.lab.recipes._base import Context, Recipe, Row
from beyondprop.lab.recipes._compared import at_epoch, compared, curves, summary, usual
from beyondprop.lab.recipes._drawing import panels
from beyondprop.lab.report._curves import draw_band
from beyondprop.lab.runs.recorded import Run, number

NOISE, RULE, RATE, BATCH = "noise=0.05", "adam", 3e-3, 50
EPOCHS, QUICK_EPOCHS = 3.0, 0.05
GOAL = 97.0

EXACT, COLORING, REGRESSION, DENSE, SPSA, STOPPED = NETS = tuple(
    f"blackbox:64:{how}:{NOISE}:conv"
    for how in ("exact", "coloring", "regression:probes=4", "dense", "spsa:probes=4", "stopped")
)
TITLES = {
    EXACT: "exact gradient",
    COLORING: "colouring",
    REGRESSION: "regression along 4 probes",
    DENSE: "dense differences",
    SPSA: "SPSA along 4 probes",
    STOPPED: "no gradient through the box",
}
LOOKS: dict[str, tuple[str, Any]] = {
    EXACT: ("#222222", "-"),
    COLORING: ("#0072B2", "-"),
    REGRESSION: ("#009E73", (0, (3, 1.2))),
    DENSE: ("#D55E00", "-"),
    SPSA: ("#CC79A7", "-"),
    STOPPED: ("#888888", (0, (1, 1))),
}


def measure(context: Context) -> tuple[Sequence[Row], dict[str, Any]]:
    """Train the net with every way to the box's gradient, the rest alike."""
    quick = context.quick
    epochs, every = (QUICK_EPOCHS, 30) if quick else (EPOCHS, 300)
    own: dict[str, Any] = {"data": "mnist", "nets": NETS, "rules": (RULE,), "lr": {RULE: RATE}, "tune": False}
    run = compared(context, "mnist", usual(context, epochs=epochs, evaluate_every=every, batch_size=BATCH, **own))
    end = {net: at_epoch(run, name(net), run.config["epochs"]) for net in NETS}
    rows = [Row(f"{TITLES[net]}, after epoch {epochs:g}", end[net], "%") for net in NETS]
    for net, bounds in (
        (COLORING, {"at_least": -0.3}),
        (REGRESSION, {"at_least": -0.3}),
        (DENSE, {}),
        (SPSA, {}),
        (STOPPED, {"at_most": -2.0}),
    ):
        rows.append(Row.lead(f"{TITLES[net]} minus {TITLES[EXACT]}", end[net], end[EXACT], **bounds))
    rows += [
        Row(f"{TITLES[net]}: calls a training row", calls_a_row(run, net), digits=4, at_most=most)
        for net, most in ((COLORING, 10.0), (REGRESSION, 10.0), (DENSE, None), (SPSA, None))
    ]
    if not quick:
        ours, theirs = (calls_to(run, net, GOAL) for net in (COLORING, DENSE))
        ratio = tuple(b / a for a, b in zip(ours, theirs, strict=True))
        rows += [
            Row(f"{TITLES[COLORING]}: million calls to {GOAL:g} %", tuple(calls / 1e6 for calls in ours)),
            Row(f"{TITLES[DENSE]}: million calls to {GOAL:g} %", tuple(calls / 1e6 for calls in theirs)),
            Row(f"calls to {GOAL:g} %, {TITLES[DENSE]} over {TITLES[COLORING]}", ratio, at_least=5.0),
        ]
    _draw(context, run)
    return rows, {"mnist": summary(run)}


def name(net: str) -> str:
    """Return what a contender's rows go by."""
    return f"{RULE} {net}"


def calls_a_row(run: Run, net: str) -> tuple[float, ...]:
    """Return every seed's calls in training over the rows that it was trained on; NaN for one without any."""
    last = [rows[-1] if (rows := run.of("eval", name(net), seed)) else {} for seed in run.config["seeds"]]
    return tuple(number(row, "calls") / row["samples"] if row.get("samples") else math.nan for row in last)


def calls_to(run: Run, net: str, accuracy: float) -> tuple[float, ...]:
    """Return every seed's calls at its first evaluation with an accuracy, in percent; NaN where that never came."""
    found = []
    for seed in run.config["seeds"]:
        rows = (row for row in run.of("eval", name(net), seed) if 100 * number(row, "accuracy") >= accuracy)
        found.append(number(next(rows, {}), "calls"))
    return tuple(found)


def _draw(context: Context, run: Run) -> None:
    labels: dict[str, Any] = {
        "ylabel": "test accuracy (%), mean and range of seeds",
        "titles": ["by epochs", "by calls of the box"],
    }
    with panels(context, 2, size=(9.6, 4.4), legend=3, sharey=True, **labels) as axes:
        for panel, x, label in zip(
            axes[0], ("epoch", "calls"), ("epochs", "calls in training (log scale)"), strict=True
        ):
            for net, (color, line) in LOOKS.items():
                draw_band(panel, curves(run, name(net), x=x), color=color, linestyle=line, label=TITLES[net])
            panel.set_xlabel(label)
        axes[0, 1].set_xscale("log")
        if not context.quick:
            axes[0, 0].set_ylim(85, 100)


RECIPE = Recipe(
    title="A noisy black box inside a classifier of MNIST",
    source=(
        'after Choromanski & Sindhwani, "On Blackbox Backpropagation and Jacobian Sensing", NeurIPS 2017: classifiers with '
        "black-box layers against exact gradients and dense differences; their numbers could not be had"
    ),
    about=(
        "Two convolutions as in LeNet-5, a layer of 64, the box, a layer of 10. The box is one step of a ring of 64 coupled "
        "oscillators in NumPy, three inputs an output, with noise of 0.05 on every output at every call, in evaluations too. "
        f"Adam at {RATE:g} for all, not tuned, linear decay, batch {BATCH}, three epochs, three seeds, central differences; "
        "the same weights and batches for all. The exact gradient is autograd's, of the same box written in torch. Calls are "
        "those of training: one a row for the value, the others for the gradient, and some at the start to find a step."
    ),
    measure=measure,
    minutes=25,
    needs=("mnist",),
)
