"""Layers of other packages: the same steps as nn.Linear of the same weights, or refused by name."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import CE, difference
from torch import Tensor, nn

from beyondprop import AffineProjection, LocoProp, UnsupportedModelError, register_layer
from beyondprop.optim import _maps

D = torch.float64
X, Y = torch.randn(12, 4, 6, dtype=D, generator=torch.Generator().manual_seed(1)), torch.arange(12) % 3


class Conv1D(nn.Module):
    """That of transformers: a Linear whose weight is `(in, out)`."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf = nf
        self.weight = nn.Parameter(torch.randn(nx, nf, dtype=D) * 0.3)
        self.bias = nn.Parameter(torch.randn(nf, dtype=D) * 0.1)

    def forward(self, x: Tensor) -> Tensor:
        size_out = (*x.size()[:-1], self.nf)
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(size_out)


class Mix(nn.Module):
    """That of einops, which names a weight `c d` and has a bias with the dimensions of its output."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(nx, nf, dtype=D) * 0.3)
        self.bias = nn.Parameter(torch.randn(1, 1, nf, dtype=D) * 0.1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("btc,cd->btd", x, self.weight) + self.bias


class Channels(nn.Module):
    """Features in the second dimension, parameters with names of their own, the weight with a dimension more."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(nf, nx, 1, dtype=D) * 0.3)
        self.shift = nn.Parameter(torch.randn(nf, 1, dtype=D) * 0.1)

    def forward(self, x: Tensor) -> Tensor:
        return self.kernel.squeeze(-1) @ x + self.shift


class Plain(nn.Module):
    """A Linear under another name, such as that of torch_geometric, without a bias."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(nf, nx, dtype=D) * 0.3)
        self.register_parameter("bias", None)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


class Swapped(nn.Module):
    """Calls a layer on channels."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.transpose(1, 2)).transpose(1, 2)


