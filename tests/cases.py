"""Nets, batches and rules that several tests use, and how they are compared."""

from __future__ import annotations

import copy
import signal
from collections.abc import Callable, Iterable, Sequence
from functools import cache, partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from beyondprop import (
    ADMM,
    BCD,
    MAC,
    AffineProjection,
    Assignment,
    Credit,
    DifferenceTargetProp,
    LearningRule,
    OfflineAltMin,
    OfflineRule,
    data,
)
from beyondprop.lab.comparing.member import Member, Observer
from beyondprop.nn import ElmanCell, Recurrent
from beyondprop.stages.chain import Chain, Trace
from beyondprop.stages.losses import LossFunction, OutputLoss

SGD = partial(torch.optim.SGD, lr=0.1)
ADAM = partial(torch.optim.Adam, lr=3e-3)
CE = nn.CrossEntropyLoss()

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "identity": nn.Identity,
    "relu": nn.ReLU,
    "leaky_relu": lambda: nn.LeakyReLU(0.01),
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "softplus": lambda: nn.Softplus(beta=2.0, threshold=3.0),
    "gelu": nn.GELU,
    "gelu_tanh": lambda: nn.GELU("tanh"),
    "hardtanh": lambda: nn.Hardtanh(-0.5, 1.5),
    "relu6": nn.ReLU6,
}


class Residual(nn.Module):
    """`x + tanh(Linear(x))`: cannot be cut, so it is a stage."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


class Attention(nn.Module):
    """Self-attention with a skip. Without weights it runs fused, where there is no second derivative."""

    def __init__(self, width: int, *, fused: bool, batch_first: bool = True) -> None:
        super().__init__()
        self.attend = nn.MultiheadAttention(width, 2, batch_first=batch_first)
        self.norm = nn.LayerNorm(width)
        self.fused = fused

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return x + self.attend(y, y, y, need_weights=not self.fused)[0]


class Functional(nn.Module):
    """Two layers with tanh between them as a function."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x)))


class Branch(nn.Module):
    """A layer, and one of two behind it, as `way` says."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.left, self.right = nn.Linear(6, 8), nn.Linear(8, 3), nn.Linear(8, 3)
        self.way = "left"

    def forward(self, x: Tensor) -> Tensor:
        return getattr(self, self.way)(torch.tanh(self.inner(x)))


class Recorder(Credit):
    """Any credit, whose assignments are kept."""

    def __init__(self, inner: Credit) -> None:
        self.inner = inner
        self.pushes = inner.pushes
        self.kept: list[Assignment] = []

    def assign(self, trace: Trace, loss: Any) -> Any:
        for assignment in self.inner.assign(trace, loss):
            self.kept.append(assignment)
            yield assignment


def descend(
    model: nn.Module, owner: Any, x: Tensor, y: Tensor, steps: int = 3, loss: Any = F.cross_entropy
) -> list[float]:
    """Steps of a drop-in optimizer, or of SGD behind a projection; returns the losses."""
    behind = torch.optim.SGD(model.parameters(), lr=0.05) if isinstance(owner, AffineProjection) else None
    losses = []
    for _ in range(steps):
        model.zero_grad()
        value = loss(model(x), y)
        value.backward()
        owner.step()
        if behind is not None:
            behind.step()
        losses.append(float(value.detach()))
    return losses


def mlp(*widths: int, activation: str = "relu", norm: bool = False, dropout: float = 0.0) -> nn.Sequential:
    """`Linear (BatchNorm) activation (Dropout) ... Linear`."""
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(widths[:-1]):
        layers += [nn.Linear(inputs, outputs)]
        layers += [nn.BatchNorm1d(outputs)] if norm else []
        layers += [ACTIVATIONS[activation]()]
        layers += [nn.Dropout(dropout)] if dropout else []
    return nn.Sequential(*layers, nn.Linear(widths[-2], widths[-1]))


def mixed(dropout: float = 0.3) -> nn.Sequential:
    """A stage with BatchNorm, a plain one, which a memory can serve, and one with dropout."""
    return nn.Sequential(
        nn.Linear(6, 16),
        nn.BatchNorm1d(16),
        nn.ReLU(),
        nn.Linear(16, 16),
        nn.Tanh(),
        nn.Dropout(dropout),
        nn.Linear(16, 3),
    )


def convnet(channels: int = 1, *, norm: bool = False) -> nn.Sequential:
    """Two convolutions with pooling and two linear layers, for 8x8 images of three classes."""
    return nn.Sequential(
        nn.Conv2d(channels, 3, 3, padding=1),
        *([nn.BatchNorm2d(3)] if norm else []),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(3, 4, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16, 8),
        nn.ReLU(),
        nn.Linear(8, 3),
    )


def rnn() -> nn.Sequential:
    """A recurrent layer over the rows of 8x8 images of three classes, all states read."""
    read = [nn.Tanh(), nn.Linear(12, 2), nn.Tanh(), nn.Flatten(), nn.Linear(16, 3)]
    return nn.Sequential(nn.Flatten(1, 2), Recurrent(ElmanCell(8, 12), "all"), *read)


def blobs(rows: int, features: int = 6, classes: int = 3, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Classes that a line separates: one center each."""
    generator = torch.Generator().manual_seed(5)
    centers = 2 * torch.randn(classes, features, generator=generator)
    y = torch.arange(rows) % classes
    return (centers[y] + 0.3 * torch.randn(rows, features, generator=generator)).to(dtype), y


