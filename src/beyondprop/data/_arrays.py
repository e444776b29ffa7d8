"""`from_arrays`: a data set of one's own arrays, DataFrames or torch Datasets, split, scaled and checked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from beyondprop import _checks
from beyondprop.data._dataset import KINDS, Dataset

Array = NDArray[Any]

_LARGEST = float(np.finfo(np.float32).max)
_BLOCK = 4096  # rows that are scaled at once: in float64 they are never all in memory


@dataclass(slots=True)
class Rows:
    """Inputs and targets as they came, and what messages call them.

    Attributes:
        x: Inputs `(N, ...)`.
        y: Targets `(N,)` or `(N, k)`, numbers or text.
        features: The names of the columns of `x`, where there are any.
        targets: The names of the targets, where there are any.
        part: `""`, or `"_test"` for rows that are given for the test.
        where: What a row goes by: `where(3) == "row 3"`.
    """

    x: Array
    y: Array
    features: tuple[str, ...] = ()
    targets: tuple[str, ...] = ()
    part: str = ""
    where: Callable[[int], str] = "row {}".format


def from_arrays(
    x: Any,
    y: Any = None,
    *,
    name: str = "arrays",
    test: float | tuple[Any, Any] | torch.utils.data.Dataset[Any] | None = 0.2,
    seed: int = 0,
    standardize: bool = True,
    kind: str | None = None,
) -> Dataset:
    """Return a data set of NumPy arrays, tensors, DataFrames, Series, lists or a map-style torch Dataset.

    Targets that are integers, booleans, text or categories are labels: their sorted values are the `classes`. Floating
    targets are numbers to predict, `(N,)` as `(N, 1)`. Inputs become float32.

    Args:
        x: Inputs `(N, ...)`; or a torch Dataset of pairs, without `y`.
        y: Labels `(N,)`, or numbers `(N,)` or `(N, k)`.
        name: What the set is called.
        test: Test rows: a share in (0, 1), a number of rows, 0 or None for none, or `(x_test, y_test)` or a torch Dataset.
        seed: Of the choice of test rows.
        standardize: Subtract the mean and divide by the standard deviation of the training rows: feature by feature for
            inputs `(N, features)`, by one mean and one deviation for images and sequences, target by target for
            regression. What is constant is only centred.
        kind: `"classification"` takes whole floating numbers as labels too, `"regression"` integers as numbers.

    Raises:
        TypeError: Something is no array of numbers, or of labels.
        ValueError: Rows, values or arguments do not fit; the message names the row, counted from 0, and the column.
    """
    held: Any = test
    if isinstance(test, torch.utils.data.Dataset):
        held = _taken("_test", test)
    elif isinstance(test, tuple | list):
        if len(test) != 2:
            raise ValueError(f"test must be a pair (x_test, y_test) where it is rows, got {len(test)} of them.")
        held = _taken("_test", *test)
    return assemble(_taken("", x, y), held, name=name, seed=seed, standardize=standardize, kind=kind)


def assemble(
    rows: Rows,
    test: Rows | float | None,
    *,
    name: str,
    seed: int = 0,
    standardize: bool = True,
    kind: str | None = None,
) -> Dataset:
    """Check and encode rows, split them where no test rows are given, and scale both parts; see `from_arrays`."""
    parts = [rows, test] if isinstance(test, Rows) else [rows]
    x = [_inputs(part) for part in parts]
    if kind is not None:
        _checks.one_of("kind", kind, KINDS)
    y, classes = _targets(parts, kind)
    if not isinstance(test, Rows):
        train, held = _split(len(rows.y), test, _checks.at_least("seed", seed, 0))
        x, y = ([whole[0][train], whole[0][held]][: 1 + bool(len(held))] for whole in (x, y))
    elif x[0].shape[1:] != x[1].shape[1:] or y[0].shape[1:] != y[1].shape[1:]:
        found = ", of y ".join(f"{one.shape[1:]} and {two.shape[1:]}" for one, two in (x, y))
        raise ValueError(f"Rows for training and for the test must have equal shapes; those of x are {found}.")
    elif rows.features and test.features and rows.features != test.features:
        raise ValueError(f"x_test must have the columns {rows.features}, in this order, got {test.features}.")
    missing = np.setdiff1d(np.arange(len(classes)), y[0])
    if len(missing):
        raise ValueError(
            f"The class {classes[missing[0]]!r} of {name!r} has no training row, only test rows; take another seed, fewer "
            "test rows, or leave its rows out."
        )
    x = _scaled(x, standardize, tuple(range(1 if x[0].ndim == 2 else x[0].ndim)))
    if not classes:
        y = _scaled(y, standardize, (0,))
    tensors = [torch.from_numpy(value) for pair in zip(x, y, strict=True) for value in pair]
    targets = () if classes else rows.targets
    return Dataset(name, *tensors, classes=classes, targets=targets, features=rows.features)


def _taken(part: str, x: Any, y: Any = None) -> Rows:
    """Take NumPy arrays and names out of whatever holds them."""
    if isinstance(x, torch.utils.data.Dataset):
        if y is not None or not hasattr(x, "__len__"):
            raise TypeError(
                f"x{part} is a torch Dataset: it must be of map style, with its targets in it and y{part} None."
            )
        pairs: list[Any] = [x[index] for index in range(len(x))]  # type: ignore[arg-type]
        if not all(isinstance(pair, tuple | list) and len(pair) == 2 for pair in pairs):
            raise TypeError(f"x{part} is a torch Dataset: its items must be pairs (input, target).")
        x, y = ([_array(pair[side]) for pair in pairs] for side in (0, 1))
    elif y is None:
        raise TypeError(f"y{part} is missing; only a torch Dataset goes without.")
    try:
        return Rows(_array(x), _array(y), _names(x), _names(y), part)
    except ValueError as error:  # NumPy's, of rows that differ in length
        raise ValueError(f"x{part} and y{part} must have rows of one shape: {error}") from error


def _array(value: Any) -> Array:
    if isinstance(value, Tensor):
        value = value.detach().cpu()
        # NumPy knows no bfloat16.
        return (value.float() if value.is_floating_point() and value.itemsize < 4 else value).numpy()
    return np.asarray(value.to_numpy() if hasattr(value, "to_numpy") else value)


def _names(value: Any) -> tuple[str, ...]:
    if hasattr(value, "columns"):
        return tuple(map(str, value.columns))
    name = getattr(value, "name", None) if hasattr(value, "to_numpy") else None
    return () if name is None else (str(name),)


def _inputs(rows: Rows) -> Array:
    """Return the inputs as finite numbers with two dimensions or more, in their own dtype."""
    x, y, part = rows.x, rows.y, rows.part
    for key, array in (("x", x), ("y", y)):
        if array.ndim == 0 or not array.size:
            raise ValueError(f"{key}{part} must have rows, got an array of shape {array.shape}.")
    if len(x) != len(y):
        raise ValueError(f"x{part} has {len(x)} rows and y{part} has {len(y)}; they must be rows of one set.")
    if x.ndim == 1:
        x = x[:, None]
    if rows.features and len(rows.features) != x.shape[-1]:
        raise ValueError(f"x{part} has {x.shape[-1]} columns and {len(rows.features)} names for them.")
    return _numbers(f"x{part}", x, rows.features, rows.where)


def _numbers(key: str, array: Array, names: tuple[str, ...], where: Callable[[int], str]) -> Array:
    """Return an array of finite numbers, or raise an error that names the first value that is none."""
    if array.dtype.kind not in "biufOUST":
        raise TypeError(f"{key} must hold numbers, got {array.dtype}.")
    if array.dtype.kind not in "biuf":
        flat = array.astype(object).reshape(-1)
        is_number = np.fromiter((isinstance(v, Real | np.bool_) or _missing(v) for v in flat), bool, len(flat))
        if not is_number.all():
            raise ValueError(_complaint(key, array, is_number, names, where, "must be numbers"))
        array = np.array([np.nan if _missing(v) else float(v) for v in flat]).reshape(array.shape)
    with np.errstate(invalid="ignore"):
        accepted = np.abs(array) <= _LARGEST  # NaN is not
    if not accepted.all():
        raise ValueError(_complaint(key, array, accepted, names, where, "must be finite numbers of at most 3.4e38"))
    return array


def _complaint(
    key: str, array: Array, accepted: Array, names: tuple[str, ...], where: Callable[[int], str], rule: str
) -> str:
    row, *at = np.argwhere(~accepted.reshape(array.shape))[0].tolist()
    value = array[(row, *at)]
    place = ""
    if len(at) == 1 and (names or array.shape[1] > 1):
        place = f", column {names[at[0]] if names else at[0]!r}"
    elif len(at) > 1:
        place = f", at {tuple(at)}"
    return f"{key} has {value.item() if isinstance(value, np.generic) else value!r} in {where(row)}{place}; its values {rule}."


def _missing(value: Any) -> bool:
    """Whether a value stands for none: None, NaN, or the `NA` and `NaT` of pandas, which is not imported here."""
    return (
        value is None or type(value).__name__ in ("NAType", "NaTType") or (isinstance(value, float) and value != value)
    )


def _targets(parts: list[Rows], kind: str | None) -> tuple[list[Array], tuple[str, ...]]:
    """Return labels in int64 and the names of the classes, or numbers `(N, k)` and no name."""
    values = [_typed(part) for part in parts]
    if kind is None:
        kind = KINDS[all(array.dtype.kind == "f" for array in values)]
    keys = [f"y{part.part}" for part in parts]
    if kind == "regression":
        shaped = [array[:, None] if array.ndim == 1 else array for array in values]
        for key, array in zip(keys, shaped, strict=True):
            if array.ndim != 2:
                raise ValueError(f"{key} must be numbers of shape (N,) or (N, k), got shape {array.shape}.")
        numbers = zip(keys, shaped, parts, strict=True)
        return [_numbers(key, array, part.targets, part.where) for key, array, part in numbers], ()
    labels: list[Array] = []
    for key, array, part in zip(keys, values, parts, strict=True):
        if array.size != len(array):
            raise ValueError(
                f"{key} must be labels of shape (N,), got {array.dtype} of shape {array.shape}; integers are numbers to "
                "predict with kind='regression', and one-hot rows become labels by argmax(1)."
            )
        label = array.reshape(-1)
        if label.dtype.kind == "f":
            label = _numbers(key, label, (), part.where)
            if not (whole := label == np.floor(label)).all():
                raise ValueError(_complaint(key, label, whole, (), part.where, "must be whole numbers to be labels"))
            label = label.astype(np.int64)
        labels.append(label)
    found, codes = np.unique(np.concatenate(labels), return_inverse=True)
    if len(found) < 2:
        raise ValueError(f"y has one class only, {found[0]!s}; a classification needs two or more.")
    return np.split(codes.astype(np.int64), [len(labels[0])])[: len(parts)], tuple(map(str, found))


def _typed(rows: Rows) -> Array:
    """Return targets as booleans, integers, floating numbers or text: objects become what they are."""
    y, key = rows.y, f"y{rows.part}"
    if y.dtype.kind in "biuf":
        return y
    if y.dtype.kind not in "OUST":
        raise TypeError(f"{key} must hold numbers or labels, got {y.dtype}.")
    flat = y.astype(object).reshape(-1)
    present = np.fromiter((not _missing(v) for v in flat), bool, len(flat))
    if not present.all():
        raise ValueError(_complaint(key, y, present, rows.targets, rows.where, "must be given in every row"))
    for types, dtype in (((bool, np.bool_), np.bool_), (Integral, np.int64), ((Real,), np.float64)):
        if all(isinstance(v, types) for v in flat):
            return flat.astype(dtype).reshape(y.shape)
    return np.array([v.decode() if isinstance(v, bytes) else str(v) for v in flat]).reshape(y.shape)


def _split(rows: int, test: float | None, seed: int) -> tuple[Array, Array]:
    """Return the numbers of the training rows and of the test rows, both rising."""
    count: Any = 0 if test is None else test
    if isinstance(count, float) and 0 < count < 1:
        count = round(count * rows) or -1  # a share that gives no row is refused
    if isinstance(count, bool) or not isinstance(count, int) or not 0 <= count < rows:
        raise ValueError(
            f"test must be a share in (0, 1), a number of rows in 0 … {rows - 1}, None or rows of its own, and leave a row "
            f"or more on both sides, got {test!r} of {rows} rows."
        )
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed), device="cpu").numpy()
    return np.sort(order[count:]), np.sort(order[:count])


def _scaled(parts: list[Array], standardize: bool, axes: tuple[int, ...]) -> list[NDArray[np.float32]]:
    """Return the parts in float32, less the first one's mean and over its standard deviation along these axes."""
    mean, std = 0.0, 1.0
    train = parts[0]
    if standardize:
        mean = train.mean(axes, dtype=np.float64)
        blocks = (train[start : start + _BLOCK] for start in range(0, len(train), _BLOCK))
        std = np.sqrt(sum(np.square(block - mean).sum(axes) for block in blocks) / (train.size / np.size(mean)))
        # Of equal values the computed deviation need not be 0 exactly.
        std = np.where(train.max(axes) == train.min(axes), 1.0, std)
    scaled = []
    for part in parts:
        out = np.empty(part.shape, np.float32)
        for start in range(0, len(part), _BLOCK):
            rows = slice(start, start + _BLOCK)
            out[rows] = (part[rows] - mean) / std
        scaled.append(out)
    return scaled