KINDS: dict[type[nn.Module], dict[str, Any]] = {
    Conv1D: {"matrix": lambda w: w.T},
    Mix: {"matrix": lambda w: w.T},
    Channels: {
        "matrix": lambda w: w.flatten(1),
        "weight": "kernel",
        "bias": "shift",
        "rows": lambda x: x.transpose(1, 2),
    },
    Plain: {},
}
kinds = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test registers is gone afterwards."""
    monkeypatch.setattr("beyondprop.optim.layers.MAPS", maps := dict(_maps.MAPS))
    monkeypatch.setattr(_maps, "MAPS", maps)
    for kind, settings in KINDS.items():
        register_layer(kind, **settings)


def pair(kind: Any) -> tuple[nn.Module, nn.Module]:
    """Two nets of equal weights, one of `kind`, the other of Linear."""
    torch.manual_seed(0)
    sizes = [(5, 6), (4, 5), (3, 4)]
    own = [kind(*size) for size in sizes]
    linear = [nn.Linear(inputs, outputs, bias=kind is not Plain, dtype=D) for outputs, inputs in sizes]
    with torch.no_grad():
        for one, other in zip(own, linear, strict=True):
            weight, *bias = one.parameters()
            other.weight.copy_(weight.T if weight.shape[0] == other.in_features else weight.flatten(1))
            for b in bias:
                other.bias.copy_(b.flatten())
    placed = [Swapped(layer) if kind is Channels else layer for layer in own]
    nets = [
        nn.Sequential(a[0], nn.Tanh(), a[1], nn.ReLU(), nn.Flatten(), nn.Unflatten(1, (4, 4)), a[2], nn.Flatten())
        for a in (placed, linear)
    ]
    return nets[0], nets[1]


def apart(own: nn.Module, linear: nn.Module) -> float:
    def rows(net: nn.Module) -> list[Tensor]:
        found = []
        for p in net.parameters():
            p = p.grad if p.grad is not None else p
            matrix = p.numel() > 5 and p.squeeze().ndim == 2
            found.append(p.squeeze().detach() if matrix else p.flatten().detach())
        return found

    pairs = zip(rows(own), rows(linear), strict=True)
    return max(difference([a if a.shape == b.shape else a.T], [b]) for a, b in pairs)


OPTIMIZERS: dict[str, Callable[[nn.Module], Any]] = {
    "matching": partial(LocoProp, lr=1e-3),
    "squared": partial(LocoProp, lr=1e-3, loss="squared", gram=False),
    "gram": partial(LocoProp, lr=1e-3, loss="squared", gram=True),
    "quadratic": partial(LocoProp, lr=1e-3, loss="quadratic"),
    "rows": partial(LocoProp, lr=1e-3, rows=5),
    "trust and prox": partial(LocoProp, lr=1e-3, trust=0.1, prox=0.2),
    "projection": AffineProjection,
    "projection over inputs": partial(AffineProjection, side="inputs"),
    "projection over samples": partial(AffineProjection, side="samples"),
    "projection with memory": partial(AffineProjection, forgetting=0.5),
    "projection of rows": partial(AffineProjection, rows=0.5),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@kinds
def test_a_registered_layer_is_a_linear(kind: type[nn.Module], name: str) -> None:
    nets = pair(kind)
    start = copy.deepcopy(nets[0])
    for net in nets:
        optimizer = OPTIMIZERS[name](net)
        inner = torch.optim.SGD(net.parameters(), lr=0.1)
        for _ in range(3):
            net.zero_grad()
            F.cross_entropy(net(X), Y).backward()
            optimizer.step()
            if isinstance(optimizer, AffineProjection):
                inner.step()
        if isinstance(optimizer, LocoProp):
            assert list(optimizer.transfers.values())[:2] == ([] if name in ("squared", "gram") else ["tanh", "relu"])
            assert len(optimizer.param_groups) == 3
        net.zero_grad()
    assert apart(*nets) < 1e-12
    assert difference(nets[0].parameters(), start.parameters()) > 1e-4


def test_half_precision_by_autocast_is_not_taken_for_another_output() -> None:
    net = pair(Conv1D)[0].float()
    optimizer = LocoProp(net)
    with torch.autocast("cpu", torch.bfloat16):
        CE(net(X.float()), Y).backward()
    optimizer.step()


def test_a_subclass_counts_unless_it_has_a_forward_pass_of_its_own() -> None:
    class Same(Conv1D): ...

    class Other(Conv1D):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).tanh()

    net = nn.Sequential(Same(5, 6), Other(3, 5))
    optimizer = LocoProp(net, base=partial(torch.optim.SGD, lr=0.1))
    assert [group["name"] for group in optimizer.param_groups] == ["0", "base"]


def test_weights_that_no_layer_has_are_said_until_they_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(_maps.MAPS, Conv1D)
    net = nn.Sequential(Conv1D(6, 6), nn.Tanh(), nn.Linear(6, 6, dtype=D))
    with pytest.warns(UserWarning, match=r"^50% of the .*those of Conv1D 50%.*by register_layer.*exclude=\['0'\]"):
        LocoProp(net)
    LocoProp(net, exclude=["0"])
    register_layer(Conv1D, lambda w: w.T)
    assert len(LocoProp(net).param_groups) == 2


class Scaled(Conv1D):
    def forward(self, x: Tensor) -> Tensor:
        return 1.1 * super().forward(x)


class Adapted(Conv1D):
    def __init__(self, nf: int, nx: int) -> None:
        super().__init__(nf, nx)
        self.adapter = nn.Linear(nx, nf, bias=False, dtype=D)
        nn.init.zeros_(self.adapter.weight)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.adapter(x)


WRONG: dict[str, tuple[Callable[[int, int], nn.Module], dict[str, Any], str]] = {
    "square without its matrix": (Conv1D, {}, r"Layer '0' gave another output \(relative difference"),
    "scaled": (Scaled, {"matrix": lambda w: w.T}, "gave another output"),
    "a copy": (Conv1D, {"matrix": lambda w: w.T.clone()}, "no view of its whole weight"),
    "a part": (Conv1D, {"matrix": lambda w: w[:1].expand(6, 6)}, "no view of its whole weight"),
    "no matrix": (Conv1D, {"matrix": lambda w: w.flatten()}, r"a tensor of shape \(36,\)"),
    "more parameters": (
        Adapted,
        {"matrix": lambda w: w.T},
        r"\['adapter.weight'\] besides its weight and bias",
    ),
    "a bias of another size": (Mix, {"matrix": lambda w: w.reshape(4, 9)}, "a bias of 6 numbers for 4 outputs"),
    "other rows": (Conv1D, {"matrix": lambda w: w.T, "rows": lambda x: x.transpose(1, 2)}, "of which the rows are"),
}


@pytest.mark.parametrize("optimizer", [LocoProp, AffineProjection])
@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_registration_is_refused_by_name(name: str, optimizer: Any) -> None:
    kind, settings, message = WRONG[name]
    assert isinstance(kind, type)
    register_layer(kind, **settings)
    net = nn.Sequential(kind(6, 6), nn.Tanh(), nn.Linear(6, 3, dtype=D))
    before = copy.deepcopy(net.state_dict())

    def run() -> None:
        own = optimizer(net)
        net(X).square().mean().backward()
        own.step()

    with pytest.raises(UnsupportedModelError, match=message):
        run()
    assert all(map(torch.equal, before.values(), net.state_dict().values()))


def test_what_is_replaced_is_known_by_its_name() -> None:
    net = pair(Channels)[0]
    optimizer = LocoProp(net)
    net[0].layer.kernel = nn.Parameter(net[0].layer.kernel.detach().clone())  # type: ignore[union-attr]
    CE(net(X), Y).backward()
    with pytest.raises(UnsupportedModelError, match=r"weight of layer '0\.layer' is no longer the parameter"):
        optimizer.step()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((nn.Linear,), ValueError, "Linear is captured by itself"),
        ((nn.Linear(2, 2),), TypeError, "takes a class of modules, got Linear"),
        ((int,), TypeError, "takes a class of modules, got <class 'int'>"),
        ((Conv1D, "T"), TypeError, "matrix must be a function of a tensor or None, got str"),
    ],
)
def test_what_cannot_be_registered_is_refused(arguments: tuple[Any, ...], error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        register_layer(*arguments)


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_names_are_strings(name: str) -> None:
    with pytest.raises(TypeError, match=f"{name} must be the name of a parameter, got int"):
        register_layer(Conv1D, **{name: 1})  # type: ignore[arg-type]
