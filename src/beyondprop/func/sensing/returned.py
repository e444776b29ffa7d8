"""What goes into a black box, and what comes out of it, as tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

_TELLING = 16


def as_tensor(value: Any) -> Tensor:
    """Return a number or an array as a tensor in memory of its own.

    Raises:
        TypeError: if it is none.
    """
    array = np.array(value)
    if array.dtype.kind not in "fiubc":
        raise TypeError(
            f"The black box returned {type(value).__name__} of {array.dtype}; it must return floats or arrays of floats."
        )
    if array.dtype.kind == "f" and array.dtype.itemsize > 8:
        array = array.astype(np.float64)  # long double, of which torch has none
    return torch.from_numpy(array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("=")))


def of_numbers(result: Any) -> Any:
    """Return lists of numbers, rectangular, as an array: they are one output, and not a structure of many."""
    return np.array(result, dtype=np.float64) if isinstance(result, list) and _is_rectangular(result) else result


def _is_rectangular(value: list[Any]) -> bool:
    if all(isinstance(each, list) for each in value):
        return bool(value) and len({len(each) for each in value}) == 1 and all(map(_is_rectangular, value))
    return all(isinstance(each, float | int | np.floating) for each in value) and any(
        isinstance(each, float | np.floating) for each in value
    )


def is_coarse(values: Sequence[Any]) -> bool:
    """Whether float64 numbers, sixteen or more, are float32's: not all whole, as counts may be."""
    tensors = [torch.as_tensor(value) for value in values]
    own = [value for value in tensors if value.dtype == torch.float64]
    return (
        len(own) == len(tensors)
        and sum(value.numel() for value in own) >= _TELLING
        and all(torch.equal(value, value.float().double()) for value in own)
        and not all(torch.equal(value, value.round()) for value in own)
    )


def given(x: Tensor, arrays: str) -> Any:
    """Return an input as the box takes it, in memory of its own: many a box works in place."""
    return x.clone() if arrays == "torch" else x.to("cpu", copy=True).numpy()


def unusable(leaves: Sequence[Tensor]) -> Tensor | None:
    """Return which rows are not finite; None: all are."""
    if all(math.isfinite(leaf.sum().item()) for leaf in leaves):  # one pass; what overflows is looked at row by row
        return None
    found = torch.zeros(len(leaves[0]), dtype=torch.bool)
    for leaf in leaves:
        found |= ~(leaf.isfinite().flatten(1).all(1) if leaf.ndim > 1 else leaf.isfinite())
    return found if bool(found.any()) else None


def same(old: Any, new: Any) -> bool:
    """Whether two arrays or tensors hold the same numbers."""
    return torch.equal(torch.as_tensor(old).nan_to_num(), torch.as_tensor(new).nan_to_num())
