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
from beyondprop.data._dataset import KINDS, Dataset, seeded, split_rows

Array = NDArray[Any]

_LARGEST = np.float64(np.finfo(np.float32).max)
_BLOCK = 4096  # rows that are scaled at once: in float64 they are never all in memory


@dataclass(slots=True)
class Values:
    """Inputs or targets of some rows, and what messages call them.

    Attributes:
        key: `"x"` or `"y"`, with `"_test"` for rows that are given for the test.
        array: Inputs `(N, ...)`, or targets `(N,)` or `(N, k)`, numbers or text.
        names: The names of the columns, where there are any.
        where: What a row goes by: `where(3) == "row 3"`.
    """

    key: str
    array: Array
    names: tuple[str, ...] = ()
    where: Callable[[int], str] = "row {}".format

    def check(self, accepted: Array, rule: str) -> None:
        """Raise an error that names the first value, its row and its column, where not all are accepted."""
        if accepted.all():
            return
        row, *at = np.argwhere(~accepted.reshape(self.array.shape))[0].tolist()
        value = self.array[(row, *at)]
        place = f", at {tuple(at)}" if len(at) > 1 else ""
        if len(at) == 1 and (self.names or self.array.shape[1] > 1):
            place = f", column {self.names[at[0]] if self.names else at[0]!r}"
        value = value.item() if isinstance(value, np.generic) else value
        raise ValueError(f"{self.key} has {value!r} in {self.where(row)}{place}; its values {rule}.")


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
    held: Any = (test, None) if isinstance(test, torch.utils.data.Dataset) else test
    parts = [_taken("", x, y)]
    if isinstance(held, tuple | list):
        if len(held) != 2:
            raise ValueError(f"test must be a pair (x_test, y_test) where it is rows, got {len(held)} of them.")
        parts.append(_taken("_test", *held))
    inputs = [_inputs(*part) for part in parts]
    if kind is not None:
        _checks.one_of("kind", kind, KINDS)
    targets, classes = _targets([part[1] for part in parts], kind)
    features = [part[0].names for part in parts]
    if len(parts) == 1:
        generator = seeded(seed)
        accepted = "test must be a share in (0, 1), a number of rows in 0 … {last}, None or rows of its own"
        halves = split_rows(len(inputs[0]), 0 if held is None else held, 0, generator, accepted)
        inputs, targets = ([whole[0][half.numpy()] for half in halves if len(half)] for whole in (inputs, targets))
    elif any(one.shape[1:] != two.shape[1:] for one, two in (inputs, targets)):
        found = ", of y ".join(f"{one.shape[1:]} and {two.shape[1:]}" for one, two in (inputs, targets))
        raise ValueError(f"Rows for training and for the test must have equal shapes; those of x are {found}.")
    elif all(features) and features[0] != features[1]:
        raise ValueError(f"x_test must have the columns {features[0]}, in this order, got {features[1]}.")
    missing = np.setdiff1d(np.arange(len(classes)), targets[0])
    if len(missing):
        raise ValueError(
            f"The class {classes[missing[0]]!r} of {name!r} has no training row, only test rows; take another seed, fewer "
            "test rows, or leave its rows out."
        )
    inputs = _scaled(inputs, standardize, tuple(range(1 if inputs[0].ndim == 2 else inputs[0].ndim)))
    if not classes:
        targets = _scaled(targets, standardize, (0,))
    tensors = [torch.from_numpy(value) for pair in zip(inputs, targets, strict=True) for value in pair]
    names = () if classes else parts[0][1].names
    return Dataset(name, *tensors, classes=classes, targets=names, features=features[0])


def _taken(part: str, x: Any, y: Any) -> tuple[Values, Values]:
    """Take NumPy arrays and names out of whatever holds them."""
    if isinstance(x, Values):  # of a file
        return x, y
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
        return Values(f"x{part}", _array(x), _names(x)), Values(f"y{part}", _array(y), _names(y))
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


