"""Streams: what rules learn and forget on Split-MNIST and Permuted-MNIST, one pass, no stored data."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from statistics import fmean
from typing import Any

import torch
from torch import nn

from beyondprop import data
from beyondprop.data import Dataset
from beyondprop.data.streams import PermutedStream, SplitStream, Stream
from beyondprop.lab import nets
from beyondprop.lab.recipes._base import Context, Recipe, Row
from beyondprop.lab.recipes._kept import Kept
from beyondprop.lab.registry import Build
from beyondprop.lab.report._style import drawing
from beyondprop.lab.training.loop import Failed
from beyondprop.lab.training.streaming import average_accuracy, forgetting, run_stream
from beyondprop.optim.factories import adam
from beyondprop.rules.altmin import AltMin
from beyondprop.rules.backprop import Backprop
from beyondprop.rules.ewc import OnlineEWC
from beyondprop.solvers.memory import Memory
from beyondprop.stages.losses import LossFunction

NET, BATCH, TASKS = "mlp:100x2", 100, 5
SEEDS, TUNING_SEED, HELD_OUT = (0, 1, 2), 100, 10_000
PERMUTED_ROWS = 12_000
"""Training rows of a permuted task: five tasks are as long a stream as Split-MNIST."""


def _memory(forgotten: float, code_solver: str = "line_search") -> Build:
    def build(model: nn.Module, loss: LossFunction, lr: float) -> AltMin:
        return AltMin(model, loss, Memory(lr=lr, forgetting=forgotten), code_solver=code_solver)

    return build


def _ewc(strength: float) -> Build:
    return lambda model, loss, lr: OnlineEWC(model, loss, adam(lr), strength=strength)


# Wide: what forgets least is far below what learns fastest.
_ADAM = (8e-6, 4e-5, 2e-4, 1e-3, 5e-3)
_SGD = (0.001, 0.005, 0.025, 0.125, 0.625)
_MEMORY = (0.004, 0.02, 0.1, 0.5, 2.5)

CONTENDERS: Mapping[str, tuple[Build, tuple[float, ...]]] = {
    "SGD": (lambda model, loss, lr: Backprop(model, loss, partial(torch.optim.SGD, lr=lr)), _SGD),
    "Adam": (lambda model, loss, lr: Backprop(model, loss, adam(lr)), _ADAM),
    "online EWC, strength 100": (_ewc(100.0), _ADAM),
    "online EWC, strength 1000": (_ewc(1000.0), _ADAM),
    "AM-Adam": (lambda model, loss, lr: AltMin(model, loss, adam(lr)), _ADAM),
    "AM-mem, forgetting 0": (_memory(0.0), _MEMORY),
    "AM-mem, forgetting 0.01": (_memory(0.01), _MEMORY),
    "AM-mem, forgetting 0.1": (_memory(0.1), _MEMORY),
    # The same memory behind plain backpropagation: what of AM-mem's result is the memory's, not the codes'.
    "Backprop with memory, forgetting 0": (_memory(0.0, "gradient"), _MEMORY),
}
"""By name: how to build it, and the learning rates that are tried."""

STREAMS: Mapping[str, Callable[[Dataset, int], Stream]] = {
    "split, class-incremental": lambda dataset, seed: SplitStream(dataset, TASKS),
    "split, domain-incremental": lambda dataset, seed: SplitStream(dataset, TASKS, "domain-incremental"),
    "permuted": lambda dataset, seed: PermutedStream(
        dataset, TASKS, seed=seed, train_size=min(PERMUTED_ROWS, len(dataset.y_train))
    ),
}
"""By name: the stream of a data set and a seed, which chooses permutations."""


def train(stream: str, contender: str, lr: float, seed: int, dataset: Dataset) -> list[list[float]] | None:
    """Return the matrix of accuracies that one pass leads to, rounded to 5 digits; None where it failed."""
    tasks = STREAMS[stream](dataset, seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = nets.build(NET, dataset.input_shape, tasks.num_classes)
        rule = CONTENDERS[contender][0](model, nn.CrossEntropyLoss(), lr)
        try:
            found = run_stream(rule, tasks, batch_size=BATCH, seed=seed)
        except Failed:
            return None
    return [[round(value, 5) for value in row] for row in found.accuracy.tolist()]


@dataclass(frozen=True)
class _Trials:
    """Passes that are made once, and told of."""

    context: Context
    kept: Kept
    dataset: Dataset
    held: Dataset

    def get(self, stream: str, contender: str, lr: float, seed: int) -> torch.Tensor | None:
        """Return R of a stream; with the seed for tuning it is of held-out rows, and other permutations."""
        dataset = self.held if seed == TUNING_SEED else self.dataset
        key = f"{stream} / {contender} / {lr:g} / seed {seed}"
        is_new = key not in self.kept.values
        found = self.kept.get(key, partial(train, stream, contender, lr, seed, dataset))
        matrix = None if found is None else torch.tensor(found, dtype=torch.float64)
        if is_new:
            self.context.say(f"{key}: " + ("failed" if matrix is None else f"{100 * average_accuracy(matrix):.1f} %"))
        return matrix

    def choose(self, stream: str, contender: str) -> tuple[float, bool]:
        """Return the learning rate with the best average accuracy, and whether it is at the edge of those tried."""
        rates = CONTENDERS[contender][1]
        rates = rates[1:3] if self.context.quick else rates
        found = {lr: self.get(stream, contender, lr, TUNING_SEED) for lr in rates}
        best = max(rates, key=lambda lr: -1.0 if (r := found[lr]) is None else average_accuracy(r))
        return best, best in (rates[0], rates[-1])


def measure(context: Context) -> tuple[Sequence[Row], dict[str, Any]]:
    """Choose every contender's learning rate on a held-out stream, then go through the stream with every seed."""
    dataset = data.load("mnist")
    if context.quick:
        few = max(200, len(dataset.y_train) // 10)
        dataset = replace(dataset, x_train=dataset.x_train[:few], y_train=dataset.y_train[:few])
    held_out = min(HELD_OUT, len(dataset.y_train) // 6)
    held = dataset.split_validation(held_out, generator=torch.Generator().manual_seed(0))
    settings = {"net": NET, "batch": BATCH, "tasks": TASKS, "rows": len(dataset.y_train), "permuted": PERMUTED_ROWS}
    trials = _Trials(context, Kept(context.out / "trials.json", settings), dataset, held)
    rows: list[Row] = []
    rates: dict[str, float] = {}
    found: dict[tuple[str, str], list[torch.Tensor]] = {}
    for stream, contender in product(STREAMS, CONTENDERS):
        lr, edge = trials.choose(stream, contender)
        matrices = [trials.get(stream, contender, lr, seed) for seed in (SEEDS[:1] if context.quick else SEEDS)]
        rates[f"{stream}, {contender}"] = lr
        found[stream, contender] = [r for r in matrices if r is not None]
        note = f"learning rate {lr:g}" + (", at the edge of those tried" if edge else "")
        for name, measure_of in (("average accuracy", average_accuracy), ("forgetting", forgetting)):
            values = tuple(math.nan if r is None else 100 * measure_of(r) for r in matrices)
            rows.append(Row(f"{stream}, {contender}: {name}", values, "%", digits=1, note=note))
            note = ""  # once for both
    _draw(context, found)
    return rows, {"chosen on a held-out stream": {"lr": rates}}


_LOOKS = {
    "SGD": "#E69F00",
    "Adam": "#D55E00",
    "AM-Adam": "#0072B2",
    "AM-mem": "#009E73",
    "online EWC": "#CC79A7",
    "Backprop with memory": "#222222",
}
_LINES = ("-", (0, (4, 1.5)), (0, (1.2, 1.2)))


def _draw(context: Context, found: Mapping[tuple[str, str], Sequence[torch.Tensor]]) -> None:
    """Draw the mean accuracy over the tasks seen so far, after each of them; mean and range over seeds."""
    with drawing():
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator

        figure = Figure(figsize=(1.2 + 3.7 * len(STREAMS), 5.2), layout="constrained")
        panels = figure.subplots(1, len(STREAMS), squeeze=False)[0]
        handles: dict[str, Any] = {}
        for (stream, name), matrices in found.items():
            axes = panels[list(STREAMS).index(stream)]
            family = name.partition(",")[0]
            line = _LINES[[n for n in CONTENDERS if n.partition(",")[0] == family].index(name) % len(_LINES)]
            curves = [[100 * float(r[i, : i + 1].mean()) for i in range(len(r))] for r in matrices]
            if not curves:
                continue
            x, after = list(range(1, len(curves[0]) + 1)), list(zip(*curves, strict=True))
            color = _LOOKS[family]
            axes.fill_between(x, list(map(min, after)), list(map(max, after)), color=color, alpha=0.15, linewidth=0)
            (handles[name],) = axes.plot(x, list(map(fmean, after)), color=color, linestyle=line, marker="o")
        for axes, stream in zip(panels, STREAMS, strict=True):
            axes.set_title(stream)
            axes.set_xlabel("tasks learned")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        panels[0].set_ylabel("test accuracy, mean of the tasks so far (%)")
        figure.legend(list(handles.values()), list(handles), loc="outside upper center", ncols=5)
        figure.savefig(context.out / "figure.png", dpi=150)


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
