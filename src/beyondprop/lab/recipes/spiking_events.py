"""Recordings of an event camera: HM2-BP beside surrogate gradients on the small copy of N-MNIST."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from beyondprop.lab.recipes._base import Context, Recipe, Row
from beyondprop.lab.recipes._compared import at_epoch, compared, figure, summary, usual
from beyondprop.lab.runs.recorded import Run, number

HM2BP, SURROGATE = NETS = ("spiking:800:hm2bp:events", "spiking:800:surrogate:events")
TITLES = {HM2BP: "HM2-BP", SURROGATE: "surrogate gradients"}
RULE, EPOCHS = "adam", 20.0


def measure(context: Context) -> tuple[Sequence[Row], dict[str, Any]]:
    """Train both nets with the same budget, each with the rate that held-out recordings choose."""
    quick = context.quick
    epochs, every = (1.0, 25) if quick else (EPOCHS, 100)
    own: dict[str, Any] = {"data": "nmnist-small", "nets": NETS, "rules": (RULE,), "tune_epochs": epochs}
    run = compared(context, "events", usual(context, 5, epochs=epochs, evaluate_every=every, batch_size=20, **own))
    end = {net: at_epoch(run, f"{RULE} {net}", epochs) for net in NETS}
    rows = [Row(f"{TITLES[net]}, after epoch {epochs:g}", end[net], "%") for net in NETS]
    rows.append(Row.lead("HM2-BP minus surrogate gradients", end[HM2BP], end[SURROGATE], at_least=0.0))
    for key, label, digits in (("spikes_a_row", "spikes a recording", 0), ("seconds", "seconds of training", 0)):
        rows += [Row(f"{TITLES[net]}: {label}", _last(run, net, key), digits=digits) for net in NETS]
    figure([run], context.out / "figure.png")
    return rows, {"events": summary(run)}


def _last(run: Run, net: str, key: str) -> tuple[float, ...]:
    return tuple(number(run.of("eval", f"{RULE} {net}", seed)[-1], key) for seed in run.config["seeds"])


RECIPE = Recipe(
    title="The small copy of N-MNIST",
    source=(
        "after Jin, Zhang & Li, NeurIPS 2018, arXiv 1805.07866, Table 2: 2312-800-10 on N-MNIST, 98.84 % with 60,000; "
        "here the first 1,000, and 100 for the test"
    ),
    about=(
        "2312-800-10 on 50 frames of 6.7 ms, 1 where an event fell, without time compression. Both nets begin with the same "
        "weights and are shown the same batches of 20, for 20 epochs: Adam, linear decay, the rate from four by recordings "
        "held out of the training ones, five seeds. The loss is that of counts, 10 for the label and 1 for the others."
    ),
    measure=measure,
    minutes=25,
    needs=("nmnist-small",),
)
