"""Streams of tasks, what is measured on them by hand, and that rules learn and forget on real digits as they should."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from cases import SGD, mlp
from torch import Tensor, nn

from beyondprop import AltMin, Backprop, Memory, data
from beyondprop.data import Dataset
from beyondprop.data.streams import PermutedStream, SplitStream, StreamTask
from beyondprop.errors import DataUnavailableError
from beyondprop.lab.training.streaming import average_accuracy, backward_transfer, forgetting, run_stream
from beyondprop.optim.factories import adam
from beyondprop.rules.base import StepResult


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return data.load("digits")


def everything(task: StreamTask, seed: int = 0, batch_size: int = 32) -> tuple[Tensor, Tensor]:
    pairs = list(task.batches(batch_size, generator=torch.Generator().manual_seed(seed)))
    return torch.cat([x for x, _ in pairs]), torch.cat([y for _, y in pairs])


def as_rows(x: Tensor) -> list[tuple[float, ...]]:
    return sorted(tuple(row) for row in x.flatten(1).tolist())


def test_split_tasks_hold_their_classes_rows_once(digits: Dataset) -> None:
    stream = SplitStream(digits)
    assert (len(stream), stream.num_classes, stream.input_shape) == (5, 10, (1, 8, 8))
    seen = []
    for own, task in zip(([0, 1], [2, 3], [4, 5], [6, 7], [8, 9]), stream, strict=True):
        x, y = everything(task)
        assert sorted(set(y.tolist())) == own
        assert len(x) == task.train_size
        wanted = torch.isin(digits.y_train, torch.tensor(own))
        assert as_rows(x) == as_rows(digits.x_train[wanted])
        x_test, y_test = task.test()
        assert torch.equal(x_test, digits.x_test[torch.isin(digits.y_test, torch.tensor(own))])
        assert sorted(set(y_test.tolist())) == own
        seen.append(x)
    assert as_rows(torch.cat(seen)) == as_rows(digits.x_train)


def test_domain_incremental_tasks_of_one_class_would_have_nothing_to_tell_apart(digits: Dataset) -> None:
    with pytest.raises(
        ValueError, match=r"tasks must leave each task two classes or more .* got 10 for the 10 classes"
    ):
        SplitStream(digits, 10, "domain-incremental")
    assert len(SplitStream(digits, 10)) == 10


class _Epochs(Backprop):
    """Backpropagation that writes down what it was called with."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.called: list[tuple[str, list[Tensor]]] = []

    def begin_epoch(self, batches: Any) -> None:
        self.called.append(("begin", [x.clone() for x, _ in batches]))

    def step(self, x: Tensor, y: Tensor, *, diagnostics: bool = False) -> StepResult:
        self.called.append(("step", [x.clone()]))
        return super().step(x, y, diagnostics=diagnostics)

    def end_epoch(self) -> None:
        self.called.append(("end", []))

    def end_task(self) -> None:
        self.called.append(("task", []))


def test_a_task_is_an_epoch_whose_batches_come_before_it(digits: Dataset) -> None:
    rule = _Epochs(nn.Sequential(nn.Flatten(), *mlp(64, 8, 10)), nn.CrossEntropyLoss(), SGD)
    run_stream(rule, SplitStream(digits), batch_size=100)
    begun: list[Tensor] = []
    order = []
    for what, batches in rule.called:
        order += [what] if what != "step" or order[-1] != "step" else []
        if what == "begin":
            begun = batches
        elif what == "step":
            assert torch.equal(begun.pop(0), batches[0])
        else:
            assert not begun
    assert order == ["begin", "step", "end", "task"] * 5


def test_domain_incremental_labels_count_from_zero_within_a_task(digits: Dataset) -> None:
    stream = SplitStream(digits, setting="domain-incremental")
    assert stream.num_classes == 2
    for task, plain in zip(stream, SplitStream(digits), strict=True):
        (x, y), (x_plain, y_plain) = everything(task), everything(plain)
        assert torch.equal(x, x_plain)
        assert torch.equal(y, y_plain % 2)
        assert torch.equal(task.test()[1], plain.test()[1] % 2)


