"""What `fit` and `evaluate` are given, as tasks: tensors, data sets, DataLoaders."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from torch.utils.data import Dataset as TorchDataset

from beyondprop import _checks
from beyondprop.lab.tasks.base import Kind, Metric, Task
from beyondprop.lab.tasks.classification import Classification
from beyondprop.lab.tasks.evaluation import ROWS, measured
from beyondprop.lab.tasks.regression import LossOnly
from beyondprop.lab.tasks.rows import RowsTask, seed_of
from beyondprop.stages.losses import LossFunction


@dataclass(frozen=True, eq=False)
class LoaderTask:
    """Batches from a DataLoader, whose order and size are its own.

    Its shuffling, with the generator of its own where it has one, is seeded by the training's seed and the epoch. A batch is a
    pair whose first part is what the model takes: a tensor, a tuple, a dict.

    Attributes:
        loader: of the training batches.
        test: of the batches to evaluate on, a pair of tensors, or None.
        kind: how outputs are judged.
    """

    loader: Any
    test: Any
    kind: Kind
    name: str = "loader"
    sample: str = "row"

    @property
    def loss(self) -> LossFunction:
        """The loss that outputs are judged by."""
        return self.kind.loss

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """What `evaluate` measures; nothing where there is nothing to evaluate on."""
        return () if self.test is None else self.kind.metrics

    @property
    def steps(self) -> int:
        """Batches of an epoch."""
        return len(self.loader)

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """See `Task.evaluate`."""
        if self.test is None:
            return {}
        with torch.random.fork_rng(devices=[]):  # a loader draws, and a look at the model must not change its training
            return measured(model, self.kind, pairs_of(self.test, device_of(model)))

    def batches(self, epoch: int, batch_size: int, seed: int, start: int = 0) -> Iterator[tuple[Any, Tensor]]:
        """Yield an epoch's batches, from number `start` on."""
        del batch_size
        drawn = seed_of(seed, epoch)
        for owner in (self.loader, getattr(self.loader, "sampler", None)):
            if isinstance(generator := getattr(owner, "generator", None), torch.Generator):
                generator.manual_seed(drawn)
            if (set_epoch := getattr(owner, "set_epoch", None)) is not None:  # of a distributed sampler
                set_epoch(epoch)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(drawn)
            pairs = iter(self.loader)
            # A sampler draws its seed with the first batch; what was done before an interruption draws nothing again.
            begun = list(islice(pairs, start + 1))[start:]
        for batch in chain(begun, pairs):
            yield _pair(batch)


def _pair(batch: Any) -> tuple[Any, Tensor]:
    if not isinstance(batch, tuple | list) or len(batch) != 2:
        found = f"{len(batch)} parts" if isinstance(batch, tuple | list) else type(batch).__name__
        raise ValueError(f"A batch of the loader must be a pair of inputs and targets, got {found}.")
    x, y = batch
    return (tuple(x) if isinstance(x, list) else x), y  # a pair as the data set had it, which collating makes a list


def _is_pair(rows: Any) -> bool:
    return isinstance(rows, tuple | list) and len(rows) == 2 and all(isinstance(part, Tensor) for part in rows)


def moved(value: Any, device: torch.device) -> Any:
    """Return nested tensors on a device."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: moved(item, device) for key, item in value.items()}
    return type(value)(moved(item, device) for item in value) if isinstance(value, tuple | list) else value


def device_of(model: nn.Module) -> torch.device:
    """Return where a model's first parameter is."""
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def pairs_of(rows: Any, device: torch.device) -> Iterator[tuple[Any, Tensor]]:
    """Yield pairs of inputs and targets of a pair of tensors, or of a DataLoader, on a device."""
    if _is_pair(rows):
        _checks.batch(*rows)
        yield from zip(rows[0].split(ROWS), rows[1].split(ROWS), strict=True)
    else:
        for batch in rows:
            x, y = _pair(batch)
            yield moved(x, device), moved(y, device)


def kind_of(loss: LossFunction, y: Any) -> Kind:
    """Return how targets like these are judged: labels `(N,)` in int64 by accuracy, too."""
    is_labels = isinstance(y, Tensor) and y.ndim == 1 and y.dtype == torch.int64
    return Classification(loss) if is_labels else LossOnly(loss)


