"""A small spiking net on 10,000 images of MNIST: HM2-BP beside surrogate gradients, each with its own learning rate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from beyondprop import data
from beyondprop.lab.recipes._base import Context, Recipe, Row
from beyondprop.lab.recipes._compared import at_epoch, compared, figure, first_rows, summary, usual
from beyondprop.lab.runs.recorded import Run, number
from beyondprop.lab.tasks.classification import Classification

HM2BP, SURROGATE, MLP = NETS = ("spiking:100:hm2bp", "spiking:100:surrogate", "mlp:100x1")
TITLES = {HM2BP: "HM2-BP", SURROGATE: "surrogate gradients", MLP: "ReLU net"}
DEEP = tuple(f"spiking:100x2:{rule}:T=40" for rule in ("hm2bp", "surrogate"))
RULE, IMAGES, EPOCHS, DEEP_EPOCHS = "adam", 10_000, 5.0, 20.0


def measure(context: Context) -> tuple[Sequence[Row], dict[str, Any]]:
    """Train nets of one hidden layer with tuned rates, then of two with the default rate, kept constant."""
    quick = context.quick
    epochs, every = (0.2, 20) if quick else (EPOCHS, 100)
    own: dict[str, Any] = {"rules": (RULE,), "batch_size": 50, "data": "mnist"}
    images = first_rows(data.load("mnist"), IMAGES // (10 if quick else 1))
    if quick:
        images = replace(images, x_test=images.x_test[:500], y_test=images.y_test[:500])
    task = Classification.task(images)
    settings = usual(context, epochs=epochs, evaluate_every=every, nets=NETS, tune_epochs=epochs, **own)
    run = compared(context, "one-layer", settings, task=task)
    end = {net: at_epoch(run, f"{RULE} {net}", epochs) for net in NETS}
    bounds: dict[str, dict[str, float]] = {HM2BP: {"at_least": 94.0}}
    rows = [Row(f"{TITLES[net]}, after epoch {epochs:g}", end[net], "%", **bounds.get(net, {})) for net in NETS]  # type: ignore[arg-type]
    rows.append(Row.lead("HM2-BP minus surrogate gradients", end[HM2BP], end[SURROGATE]))
    rows += [Row(f"{TITLES[net]}: spikes an image", _last(run, net, "spikes_a_row"), digits=0) for net in NETS[:2]]
    rows += [Row(f"{TITLES[net]}: seconds of training", _last(run, net, "seconds"), digits=0) for net in NETS]
    deep_epochs, every = (0.4, 20) if quick else (DEEP_EPOCHS, 200)
    settings = usual(
        context, epochs=deep_epochs, evaluate_every=every, nets=DEEP, tune=False, schedule="constant", **own
    )
    deep = compared(context, "two-layers", settings, task=task)
    for net, title in zip(DEEP, ("HM2-BP", "surrogate gradients"), strict=True):
        seeds = [
            [100 * number(row, "accuracy") for row in deep.of("eval", f"{RULE} {net}", s)] for s in deep.config["seeds"]
        ]
        falls = tuple(max(course) - course[-1] for course in seeds)
        label = f"{title}, two layers at T = 40, constant rate, after epoch {deep_epochs:g}"
        rows.append(Row(label, tuple(course[-1] for course in seeds), "%", at_least=90.0 if net == DEEP[0] else None))
        rows.append(Row("  below its best by", falls, "points", at_most=2.0 if net == DEEP[0] else None))
    figure([run, deep], context.out / "figure.png")
    return rows, {"one-layer": summary(run), "two-layers": summary(deep)}


def _last(run: Run, net: str, key: str) -> tuple[float, ...]:
    return tuple(number(run.of("eval", f"{RULE} {net}", seed)[-1], key) for seed in run.config["seeds"])


RECIPE = Recipe(
    title="Small spiking nets on 10,000 images of MNIST",
    source="after Jin, Zhang & Li, NeurIPS 2018, arXiv 1805.07866; bounds are ours, nothing was published at this size",
    about=(
        "784-100-10 at T = 50, five epochs of the first 10,000 images in batches of 50, all test images: Adam, linear decay, "
        "the rate from four by held-out images, the same weights, images and trains for both rules, three seeds. Then "
        "784-100-100-10 at T = 40 with the default rate of 0.003, kept constant over 20 epochs; the published rule collapses."
    ),
    measure=measure,
    minutes=50,
    needs=("mnist",),
)
