"""Steps and epochs: epochs may differ in length, as the tasks of a stream do."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from torch import nn

from beyondprop import _checks


@dataclass(frozen=True)
class Calendar:
    """Which epoch a step is in.

    Attributes:
        lengths: steps of each epoch; after the last they begin again.
    """

    lengths: tuple[int, ...]

    @classmethod
    def of(cls, model: nn.Module, task: Any, batch_size: int, *, whole_set: bool = False) -> Calendar:
        """Return the calendar of a model on a task, without last batches that a BatchNorm could not normalise."""
        if whole_set:
            return cls((1,))
        if hasattr(task, "steps"):
            return cls((task.steps,))
        rows = getattr(task, "epoch_rows", None) or (len(task.x_train),)
        return cls(tuple(_steps(model, count, batch_size) for count in rows))

    @property
    def longest(self) -> int:
        """Steps of the longest epoch; of every one where they are alike."""
        return max(self.lengths)

    def where(self, step: int) -> tuple[int, int]:
        """Return the epoch that step number `step` is in, and how many of its steps are done before."""
        rounds, rest = divmod(step, sum(self.lengths))
        index = bisect_right(list(accumulate(self.lengths)), rest)
        return rounds * len(self.lengths) + index, rest - sum(self.lengths[:index])

    def end(self, epoch: int) -> int:
        """Return the number of steps that are done when an epoch is over."""
        rounds, index = divmod(epoch, len(self.lengths))
        return rounds * sum(self.lengths) + sum(self.lengths[: index + 1])

    def epochs(self, step: int) -> float:
        """Return the epochs that so many steps are."""
        if len(self.lengths) == 1:
            return step / self.lengths[0]
        epoch, start = self.where(step)
        return epoch + start / self.lengths[epoch % len(self.lengths)]

    def step_at(self, epochs: float) -> int:
        """Return how many steps so many epochs are, rounded."""
        if len(self.lengths) == 1:
            return round(epochs * self.lengths[0])
        whole = int(epochs)
        return self.end(whole - 1) + round((epochs - whole) * self.lengths[whole % len(self.lengths)])


def stop_step(stop: float, steps: int, calendar: Calendar) -> int:
    """Return the step at which a training that stops at epoch `stop` ends: one or more of `steps`, but not all.

    Raises:
        ValueError: if there is no such step.
    """
    _checks.positive("stop", stop)
    step = max(1, calendar.step_at(stop))
    if step >= steps:
        raise ValueError(f"stop={stop:g} epochs is step {step} of {steps}; one or more must be left.")
    return step


def _steps(model: nn.Module, rows: int, batch_size: int) -> int:
    batch_norm = nn.modules.batchnorm._BatchNorm
    if batch_size > 1 and rows % batch_size == 1 and any(isinstance(m, batch_norm) for m in model.modules()):
        if rows == 1:
            raise ValueError("There is 1 training row; a model with BatchNorm needs 2 or more in a batch.")
        return rows // batch_size
    return -(-rows // batch_size)
