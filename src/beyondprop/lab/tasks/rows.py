"""Tasks whose rows are tensors in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from beyondprop.data import Dataset, batches
from beyondprop.data._dataset import split_rows
from beyondprop.lab.nets import build
from beyondprop.lab.tasks.base import Kind, Metric
from beyondprop.lab.tasks.evaluation import ROWS, measured
from beyondprop.stages.losses import LossFunction

TRAINING = "training "
"""What comes before a metric's key where it is measured on the training rows."""


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class RowsTask:
    """Training rows and, where there are any, test rows; see `Task`.

    Attributes:
        kind: loss and metrics.
        outputs: what a network gives for a row.
        measures_training: whether `evaluate` measures the training rows, too, as `training accuracy` and so on.
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
    measures_training: bool = False
    draw: Callable[[RowsTask, int], RowsTask] | None = None

    @classmethod
    def of(cls, dataset: Dataset, kind: Kind) -> RowsTask:
        """Return the task of a data set."""
        rows = {key: getattr(dataset, key) for key in ("name", "x_train", "y_train", "x_test", "y_test")}
        return cls(kind=kind, outputs=dataset.outputs, **rows)

    def __repr__(self) -> str:
        tested = 0 if self.y_test is None else len(self.y_test)
        kind, shape = type(self.kind).__name__, tuple(self.x_train.shape[1:])
        return f"RowsTask({self.name!r}, {kind}, train={len(self.y_train)}, test={tested}, input_shape={shape})"

    @property
    def loss(self) -> LossFunction:
        """What a network is trained on."""
        return self.kind.loss

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """What `evaluate` measures; nothing without test rows."""
        if self.x_test is None:
            return ()
        own = self.kind.metrics
        if self.measures_training:
            own += tuple(replace(m, key=f"{TRAINING}{m.key}", label=f"{TRAINING}{m.label}") for m in own)
        return own

    def net(self, form: str) -> nn.Module:
        """See `Task.net`."""
        return build(form, tuple(self.x_train.shape[1:]), self.outputs)

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """See `Task.evaluate`."""
        if self.x_test is None or self.y_test is None:
            return {}
        found = self._measured(model, self.x_test, self.y_test)
        if self.measures_training:
            own = self._measured(model, self.x_train, self.y_train)
            found |= {f"{TRAINING}{key}": value for key, value in own.items()}
        return found

    def _measured(self, model: nn.Module, x: Tensor, y: Tensor) -> dict[str, float]:
        return measured(model, self.kind, zip(x.split(ROWS), y.split(ROWS), strict=True))

    def drawn(self, seed: int) -> RowsTask:
        """Return the task as a seed draws it."""
        return self if self.draw is None else self.draw(self, seed)

    def held_out(self, share: float) -> RowsTask:
        """See `Task.held_out`; equal rows, whatever the seeds of trainings are."""
        x, y, rows = self.x_train, self.y_train, len(self.y_train)
        count = min(max(1, round(share * rows)), rows - 1)
        accepted = "the training rows that are held out must be 1 … {last}"
        halves = split_rows(rows, count, 1, torch.Generator().manual_seed(0), accepted)
        kept, held = (part.to(x.device) for part in halves)
        return replace(self, x_train=x[kept], y_train=y[kept], x_test=x[held], y_test=y[held])

    def to(self, device: str) -> RowsTask:
        """See `Task.to`."""
        rows = {key: getattr(self, key) for key in ("x_train", "y_train", "x_test", "y_test")}
        return replace(self, **{key: None if value is None else value.to(device) for key, value in rows.items()})


def shuffled(
    x: Tensor, y: Tensor, epoch: int, batch_size: int, seed: int, start: int = 0
) -> Iterator[tuple[Tensor, Tensor]]:
    """Return an epoch's batches, from number `start` on; the order comes from `seed` and the epoch's number alone."""
    generator = torch.Generator().manual_seed(seed_of(seed, epoch))
    return batches(x, y, batch_size, generator=generator, start=start)


def seed_of(seed: int, epoch: int) -> int:
    """Return a seed made of both numbers, so that no epoch's order depends on what was drawn before it."""
    return (seed * 0x9E3779B97F4A7C15 + epoch) % 2**63