def test_a_seed_draws_the_classes(digits: Dataset) -> None:
    orders = [SplitStream(digits, tasks=2, seed=seed).classes for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
    assert sorted(orders[2][0] + orders[2][1]) == list(range(10))
    stream = SplitStream(digits, tasks=2, setting="domain-incremental", seed=1)
    first = next(iter(stream))
    wanted = {own: place for place, own in enumerate(stream.classes[0])}
    x, y = first.test()
    rows = torch.isin(digits.y_test, torch.tensor(stream.classes[0]))
    assert torch.equal(x, digits.x_test[rows])
    assert y.tolist() == [wanted[label] for label in digits.y_test[rows].tolist()]


def test_permuted_tasks_shuffle_every_row_alike(digits: Dataset) -> None:
    stream = PermutedStream(digits, 3, seed=4)
    tasks = list(stream)
    assert (len(stream), stream.num_classes) == (3, 10)
    assert torch.equal(tasks[0].test()[0], digits.x_test)
    orders = []
    for task in tasks[1:]:
        x, y = task.test()
        assert x.shape == digits.x_test.shape
        assert torch.equal(y, digits.y_test)
        # The permutation is found from a row of distinct values, and must explain all the others.
        marked = Dataset(
            "marked", torch.arange(64.0).view(1, 1, 8, 8), *(torch.zeros(1).long(), x[:1], y[:1]), digits.classes
        )
        again = list(PermutedStream(marked, 3, seed=4))[len(orders) + 1]
        order = everything(again)[0].flatten().long()
        assert sorted(order.tolist()) == list(range(64))
        assert torch.equal(x.flatten(1), digits.x_test.flatten(1)[:, order])
        assert as_rows(everything(task)[0]) == as_rows(digits.x_train.flatten(1)[:, order])
        orders.append(order)
    assert not torch.equal(orders[0], orders[1])
    other = list(PermutedStream(digits, 3, seed=5))
    assert not torch.equal(other[1].test()[0], tasks[1].test()[0])


def test_permuted_tasks_may_have_rows_of_their_own(digits: Dataset) -> None:
    first, second = PermutedStream(digits, 2, train_size=100)
    assert first.train_size == second.train_size == 100
    assert sorted(everything(first)[1].tolist()) != sorted(everything(second)[1].tolist())


def test_batches_have_their_size_and_the_generators_order(digits: Dataset) -> None:
    (task,) = SplitStream(digits, tasks=1)
    sizes = [len(y) for _, y in task.batches(100, generator=torch.Generator().manual_seed(0))]
    assert sizes == [100] * (len(sizes) - 1) + [len(digits.y_train) % 100]
    assert torch.equal(everything(task, 1)[0], everything(task, 1)[0])
    assert not torch.equal(everything(task, 1)[0], everything(task, 2)[0])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda d: SplitStream(d, tasks=3), r"tasks must divide the 10 classes of 'digits', each with as many, got 3"),
        (lambda d: SplitStream(d, tasks=0), r"tasks must be an integer >= 1, got 0"),
        (
            lambda d: SplitStream(d, setting="class"),
            r"setting must be one of 'class-incremental', 'domain-incremental'",
        ),
        (lambda d: SplitStream(d, seed=-1), r"seed must be an integer >= 0, got -1"),
        (lambda d: PermutedStream(d, 0), r"tasks must be an integer >= 1, got 0"),
        (
            lambda d: PermutedStream(d, train_size=9999),
            r"train_size must be <= 1437, the training rows of 'digits', got 9999",
        ),
        (lambda d: next(next(iter(SplitStream(d))).batches(0, generator=torch.Generator())), r"batch_size must be"),
    ],
)
def test_bad_streams_are_refused(make: Any, message: str, digits: Dataset) -> None:
    with pytest.raises(ValueError, match=message):
        make(digits)


def test_a_task_without_rows_is_named() -> None:
    x, y = torch.zeros(4, 2), torch.tensor([0, 1, 2, 2])
    lacking = Dataset("few", x, y, x, y, ("a", "b", "c", "d"))
    assert len(SplitStream(lacking, tasks=2)) == 2
    with pytest.raises(ValueError, match=r"Task d of 'few' has 0 training and 0 test rows"):
        SplitStream(lacking, tasks=4)


def test_measures_by_hand() -> None:
    r = torch.tensor([[0.9, 0.2, 0.1], [0.95, 0.8, 0.3], [0.5, 0.6, 0.7]], dtype=torch.float64)
    assert average_accuracy(r) == pytest.approx((0.5 + 0.6 + 0.7) / 3)
    # The best of task 1 was after task 2, not after its own training.
    assert forgetting(r) == pytest.approx(((0.95 - 0.5) + (0.8 - 0.6)) / 2)
    assert backward_transfer(r) == pytest.approx(((0.5 - 0.9) + (0.6 - 0.8)) / 2)
    # A task that is better at the end than ever before was not forgotten: less than 0.
    better = torch.tensor([[0.5, 0.0], [0.8, 0.9]])
    assert forgetting(better) == pytest.approx(-0.3)
    assert backward_transfer(better) == pytest.approx(0.3)
    one = torch.tensor([[0.7]])
    assert (average_accuracy(one), forgetting(one), backward_transfer(one)) == (pytest.approx(0.7), 0.0, 0.0)
    for function in (average_accuracy, forgetting, backward_transfer):
        with pytest.raises(ValueError, match=r"accuracy must be a square matrix, .* got shape \(2, 3\)"):
            function(torch.zeros(2, 3))