def images(rows: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """8x8 images of the same kind."""
    x, y = blobs(rows, 64)
    return x.view(rows, 1, 8, 8).to(dtype), y


def state(module: nn.Module) -> dict[str, Tensor]:
    """A copy of weights and buffers."""
    return {name: value.clone() for name, value in module.state_dict().items()}


def equal(a: Any, b: Any) -> bool:
    """Whether two nests of dicts, lists and tensors are equal to the last bit; NaN equals NaN."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(equal(p, q) for p, q in zip(a, b, strict=True))
    return a == b or (a != a and b != b)


def rule_state(rule: LearningRule) -> Any:
    """A deep copy of all that a step may change; the count of steps goes on where one is refused."""
    return copy.deepcopy((rule.model.state_dict(), rule.state_dict() | {"watchdog": None, "steps": None}))


def difference(a: Iterable[Tensor], b: Iterable[Tensor]) -> float:
    """Largest absolute difference between two lists of tensors."""
    return max(float((p.detach() - q.detach()).abs().max()) for p, q in zip(a, b, strict=True))


def relative(a: Tensor, b: Tensor) -> float:
    """`|a - b| / |b|`."""
    a, b = a.detach(), b.detach()
    return float((a - b).norm() / b.norm().clamp_min(1e-30))


def assignments(
    model: nn.Module, loss: LossFunction, credit: Credit, x: Tensor, y: Tensor, **settings: Any
) -> list[Assignment]:
    """What a credit gives the stages of a model, last stage first."""
    chain = Chain(model, **settings)
    credit.bind(chain)
    with torch.no_grad():
        trace = chain.record(x, push=credit.pushes)
        return list(credit.assign(trace, OutputLoss(loss).at(trace.output, y)))


def jacobian(function: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
    """Every sample's Jacobian `(N, out, in)`, one sample at a time, by autograd."""
    rows = []
    for sample in z:
        full = torch.autograd.functional.jacobian(lambda s: function(s.unsqueeze(0)).squeeze(0), sample)
        rows.append(full.reshape(-1, sample.numel()))  # type: ignore[union-attr]
    return torch.stack(rows)


def train(rule: LearningRule, batches: Sequence[tuple[Tensor, Tensor]]) -> list[float]:
    """One step a batch; return the losses."""
    return [float(rule.step(x, y).loss) for x, y in batches]


def target_propagation(**changes: Any) -> DifferenceTargetProp:
    """Difference target propagation of a net with a normalisation, dropout and two nonlinearities."""
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Linear(6, 9), nn.BatchNorm1d(9), nn.Tanh(), nn.Dropout(0.2), nn.Linear(9, 8), nn.Tanh(), nn.Linear(8, 7),
        nn.ReLU(), nn.Linear(7, 3),
    )  # fmt: skip
    return DifferenceTargetProp(model, nn.CrossEntropyLoss(), **changes)


OFFLINE_RULES: dict[str, Callable[..., OfflineRule]] = {
    "OfflineAltMin": OfflineAltMin,
    "OfflineAltMin-squared": partial(OfflineAltMin, output_loss="squared", code_steps=3),
    "MAC": partial(MAC, mu_growth=1.0),
    "MAC-squared": partial(MAC, mu_growth=1.0, output_loss="squared"),
    "BCD": partial(BCD, output_loss="squared"),
    "BCD-hinge": partial(BCD, output_loss="hinge", alpha=0.5, gamma=2.0),
    "ADMM": partial(ADMM, output_loss="hinge", warm_start=2),
    "ADMM-squared": partial(ADMM, output_loss="squared", warm_start=0, gamma=1.0),
}
every_offline_rule = pytest.mark.parametrize("name", list(OFFLINE_RULES))


@cache
def digits() -> data.Dataset:
    return data.load("digits")


def whole_set(rows: int = 90, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    found = digits()
    return found.x_train[:rows].to(dtype), found.y_train[:rows]


def offline_rule(
    name: str, *, dtype: torch.dtype = torch.float64, activation: str = "relu", seed: int = 2
) -> OfflineRule:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Flatten(), *mlp(64, 12, 9, 10, activation=activation)).to(dtype)
    return OFFLINE_RULES[name](model, CE)


def sweeps(rule: OfflineRule, x: Tensor, y: Tensor, count: int) -> list[float]:
    return [float(rule.step(x, y).loss) for _ in range(count)]


def projected(model: nn.Module, loss: Callable[[], Tensor], samples: float | None = None) -> list[Tensor]:
    """What an affine projection makes of the gradients of `loss()`, which is averaged over `samples`."""
    projection = AffineProjection(model)
    loss().backward()
    projection.step(samples)
    projection.remove_hooks()
    return [p.grad for p in model.parameters() if p.grad is not None]


class InterruptAt(Observer):
    """Presses Ctrl-C at the n-th row of a comparison."""

    def __init__(self, count: int) -> None:
        self.count = count

    def row(self, member: Member, row: dict[str, Any]) -> None:
        self.count -= 1
        if self.count == 0:
            signal.raise_signal(signal.SIGINT)
