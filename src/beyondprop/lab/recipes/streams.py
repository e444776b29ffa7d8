"""Streams: what rules learn and forget on Split-MNIST and Permuted-MNIST, one pass, no stored data."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from beyondprop.lab import registry, tasks
from beyondprop.lab.recipes._base import Context, Recipe, Row
from beyondprop.lab.recipes._compared import EXACT, chosen, compared, first_rows, usual
from beyondprop.lab.recipes._drawing import panels
from beyondprop.lab.registry import Build, RuleSpec
from beyondprop.lab.report._curves import Curve, draw_band
from beyondprop.lab.runs.recorded import Run
from beyondprop.lab.tasks.streams import ON_TASK, average_accuracy, forgetting
from beyondprop.optim.factories import adam
from beyondprop.rules.altmin import AltMin
from beyondprop.rules.backprop import Backprop
from beyondprop.rules.ewc import OnlineEWC
from beyondprop.solvers.memory import Memory
from beyondprop.stages.losses import LossFunction

STREAMS = {
    "split, class-incremental": "split:mnist",
    "split, domain-incremental": "split:mnist:domain",
    # Five tasks are as long a stream as Split-MNIST.
    "permuted": "permuted:mnist:rows=12000",
}
"""By title: the task."""


def _memory(forgotten: float, code_solver: str = "line_search") -> Build:
    def build(model: nn.Module, loss: LossFunction, lr: float) -> AltMin:
        return AltMin(model, loss, Memory(lr=lr, max_gain=None, forgetting=forgotten), code_solver=code_solver)

    return build


def _ewc(strength: float) -> Build:
    return lambda model, loss, lr: OnlineEWC(model, loss, adam(lr), strength=strength)


# Wide: what forgets least is far below what learns fastest.
_ADAM = (8e-6, 4e-5, 2e-4, 1e-3, 5e-3)
_SGD = (0.001, 0.005, 0.025, 0.125, 0.625)
_MEMORY = (0.004, 0.02, 0.1, 0.5, 2.5)

_ROWS: tuple[tuple[str, str, Build, tuple[float, ...]], ...] = (
    ("sgd", "SGD", lambda model, loss, lr: Backprop(model, loss, partial(torch.optim.SGD, lr=lr)), _SGD),
    ("adam", "Adam", registry.rules.get("adam").build, _ADAM),
    ("ewc-100", "online EWC, strength 100", _ewc(100.0), _ADAM),
    ("ewc-1000", "online EWC, strength 1000", _ewc(1000.0), _ADAM),
    ("am-adam", "AM-Adam", EXACT["am-adam"], _ADAM),
    ("am-mem", "AM-mem, forgetting 0", _memory(0.0), _MEMORY),
    ("am-mem-0.01", "AM-mem, forgetting 0.01", _memory(0.01), _MEMORY),
    ("am-mem-0.1", "AM-mem, forgetting 0.1", _memory(0.1), _MEMORY),
    # The same memory behind plain backpropagation: what of AM-mem's result is the memory's, not the codes'.
    ("backprop-mem", "Backprop with memory, forgetting 0", _memory(0.0, "gradient"), _MEMORY),
)
CONTENDERS = tuple(RuleSpec(name, title, "", "", build, grid[2], grid) for name, title, build, grid in _ROWS)


def measure(context: Context) -> tuple[Sequence[Row], dict[str, Any]]:
    """Choose every contender's learning rate on a held-out stream, then go through the stream with every seed."""
    rows: list[Row] = []
    rates: dict[str, float] = {}
    found: dict[tuple[str, str], list[Tensor]] = {}
    for stream, form in STREAMS.items():
        task = tasks.load(form)
        assert isinstance(task, tasks.ContinualTask)
        if context.quick:
            few = max(200, len(task.dataset.y_train) // 10)
            task = replace(task, dataset=first_rows(task.dataset, few))
        own: dict[str, Any] = {"batch_size": 100, "schedule": "constant", "tune_seeds": (100,)}
        settings = usual(context, task=form, nets=("mlp:100x2",), epochs=5.0, **own)
        run = compared(context, form.replace(":", "-").replace("=", "-"), settings, CONTENDERS, task=task)
        lr, at_edge = chosen(run)
        for spec in CONTENDERS:
            matrices = [accuracies(run, spec.name, seed) for seed in settings.seeds]
            rates[f"{stream}, {spec.title}"] = lr[spec.name]
            found[stream, spec.title] = [r for r in matrices if r is not None]
            note = f"learning rate {lr[spec.name]:g}" + (", at the edge of those tried" * (spec.name in at_edge))
            for name, measure_of in (("average accuracy", average_accuracy), ("forgetting", forgetting)):
                values = tuple(math.nan if r is None else 100 * measure_of(r) for r in matrices)
                rows.append(Row(f"{stream}, {spec.title}: {name}", values, "%", digits=1, note=note))
                note = ""  # once for both
    _draw(context, found)
    return rows, {"chosen on a held-out stream": {"lr": rates}}


def accuracies(run: Run, name: str, seed: int) -> Tensor | None:
    """Return the accuracies after each task on each, `(T, T)`, rounded to 5 digits; None where the training failed."""
    if seed not in run.seeds(name)["done"]:
        return None
    rows = [row for row in run.of("eval", name, seed) if row["step"]]
    values = [[round(value, 5) for key, value in row.items() if key.startswith(ON_TASK)] for row in rows]
    return torch.tensor(values, dtype=torch.float64)


_LOOKS = {
    "SGD": "#E69F00",
    "Adam": "#D55E00",
    "AM-Adam": "#0072B2",
    "AM-mem": "#009E73",
    "online EWC": "#CC79A7",
    "Backprop with memory": "#222222",
}
_LINES = ("-", (0, (4, 1.5)), (0, (1.2, 1.2)))


def _draw(context: Context, found: Mapping[tuple[str, str], Sequence[Tensor]]) -> None:
    """Draw the mean accuracy over the tasks seen so far, after each of them; mean and range over seeds."""
    titles = [spec.title for spec in CONTENDERS]
    labels: dict[str, Any] = {"xlabel": "tasks learned", "ylabel": "test accuracy, mean of the tasks so far (%)"}
    size = (1.2 + 3.7 * len(STREAMS), 5.2)
    with panels(context, len(STREAMS), size=size, titles=list(STREAMS), legend=5, whole_x=True, **labels) as axes:
        for (panel, stream), title in product(zip(axes[0], STREAMS, strict=True), titles):
            family = title.partition(",")[0]
            line = _LINES[[name for name in titles if name.partition(",")[0] == family].index(title) % len(_LINES)]
            curves = [
                Curve(np.arange(1, len(r) + 1), np.array([100 * float(r[i, : i + 1].mean()) for i in range(len(r))]))
                for r in found[stream, title]
            ]
            draw_band(panel, curves, color=_LOOKS[family], linestyle=line, marker="o", label=title)


RECIPE = Recipe(
    title="Streams: Split-MNIST and Permuted-MNIST, one pass, no stored data",
    source="no published number of these rules; measures of Chaudhry et al., ECCV 2018, arXiv 1801.10112",
    about=(
        "784-100-100-10, batch 100, five tasks; Split-MNIST has all 60,000 rows, Permuted-MNIST 12,000 a task. Five learning "
        "rates a factor of 5 apart for each contender, chosen by average accuracy on one stream of 50,000 of the training rows "
        "tested on the other 10,000, with other permutations; then three seeds, of weights, order of rows and permutations."
    ),
    measure=measure,
    minutes=40,
    needs=("mnist",),
)
