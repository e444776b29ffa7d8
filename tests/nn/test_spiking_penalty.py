"""The regulariser of the published runs."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from beyondprop.nn import CubaLIF, PoissonEncoder, SpikingLayer, SpikingSumPool2d, exponential_penalty

NEURON = CubaLIF()


def test_its_derivative_is_the_published_one() -> None:
    torch.manual_seed(0)
    ops = nn.Linear(6, 4, bias=False), nn.Conv2d(2, 3, 3, bias=False)
    model = nn.Sequential(PoissonEncoder(5), *(SpikingLayer(op, NEURON) for op in ops)).double()
    exponential_penalty(model, strength=3.0, sharpness=0.5, largest=2.0).backward()
    for op in ops:
        assert op.weight.grad is not None
        rows = op.weight.detach().flatten(1) / 2.0
        for row, found in zip(rows, op.weight.grad.flatten(1), strict=True):
            mean = sum(float(w) ** 2 for w in row) / len(row)
            wanted = [3.0 * 0.5 * float(w) * math.exp(0.5 * (mean - 1.0)) for w in row]
            torch.testing.assert_close(found, torch.tensor(wanted, dtype=torch.float64), rtol=1e-12, atol=0.0)


def test_shared_weights_count_once_and_pooling_has_none() -> None:
    op = nn.Linear(4, 4, bias=False)
    once = exponential_penalty(SpikingLayer(op, NEURON))
    assert exponential_penalty(nn.Sequential(SpikingLayer(op, NEURON), SpikingLayer(op, NEURON))).item() == once.item()
    both = nn.Sequential(SpikingSumPool2d(2, NEURON), nn.Flatten(2), SpikingLayer(op, NEURON))
    assert exponential_penalty(both).item() == once.item()


def test_it_is_computed_in_single_precision_at_least() -> None:
    layer = SpikingLayer(nn.Linear(4, 400, bias=False), NEURON).half()
    found = exponential_penalty(layer)
    assert found.dtype == torch.float32
    found.backward()
    assert layer.op.weight.grad is not None
    assert layer.op.weight.grad.dtype == torch.float16


@pytest.mark.parametrize("name", ["strength", "sharpness", "largest"])
def test_numbers_must_be_positive(name: str) -> None:
    with pytest.raises(ValueError, match=name):
        exponential_penalty(SpikingLayer(nn.Linear(2, 2, bias=False), NEURON), **{name: 0.0})


def test_a_model_without_spiking_layers_is_refused() -> None:
    with pytest.raises(ValueError, match="SpikingLayer"):
        exponential_penalty(nn.Linear(2, 2))
