"""How rules are printed."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from inspect import signature
from typing import Any

import torch
from torch import nn

from beyondprop.stages.losses import OutputLoss

_PLAIN = (int, float, str, bool, type(None))


def shown(thing: Any, more: Iterable[str] = ()) -> str:
    """Return the class and those arguments of the constructor, and attributes in `more`, that the object still has."""
    names = dict.fromkeys([*list(signature(type(thing).__init__).parameters)[1:], *more])
    known = {name: vars(thing)[name] for name in names if name in vars(thing)}
    settings = ", ".join(f"{name}={_value(value)}" for name, value in known.items() if not _is_empty(value))
    return f"{type(thing).__name__}({settings})"


def _is_empty(value: Any) -> bool:
    return isinstance(value, tuple) and not value


def _value(value: Any) -> str:
    if isinstance(value, _PLAIN):
        return repr(value)
    if isinstance(value, OutputLoss):
        return _value(value.loss)
    if isinstance(getattr(value, "name", None), str):
        return repr(value.name)
    if isinstance(value, nn.Module):
        return type(value).__name__
    if isinstance(value, torch.optim.Optimizer):
        rates = dict.fromkeys(float(group["lr"]) for group in value.param_groups if "lr" in group)
        return f"{type(value).__name__}(lr={' and '.join(f'{lr:.4g}' for lr in rates)})"
    if isinstance(value, tuple | list):
        return f"[{', '.join(map(_value, value))}]"
    if isinstance(value, functools.partial):
        return _value(value.func)
    if callable(value) and hasattr(value, "__name__"):
        return value.__name__
    own = type(value).__repr__ is not object.__repr__
    return repr(value) if own else shown(value)
