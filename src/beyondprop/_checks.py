"""Argument checks that everybody shares: what was given, what is accepted."""

from __future__ import annotations

import math
from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any

# This module does not import torch: the command line's settings are checked before it is needed.


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def positive(name: str, value: float) -> float:
    """Return `value`, or raise `ValueError` unless it is a finite number > 0."""
    if not (_is_finite(value) and value > 0):
        raise ValueError(f"{name} must be a finite number > 0, got {value!r}.")
    return value


def non_negative(name: str, value: float) -> float:
    """Return `value`, or raise `ValueError` unless it is a finite number >= 0."""
    if not (_is_finite(value) and value >= 0):
        raise ValueError(f"{name} must be a finite number >= 0, got {value!r}.")
    return value


def growing(name: str, value: float, growth: float, limit: float) -> tuple[float, float, float]:
    """Return a value > 0 with its factor of growth >= 1 and the limit > 0 where that ends, or raise `ValueError`."""
    if not growth >= 1:
        raise ValueError(f"{name}_growth must be >= 1, got {growth!r}.")
    if not limit > 0:
        raise ValueError(f"{name}_limit must be > 0, got {limit!r}.")
    return positive(name, value), growth, limit


def at_least(name: str, value: int, least: int) -> int:
    """Return `value`, or raise `ValueError` unless it is an integer >= `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be an integer >= {least}, got {value!r}.")
    return value


def hint(value: Any, accepted: Iterable[Any]) -> str:
    """`"; perhaps you meant 'adam'"` where one accepted string is close to `value`, else `""`: the end of a message."""
    words = [word for word in accepted if isinstance(word, str)]
    close = get_close_matches(value, words, n=1) if isinstance(value, str) else []
    return f"; perhaps you meant {close[0]!r}" if close else ""


def one_of(name: str, value: Any, accepted: Iterable[Any]) -> Any:
    """Return `value`, or raise `ValueError` naming what is accepted, and which of it may have been meant."""
    accepted = list(accepted)
    if value not in accepted:
        known = ", ".join(map(repr, accepted))
        raise ValueError(f"{name} must be one of {known}, got {value!r}{hint(value, accepted)}.")
    return value


def share(name: str, value: float | int | None) -> float | int:
    """Return a share in (0, 1] as a float or a number >= 1 as an int; None is all, 1.0."""
    if value is None:
        return 1.0
    if isinstance(value, int) and not isinstance(value, bool) and value >= 1:
        return value
    if isinstance(value, float) and 0 < value <= 1:
        return value
    raise ValueError(f"{name} must be a share in (0, 1] as a float or a number >= 1 as an int, got {value!r}.")


def batch(x: Any, y: Any) -> None:
    """Raise `ValueError` unless `x` and `y` are tensors of one non-empty batch."""
    import torch

    for name, value in (("x", x), ("y", y)):
        if not isinstance(value, torch.Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}.")
        if value.ndim == 0:
            raise ValueError(f"{name} must have the batch as its first dimension, got a scalar.")
    if x.shape[0] == 0:
        raise ValueError("The batch is empty: x has shape " + str(tuple(x.shape)) + ", one row or more is needed.")
    if x.shape[0] != y.shape[0]:
        raise ValueError(f"x has {x.shape[0]} rows and y has {y.shape[0]}; they must be rows of one batch.")
