"""Streams of tasks: one data set cut by its classes, or seen through one permutation of its inputs after the other.

A stream yields tasks in their order. What a learner may see of a task is one pass over its training batches; they are gathered
as they are asked for, and the stream keeps no row besides the data set's own. Test rows of all tasks can be asked for at any
time. Scenarios are named after van de Ven & Tolias, "Three scenarios for continual learning", 2019, arXiv 1904.07734.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from beyondprop import _checks
from beyondprop.data._dataset import Dataset, seeded

SETTINGS = ("class-incremental", "domain-incremental")


@dataclass(frozen=True, slots=True, eq=False)
class StreamTask:
    """One task of a stream: its name for tables, and the numbers of its own training rows and classes."""

    name: str
    train_size: int
    num_classes: int
    _data: Dataset
    _train_rows: Tensor
    _test_rows: Tensor
    _labels: Tensor  # from the data set's labels to the task's
    _order: Tensor | None  # of the flattened inputs

    def batches(self, batch_size: int, *, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield every training row once, in an order that a CPU generator draws, gathered batch by batch."""
        _checks.at_least("batch_size", batch_size, 1)
        order = self._train_rows[torch.randperm(self.train_size, generator=generator)]
        for rows in order.to(self._data.x_train.device).split(batch_size):
            yield self._seen(self._data.x_train, self._data.y_train, rows)

    def test(self) -> tuple[Tensor, Tensor]:
        """Return inputs and labels of the task's test rows."""
        return self._seen(self._data.x_test, self._data.y_test, self._test_rows.to(self._data.x_test.device))

    def _seen(self, x: Tensor, y: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        x = x.index_select(0, rows)
        if self._order is not None:
            x = x.flatten(1).index_select(1, self._order.to(x.device)).view_as(x)
        return x, self._labels.to(y.device)[y.index_select(0, rows)]

    def __repr__(self) -> str:
        return f"StreamTask({self.name!r}, train_size={self.train_size}, num_classes={self.num_classes})"


class Stream(Protocol):
    """What `streaming.run_stream` needs of a stream."""

    @property
    def num_classes(self) -> int:
        """Outputs that a network needs."""
        ...

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[StreamTask]: ...


class _DatasetStream:
    """The tasks made of one data set, with `input_shape` of one input and as many outputs as `num_classes`."""

    num_classes: int
    _tasks: Sequence[StreamTask]

    def __init__(self, dataset: Dataset, tasks: int) -> None:
        if not dataset.classes or dataset.y_test is None:
            raise ValueError(f"A stream needs a data set with classes and test rows, got {dataset!r}.")
        _checks.at_least("tasks", tasks, 1)
        self.dataset = dataset
        self.input_shape = dataset.input_shape

    def __len__(self) -> int:
        return len(self._tasks)

    def __iter__(self) -> Iterator[StreamTask]:
        return iter(self._tasks)


class SplitStream(_DatasetStream):
    """A data set cut by its classes: each task has some of them, and no two tasks share one.

    In the class-incremental setting labels are the data set's own: the network has an output for every class and is asked,
    without being told of tasks, which of all it is. In the domain-incremental setting labels count from 0 within each task:
    the network has as many outputs as a task has classes (Split-MNIST: is it the first or the second of its pair).

    Args:
        dataset: a classification data set.
        tasks: how many; the number of classes must be a multiple.
        setting: `"class-incremental"` or `"domain-incremental"`.
        seed: None keeps the order of the classes (0/1, 2/3, ... as usual); a number draws one.

    Raises:
        ValueError: if an argument is out of its range, or a task has no row.

    Example:
        >>> from beyondprop import data
        >>> [task.name for task in SplitStream(data.load("digits"))]
        ['0/1', '2/3', '4/5', '6/7', '8/9']
    """

    def __init__(
        self, dataset: Dataset, tasks: int = 5, setting: str = "class-incremental", *, seed: int | None = None
    ) -> None:
        super().__init__(dataset, tasks)
        self.setting: str = _checks.one_of("setting", setting, SETTINGS)
        count = dataset.num_classes
        if count % tasks:
            raise ValueError(
                f"tasks must divide the {count} classes of {dataset.name!r}, each with as many, got {tasks}."
            )
        is_local = setting == "domain-incremental"
        if is_local and tasks == count:
            raise ValueError(
                f"tasks must leave each task two classes or more where labels are counted within the task, got {tasks} for the "
                f"{tasks} classes of {dataset.name!r}."
            )
        classes = torch.arange(count)
        if seed is not None:
            classes = classes[torch.randperm(count, generator=seeded(seed))]
        self.classes: list[list[int]] = classes.view(tasks, -1).tolist()
        self.num_classes = count // tasks if is_local else count
        self._tasks = [self._task(own, is_local) for own in self.classes]

    def _task(self, own: Sequence[int], is_local: bool) -> StreamTask:
        data = self.dataset
        wanted = torch.tensor(own)
        train, test = (torch.isin(y.cpu(), wanted).nonzero().squeeze(1) for y in (data.y_train, data.y_test))
        name = "/".join(data.classes[label] for label in own)
        if not len(train) or not len(test):
            raise ValueError(f"Task {name} of {data.name!r} has {len(train)} training and {len(test)} test rows.")
        labels = torch.arange(data.num_classes)
        if is_local:
            labels = torch.full_like(labels, -1)
            labels[wanted] = torch.arange(len(own))
        return StreamTask(name, len(train), len(own), data, train, test, labels, None)


class PermutedStream(_DatasetStream):
    """A data set whose inputs are shuffled by another permutation in every task; labels stay (domain-incremental).

    Permuted MNIST, Goodfellow et al. 2013 (arXiv 1312.6211). The first task has the inputs as they are.

    Args:
        dataset: a classification data set; all its features, channels among them, are permuted alike in all rows.
        tasks: how many, >= 1.
        seed: of the permutations.
        train_size: training rows of a task, drawn anew for each; None takes all.
    """

    def __init__(self, dataset: Dataset, tasks: int = 10, *, seed: int = 0, train_size: int | None = None) -> None:
        super().__init__(dataset, tasks)
        rows = len(dataset.y_train)
        if train_size is not None and _checks.at_least("train_size", train_size, 1) > rows:
            raise ValueError(f"train_size must be <= {rows}, the training rows of {dataset.name!r}, got {train_size}.")
        generator = seeded(seed)
        features = dataset.x_train[0].numel()
        orders = [None, *(torch.randperm(features, generator=generator) for _ in range(tasks - 1))]
        self.num_classes = dataset.num_classes
        labels, test = torch.arange(self.num_classes), torch.arange(len(dataset.y_test))
        self._tasks = []
        for index, order in enumerate(orders):
            name = f"permutation {index}" if index else "as it is"
            train = torch.arange(rows) if train_size is None else torch.randperm(rows, generator=generator)[:train_size]
            self._tasks.append(StreamTask(name, len(train), self.num_classes, dataset, train, test, labels, order))