def _inputs(x: Values, y: Values) -> Array:
    """Return the inputs as finite numbers with two dimensions or more, in their own dtype."""
    for values in (x, y):
        if values.array.ndim == 0 or not values.array.size:
            raise ValueError(f"{values.key} must have rows, got an array of shape {values.array.shape}.")
    if len(x.array) != len(y.array):
        raise ValueError(
            f"{x.key} has {len(x.array)} rows and {y.key} has {len(y.array)}; they must be rows of one set."
        )
    if x.array.ndim == 1:
        x.array = x.array[:, None]
    if x.names and len(x.names) != x.array.shape[-1]:
        raise ValueError(f"{x.key} has {x.array.shape[-1]} columns and {len(x.names)} names for them.")
    return _numbers(x)


def _numbers(values: Values) -> Array:
    """Return finite numbers, or raise an error that names the first value that is none."""
    kind = values.array.dtype.kind
    if kind not in "biufOUST":
        raise TypeError(f"{values.key} must hold numbers, got {values.array.dtype}.")
    if kind not in "biuf":
        flat = values.array.astype(object).reshape(-1)
        values.check(np.array([isinstance(v, Real | np.bool_) or _missing(v) for v in flat]), "must be numbers")
        numbers = [np.nan if _missing(v) else float(v) for v in flat]
        values.array = np.array(numbers).reshape(values.array.shape)
    with np.errstate(invalid="ignore"):
        accepted = np.abs(values.array) <= _LARGEST  # NaN is not; in float64, where no limit becomes infinite
    values.check(accepted, "must be finite numbers of at most 3.4e38")
    return values.array


def _missing(value: Any) -> bool:
    """Whether a value stands for none: None, NaN, or the `NA` and `NaT` of pandas, which is not imported here."""
    is_nan = isinstance(value, float) and value != value
    return value is None or is_nan or type(value).__name__ in ("NAType", "NaTType")


def _targets(parts: list[Values], kind: str | None) -> tuple[list[Array], tuple[str, ...]]:
    """Return labels in int64 and the names of the classes, or numbers `(N, k)` and no name."""
    for part in parts:
        part.array = _typed(part)
    if kind is None:
        kind = KINDS[all(part.array.dtype.kind == "f" for part in parts)]
    if kind == "regression":
        for part in parts:
            if part.array.ndim == 1:
                part.array = part.array[:, None]
            if part.array.ndim != 2:
                raise ValueError(f"{part.key} must be numbers of shape (N,) or (N, k), got shape {part.array.shape}.")
        return [_numbers(part) for part in parts], ()
    for part in parts:
        array = part.array
        if array.size != len(array):
            raise ValueError(
                f"{part.key} must be labels of shape (N,), got {array.dtype} of shape {array.shape}; integers are "
                "numbers to predict with kind='regression', and one-hot rows become labels by argmax(1)."
            )
        part.array = array.reshape(-1)
        if array.dtype.kind == "f":
            part.check(np.floor(_numbers(part)) == part.array, "must be whole numbers to be labels")
            part.array = part.array.astype(np.int64)
    found, codes = np.unique(np.concatenate([part.array for part in parts]), return_inverse=True)
    if len(found) < 2:
        raise ValueError(f"y has one class only, {found[0]!s}; a classification needs two or more.")
    return np.split(codes.astype(np.int64), [len(parts[0].array)])[: len(parts)], tuple(map(str, found))


def _typed(targets: Values) -> Array:
    """Return targets as booleans, integers, floating numbers or text: objects become what they are."""
    array = targets.array
    if array.dtype.kind in "biuf":
        return array
    if array.dtype.kind not in "OUST":
        raise TypeError(f"{targets.key} must hold numbers or labels, got {array.dtype}.")
    flat = array.astype(object).reshape(-1)
    targets.check(np.array([not _missing(v) for v in flat]), "must be given in every row")
    for types, dtype in ((bool | np.bool_, np.bool_), (Integral, np.int64), (Real, np.float64)):
        if all(isinstance(v, types) for v in flat):
            return flat.astype(dtype).reshape(array.shape)
    return np.array([v.decode() if isinstance(v, bytes) else str(v) for v in flat]).reshape(array.shape)


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
