"""Optimizers as factories: what builds a `torch.optim` optimizer over the parameters that it is given."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import nn

from beyondprop.optim.rmsprop import RMSProp

OptimizerFactory = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
"""Builds a torch optimizer over parameters, such as `partial(torch.optim.Adam, lr=3e-3)`."""


def adam(lr: float = 3e-3) -> OptimizerFactory:
    """Return a factory of `torch.optim.Adam`, fused where the parameters' device has a fused kernel."""

    def build(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        parameters = list(parameters)
        fused = all(p.device.type in ("cpu", "cuda", "mps", "xpu") and p.is_floating_point() for p in parameters)
        return torch.optim.Adam(parameters, lr=lr, fused=fused)

    return build


def centered_rmsprop(lr: float, **settings: float) -> OptimizerFactory:
    """Return a factory of a centered `RMSProp` whose second moment starts at 0, with the settings of Lee et al., ECML 2015."""
    own: dict[str, Any] = {"alpha": 0.95, "momentum": 0.9, "eps": 1e-3, "initial": 0.0} | settings
    return partial(RMSProp, lr=lr, centered=True, **own)
