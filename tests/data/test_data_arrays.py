"""Data sets of one's own arrays, frames and torch Datasets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_diabetes, load_iris
from torch.utils.data import IterableDataset, TensorDataset

from beyondprop.data import from_arrays, load

X = np.arange(40.0).reshape(20, 2) ** 2
Y = np.arange(20) % 3


@dataclass
class Frame:
    """What is used of a DataFrame."""

    content: dict[str, list[Any]]

    @property
    def columns(self) -> list[str]:
        return list(self.content)

    def to_numpy(self) -> np.ndarray:
        return np.array(list(self.content.values()), object).T


@dataclass
class Series:
    """What is used of a Series."""

    values: list[Any]
    name: str | None = None

    def to_numpy(self) -> np.ndarray:
        return np.array(self.values, object)


def _raw(x: Any, y: Any, **options: Any) -> Any:
    return from_arrays(x, y, **{"standardize": False, "test": 0, **options})


def test_training_rows_alone_standardize() -> None:
    x = np.array([[0.0, 7.0], [2.0, 7.0], [100.0, 8.0]])
    data = from_arrays(x[:2], [1.0, 3.0], test=(x[2:], [5.0]))
    assert data.x_train.tolist() == [[-1, 0], [1, 0]]  # a constant column is only centred
    assert data.x_test.tolist() == [[99, 1]]
    assert (data.y_train.tolist(), data.y_test.tolist()) == ([[-1], [1]], [[3]])
    assert (data.x_train.dtype, data.y_train.dtype) == (torch.float32, torch.float32)
    split = from_arrays(*load_diabetes(return_X_y=True))
    assert split.x_train.mean(0).abs().max() < 1e-6
    assert (split.x_train.std(0, correction=0) - 1).abs().max() < 1e-5
    assert split.x_test.mean(0).abs().min() > 1e-4
    assert split.y_train.mean().abs() < 1e-6 < 1e-3 < split.y_test.mean().abs()


def test_large_offsets_keep_their_digits() -> None:
    seconds = 1.7e9 + np.arange(10_000.0)[:, None]  # float32 knows these to 128 only, and the rows take several blocks
    x = from_arrays(seconds, Y[np.arange(10_000) % 20], test=0).x_train
    assert x.unique().numel() == 10_000
    torch.testing.assert_close(x.std(correction=0), torch.tensor(1.0))


def test_images_share_one_mean_and_deviation() -> None:
    images = np.stack([np.zeros((20, 2, 2)), np.full((20, 2, 2), 4.0)], 1).astype(np.uint8)
    x = from_arrays(images, Y, test=0).x_train
    assert x.shape == (20, 2, 2, 2)
    assert (x[:, 0].unique().tolist(), x[:, 1].unique().tolist()) == ([-1], [1])
    assert _raw(images, Y).x_train.unique().tolist() == [0, 4]


@pytest.mark.parametrize(
    ("y", "kind", "classes", "labels"),
    [
        ([10, 9, 10, -1], None, ("-1", "9", "10"), [2, 1, 2, 0]),
        (["b", "a", "b", "a"], None, ("a", "b"), [1, 0, 1, 0]),
        ([True, False, True, True], None, ("False", "True"), [1, 0, 1, 1]),
        (torch.tensor([[3], [5], [3], [5]]), None, ("3", "5"), [0, 1, 0, 1]),
        (np.array([b"no", b"yes", b"no", b"yes"]), None, ("no", "yes"), [0, 1, 0, 1]),
        (Series([12, 2, 2, 12]), None, ("2", "12"), [1, 0, 0, 1]),
        (Series(["a", 1, "a", 1]), None, ("1", "a"), [1, 0, 1, 0]),
        ([10.0, 9.0, 9.0, 10.0], "classification", ("9", "10"), [1, 0, 0, 1]),
    ],
)
def test_labels_are_the_sorted_values(y: Any, kind: str | None, classes: tuple[str, ...], labels: list[int]) -> None:
    data = _raw(X[:4], y, kind=kind)
    assert (data.classes, data.y_train.tolist(), data.targets) == (classes, labels, ())
    assert (data.y_train.dtype, data.kind, data.outputs) == (torch.int64, "classification", len(classes))


@pytest.mark.parametrize(
    ("y", "kind", "numbers", "targets"),
    [
        ([1.0, 2.0], None, [[1], [2]], ("target",)),
        (Series([1, 2.5], "price"), None, [[1], [2.5]], ("price",)),
        ([[1.0, 5.0], [2.0, 6.0]], None, [[1, 5], [2, 6]], ("target0", "target1")),
        (Frame({"p": [1, 2], "q": [3, 4]}), "regression", [[1, 3], [2, 4]], ("p", "q")),
        (torch.tensor([1, 2], dtype=torch.uint8), "regression", [[1], [2]], ("target",)),
        (torch.tensor([1, 2], dtype=torch.bfloat16), None, [[1], [2]], ("target",)),
    ],
)
def test_numbers_are_targets(y: Any, kind: str | None, numbers: list[list[float]], targets: tuple[str, ...]) -> None:
    data = _raw(X[:2], y, kind=kind)
    assert (data.y_train.tolist(), data.targets, data.classes) == (numbers, targets, ())
    assert (data.kind, data.outputs) == ("regression", len(targets))


def test_frames_keep_their_names() -> None:
    frame = Frame({"age": [30, 40, 50], "smokes": [True, False, True]})
    data = _raw(frame, Series(["u", "v", "u"], "outcome"))
    assert (data.features, data.classes) == (("age", "smokes"), ("u", "v"))
    assert data.x_train.tolist() == [[30, 1], [40, 0], [50, 1]]
    other = Frame({"smokes": [True], "age": [30]})
    with pytest.raises(ValueError, match=r"x_test must have the columns \('age', 'smokes'\), in this order, got"):
        _raw(frame, ["u", "v", "u"], test=(other, ["u"]))


def test_torch_datasets() -> None:
    x, y = torch.arange(24.0).reshape(6, 2, 2), torch.tensor([0, 1, 0, 1, 0, 1])
    data = _raw(TensorDataset(x[:4], y[:4]), None, test=TensorDataset(x[4:], y[4:]))
    assert torch.equal(data.x_train, x[:4])
    assert torch.equal(data.x_test, x[4:])
    assert (data.y_train.tolist(), data.y_test.tolist()) == ([0, 1, 0, 1], [0, 1])
    items: Any = [(x[0], 0), (x[1], 1)]

    class Items(torch.utils.data.Dataset[Any]):
        def __getitem__(self, index: int) -> Any:
            return items[index]

        def __len__(self) -> int:
            return len(items)

    assert _raw(Items(), None).y_train.tolist() == [0, 1]
    items[1] = x[1]
    with pytest.raises(TypeError, match=r"its items must be pairs \(input, target\)"):
        _raw(Items(), None)
    items[1] = (x[1, 0], 1)
    with pytest.raises(ValueError, match="must have rows of one shape"):
        _raw(Items(), None)


@pytest.mark.parametrize(("test", "count"), [(0.2, 4), (7, 7), (0, 0), (None, 0), (0.95, 19)])
def test_rows_are_split_once_each(test: float | None, count: int) -> None:
    data = _raw(X, X[:, 0], test=test)
    train = data.x_train[:, 0].tolist()
    tested = [] if data.x_test is None else data.x_test[:, 0].tolist()
    assert len(tested) == count
    assert sorted(train + tested) == X[:, 0].tolist()
    assert (train, tested) == (sorted(train), sorted(tested))
    assert torch.equal(data.y_train[:, 0], data.x_train[:, 0])
    if data.x_test is None:
        assert data.y_test is None
    else:
        assert torch.equal(data.y_test[:, 0], data.x_test[:, 0])


def test_equal_seeds_give_equal_splits() -> None:
    splits = [from_arrays(*load_iris(return_X_y=True), seed=seed).x_test for seed in (0, 0, 1)]
    assert torch.equal(splits[0], splits[1])
    assert not torch.equal(splits[0], splits[2])
    torch.manual_seed(99)  # the global state must not matter
    assert torch.equal(from_arrays(*load_iris(return_X_y=True)).x_test, splits[0])


def test_diabetes() -> None:
    data, raw = load("diabetes"), load("diabetes", standardize=False)
    assert (data.x_train.shape, data.x_test.shape, data.y_test.shape) == ((353, 10), (89, 10), (89, 1))
    assert (data.kind, data.targets, data.features[2]) == ("regression", ("progression",), "bmi")
    assert raw.x_train[:, 1].unique().tolist() == [1, 2]
    assert torch.cat([raw.y_train, raw.y_test]).sum() == 67243
    for key in ("x", "y"):
        train, test = getattr(raw, f"{key}_train"), getattr(raw, f"{key}_test")
        mean, std = train.mean(0), train.std(0, correction=0)
        torch.testing.assert_close(getattr(data, f"{key}_train"), (train - mean) / std, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(getattr(data, f"{key}_test"), (test - mean) / std, atol=1e-5, rtol=1e-5)
    weights = torch.linalg.lstsq(data.x_train, data.y_train).solution
    assert (data.x_test @ weights - data.y_test).square().mean() < 0.7 * data.y_test.var()
    assert raw.y_test[:5, 0].tolist() == load("diabetes", standardize=False).y_test[:5, 0].tolist()


class _Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter(())


def _with(value: Any, *at: int) -> np.ndarray:
    x = X.copy()
    x[at] = value
    return x


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: _raw(_with(np.nan, 3, 1), Y), ValueError, r"x has nan in row 3, column 1; its values must be finite"),
        (lambda: _raw(_with(-np.inf, 0, 0), Y), ValueError, r"x has -inf in row 0, column 0"),
        (lambda: _raw(_with(1e39, 0, 0), Y), ValueError, r"x has 1e\+39 in row 0.* at most 3.4e38"),
        (lambda: _raw(X, _with(np.nan, 2, 0)[:, 0]), ValueError, r"y has nan in row 2;"),
        (lambda: _raw(np.full((2, 1, 3), np.nan), [0, 1]), ValueError, r"x has nan in row 0, at \(0, 0\)"),
        (lambda: _raw(X, Y, test=(_with(np.nan, 1, 1), Y)), ValueError, r"x_test has nan in row 1"),
        (lambda: _raw(Frame({"a": [1, 2], "b": [1, "x"]}), [0, 1]), ValueError, r"x has 'x' in row 1, column 'b'"),
        (lambda: _raw(Frame({"a": [1, "3"]}), [0, 1]), ValueError, r"x has '3' in row 1, column 'a'.*must be numbers"),
        (lambda: _raw(Frame({"a": [1, None]}), [0, 1]), ValueError, r"x has nan in row 1, column 'a'.*must be finite"),
        (lambda: _raw(np.array([["a"], ["b"]]), [0, 1]), ValueError, r"x has 'a' in row 0; its values must be numbers"),
        (lambda: _raw(X[:2] * 1j, [0, 1]), TypeError, r"x must hold numbers, got complex128"),
        (lambda: _raw(X[:2], np.array([1j, 2])), TypeError, r"y must hold numbers or labels, got complex128"),
        (lambda: _raw(X[:2], Series(["a", None])), ValueError, r"y has None in row 1; .*given in every row"),
        (lambda: _raw(X[:2], ["a", "b"], kind="regression"), ValueError, r"y has 'a' in row 0; .*must be numbers"),
        (lambda: _raw(X[:2], [1.0, 1.5], kind="classification"), ValueError, r"y has 1.5 in row 1; .*whole numbers"),
        (lambda: _raw(X[:2], [[1, 0], [0, 1]]), ValueError, r"y must be labels of shape \(N,\), .* argmax\(1\)"),
        (lambda: _raw(X[:2], np.zeros((2, 1, 1))), ValueError, r"y must be numbers of shape \(N,\) or \(N, k\)"),
        (lambda: _raw(X, Y * 0 + 4), ValueError, r"y has one class only, 4;"),
        (lambda: _raw(X, Y, test=(X, Y + 1)), ValueError, r"class '3' of 'arrays' has no training row"),
        (lambda: _raw(X, np.arange(20), test=5), ValueError, r"has no training row, only test rows"),
        (lambda: _raw(X, Y, test=(X[:, :1], Y)), ValueError, r"equal shapes; those of x are \(2,\) and \(1,\), of y"),
        (lambda: _raw(X, Y, test=(X, Y, Y)), ValueError, r"test must be a pair \(x_test, y_test\) .*got 3"),
        (lambda: _raw(X, Y[1:]), ValueError, r"x has 20 rows and y has 19"),
        (lambda: _raw(X[:0], Y[:0]), ValueError, r"x must have rows, got an array of shape \(0, 2\)"),
        (lambda: _raw(3.0, Y), ValueError, r"x must have rows, got an array of shape \(\)"),
        (lambda: _raw([[1], [1, 2]], [0, 1]), ValueError, r"x and y must have rows of one shape"),
        (lambda: _raw(X, None), TypeError, r"y is missing; only a torch Dataset"),
        (lambda: _raw(_Stream(), None), TypeError, r"x is a torch Dataset: it must be of map style"),
        (lambda: _raw(TensorDataset(torch.ones(1)), Y), TypeError, r"with its targets in it and y None"),
        (lambda: _raw(X, Y, kind="regresion"), ValueError, r"kind must be one of .* perhaps you meant 'regression'"),
        (lambda: _raw(X, Y, seed=-1, test=2), ValueError, r"seed must be an integer >= 0"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(make: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize("test", [20, -1, 1.0, 0.01, 0.99, True, "3", float("nan")])
def test_sizes_of_the_test_out_of_range_are_refused(test: Any) -> None:
    with pytest.raises(ValueError, match=r"a number of rows in 0 … 19, None or rows of its own"):
        _raw(X, Y, test=test)
