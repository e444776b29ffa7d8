"""What a task is: rows, a loss, and the numbers that a trained model is judged by."""

from __future__ import annotations

import abc
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from beyondprop.stages.losses import LossFunction, OutputLoss


@dataclass(frozen=True, slots=True)
class Metric:
    """One number that a trained model is judged by.

    Attributes:
        key: what it goes by in recorded rows, and in what `Task.evaluate` returns.
        label: for people, with its unit once it is multiplied by `scale`: `"accuracy (%)"`.
        scale: factor from the recorded number to the shown one.
        higher_is_better: whether a larger number is the better one.
    """

    key: str
    label: str
    scale: float = 1.0
    higher_is_better: bool = True


LOSS = Metric("loss", "loss", higher_is_better=False)
ACCURACY = Metric("accuracy", "accuracy (%)", 100.0)
R2 = Metric("r2", "R\N{SUPERSCRIPT TWO}")


class Task(Protocol):
    """What contenders are compared on. The first metric decides: tuning, early stop, the star in the table.

    A task may also have any of these: `batches(epoch, batch_size, seed, start)`, the batches of an epoch, where these are not
    its rows shuffled; `epoch_rows`, the rows of each epoch, where epochs differ; `epochs`, how many there are, where it says;
    `drawn(seed)`, the task as that seed draws it; `over(evaluations)`, further metrics from all evaluations so far;
    `epochs_are_tasks`, where the rule is to know that a task of a stream is over; `outputs`, for nets that are functions.
    """

    @property
    def name(self) -> str:
        """What it is called in tables and run directories."""
        ...

    @property
    def x_train(self) -> Tensor:
        """Training rows, or the numbers that stand for them, `(N, ...)`."""
        ...

    @property
    def y_train(self) -> Tensor:
        """Their targets, `(N, ...)`."""
        ...

    @property
    def loss(self) -> LossFunction:
        """What a network is trained on: `loss(output, y)`, the mean (or sum) over the rows."""
        ...

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """What `evaluate` measures; empty where there are no rows to evaluate on."""
        ...

    @property
    def sample(self) -> str:
        """What a row is called: `"row"`, `"sequence"`, `"game"`."""
        ...

    def net(self, form: str) -> nn.Module:
        """Build the network of that form for the task's inputs and outputs; weights come from the global random state."""
        ...

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Return every metric's number, in evaluation mode; every module gets its own mode back."""
        ...

    def held_out(self, share: float) -> Task:
        """Return the task for tuning: a share of the training rows takes the place of the test rows, which are not in it."""
        ...

    def to(self, device: str) -> Task:
        """Return the task with its rows on a device."""
        ...


class Kind(abc.ABC):
    """What the rows of a task are judged by, part by part: sums over parts, and numbers from the sums.

    Attributes:
        loss: `loss(output, y)`.
        metrics: what `numbers` returns, the deciding one first.
    """

    loss: LossFunction
    metrics: tuple[Metric, ...]

    @abc.abstractmethod
    def part(self, output: Tensor, y: Tensor) -> Tensor:
        """Return sums over these rows, 1-D, in the dtype of `evaluation.wide`."""

    @abc.abstractmethod
    def numbers(self, sums: list[float]) -> dict[str, float]:
        """Return the metrics from the sums over all rows."""

    def check(self, output: Tensor, y: Tensor) -> None:
        """Raise `ValueError` where a network's output does not fit the targets."""
        loss = self.loss if isinstance(self.loss, OutputLoss) else OutputLoss(self.loss)
        with torch.no_grad():
            loss.check(output, y)
            loss(output, y)
