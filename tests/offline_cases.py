"""The offline rules as tests build them, and the rows that they are given."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from helpers import mlp
from torch import Tensor, nn

from beyondprop import ADMM, BCD, MAC, OfflineAltMin, OfflineRule, data

RULES: dict[str, Callable[..., OfflineRule]] = {
    "OfflineAltMin": OfflineAltMin,
    "OfflineAltMin-squared": functools.partial(OfflineAltMin, output_loss="squared", code_steps=3),
    "MAC": functools.partial(MAC, mu_growth=1.0),
    "MAC-squared": functools.partial(MAC, mu_growth=1.0, output_loss="squared"),
    "BCD": functools.partial(BCD, output_loss="squared"),
    "BCD-hinge": functools.partial(BCD, output_loss="hinge", alpha=0.5, gamma=2.0),
    "ADMM": functools.partial(ADMM, output_loss="hinge", warm_start=2),
    "ADMM-squared": functools.partial(ADMM, output_loss="squared", warm_start=0, gamma=1.0),
}
every_rule = pytest.mark.parametrize("name", list(RULES))
CE = nn.CrossEntropyLoss()


@functools.cache
def digits() -> data.Dataset:
    return data.load("digits")


def whole_set(rows: int = 90, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    found = digits()
    return found.x_train[:rows].to(dtype), found.y_train[:rows]


def build(name: str, *, dtype: torch.dtype = torch.float64, activation: str = "relu", seed: int = 2) -> OfflineRule:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Flatten(), *mlp(64, 12, 9, 10, activation=activation)).to(dtype)
    return RULES[name](model, CE)


def sweeps(rule: OfflineRule, x: Tensor, y: Tensor, count: int) -> list[float]:
    return [float(rule.step(x, y).loss) for _ in range(count)]
