"""Reversible chains that several tests use, and how they are compared with stored activations."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from beyondprop.nn import AdditiveCoupling, AffineCoupling, Coupling, MomentumCoupling, ReversibleSequential

TIGHT = 1e-10


def conv(channels: int, outputs: int | None = None, *, dropout: float = 0.0, norm: bool = True) -> nn.Sequential:
    """BN-ReLU-convolution, with dropout behind it."""
    norms = [nn.BatchNorm2d(channels)] if norm else []
    drops = [nn.Dropout(dropout)] if dropout else []
    return nn.Sequential(*norms, nn.ReLU(), nn.Conv2d(channels, outputs or channels, 3, padding=1), *drops)


COUPLINGS: dict[str, Callable[..., Coupling]] = {
    "additive": lambda **k: AdditiveCoupling(conv(4, **k), conv(4, **k)),
    "affine": lambda **k: AffineCoupling(conv(4, 8, **k), conv(4, 8, **k)),
    "momentum": lambda **k: MomentumCoupling(conv(4, **k)),
}
every_coupling = pytest.mark.parametrize("kind", list(COUPLINGS))
every_mode = pytest.mark.parametrize("mode", ["inverse", "checkpoint"])


def chain(kind: str = "additive", depth: int = 4, **options: Any) -> Any:
    """A chain of convolutions on images of 8 channels, in float64."""
    torch.manual_seed(0)
    return ReversibleSequential(*(COUPLINGS[kind](**options) for _ in range(depth))).double()


def images(dtype: torch.dtype = torch.float64, *, grad: bool = True) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(3, 8, 5, 5, generator=generator).to(dtype).requires_grad_(grad)


def far(found: Any, right: Any) -> float:
    """The largest relative difference between two lists of tensors; what is 1e-6 of the largest counts as zero."""
    floor, worst = max(float(b.detach().norm()) for b in right if b is not None) * 1e-6, 0.0
    for a, b in zip(found, right, strict=True):
        assert (a is None) == (b is None)
        if b is not None:
            worst = max(worst, float((a - b).detach().norm()) / max(floor, float(b.detach().norm())))
    return worst


Loss = Callable[[nn.Module, Tensor], Tensor]


def in_mode(model: nn.Module, mode: str) -> Any:
    """A copy of the model, its chains in this mode."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, ReversibleSequential):
            module.mode = mode
    return model


def same_as_stored(
    model: nn.Module, mode: str, loss: Loss = lambda m, x: m(x).square().mean(), x: Tensor | None = None
) -> None:
    """Loss, gradients, buffers and the generator's state are those of the stored mode."""
    found: dict[str, Any] = {}
    for way in ("store", mode):
        torch.manual_seed(1)
        copied, given = in_mode(model, way), (images() if x is None else x).detach().requires_grad_()
        value = loss(copied, given)
        value.backward()
        gradients = [given.grad, *(p.grad for p in copied.parameters())]
        found[way] = value.detach(), gradients, [*copied.buffers()], torch.get_rng_state()
    (value, gradients, buffers, state), (right, stored, theirs, drawn) = found[mode], found["store"]
    assert torch.equal(value, right)
    assert any(g is not None for g in stored)
    assert far(gradients, stored) < TIGHT
    assert all(torch.equal(a, b) for a, b in zip(buffers, theirs, strict=True))
    assert torch.equal(state, drawn)
