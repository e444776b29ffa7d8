"""What is checked against: nets with feedback rewritten by hand, a sweep of codes and matching losses written out."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from functools import cache
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch.nn.grad as conv_grad
from cases import Attention, Residual, convnet, jacobian, mlp
from numpy.polynomial.legendre import leggauss
from torch import Tensor, nn

from beyondprop.lab.nets.convolutional import basic_block
from beyondprop.lab.nets.forms import build
from beyondprop.nn import Residual as _Skip
from beyondprop.optim.matching import Transfer

CE = nn.CrossEntropyLoss()


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, feedback: Tensor) -> Tensor:
        ctx.save_for_backward(x, feedback)
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:  # type: ignore[override]
        x, feedback = ctx.saved_tensors
        rows, inputs = g.reshape(-1, g.shape[-1]), x.reshape(-1, x.shape[-1])
        return g @ feedback, rows.t() @ inputs, rows.sum(0), None


class _Conv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, feedback: Tensor, how: Any) -> Tensor:
        ctx.save_for_backward(x, weight, feedback)
        ctx.how, ctx.has_bias = how, bias is not None
        return F.conv2d(x, weight, bias, *how)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:  # type: ignore[override]
        x, weight, feedback = ctx.saved_tensors
        below = conv_grad.conv2d_input(list(x.shape), feedback, g, *ctx.how)
        own = conv_grad.conv2d_weight(x, list(weight.shape), g, *ctx.how)
        return below, own, g.sum((0, 2, 3)) if ctx.has_bias else None, None, None


class _FeedbackLinear(nn.Module):
    def __init__(self, layer: nn.Linear, feedback: Tensor) -> None:
        super().__init__()
        self.weight, self.bias, self.feedback = layer.weight, layer.bias, feedback

    def forward(self, x: Tensor) -> Tensor:
        return _Linear.apply(x, self.weight, self.bias, self.feedback)  # type: ignore[return-value]


class _FeedbackConv(nn.Module):
    def __init__(self, layer: nn.Conv2d, feedback: Tensor) -> None:
        super().__init__()
        self.weight, self.bias, self.feedback = layer.weight, layer.bias, feedback
        self.how = (layer.stride, layer.padding, layer.dilation, layer.groups)

    def forward(self, x: Tensor) -> Tensor:
        return _Conv.apply(x, self.weight, self.bias, self.feedback, self.how)  # type: ignore[return-value]


class _FeedbackAttention(nn.Module):
    """`nn.MultiheadAttention` of two heads, written out, with rewritten layers."""

    def __init__(self, attend: nn.MultiheadAttention, project: Tensor, out: Tensor) -> None:
        super().__init__()
        self.in_proj_weight, self.in_proj_bias = attend.in_proj_weight, attend.in_proj_bias
        self.out_proj = _FeedbackLinear(attend.out_proj, out)
        self.feedback, self.heads = project, attend.num_heads

    def forward(self, x: Tensor, _key: Tensor, _value: Tensor, **_: Any) -> tuple[Tensor, None]:
        joint: Any = _Linear.apply(x, self.in_proj_weight, self.in_proj_bias, self.feedback)
        q, k, v = (p.unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in joint.chunk(3, -1))
        weights = torch.softmax(q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5, -1)
        return self.out_proj((weights @ v).transpose(1, 2).flatten(2)), None


def rewritten(model: nn.Module, feedback: dict[str, Tensor]) -> nn.Module:
    """The model, its weights copied, with every layer's backward sending errors through the feedback of its weight."""
    model = copy.deepcopy(model)
    for name, module in list(model.named_modules()):
        parent, _, child = name.rpartition(".")
        if type(module) is nn.Linear and f"{name}.weight" in feedback:
            setattr(model.get_submodule(parent), child, _FeedbackLinear(module, feedback[f"{name}.weight"]))
        if type(module) is nn.Conv2d and f"{name}.weight" in feedback:
            setattr(model.get_submodule(parent), child, _FeedbackConv(module, feedback[f"{name}.weight"]))
        if type(module) is nn.MultiheadAttention and f"{name}.in_proj_weight" in feedback:
            pair = feedback[f"{name}.in_proj_weight"], feedback[f"{name}.out_proj.weight"]
            setattr(model.get_submodule(parent), child, _FeedbackAttention(module, *pair))
    return model


def _lenet() -> nn.Module:
    return build("lenet5", (1, 16, 16), 3)


def _residual() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        basic_block(4, 8, 2),
        basic_block(8, 8, 1),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(32, 3),
    )


def _attention(fused: bool) -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 6), Attention(6, fused=fused), nn.Flatten(), nn.Linear(18, 3))


NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (lambda: mlp(6, 8, 7, 5, 3, activation="tanh"), (6,)),
    "relu": (lambda: mlp(6, 8, 7, 3), (6,)),
    "norm": (lambda: mlp(6, 8, 7, 3, norm=True), (6,)),
    "lenet": (_lenet, (1, 16, 16)),
    "convnet": (lambda: convnet(norm=True), (1, 8, 8)),
    "grouped": (
        lambda: nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.Tanh(), nn.Conv2d(4, 6, 3, 2, 1, 1, 2), nn.ReLU(), nn.Flatten(), nn.Linear(54, 3)
        ),
        (1, 8, 8),
    ),
    "residual": (_residual, (1, 8, 8)),
    "skip": (lambda: nn.Sequential(nn.Linear(6, 8), nn.Tanh(), Residual(8), Residual(8), nn.Linear(8, 3)), (6,)),
    "block_first": (lambda: nn.Sequential(Residual(6), nn.Linear(6, 3)), (6,)),
    "closed_block_first": (
        lambda: nn.Sequential(
            _Skip(nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 1, 1))),
            nn.Flatten(),
            nn.Linear(64, 3),
        ),
        (1, 8, 8),
    ),
    "norm_first": (lambda: nn.Sequential(nn.BatchNorm1d(6), *mlp(6, 8, 3)), (6,)),
    "attention": (lambda: _attention(False), (3, 6)),
    "fused_attention": (lambda: _attention(True), (3, 6)),
}
every_net = pytest.mark.parametrize("net", list(NETS))


def case(net: str, rows: int = 7) -> tuple[nn.Module, Tensor, Tensor]:
    build, shape = NETS[net]
    return build().double(), torch.randn(rows, *shape, dtype=torch.float64), torch.arange(rows) % 3


def literal_sweep(
    stages: Sequence[nn.Module],
    x: Tensor,
    y: Tensor,
    damping: Callable[[Tensor, Tensor], float],
    mu: float,
    normalize: bool,
) -> list[Tensor]:
    """Line search, last code first, with every sample's Jacobian and Hessian written out; nan where a sample is dead.

    `damping` is a function of a hidden code's `|g|^2` and `|J g|^2`, both `(N,)`.
    """
    codes = [x]
    for stage in stages:
        codes.append(stage(codes[-1]).detach())
    p = torch.softmax(codes[-1], 1)
    deltas = [F.one_hot(y, p.shape[1]) - p]
    for level in range(len(stages) - 1, 0, -1):
        j = jacobian(stages[level], codes[level])
        g = (j.mT @ deltas[-1].unsqueeze(-1)).squeeze(-1)
        image = (j @ g.unsqueeze(-1)).squeeze(-1)
        squared, curvature = (g**2).sum(1), (image**2).sum(1)
        weight = damping(squared, curvature)
        if level == len(stages) - 1:
            weight = mu
            curvature = (p * image**2).sum(1) - (p * image).sum(1) ** 2
        t = squared / (weight * squared + curvature)
        deltas.append(g * (t / t.mean() if normalize else t).unsqueeze(1))
    return deltas


# Where transfer functions are not smooth: GELUs at their minima, piecewise linear ones, softplus of beta 1, 2.5 and 0.5.
_KINKS = (-math.inf, -0.7524614220710162, -0.7517915246935645, 0.0, 20.0, 24.0, 40.0, math.inf)


@cache
def _quadrature(panels: int = 32, order: int = 20) -> tuple[Tensor, Tensor]:
    """Nodes and weights on [0, 1]: Gauss-Legendre on equal panels."""
    nodes, weights = (torch.from_numpy(found) / 2 for found in leggauss(order))
    starts = torch.arange(panels, dtype=torch.float64).unsqueeze(1)
    return ((starts + 0.5 + nodes) / panels).flatten(), (weights / panels).repeat(panels)


def integral(f: Transfer, z: Tensor, dim: int = -1) -> Tensor:
    """Of every entry the integral of f from 0 to z, in float64 and differentiable; of softmax the log-sum-exp over `dim`."""
    z = z.double()
    if f.name == "softmax":
        return torch.logsumexp(z, dim)
    nodes, weights = _quadrature()
    whole = torch.zeros_like(z)
    for low, high in pairwise(_KINKS):
        start = min(max(0.0, low), high)
        length = z.clamp(low, high) - start
        whole = whole + length * (f.value(start + length.unsqueeze(-1) * nodes, -1) @ weights)
    return whole


def matching_loss(a: Tensor, z: Tensor, f: Transfer, dim: int = -1) -> Tensor:
    """D_F(a, z), summed over all entries: 0-d, float64."""
    between = integral(f, a, dim).sum() - integral(f, z, dim).sum()
    return between - (f.value(z, dim) * (a - z)).sum()


def nlms(row: Tensor, delta: Tensor, damping: float = 0.0) -> Tensor:
    """Normalised LMS, of one input `(n,)` and what its output should lose `(out,)`: `(out, n)`."""
    return torch.outer(delta, row) / (damping + row @ row)
