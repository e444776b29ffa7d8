from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch

from beyondprop.data import Dataset, PermutedStream, SplitStream, StreamTask, batches, describe, load, names


def _toy(rows: int = 10) -> Dataset:
    x = torch.arange(rows, dtype=torch.float32)[:, None]
    y = torch.arange(rows) % 2
    return Dataset("toy", x, y, torch.full((3, 1), -1.0), torch.tensor([0, 1, 1]), ("even", "odd"))


def test_properties_and_repr() -> None:
    toy = _toy()
    assert (toy.input_shape, toy.num_classes) == ((1,), 2)
    assert repr(toy) == "Dataset('toy', train=10, test=3, input_shape=(1,), num_classes=2)"


def _prices(rows: int = 10) -> Dataset:
    x = torch.arange(rows, dtype=torch.float32)[:, None]
    return Dataset("prices", x, torch.cat([x, -x], 1), targets=("up", "down"), features=("a",))


def test_regression_without_test_rows() -> None:
    prices = _prices()
    assert (prices.x_test, prices.y_test, prices.num_classes) == (None, None, 0)
    assert (prices.kind, prices.outputs, _toy().kind, _toy().outputs) == ("regression", 2, "classification", 2)
    assert repr(prices) == "Dataset('prices', train=10, test=0, input_shape=(1,), targets=('up', 'down'))"
    assert Dataset("p", prices.x_train, prices.y_train).targets == ("target0", "target1")
    assert Dataset("p", prices.x_train, prices.x_train).targets == ("target",)
    wide = prices.to(dtype=torch.float64)
    assert (wide.x_train.dtype, wide.y_train.dtype, wide.x_test) == (torch.float64, torch.float64, None)
    split = prices.split_validation(4, generator=torch.Generator().manual_seed(0))
    assert split.y_test.shape == (4, 2)
    assert torch.equal(split.y_test[:, :1], split.x_test)
    assert (split.targets, split.features) == (("up", "down"), ("a",))


