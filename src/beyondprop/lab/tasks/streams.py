"""Streams of tasks: one pass, task by task, tested on all of them after each.

With R[i, j] the accuracy on task j's test rows after training on task i, and T tasks:

    average accuracy     A = 1/T sum_j R[T, j]                                            (Lopez-Paz & Ranzato 2017)
    forgetting           F = 1/(T-1) sum_{j<T} ( max_{i<T} R[i, j] - R[T, j] )            (Chaudhry et al. 2018, equation 3)

Lopez-Paz & Ranzato, "Gradient episodic memory for continual learning", NeurIPS 2017, arXiv 1706.08840; Chaudhry et al.,
"Riemannian walk for incremental learning", ECCV 2018, arXiv 1801.10112.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from beyondprop import _checks, data
from beyondprop.data import Dataset, PermutedStream, Progress, SplitStream, Stream
from beyondprop.lab.nets import build
from beyondprop.lab.tasks.base import Metric
from beyondprop.lab.tasks.classification import Classification
from beyondprop.lab.tasks.evaluation import ROWS, measured
from beyondprop.stages.losses import LossFunction

AVERAGE = Metric("average_accuracy", "average accuracy (%)", 100.0)
FORGETTING = Metric("forgetting", "forgetting (%)", 100.0, higher_is_better=False)
ON_TASK = "accuracy on "


@dataclass(frozen=True, eq=False)
class ContinualTask:
    """A stream whose tasks are the epochs; every row is seen once, in an order that the seed draws.

    Attributes:
        name: for tables.
        dataset: what the stream is made of.
        make: `make(dataset, seed)` returns the stream.
        seed: what the stream is drawn by.
    """

    name: str
    dataset: Dataset
    make: Callable[[Dataset, int], Stream]
    seed: int = 0
    sample: str = "row"
    epochs_are_tasks: bool = True
    stream: Any = field(init=False)
    parts: Sequence[data.StreamTask] = field(init=False)
    loss: LossFunction = field(default_factory=nn.CrossEntropyLoss)
    metrics = (AVERAGE, FORGETTING)

    def __post_init__(self) -> None:
        stream = self.make(self.dataset, self.seed)
        object.__setattr__(self, "stream", stream)
        object.__setattr__(self, "parts", list(stream))
        if not self.parts:
            raise ValueError("stream must have a task or more, got none.")

    @property
    def x_train(self) -> Tensor:
        """The data set's training rows."""
        return self.dataset.x_train

    @property
    def y_train(self) -> Tensor:
        """Their labels, the stream's where it has others."""
        return self.dataset.y_train % self.outputs

    @property
    def kind(self) -> Classification:
        """How outputs are judged."""
        return Classification(self.loss, tuple(map(str, range(self.outputs))))

    @property
    def outputs(self) -> int:
        """Outputs that a network needs."""
        return self.stream.num_classes

    @property
    def epochs(self) -> int:
        """How many tasks there are."""
        return len(self.parts)

    @property
    def epoch_rows(self) -> tuple[int, ...]:
        """The rows of each task."""
        return tuple(part.train_size for part in self.parts)

    def net(self, form: str) -> nn.Module:
        """See `Task.net`."""
        return build(form, self.dataset.input_shape, self.outputs)

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Return the accuracy on every task, those to come among them, and their mean."""
        found = {}
        for part in self.parts:
            x, y = part.test()
            pairs = zip(x.split(ROWS), y.split(ROWS), strict=True)
            found[f"{ON_TASK}{part.name}"] = measured(model, self.kind, pairs)["accuracy"]
        return {"average_accuracy": sum(found.values()) / len(found)} | found

    def over(self, evaluations: Sequence[Mapping[str, float]]) -> dict[str, float]:
        """Return forgetting after the last of the evaluations, the first of which is from before the training."""
        rows = [[value for key, value in row.items() if key.startswith(ON_TASK)] for row in evaluations[1:]]
        if len(rows) < 2:
            return {"forgetting": 0.0}
        return {"forgetting": forgetting(torch.tensor(rows, dtype=torch.float64)[:, : len(rows)])}

    def drawn(self, seed: int) -> ContinualTask:
        """Return the stream that a seed draws."""
        return replace(self, seed=seed)

    def held_out(self, share: float) -> ContinualTask:
        """See `Task.held_out`."""
        count = max(1, round(share * len(self.dataset.y_train)))
        return replace(self, dataset=self.dataset.split_validation(count, generator=torch.Generator().manual_seed(0)))

    def to(self, device: str) -> ContinualTask:
        """See `Task.to`."""
        return replace(self, dataset=self.dataset.to(device))

    def batches(self, epoch: int, batch_size: int, seed: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the batches of task number `epoch`; one generator draws the orders of all tasks, one after the other."""
        generator = torch.Generator().manual_seed(seed)
        for part in self.parts[:epoch]:
            torch.randperm(part.train_size, generator=generator)
        return islice(self.parts[epoch].batches(batch_size, generator=generator), start, None)


