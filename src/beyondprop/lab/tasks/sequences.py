"""Made sequences: the adding problem, fresh in every batch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from beyondprop import _checks
from beyondprop.data import Progress, adding
from beyondprop.lab.nets import build
from beyondprop.lab.runs.text import clipped
from beyondprop.lab.tasks.base import Metric
from beyondprop.lab.tasks.evaluation import measured
from beyondprop.lab.tasks.regression import LossOnly

ERROR = Metric("loss", "mean squared error", higher_is_better=False)
_TEST = 10**6
_LONGEST = 100_000  # steps: the test sequences alone take 800 MB then


@dataclass(frozen=True, eq=False)
class AddingTask:
    """The adding problem: the sum of two marked numbers in a sequence; always answering 1 has an error of 1/6.

    Every batch is new; its order of draws comes from the seed of the training. Each seed has its own 1000 test sequences, so
    that tuning needs a seed of its own and no row to hold out.

    Attributes:
        length: of a sequence.
        seed: of the test sequences, and of the batches.
        epoch_rows: sequences that are called an epoch.
    """

    length: int = 100
    seed: int = 0
    epoch_rows: tuple[int, ...] = (6400,)
    device: str = "cpu"
    sample: str = "sequence"
    is_fresh: bool = True
    rows: tuple[Tensor, Tensor] = field(init=False)
    _states: dict[tuple[int, int, int], Tensor] = field(init=False, repr=False, default_factory=dict)
    """Of the generator, by seed, batch size and batch: no epoch draws those before it again."""

    def __post_init__(self) -> None:
        if _checks.at_least("length", self.length, 2) > _LONGEST:
            raise ValueError(f"length must be at most {_LONGEST:,}, got {self.length:g}.")
        rows = adding(1000, self.length, generator=torch.Generator().manual_seed(_TEST + self.seed))
        object.__setattr__(self, "rows", tuple(part.to(self.device) for part in rows))

    @property
    def name(self) -> str:
        """For tables."""
        return f"adding:{self.length}"

    @property
    def x_train(self) -> Tensor:
        """Sequences of the same kind, `(1000, length, 2)`, for measurements on the side."""
        return self.rows[0]

    @property
    def y_train(self) -> Tensor:
        """Their sums, `(1000, 1)`."""
        return self.rows[1]

    kind = LossOnly(nn.MSELoss())
    loss = kind.loss
    metrics = (ERROR,)
    outputs = 1

    def net(self, form: str) -> nn.Module:
        """See `Task.net`."""
        return build(form, (self.length, 2), self.outputs)

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """See `Task.evaluate`."""
        return measured(model, self.kind, [self.rows])

    def drawn(self, seed: int) -> AddingTask:
        """Return the task with the test sequences of a seed."""
        return replace(self, seed=seed)

    def held_out(self, share: float) -> AddingTask:
        """Return the task as it is: another seed has other test sequences."""
        del share
        return self

    def to(self, device: str) -> AddingTask:
        """See `Task.to`."""
        return replace(self, device=device)

    def batches(self, epoch: int, batch_size: int, seed: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield an epoch's batches, drawn one after the other from the seed's own generator."""
        count = -(-self.epoch_rows[0] // batch_size)
        begin = epoch * count + start
        known = max((i for s, size, i in self._states if (s, size) == (seed, batch_size) and i <= begin), default=0)
        generator = torch.Generator().manual_seed(seed)
        if known:
            generator.set_state(self._states[seed, batch_size, known])
        for index in range(known, (epoch + 1) * count):
            x, y = adding(batch_size, self.length, generator=generator)
            if index + 1 == (epoch + 1) * count:
                self._states[seed, batch_size, index + 1] = generator.get_state()
            if index >= begin:
                yield x.to(self.device), y.to(self.device)


def adding_problem(length: str, progress: Progress | None = None) -> AddingTask:
    """Return the adding problem for `adding[:LENGTH]`."""
    del progress
    if length and not (length.isdecimal() and len(length) <= 10 and 2 <= int(length) <= _LONGEST):
        raise ValueError(
            f"task adding:LENGTH takes a whole number of steps from 2 to {_LONGEST:,}, such as adding:100, got "
            f"{clipped(length, 40)!r}."
        )
    return AddingTask(int(length or 100))
