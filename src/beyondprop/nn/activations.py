"""Closed-form slopes of the common nonlinearities.

Each entry maps a module to `f(z)` and to `slope(z, a) = f'(z)`, where `a = f(z)` is already known; both read the module's
settings when they are called. Autograd's conventions
at the kinks hold (the slope of ReLU at 0 is 0), so closed form and autograd agree to the last bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Activation(NamedTuple):
    """An elementwise nonlinearity: its value and, from input and value, its slope.

    `is_gate`: the slope is 0 or 1, so that applying it twice is applying it once. `needs_input`: the slope is not known
    from the value alone, so that z must be kept. `factors`: of a unit with a target rule; from input and delta, what stands in
    for the slope from the first delta on.
    """

    value: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor, Tensor], Tensor]
    is_gate: bool = False
    needs_input: bool = True
    factors: Callable[[Tensor, Tensor], Tensor] | None = None


def _leaky_relu(module: nn.LeakyReLU) -> Activation:
    return Activation(
        lambda z: F.leaky_relu(z, module.negative_slope),
        lambda z, a: torch.where(z > 0, torch.ones_like(z), module.negative_slope),
    )


def _softplus(module: nn.Softplus) -> Activation:
    return Activation(
        module.forward,
        # Beyond the threshold torch computes the identity, whose slope is exactly 1.
        lambda z, a: torch.where(z * module.beta > module.threshold, 1.0, torch.sigmoid(z * module.beta)).to(z.dtype),
    )


def gelu_slope(z: Tensor, approximate: str) -> Tensor:
    """Return GELU'(z); `approximate` as for `nn.GELU`."""
    if approximate == "tanh":
        t = torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3))
        return 0.5 * (1 + t) + 0.5 * z * (1 - t * t) * math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * z * z)
    return 0.5 * (1 + torch.erf(z / math.sqrt(2))) + z * torch.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)


def _hardtanh(module: nn.Hardtanh) -> Activation:
    return Activation(
        lambda z: z.clamp(module.min_val, module.max_val),
        lambda z, a: ((z > module.min_val) & (z < module.max_val)).to(z.dtype),
    )


_FACTORIES: dict[type[nn.Module], Callable[[Any], Activation]] = {
    nn.ReLU: lambda m: Activation(torch.relu, lambda z, a: a.sign(), is_gate=True, needs_input=False),  # a >= 0
    nn.LeakyReLU: _leaky_relu,
    nn.Tanh: lambda m: Activation(torch.tanh, lambda z, a: 1 - a * a, needs_input=False),
    nn.Sigmoid: lambda m: Activation(torch.sigmoid, lambda z, a: a * (1 - a), needs_input=False),
    nn.Softplus: _softplus,
    nn.GELU: lambda m: Activation(m.forward, lambda z, a: gelu_slope(z, m.approximate)),
    nn.Hardtanh: _hardtanh,
    nn.ReLU6: _hardtanh,
    nn.Hardsigmoid: lambda m: Activation(F.hardsigmoid, lambda z, a: ((z > -3) & (z < 3)).to(z.dtype) / 6),
}


def register_closed_form(kind: type[nn.Module], factory: Callable[[Any], Activation]) -> None:
    """Let stages use a closed form for exactly this type of module (not for types derived from it)."""
    _FACTORIES[kind] = factory


def closed_form(module: nn.Module) -> Activation | None:
    """Return the closed form of an activation module, or None where there is none."""
    factory = _FACTORIES.get(type(module))
    return factory(module) if factory is not None else None