def _check_test(rows: Any, test: Any) -> None:
    is_loader = isinstance(rows, DataLoader)
    if not (is_loader or _is_pair(rows)):
        raise TypeError(
            f"test goes beside a pair of tensors or a DataLoader; a {type(rows).__name__} has its own test rows."
        )
    if not (_is_pair(test) or (is_loader and isinstance(test, DataLoader))):
        given = f"{len(test)} parts" if isinstance(test, tuple | list) else type(test).__name__
        raise TypeError(f"test must be a pair of tensors (x, y){' or a DataLoader' * is_loader}, got {given}.")


def as_task(rows: Any, loss: LossFunction, test: Any = None) -> Task | LoaderTask:
    """Return what `fit` or `evaluate` was given as a task.

    Args:
        rows: a task; a data set or anything else with `x_train`, `y_train` and, where there are any, `x_test`, `y_test`; a pair
            of tensors; or a DataLoader.
        loss: what outputs are judged by, but for a task, which has its own.
        test: rows to evaluate on beside a pair of tensors (a pair, too) or a DataLoader (a pair or a DataLoader).

    Raises:
        TypeError: if it is something else; the message says what is accepted.
    """
    if test is not None:
        _check_test(rows, test)
    if hasattr(rows, "evaluate") and hasattr(rows, "metrics"):
        return rows
    if isinstance(rows, DataLoader):
        if not hasattr(rows, "__len__") or isinstance(rows.dataset, IterableDataset):
            raise TypeError("A DataLoader over an IterableDataset has no known length; give a map-style dataset.")
        with torch.random.fork_rng(devices=[]):
            first = next(iter(test), (None, None)) if isinstance(test, DataLoader) else test or (None, None)
        return LoaderTask(rows, test, kind_of(loss, first[1]))
    if _is_pair(rows):
        x_test, y_test = test or (None, None)
        found: dict[str, Any] = {"x_train": rows[0], "y_train": rows[1], "x_test": x_test, "y_test": y_test}
    elif hasattr(rows, "x_train") and hasattr(rows, "y_train"):
        found = {key: getattr(rows, key, None) for key in ("x_train", "y_train", "x_test", "y_test")}
    else:
        raise TypeError(
            "data must be a task, a data set with x_train and y_train, a pair of tensors (x, y), or a DataLoader; got "
            f"{type(rows).__name__}."
        )
    _checks.batch(found["x_train"], found["y_train"])
    if found["x_test"] is not None:
        _checks.batch(found["x_test"], found["y_test"])
    return RowsTask(name=str(getattr(rows, "name", "rows")), kind=kind_of(loss, found["y_train"]), **found)


def evaluate(model: nn.Module, rows: Any, loss: LossFunction | None = None) -> dict[str, float]:
    """Evaluate in evaluation mode and give every module its mode back.

    Args:
        model: any module.
        rows: a task or a data set with `x_test` and `y_test`, whose test rows are taken; a pair of tensors `(x, y)`; or a
            DataLoader of such pairs.
        loss: `loss(output, y)`; a task has its own. One that says `reduction="sum"` is given per row; one that does not say
            how it reduces is called once, on all rows. Default: cross-entropy for labels `(N,)` in int64, else mean squared
            error.

    Returns:
        The metrics by key: `"accuracy"` for labels, `"loss"`, ....

    Raises:
        TypeError: if `rows` is nothing that can be evaluated on; the message says what is.
        ValueError: if there are no rows, or targets do not fit the outputs.
    """
    if hasattr(rows, "evaluate") and hasattr(rows, "metrics"):
        return rows.evaluate(model)
    if hasattr(rows, "x_train") or hasattr(rows, "x_test"):
        if getattr(rows, "x_test", None) is None or getattr(rows, "y_test", None) is None:
            raise ValueError(
                f"{type(rows).__name__} has no test rows (x_test and y_test). Give a pair of tensors, such as "
                "(rows.x_train, rows.y_train)."
            )
        rows = rows.x_test, rows.y_test
    is_map = isinstance(rows, TorchDataset) and not isinstance(rows, IterableDataset)  # of single rows
    if isinstance(rows, Tensor | str | dict) or not isinstance(rows, Iterable) or is_map:
        raise TypeError(
            "rows must be a task, a data set with x_test and y_test, a pair of tensors (x, y), or a DataLoader; got "
            f"{type(rows).__name__}."
        )
    with torch.random.fork_rng(devices=[]):  # a loader draws
        pairs = pairs_of(rows, device_of(model))
        first = next(pairs, None)
        if first is None:
            raise ValueError("There are no rows to evaluate on.")
        if loss is None:
            loss = nn.CrossEntropyLoss() if first[1].dtype == torch.int64 else nn.MSELoss()
        return measured(model, kind_of(loss, first[1]), chain([first], pairs))
