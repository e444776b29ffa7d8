"""Learning from a stream of tasks, once through and nothing stored: how much is learned, and how much of it is forgotten.

With R[i, j] the accuracy on task j's test rows after training on task i, and T tasks:

    average accuracy     A = 1/T sum_j R[T, j]                                            (Lopez-Paz & Ranzato 2017)
    forgetting           F = 1/(T-1) sum_{j<T} ( max_{i<T} R[i, j] - R[T, j] )            (Chaudhry et al. 2018, equation 3)
    backward transfer    B = 1/(T-1) sum_{j<T} ( R[T, j] - R[j, j] )                      (Lopez-Paz & Ranzato 2017)

Lopez-Paz & Ranzato, "Gradient episodic memory for continual learning", NeurIPS 2017, arXiv 1706.08840; Chaudhry et al.,
"Riemannian walk for incremental learning", ECCV 2018, arXiv 1801.10112.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor, nn

from beyondprop import _checks
from beyondprop.data.streams import Stream
from beyondprop.lab.tasks.evaluation import evaluate, evaluation_mode
from beyondprop.lab.training.loop import epoch_of
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
        """See `average_accuracy`."""
        return average_accuracy(self.accuracy)

    @property
    def forgetting(self) -> float:
        """See `forgetting`."""
        return forgetting(self.accuracy)

    @property
    def backward_transfer(self) -> float:
        """See `backward_transfer`."""
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
    _checks.at_least("seed", seed, 0)
    _checks.at_least("batch_size", batch_size, 1)
    generator = torch.Generator().manual_seed(seed)
    tasks = list(stream)
    if not tasks:
        raise ValueError("stream must have a task or more, got none.")
    accuracy = torch.zeros(len(tasks), len(tasks), dtype=torch.float64)
    samples = steps = 0
    seconds = 0.0
    x, _ = tasks[0].test()
    rule.check_input(x)
    _check_outputs(rule.model, x[:1], stream.num_classes)
    for index, task in enumerate(tasks):
        began = time.perf_counter()
        count, _ = epoch_of(rule.model, task.train_size, batch_size)
        same_order = torch.Generator()
        same_order.set_state(generator.get_state())
        rule.begin_epoch(islice(task.batches(batch_size, generator=same_order), count))
        for x, y in islice(task.batches(batch_size, generator=generator), count):
            rule.step(x, y)
            samples += len(x)
            steps += 1
        rule.end_epoch()
        rule.end_task()
        rule.check_finite()
        seconds += time.perf_counter() - began
        for other, tested in enumerate(tasks):
            accuracy[index, other] = evaluate(rule.model, rule.loss, *tested.test()).accuracy or 0.0
        if progress is not None:
            progress(index + 1, len(tasks))
    return StreamResult(accuracy, samples, steps, seconds)


def _check_outputs(model: nn.Module, x: Tensor, classes: int) -> None:
    with evaluation_mode(model), torch.inference_mode():
        output = model(x)
    if output.ndim != 2 or output.shape[1] < classes:
        found = ", ".join(map(str, ("N", *output.shape[1:])))
        raise ValueError(
            f"The model must have an output for each of the stream's classes, (N, {classes}), got ({found})."
        )


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