class Counting(Backprop):
    """Notes what it is given, and when tasks end."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.log: list[Any] = []

    def step(self, x: Tensor, y: Tensor, *, diagnostics: bool = False) -> StepResult:
        self.log.append(len(x))
        return super().step(x, y, diagnostics=diagnostics)

    def end_task(self) -> None:
        self.log.append("end")


def test_one_pass_and_a_word_at_the_end_of_each_task(digits: Dataset) -> None:
    rule = Counting(nn.Sequential(nn.Flatten(), *mlp(64, 16, 10)), nn.CrossEntropyLoss(), SGD)
    told: list[tuple[int, int]] = []
    stream = SplitStream(digits)
    found = run_stream(rule, stream, batch_size=50, progress=lambda *done: told.append(done))
    assert sum(n for n in rule.log if n != "end") == found.samples == len(digits.y_train)
    assert rule.log.count("end") == 5
    assert found.steps == len(rule.log) - 5
    assert told == [(i, 5) for i in range(1, 6)]
    assert found.seconds > 0


def test_the_matrix_is_what_plain_loops_find(digits: Dataset) -> None:
    def rule() -> Backprop:
        torch.manual_seed(0)
        return Backprop(nn.Sequential(nn.Flatten(), *mlp(64, 16, 10)), nn.CrossEntropyLoss(), SGD)

    found = run_stream(rule(), SplitStream(digits), batch_size=20, seed=3)
    again, generator = rule(), torch.Generator().manual_seed(3)
    for i, task in enumerate(SplitStream(digits)):
        for x, y in task.batches(20, generator=generator):
            again.step(x, y)
        for j, tested in enumerate(SplitStream(digits)):
            x, y = tested.test()
            accuracy = (again.model(x).argmax(1) == y).double().mean()
            assert float(found.accuracy[i, j]) == pytest.approx(float(accuracy), abs=1e-12)
    assert found.average_accuracy == average_accuracy(found.accuracy)
    assert found.forgetting == forgetting(found.accuracy)
    assert found.backward_transfer == backward_transfer(found.accuracy)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_memory_keeps_more_than_descent_on_real_digits(seed: int, digits: Dataset) -> None:
    def learned(build: Any) -> Any:
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Flatten(), *mlp(64, 100, 100, 10))
        return run_stream(build(model, nn.CrossEntropyLoss()), SplitStream(digits), batch_size=10, seed=seed)

    plain = learned(lambda m, loss: Backprop(m, loss, adam(1e-3)))
    memory = learned(lambda m, loss: AltMin(m, loss, Memory(lr=0.1)))
    assert plain.average_accuracy < 0.25  # the last task's two classes of ten, at best
    assert memory.accuracy.diagonal().min() > 0.9  # one pass is enough for each task,
    assert memory.average_accuracy > plain.average_accuracy + 0.1  # and some of all stays


def test_a_batch_of_one_row_is_left_out_for_batch_norm(digits: Dataset) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 10))
    rule = Counting(model, nn.CrossEntropyLoss(), SGD)
    sizes = [task.train_size for task in SplitStream(digits)]
    batch = next(n for n in range(10, 60) if any(size % n == 1 for size in sizes))
    found = run_stream(rule, SplitStream(digits), batch_size=batch)
    assert 1 not in rule.log
    assert found.samples == sum(size - (size % batch == 1) for size in sizes)


def test_outputs_that_are_too_few_are_refused_before_training(digits: Dataset) -> None:
    rule = Counting(nn.Sequential(nn.Flatten(), nn.Linear(64, 2)), nn.CrossEntropyLoss(), SGD)
    with pytest.raises(ValueError, match=r"an output for each of the stream's classes, \(N, 10\), got \(N, 2\)"):
        run_stream(rule, SplitStream(digits))
    assert rule.log == []


def test_a_stream_that_does_not_fit_is_refused_before_training(digits: Dataset) -> None:
    class Empty:
        num_classes = 10

        def __len__(self) -> int:
            return 0

        def __iter__(self) -> Iterator[Any]:
            return iter(())

    rule = Counting(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).double(), nn.CrossEntropyLoss(), SGD)
    with pytest.raises(ValueError, match="stream must have a task or more, got none"):
        run_stream(rule, Empty())
    with pytest.raises(ValueError, match=r"x has dtype torch.float32, the model's weights torch.float64"):
        run_stream(rule, SplitStream(digits))
    assert rule.log == []


@pytest.mark.data
@pytest.mark.slow
def test_split_mnist_class_incremental_is_forgotten_by_adam_and_kept_by_a_memory() -> None:
    root = os.environ.get("BEYONDPROP_DATA")
    if not root:
        pytest.skip("BEYONDPROP_DATA is not set: it must name a folder with the real data sets")
    try:
        mnist = data.load("mnist", root=root, download=False)
    except DataUnavailableError as error:
        pytest.skip(str(error))
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Flatten(), *mlp(784, 100, 100, 10))
    found = run_stream(Backprop(plain, nn.CrossEntropyLoss(), adam(1e-3)), SplitStream(mnist), batch_size=100)
    assert found.accuracy.diagonal().min() > 0.9  # each task is learned,
    assert found.average_accuracy < 0.25  # and only the last is known
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), *mlp(784, 100, 100, 10))
    kept = run_stream(AltMin(model, nn.CrossEntropyLoss(), Memory(lr=0.06)), SplitStream(mnist), batch_size=100)
    assert kept.average_accuracy > 0.5
