"""Learning from a stream of tasks, once through and nothing stored: how much is learned, and how much of it is forgotten."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch
from torch import Tensor

from beyondprop.data import Stream
from beyondprop.lab.runs.recorded import Row
from beyondprop.lab.tasks.streams import ON_TASK, ContinualTask, average_accuracy, backward_transfer, forgetting
from beyondprop.lab.training.fit import fit
from beyondprop.nn.functional import evaluation_mode
from beyondprop.rules.base import LearningRule


@dataclass(frozen=True, slots=True, eq=False)
class StreamResult:
    """What learning a stream led to.

    Attributes:
        accuracy: R, `(T, T)`, float64: row i after training on task i, column j on task j; tasks to come are measured, too.
        samples: training rows seen.
        steps: batches seen.
        seconds: of training, without evaluations.
    """

    accuracy: Tensor
    samples: int
    steps: int
    seconds: float

    @property
    def average_accuracy(self) -> float:
        """Mean accuracy over all tasks after the last."""
        return average_accuracy(self.accuracy)

    @property
    def forgetting(self) -> float:
        """Accuracy that was lost since its best, see `lab.tasks.forgetting`."""
        return forgetting(self.accuracy)

    @property
    def backward_transfer(self) -> float:
        """How later tasks changed the accuracy on earlier ones."""
        return backward_transfer(self.accuracy)


def run_stream(
    rule: LearningRule,
    stream: Stream,
    *,
    batch_size: int = 10,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> StreamResult:
    """Train on every task's rows once, in the stream's order, and test on all tasks after each.

    Nothing is stored but the rule's own state. A task is an epoch: `rule.begin_epoch` gets its batches before the first step
    (most rules take none of them), `rule.end_epoch` and `rule.end_task` come after the last.
    A last batch of a single row is left out where the model has a BatchNorm, which could not normalise it.

    Args:
        rule: any rule that learns from batches; its model has `stream.num_classes` outputs.
        stream: the tasks.
        batch_size: rows in a batch.
        seed: of the order of the rows within each task.
        progress: called after each task with the tasks done and all tasks.

    Raises:
        ValueError: if an argument is out of its range, the stream has no task or is on another device or of another dtype than
            the model, or the model has not one output for each class.
        NonFiniteError: where the rule does.
    """
    parts = list(stream)
    dataset: Any = getattr(parts[0], "_data", None) if parts else None
    task = ContinualTask("stream", dataset, lambda dataset, seed: stream, loss=rule.loss.loss)
    x, _ = parts[0].test()
    rule.check_input(x)
    with evaluation_mode(rule.model), torch.inference_mode():
        output = rule.model(x[:1])
    if output.ndim != 2 or output.shape[1] < stream.num_classes:
        raise ValueError(
            f"The model must have an output for each of the stream's classes, (N, {stream.num_classes}), got "
            f"({', '.join(map(str, ('N', *output.shape[1:])))})."
        )
    evaluations = count()  # the first comes before any task

    def log(row: Row) -> None:
        if row["kind"] == "eval" and (done := next(evaluations)) and progress is not None:
            progress(done, len(parts))

    history = fit(rule, task, epochs=len(parts), batch_size=batch_size, seed=seed, schedule="constant", log=log)
    rows = history.evaluations[1:]
    found = [[value or 0.0 for key, value in row.items() if key.startswith(ON_TASK)] for row in rows]
    last = rows[-1]
    return StreamResult(torch.tensor(found, dtype=torch.float64), last["samples"], last["step"], last["seconds"])
