"""`Dataset`, a data set as four tensors, and `batches`, one epoch of mini-batches over tensors."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from beyondprop import _checks

KINDS = ("classification", "regression")


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Dataset:
    """A data set in memory: for classification with `classes`, for regression without.

    Attributes:
        name: The name that `load` knows it by, for example `"mnist"`, or its file's.
        x_train: Inputs `(N, *input_shape)`, floating point, scaled and ready for a network.
        y_train: Labels `(N,)`, int64, `0 … num_classes - 1`; for regression numbers `(N, k)`, floating point.
        x_test: Inputs `(M, *input_shape)` that training and tuning never see; None where there are no test rows.
        y_test: Their labels `(M,)` or numbers `(M, k)`; None where there are no test rows.
        classes: The label names, in the order of the labels; empty for regression.
        targets: The names of the k numbers; by default `("target",)`, or `("target0", "target1", …)`.
        features: The names of the inputs' columns, where there are any.

    Raises:
        TypeError: Inputs are not floating point, or targets not of their kind's type and shape.
        ValueError: Rows, shapes, labels or names do not fit together.
    """

    name: str
    x_train: Tensor
    y_train: Tensor
    # Any stands for None: nearly every set has test rows, and whoever takes one of those need not ask.
    x_test: Tensor | Any = None
    y_test: Tensor | Any = None
    classes: tuple[str, ...] = ()
    targets: tuple[str, ...] = ()
    features: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self._check_part("train", self.x_train, self.y_train)
        if self.x_test is not None and self.y_test is not None:
            self._check_part("test", self.x_test, self.y_test)
            for key, train, test in (("x", self.x_train, self.x_test), ("y", self.y_train, self.y_test)):
                if train.shape[1:] != test.shape[1:]:
                    raise ValueError(
                        f"{key}_train has rows of shape {tuple(train.shape[1:])} and {key}_test of shape "
                        f"{tuple(test.shape[1:])}; they must be equal."
                    )
        elif self.x_test is not None or self.y_test is not None:
            raise ValueError("x_test and y_test must be given both or not at all.")
        count = 0 if self.classes else self.y_train.shape[1]
        if not self.targets and count:
            names = ("target",) if count == 1 else tuple(f"target{index}" for index in range(count))
            object.__setattr__(self, "targets", names)
        if len(self.targets) != count:
            raise ValueError(f"targets must name {count} columns of y_train, got {self.targets!r}.")
        if self.features and self.input_shape != (len(self.features),):
            raise ValueError(f"features has {len(self.features)} names for inputs of shape {self.input_shape}.")

    def _check_part(self, part: str, x: Tensor, y: Tensor) -> None:
        _checks.batch(x, y)
        if not x.is_floating_point():
            raise TypeError(f"x_{part} must be floating point, got {x.dtype}.")
        got = f"got {y.dtype} of shape {tuple(y.shape)}"
        if not self.classes:
            if y.is_floating_point() and y.ndim == 2:
                return
            raise TypeError(
                f"y_{part} must be floating point of shape (N, k), {got}; labels need the names of their classes."
            )
        if y.dtype != torch.int64 or y.ndim != 1:
            raise TypeError(f"y_{part} must be int64 of shape (N,), {got}.")
        low, high = int(y.min()), int(y.max())
        if low < 0 or high >= len(self.classes):
            raise ValueError(
                f"y_{part} has labels {low} … {high}; {len(self.classes)} classes accept 0 … {len(self.classes) - 1}."
            )

    def __repr__(self) -> str:
        tested = 0 if self.y_test is None else len(self.y_test)
        found = f"num_classes={self.num_classes}"
        if self.targets:
            found = f"targets={self.targets if self.outputs < 5 else self.outputs}"
        return (
            f"Dataset({self.name!r}, train={len(self.y_train)}, test={tested}, input_shape={self.input_shape}, {found})"
        )

    @property
    def input_shape(self) -> tuple[int, ...]:
        """The shape of one input, without the batch dimension."""
        return tuple(self.x_train.shape[1:])

    @property
    def num_classes(self) -> int:
        """How many classes there are; 0 for regression."""
        return len(self.classes)

    @property
    def kind(self) -> str:
        """`"classification"` or `"regression"`."""
        return KINDS[not self.classes]

    @property
    def outputs(self) -> int:
        """How many numbers a network answers a row with: one for each class, or for each target."""
        return len(self.classes or self.targets)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Dataset:
        """Return this set with all tensors on `device`, inputs and targets in `dtype`; labels stay int64.

        Raises:
            TypeError: `dtype` is not floating point.
        """
        keys = ("x_train", "y_train", "x_test", "y_test")
        parts = {key: part for key in keys if (part := getattr(self, key)) is not None}
        moved = {key: part.to(device, dtype if part.is_floating_point() else None) for key, part in parts.items()}
        return replace(self, **moved)

    def split_validation(self, fraction_or_count: float, *, generator: torch.Generator) -> Dataset:
        """Return a set for tuning: rows held out of the training part take the place of the test rows.

        The test rows are not in the result, so that what is tuned on it has never seen them. Equal generator
        states give equal splits; both parts keep the order of the training part.

        Args:
            fraction_or_count: How much of the training part to hold out: a float strictly between 0 and 1 is
                a fraction, rounded to whole rows; an int is a number of rows. Both sides need a row or more.
            generator: Where the choice of rows comes from.

        Raises:
            TypeError: `generator` is not a `torch.Generator`.
            ValueError: The amount is out of range.
        """
        if not isinstance(generator, torch.Generator):
            raise TypeError(f"generator must be a torch.Generator, got {type(generator).__name__}.")
        accepted = "fraction_or_count must be a float in (0, 1) or an int in 1 … {last}"
        halves = split_rows(len(self.y_train), fraction_or_count, 1, generator, accepted)
        kept, held_out = (rows.to(self.x_train.device) for rows in halves)
        x, y = self.x_train, self.y_train
        return replace(self, x_train=x[kept], y_train=y[kept], x_test=x[held_out], y_test=y[held_out])


def seeded(seed: int) -> torch.Generator:
    """Return a CPU generator of a seed in 0 … 2^64 - 1, what torch takes."""
    if _checks.at_least("seed", seed, 0) >= 2**64:
        raise ValueError("seed must be an integer in 0 … 2^64 - 1, got a larger one.")
    return torch.Generator().manual_seed(seed)


def split_rows(rows: int, amount: Any, least: int, generator: torch.Generator, accepted: str) -> tuple[Tensor, Tensor]:
    """Draw `amount` of the rows, a share or a number >= `least`; return the others and those, both in rising order.

    `accepted` begins the message of the error for any other amount, with `{last}` for the largest number.
    """
    count = amount
    if isinstance(amount, float) and 0 < amount < 1:
        count = round(amount * rows) or -1  # a share that gives no row is refused
    if isinstance(count, bool) or not isinstance(count, int) or not least <= count < rows:
        raise ValueError(
            f"{accepted.format(last=rows - 1)}, and leave a row or more on both sides, got {amount!r} of {rows} rows."
        )
    order = torch.randperm(rows, generator=generator, device=generator.device)
    return order[count:].sort().values, order[:count].sort().values


def batches(
    x: Tensor, y: Tensor, batch_size: int, *, generator: torch.Generator | None, drop_last: bool = False, start: int = 0
) -> Iterator[tuple[Tensor, Tensor]]:
    """One epoch over the rows of `x` and `y`, as copies gathered on the tensors' own device.

    The order is drawn when this is called, exactly once, whatever part of the epoch is then used. To resume
    in mid-epoch, set the generator to its state before that call and pass the number of batches done as
    `start`.

    Args:
        x: Inputs `(N, …)`.
        y: Targets `(N, …)`.
        batch_size: Rows in a batch; the last batch has what is left.
        generator: A CPU generator that shuffles the rows; None keeps their order.
        drop_last: Leave out a last batch that is short.
        start: How many batches to skip; nothing is gathered for them.

    Raises:
        TypeError: An argument is of the wrong type.
        ValueError: No rows, `x` and `y` of different lengths, sizes out of range, a generator of another
            device, or `drop_last` with fewer rows than one batch.
    """
    _checks.batch(x, y)
    _checks.at_least("batch_size", batch_size, 1)
    _checks.at_least("start", start, 0)
    rows = x.shape[0]
    if drop_last and rows < batch_size:
        raise ValueError(f"drop_last leaves no batch: {rows} rows are fewer than batch_size={batch_size}.")
    used = rows - rows % batch_size if drop_last else rows
    count = -(-used // batch_size)
    if start > count:
        raise ValueError(f"start must be <= {count}, the number of batches in this epoch, got {start}.")
    if generator is None:
        order = torch.arange(rows, device="cpu")  # whatever the default device is
    elif not isinstance(generator, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator or None, got {type(generator).__name__}.")
    elif generator.device.type != "cpu":
        raise ValueError(f"generator must be a CPU generator, got one on {generator.device}.")
    else:
        order = torch.randperm(rows, generator=generator, device="cpu")
    return _gather(x, y, order[:used], batch_size, start)


def _gather(x: Tensor, y: Tensor, order: Tensor, batch_size: int, start: int) -> Iterator[tuple[Tensor, Tensor]]:
    # One transfer of the whole order; index_select copies even rows that are in order, so that an in-place
    # operation of a network can never reach the data.
    order_x, order_y = order.to(x.device), order.to(y.device)
    for first in range(start * batch_size, len(order), batch_size):
        rows = slice(first, first + batch_size)
        yield x.index_select(0, order_x[rows]), y.index_select(0, order_y[rows])
