"""Trains of spikes and small operators for tests of spiking layers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from beyondprop.nn import CubaLIF

every_rule = pytest.mark.parametrize("rule", ["hm2bp", "surrogate"])
NEURON = CubaLIF(tau_mem=8.0, tau_syn=2.0, threshold=0.5)
NEURONS = [CubaLIF(threshold=0.5), CubaLIF(8.0, 3.0, 0.5, refractory=2, delay=0), CubaLIF(5.0, 5.0, 0.5, 1, 3)]


def make_op(inputs: int = 6, outputs: int = 5, dtype: torch.dtype = torch.float64) -> nn.Linear:
    op = nn.Linear(inputs, outputs, bias=False, dtype=dtype)
    nn.init.uniform_(op.weight, -1.0, 1.5)
    return op


def make_spikes(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return (torch.rand(shape) < 0.4).to(dtype)


def weight_gradient(layer: nn.Module, x: Tensor, coefficient: Tensor) -> Tensor:
    """Return the gradient of the sum of the counts times coefficients, `(N, F)`, and leave none behind."""
    (layer(x).sum(1) * coefficient).sum().backward()
    (weight,) = layer.parameters()
    assert weight.grad is not None
    found, weight.grad = weight.grad, None
    return found


def spikes(*shape: int, seed: int = 0) -> Tensor:
    """Return single-precision spikes in 0.4 of the steps, the same for a seed."""
    return (torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) < 0.4).float()


def linear(inputs: int = 6, outputs: int = 4) -> nn.Linear:
    """Return weights in [0, 1], the same every time."""
    op = nn.Linear(inputs, outputs, bias=False)
    with torch.no_grad():
        op.weight.uniform_(0.0, 1.0, generator=torch.Generator().manual_seed(0))
    return op


def gradient(layer: nn.Module, name: str = "op.weight") -> Tensor:
    """Return what a parameter has in `.grad`."""
    found = layer.get_parameter(name).grad
    assert found is not None
    return found