def test_streams_need_classes_and_test_rows() -> None:
    toy = _toy()
    for data in (_prices(), Dataset("toy", toy.x_train, toy.y_train, classes=toy.classes)):
        for stream in (SplitStream, PermutedStream):
            with pytest.raises(ValueError, match="A stream needs a data set with classes and test rows, got Dataset"):
                stream(data, 2)
    task = next(iter(PermutedStream(toy, 2)))
    assert isinstance(task, StreamTask)
    assert repr(task) == "StreamTask('as it is', train_size=10, num_classes=2)"


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"y_train": torch.zeros(10)},
            TypeError,
            r"y_train must be floating point of shape \(N, k\), got torch.float32",
        ),
        (
            {"y_train": torch.zeros(10, 1).long()},
            TypeError,
            r"got torch.int64 of shape \(10, 1\); labels need the names",
        ),
        ({"x_test": torch.zeros(2, 1)}, ValueError, "x_test and y_test must be given both or not at all"),
        (
            {"x_test": torch.ones(2, 1), "y_test": torch.ones(2, 3)},
            ValueError,
            r"y_train has .*\(2,\) and y_test of .*\(3,\)",
        ),
        ({"targets": ("up",)}, ValueError, r"targets must name 2 columns of y_train, got \('up',\)"),
        ({"y_train": torch.arange(10) % 2, "classes": ("a", "b")}, ValueError, "targets must name 0 columns"),
        ({"features": ("a", "b")}, ValueError, r"features has 2 names for inputs of shape \(1,\)"),
    ],
)
def test_regression_parts_that_do_not_fit_are_refused(
    changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        replace(_prices(), **changes)


def test_to_converts_inputs_only() -> None:
    toy = _toy().to(dtype=torch.float64)
    assert {toy.x_train.dtype, toy.x_test.dtype} == {torch.float64}
    assert {toy.y_train.dtype, toy.y_test.dtype} == {torch.int64}
    with pytest.raises(TypeError, match=r"x_train must be floating point, got torch.int32"):
        _toy().to(dtype=torch.int32)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_to_a_device_gives_batches_and_splits_there() -> None:
    toy = _toy().to("cuda")
    split = toy.split_validation(4, generator=torch.Generator().manual_seed(0))
    here = _toy().split_validation(4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(split.x_test.cpu(), here.x_test)
    for x, y in batches(toy.x_train, toy.y_train, 4, generator=torch.Generator().manual_seed(0)):
        assert x.is_cuda
        assert torch.equal(x[:, 0].long() % 2, y)
    with pytest.raises(ValueError, match="generator must be a CPU generator, got one on cuda"):
        batches(toy.x_train, toy.y_train, 4, generator=torch.Generator("cuda"))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x_train": torch.zeros(9, 1)}, ValueError, "9 rows and y has 10"),
        ({"x_test": torch.zeros(3, 2)}, ValueError, r"shape \(1,\) and x_test of shape \(2,\)"),
        ({"y_test": torch.tensor([0, 1, 2])}, ValueError, "y_test has labels 0 … 2; 2 classes accept 0 … 1"),
        ({"y_test": torch.tensor([-1, 1, 1])}, ValueError, "y_test has labels -1 … 1"),
        ({"y_test": torch.zeros(3)}, TypeError, "y_test must be int64 of shape"),
        ({"x_test": torch.zeros(3, 1, dtype=torch.uint8)}, TypeError, "x_test must be floating point"),
    ],
)
def test_parts_that_do_not_fit_are_refused(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    toy = _toy()
    fields = {name: getattr(toy, name) for name in ("name", "x_train", "y_train", "x_test", "y_test", "classes")}
    with pytest.raises(error, match=message):
        Dataset(**(fields | changes))


@pytest.mark.parametrize(("amount", "count"), [(3, 3), (0.3, 3), (0.25, 2), (9, 9)])
def test_validation_rows_leave_the_training_part_and_replace_the_test_rows(amount: float, count: int) -> None:
    toy = _toy()
    split = toy.split_validation(amount, generator=torch.Generator().manual_seed(0))
    train, held_out = split.x_train[:, 0].tolist(), split.x_test[:, 0].tolist()
    assert len(held_out) == count
    assert sorted(train + held_out) == list(range(10))  # disjoint, complete, and no test row (-1)
    assert (train, held_out) == (sorted(train), sorted(held_out))
    assert torch.equal(split.y_train, split.x_train[:, 0].long() % 2)
    assert torch.equal(split.y_test, split.x_test[:, 0].long() % 2)
    assert len(toy.y_train) == 10


def test_validation_split_is_a_function_of_the_generator() -> None:
    splits = [
        load("digits").split_validation(100, generator=torch.Generator().manual_seed(s)).x_test for s in (5, 5, 6)
    ]
    assert torch.equal(splits[0], splits[1])
    assert not torch.equal(splits[0], splits[2])


@pytest.mark.parametrize("amount", [0, 10, -1, 0.0, 1.0, 0.01, 0.99, 1.5, True, "3", float("nan")])
def test_validation_amounts_out_of_range_are_refused(amount: float) -> None:
    with pytest.raises(ValueError, match=r"float in \(0, 1\) or an int in 1 … 9"):
        _toy().split_validation(amount, generator=torch.Generator())


def test_validation_needs_a_generator() -> None:
    with pytest.raises(TypeError, match=r"generator must be a torch.Generator, got NoneType"):
        _toy().split_validation(3, generator=None)  # pyright: ignore[reportArgumentType]


def test_digits() -> None:
    digits = load("digits", download=False)
    assert digits.x_train.shape == (1437, 1, 8, 8)
    assert digits.x_test.shape == (360, 1, 8, 8)
    assert digits.x_train.dtype == torch.float32
    assert (digits.x_train.min(), digits.x_train.max()) == (0.0, 1.0)
    both = torch.cat((digits.y_train, digits.y_test))
    assert both.bincount().tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    # Stratified: each class has a fifth of its rows in the test part.
    assert (digits.y_test.bincount() - both.bincount() * 360 / 1797).abs().max() < 1
    # One known image: the first row of scikit-learn's set is a zero.
    first = torch.tensor([0, 0, 5, 13, 9, 1, 0, 0]) / 16
    everything = torch.cat((digits.x_train, digits.x_test))
    assert digits.classes[both[(everything[:, 0, 0] == first).all(1)][0]] == "0"
    # No image changed sides or got lost.
    assert (everything * 16).sum() == 561718


def test_the_digits_split_never_changes() -> None:
    one, two = load("digits"), load("digits")
    assert torch.equal(one.x_train, two.x_train)
    assert torch.equal(one.y_test, two.y_test)
    assert one.y_train[:10].tolist() == [3, 9, 1, 3, 1, 9, 4, 4, 2, 8]
    assert one.y_test[:10].tolist() == [7, 6, 3, 7, 7, 3, 2, 8, 9, 3]


def test_digits_learn() -> None:
    digits = load("digits")
    x, y = digits.x_train.flatten(1), torch.nn.functional.one_hot(digits.y_train, 10).float()
    weights = torch.linalg.solve(x.T @ x + torch.eye(64), x.T @ y)  # ridge: wrong labels or pixels would show
    accuracy = ((digits.x_test.flatten(1) @ weights).argmax(1) == digits.y_test).float().mean()
    assert accuracy > 0.9


def test_catalog() -> None:
    assert names() == ["diabetes", "digits", "nmnist-small", "higgs", "mnist", "fashion-mnist", "cifar10"]
    for name in names():
        info = describe(name)
        assert info.name == name
        assert info.outputs == {"diabetes": 1, "higgs": 2}.get(name, 10)
        assert info.home_page.startswith("http")
        assert info.description
        assert info.license
    for name in ("diabetes", "digits"):
        info, data = describe(name), load(name)
        assert (info.train_size, info.test_size) == (len(data.y_train), len(data.y_test))
        assert (info.input_shape, info.classes, info.targets) == (data.input_shape, data.classes, data.targets)


@pytest.mark.parametrize("function", [load, describe])
def test_an_unknown_name_lists_the_known_ones(function: object) -> None:
    assert callable(function)
    with pytest.raises(
        ValueError,
        match="name must be one of 'diabetes', 'digits', 'nmnist-small', 'higgs', 'mnist', 'fashion-mnist', 'cifar10', got",
    ):
        function("MNIST")


def test_importing_and_describing_imports_neither_sklearn_nor_pillow() -> None:
    code = (
        "import sys, beyondprop.data as d; [d.describe(n) for n in d.names()]; "
        "print([m for m in ('sklearn', 'PIL') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
