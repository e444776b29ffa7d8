"""Tasks whose rows are tensors in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from beyondprop.data import Dataset, batches
from beyondprop.lab.nets import build
from beyondprop.lab.tasks.base import Kind, Metric
from beyondprop.lab.tasks.evaluation import ROWS, measured
from beyondprop.stages.losses import LossFunction

_SEEDS = 2**63


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class RowsTask:
    """Training rows and, where there are any, test rows; see `Task`.

    Attributes:
        kind: loss and metrics.
        outputs: what a network gives for a row.
        draw: `draw(task, seed)` returns the task as a seed draws it, for instance with some of its rows; None: as it is.
    """

    name: str
    x_train: Tensor
    y_train: Tensor
    x_test: Tensor | None = None
    y_test: Tensor | None = None
    kind: Kind
    outputs: int = 0
    sample: str = "row"
    draw: Callable[[RowsTask, int], RowsTask] | None = None

    @classmethod
    def of(cls, dataset: Dataset, kind: Kind, outputs: int) -> RowsTask:
        """Return the task of a data set."""
        rows = {key: getattr(dataset, key) for key in ("name", "x_train", "y_train", "x_test", "y_test")}
        return cls(kind=kind, outputs=outputs, **rows)

    def __repr__(self) -> str:
        tested = 0 if self.y_test is None else len(self.y_test)
        kind = type(self.kind).__name__
        return (
            f"RowsTask({self.name!r}, {kind}, train={len(self.y_train)}, test={tested}, input_shape={self.input_shape})"
        )

    @property
    def loss(self) -> LossFunction:
        """What a network is trained on."""
        return self.kind.loss

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """What `evaluate` measures; nothing without test rows."""
        return () if self.x_test is None else self.kind.metrics

    @property
    def input_shape(self) -> tuple[int, ...]:
        """The shape of one row's input."""
        return tuple(self.x_train.shape[1:])

    def net(self, form: str) -> nn.Module:
        """See `Task.net`."""
        return build(form, self.input_shape, self.outputs)

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """See `Task.evaluate`."""
        if self.x_test is None or self.y_test is None:
            return {}
        return measured(model, self.kind, zip(self.x_test.split(ROWS), self.y_test.split(ROWS), strict=True))

    def drawn(self, seed: int) -> RowsTask:
        """Return the task as a seed draws it."""
        return self if self.draw is None else self.draw(self, seed)

    def held_out(self, share: float) -> RowsTask:
        """See `Task.held_out`; equal rows, whatever the seeds of trainings are."""
        generator = torch.Generator().manual_seed(0)
        held, kept = split_rows(len(self.y_train), share, generator)
        held, kept = held.to(self.x_train.device), kept.to(self.x_train.device)
        return replace(
            self,
            x_train=self.x_train.index_select(0, kept),
            y_train=self.y_train.index_select(0, kept),
            x_test=self.x_train.index_select(0, held),
            y_test=self.y_train.index_select(0, held),
        )

    def to(self, device: str) -> RowsTask:
        """See `Task.to`."""
        rows = {key: getattr(self, key) for key in ("x_train", "y_train", "x_test", "y_test")}
        return replace(self, **{key: None if value is None else value.to(device) for key, value in rows.items()})


def split_rows(rows: int, share: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return the numbers of the rows that are held out, and of those that are kept, both rising."""
    count = min(max(1, round(share * rows)), rows - 1)
    if rows < 2:
        raise ValueError(f"There is {rows} training row; one or more must be left beside those that are held out.")
    order = torch.randperm(rows, generator=generator)
    return order[:count].sort().values, order[count:].sort().values


def shuffled(
    x: Tensor, y: Tensor, epoch: int, batch_size: int, seed: int, start: int = 0
) -> Iterator[tuple[Tensor, Tensor]]:
    """Return an epoch's batches, from number `start` on; the order comes from `seed` and the epoch's number alone."""
    # Seeded by both numbers, so that no epoch's order depends on what was drawn before it.
    generator = torch.Generator().manual_seed((seed * 0x9E3779B97F4A7C15 + epoch) % _SEEDS)
    return batches(x, y, batch_size, generator=generator, start=start)
