"""Streams: what rules learn and forget on Split-MNIST and Permuted-MNIST, one pass, no stored data.

No published number is claimed for these rules on these streams; the recipe measures AM-mem (with its memory's forgetting),
AM-Adam, SGD and Adam, and online EWC as the replay-free baseline, under one protocol: every contender gets a grid of three
learning rates, chosen by average accuracy on a held-out stream (held-out training rows in place of the test rows, and other
permutations), then three seeds on the stream itself. A seed gives the initial weights, the order of the rows and, for
Permuted-MNIST, the permutations.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from beyondprop import data, nets
from beyondprop._files import write_atomically
from beyondprop.data import Dataset
from beyondprop.data.streams import PermutedStream, SplitStream, Stream
from beyondprop.losses import LossFunction
from beyondprop.recipes._base import Context, Recipe, Row
from beyondprop.registry import Build
from beyondprop.report._style import drawing
from beyondprop.rules.altmin import AltMin
from beyondprop.rules.backprop import Backprop
from beyondprop.rules.ewc import OnlineEWC
from beyondprop.solvers.descent import adam
from beyondprop.solvers.memory import Memory
from beyondprop.streaming import run_stream
from beyondprop.training import Failed

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NET = "mlp:100x2"
SEEDS = (0, 1, 2)
HELD_OUT = 10_000
TUNING_SEED = 100
PERMUTED_ROWS = 12_000
"""Training rows of a permuted task: five tasks are as long a stream as Split-MNIST."""


def _memory(forgetting: float, code_solver: str = "line_search") -> Build:
    def build(model: nn.Module, loss: LossFunction, lr: float) -> AltMin:
        return AltMin(model, loss, Memory(lr=lr, forgetting=forgetting), code_solver=code_solver)

    return build


def _ewc(strength: float) -> Build:
    return lambda model, loss, lr: OnlineEWC(model, loss, adam(lr), strength=strength)


# Wide: what forgets least is far below what learns fastest.
_ADAM = (4e-5, 2e-4, 1e-3)
_SGD = (0.001, 0.005, 0.025)
_MEMORY = (0.02, 0.06, 0.2)

CONTENDERS: Mapping[str, tuple[Build, tuple[float, ...]]] = {
    "SGD": (lambda model, loss, lr: Backprop(model, loss, partial(torch.optim.SGD, lr=lr)), _SGD),
    "Adam": (lambda model, loss, lr: Backprop(model, loss, adam(lr)), _ADAM),
    "online EWC, strength 100": (_ewc(100.0), _ADAM),
    "online EWC, strength 1000": (_ewc(1000.0), _ADAM),
    "online EWC, strength 10000": (_ewc(10_000.0), _ADAM),
    "AM-Adam": (lambda model, loss, lr: AltMin(model, loss, adam(lr)), _ADAM),
    "AM-mem, forgetting 0": (_memory(0.0), _MEMORY),
    "AM-mem, forgetting 0.01": (_memory(0.01), _MEMORY),
    "AM-mem, forgetting 0.1": (_memory(0.1), _MEMORY),
    # The same memory behind plain backpropagation: what of AM-mem's result is the memory's, not the codes'.
    "Backprop with memory, forgetting 0": (_memory(0.0, "gradient"), _MEMORY),
}
"""By name: how to build it, and the learning rates that are tried."""

STREAMS: Mapping[str, Callable[[Dataset, int, bool], Stream]] = {
    "split-mnist, class-incremental": lambda dataset, seed, tuning: SplitStream(dataset),
    "split-mnist, domain-incremental": lambda dataset, seed, tuning: SplitStream(dataset, setting="domain-incremental"),
    "permuted-mnist": lambda dataset, seed, tuning: PermutedStream(
        dataset, 2 if tuning else 5, seed=seed, train_size=min(PERMUTED_ROWS, len(dataset.y_train))
    ),
}
"""By name: the stream of a data set, a seed, and whether a learning rate is being chosen."""


@dataclass(frozen=True, slots=True)
class Trial:
    """One pass over one stream.

    Attributes:
        stream: its name.
        contender: its name.
        lr: learning rate.
        seed: see the module.
        tuning: whether it was on the held-out stream.
        average_accuracy: see `streaming`; 0 where it failed.
        forgetting: likewise.
        backward_transfer: likewise.
        accuracy: R, rounded to 5 digits; empty where it failed.
        failure: what ended it, or None.
    """

    stream: str
    contender: str
    lr: float
    seed: int
    tuning: bool
    average_accuracy: float
    forgetting: float
    backward_transfer: float
    accuracy: list[list[float]]
    failure: str | None = None


def run(
    quick: bool,
    out: Path,
    *,
    dataset: Dataset | None = None,
    batch_size: int = 100,
    streams: Sequence[str] = tuple(STREAMS),
    contenders: Sequence[str] = tuple(CONTENDERS),
    say: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Measure, write `streams.json` and `streams.png` into `out`, and return what the JSON holds.

    What `streams.json` has already is not measured again: a run that was stopped goes on.

    Args:
        quick: one seed, two learning rates and a tenth of the training rows; the numbers are not those of the full run.
        out: a folder, made where it is missing.
        dataset: what the streams are made of; default: MNIST.
        batch_size: rows in a batch.
        streams: names out of `STREAMS`.
        contenders: names out of `CONTENDERS`.
        say: called with a line after every trial.
    """
    dataset = dataset or data.load("mnist")
    generator = torch.Generator().manual_seed(0)
    if quick:
        few = torch.randperm(len(dataset.y_train), generator=generator)[: max(200, len(dataset.y_train) // 10)]
        dataset = Dataset(
            dataset.name, dataset.x_train[few], dataset.y_train[few], dataset.x_test, dataset.y_test, dataset.classes
        )
    held = dataset.split_validation(min(HELD_OUT, len(dataset.y_train) // 6), generator=generator)
    out.mkdir(parents=True, exist_ok=True)
    file = out / "streams.json"
    settings = {"experiment": "streams", "quick": quick, "data": dataset.name, "net": NET, "batch_size": batch_size}
    trials = _done(file, settings)

    def trial(stream: str, contender: str, lr: float, seed: int, *, tuning: bool) -> Trial:
        key = (stream, contender, lr, seed, tuning)
        for done in trials:
            if (done.stream, done.contender, done.lr, done.seed, done.tuning) == key:
                return done
        found = _trial(stream, contender, lr, seed, held if tuning else dataset, batch_size, tuning=tuning)
        trials.append(found)
        _write(file, settings, trials, _table(trials))
        if say is not None:
            what = "tuning" if tuning else f"seed {seed}"
            say(
                f"{stream}, {contender}, lr {lr:g}, {what}: {found.average_accuracy:.4f} {found.failure or ''}".rstrip()
            )
        return found

    for stream in streams:
        for contender in contenders:
            grid = CONTENDERS[contender][1][: 2 if quick else None]
            tried = {lr: trial(stream, contender, lr, TUNING_SEED, tuning=True).average_accuracy for lr in grid}
            best = max(tried, key=lambda lr: tried[lr])
            for seed in SEEDS[: 1 if quick else None]:
                trial(stream, contender, best, seed, tuning=False)
    table = _table(trials)
    found = _write(file, settings, trials, table)
    with drawing():
        draw(table, trials).savefig(out / "streams.png", metadata={"Software": None})
    return found


def _trial(
    stream: str, contender: str, lr: float, seed: int, dataset: Dataset, batch_size: int, *, tuning: bool
) -> Trial:
    tasks = STREAMS[stream](dataset, seed, tuning)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = nets.build(NET, dataset.input_shape, tasks.num_classes)
        rule = CONTENDERS[contender][0](model, nn.CrossEntropyLoss(), lr)
        try:
            found = run_stream(rule, tasks, batch_size=batch_size, seed=seed)
        except Failed as error:
            return Trial(stream, contender, lr, seed, tuning, 0.0, 0.0, 0.0, [], " ".join(str(error).split()))
    rounded = [[round(value, 5) for value in row] for row in found.accuracy.tolist()]
    return Trial(
        stream,
        contender,
        lr,
        seed,
        tuning,
        average_accuracy=round(found.average_accuracy, 5),
        forgetting=round(found.forgetting, 5),
        backward_transfer=round(found.backward_transfer, 5),
        accuracy=rounded,
    )


def _table(trials: Sequence[Trial]) -> list[dict[str, Any]]:
    """Return a row for every contender on every stream that it has gone through, this time or before."""
    rows = []
    for stream in STREAMS:
        for contender in CONTENDERS:
            own = [trial for trial in trials if (trial.stream, trial.contender) == (stream, contender)]
            seeds = [trial for trial in own if not trial.tuning]
            if seeds:
                tried = {trial.lr: trial.average_accuracy for trial in own if trial.tuning}
                rows.append(_summary(stream, contender, seeds[0].lr, tried, seeds))
    return rows


def _summary(stream: str, contender: str, lr: float, tried: dict[float, float], seeds: list[Trial]) -> dict[str, Any]:
    row: dict[str, Any] = {"stream": stream, "contender": contender, "lr": lr}
    row["tuned"] = {f"{rate:g}": value for rate, value in tried.items()}
    for name in ("average_accuracy", "forgetting", "backward_transfer"):
        values = [getattr(trial, name) for trial in seeds]
        row[name] = {"mean": round(fmean(values), 5), "low": min(values), "high": max(values)}
    row["seeds"] = len(seeds)
    row["failed"] = sum(trial.failure is not None for trial in seeds)
    return row


def _done(file: Path, settings: dict[str, Any]) -> list[Trial]:
    if not file.is_file():
        return []
    found = json.loads(file.read_text(encoding="utf-8"))
    differing = [name for name, value in settings.items() if found.get(name) != value]
    if differing:
        raise FileExistsError(f"{str(file)!r} is of another run: {', '.join(differing)} differ. Choose another folder.")
    return [Trial(**trial) for trial in found["trials"]]


def _write(
    file: Path, settings: dict[str, Any], trials: Sequence[Trial], table: list[dict[str, Any]]
) -> dict[str, Any]:
    content = {**settings, "table": table, "trials": [asdict(trial) for trial in trials]}
    lines = json.dumps(content | {"trials": []}, indent=1)[:-2].rsplit('"trials": []', 1)[0]
    rows = ",\n  ".join(json.dumps(trial) for trial in content["trials"])
    write_atomically(file, f'{lines}"trials": [\n  {rows}\n ]\n}}\n'.encode())
    return content


_LOOKS = {
    "SGD": "#E69F00",
    "Adam": "#D55E00",
    "AM-Adam": "#0072B2",
    "AM-mem": "#009E73",
    "online EWC": "#CC79A7",
    "Backprop with memory": "#222222",
}
_LINES = ("-", (0, (4, 1.5)), (0, (1.2, 1.2)))


def draw(table: Sequence[Mapping[str, Any]], trials: Sequence[Trial]) -> Figure:
    """Draw, for each stream, the mean accuracy over the tasks seen so far, after each of them; mean and range over seeds."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    streams = list(dict.fromkeys(row["stream"] for row in table))
    figure = Figure(figsize=(1.2 + 3.7 * len(streams), 5.2), dpi=150, layout="constrained")
    panels = figure.subplots(1, len(streams), squeeze=False)[0]
    handles: dict[str, Any] = {}
    for axes, stream in zip(panels, streams, strict=True):
        for row in (row for row in table if row["stream"] == stream):
            name, key = row["contender"], (stream, row["contender"], row["lr"])
            family = name.partition(",")[0]
            line = _LINES[[n for n in CONTENDERS if n.partition(",")[0] == family].index(name) % len(_LINES)]
            curves = [
                [100 * fmean(after[: i + 1]) for i, after in enumerate(trial.accuracy)]
                for trial in trials
                if (trial.stream, trial.contender, trial.lr) == key and not trial.tuning and trial.accuracy
            ]
            if not curves:
                continue
            x = list(range(1, len(curves[0]) + 1))
            color = _LOOKS.get(family, "#222222")
            axes.fill_between(
                x, [min(c) for c in zip(*curves, strict=True)], [max(c) for c in zip(*curves, strict=True)],
                color=color, alpha=0.15, linewidth=0,
            )  # fmt: skip
            (handles[name],) = axes.plot(
                x, [fmean(c) for c in zip(*curves, strict=True)], color=color, linestyle=line, marker="o"
            )
        axes.set_title(stream)
        axes.set_xlabel("tasks learned")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    panels[0].set_ylabel("test accuracy, mean of the tasks so far (%)")
    figure.legend(list(handles.values()), list(handles), loc="outside upper center", ncols=min(5, 2 * len(streams) - 1))
    return figure


def reproduce(context: Context) -> tuple[Sequence[Row], dict[str, Any]]:
    """Run all streams; two rows for each contender on each of them."""
    found = run(context.quick, context.out, say=context.say)
    (context.out / "streams.png").replace(context.out / "figure.png")
    trials = [trial for trial in found["trials"] if not trial["tuning"]]
    rows, rates = [], {}
    for line in found["table"]:
        key = (line["stream"], line["contender"])
        own = [trial for trial in trials if (trial["stream"], trial["contender"]) == key]
        name = ": ".join(key)
        rates[name] = line["lr"]
        for what in ("average_accuracy", "forgetting"):
            values = tuple(float("nan") if trial["failure"] else 100 * trial[what] for trial in own)
            rows.append(Row(f"{name}, {what.replace('_', ' ')}", values, "%", digits=1))
    return rows, {"chosen on a held-out stream": {"lr": rates}}


RECIPE = Recipe(
    title="Streams: Split-MNIST and Permuted-MNIST, one pass, no stored data",
    source="no published number of these rules; measures of Chaudhry et al., ECCV 2018, arXiv 1801.10112",
    about=(
        "784-100-100-10, batch 100; three learning rates for each contender, chosen by average accuracy on a held-out stream, "
        "then three seeds."
    ),
    measure=reproduce,
    minutes=90,
    needs=("mnist",),
)
