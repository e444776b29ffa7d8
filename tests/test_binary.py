"""Sign: forward a step, backward straight through."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from beyondprop.nn.binary import Sign


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_forward_is_one_or_minus_one(dtype: torch.dtype) -> None:
    z = torch.tensor([-3.0, -0.1, -0.0, 0.0, 0.1, 3.0, float("inf"), -float("inf")], dtype=dtype)
    signs = Sign()(z)
    assert signs.dtype == dtype
    assert signs.tolist() == [-1, -1, 1, 1, 1, 1, 1, -1]
    assert bool(Sign()(torch.tensor([float("nan")])).isnan())


@pytest.mark.parametrize("surrogate", ["hardtanh", "identity"])
def test_backward_is_the_surrogates(surrogate: str) -> None:
    z = torch.linspace(-2, 2, 21, dtype=torch.float64).requires_grad_()
    g = torch.randn(21, dtype=torch.float64)
    (found,) = torch.autograd.grad(Sign(surrogate)(z), z, g)
    window = (z.abs() <= 1).double() if surrogate == "hardtanh" else torch.ones_like(z)
    assert torch.equal(found, g * window)


def test_it_is_a_module() -> None:
    model = nn.Sequential(nn.Linear(3, 4), Sign("identity"), nn.Linear(4, 1))
    twin = copy.deepcopy(model)
    assert "surrogate='identity'" in repr(model)
    x = torch.randn(5, 3)
    assert torch.equal(model(x), twin(x))
    model(x).sum().backward()
    assert bool(model[0].weight.grad.any())  # type: ignore[union-attr]


def test_unknown_surrogates() -> None:
    with pytest.raises(ValueError, match="surrogate must be one of 'hardtanh', 'identity', got 'tanh'"):
        Sign("tanh")