def average_accuracy(accuracy: Tensor) -> float:
    """Return the mean accuracy over all tasks after the last, `1/T sum_j R[T, j]`.

    Example:
        >>> round(average_accuracy(torch.tensor([[0.9, 0.1], [0.5, 0.7]])), 6)
        0.6
    """
    return float(_matrix(accuracy)[-1].mean())


def forgetting(accuracy: Tensor) -> float:
    """Return how much accuracy was lost since its best, `1/(T-1) sum_{j<T} (max_{i<T} R[i, j] - R[T, j])`.

    Chaudhry et al. 2018: the best is over all earlier moments; the last task, which nothing came after, does not count. 0 for a
    single task.

    Example:
        >>> round(forgetting(torch.tensor([[0.9, 0.1], [0.5, 0.7]])), 6)
        0.4
    """
    r = _matrix(accuracy)
    return 0.0 if len(r) == 1 else float((r[:-1, :-1].amax(0) - r[-1, :-1]).mean())


def backward_transfer(accuracy: Tensor) -> float:
    """Return how later tasks changed the accuracy on earlier ones, `1/(T-1) sum_{j<T} (R[T, j] - R[j, j])`; 0 for one task.

    Example:
        >>> round(backward_transfer(torch.tensor([[0.9, 0.1], [0.5, 0.7]])), 6)
        -0.4
    """
    r = _matrix(accuracy)
    return 0.0 if len(r) == 1 else float((r[-1, :-1] - r.diagonal()[:-1]).mean())


def _matrix(accuracy: Tensor) -> Tensor:
    if accuracy.ndim != 2 or accuracy.shape[0] != accuracy.shape[1] or not len(accuracy):
        raise ValueError(
            f"accuracy must be a square matrix, after which task by on which task, got shape {tuple(accuracy.shape)}."
        )
    return accuracy.double()


def _split(dataset: Dataset, seed: int, tasks: int, setting: str) -> Stream:
    del seed  # of the order of rows alone
    return SplitStream(dataset, tasks, setting)


def _permuted(dataset: Dataset, seed: int, tasks: int, train_size: int | None) -> Stream:
    rows = None if train_size is None else min(train_size, len(dataset.y_train))
    return PermutedStream(dataset, tasks, seed=seed, train_size=rows)


def split(rest: str, progress: Progress | None = None) -> ContinualTask:
    """Return Split-MNIST and its like for `split:DATA[:domain][:tasks=N]`."""
    name, options = _parted("split", rest, ("domain", "tasks"))
    setting = "domain-incremental" if "domain" in options else "class-incremental"
    make = partial(_split, tasks=int(options.get("tasks", 5)), setting=setting)
    return ContinualTask(f"split:{rest or name}", data.load(name, progress=progress), make)


def permuted(rest: str, progress: Progress | None = None) -> ContinualTask:
    """Return Permuted-MNIST and its like for `permuted:DATA[:tasks=N][:rows=N]`."""
    name, options = _parted("permuted", rest, ("tasks", "rows"))
    rows = int(options["rows"]) if "rows" in options else None
    make = partial(_permuted, tasks=int(options.get("tasks", 5)), train_size=rows)
    return ContinualTask(f"permuted:{rest or name}", data.load(name, progress=progress), make)


_MOST = {"tasks": 1000, "rows": 10**9}


def _parted(kind: str, rest: str, accepted: Sequence[str]) -> tuple[str, dict[str, str]]:
    name, *parts = (rest or "digits").split(":")
    options = {part.partition("=")[0]: part.partition("=")[2] for part in parts}
    for key, value in options.items():
        _checks.one_of(f"option of task {kind}", key, accepted)
        if key in _MOST and not (value.isdecimal() and len(value) < 12 and 0 < int(value) <= _MOST[key]):
            raise ValueError(f"task {kind}: {key}=N takes a whole number from 1 to {_MOST[key]}, got {value[:40]!r}.")
    return name, options
