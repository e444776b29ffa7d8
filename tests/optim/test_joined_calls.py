"""Several calls of a layer are one local problem, whose rows are multiplied at once: the same step as call by call."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import pytest
import torch
from cases import difference
from torch import Tensor, nn

from beyondprop import AffineProjection, LocoProp
from beyondprop.optim import _local, affine_projection
from beyondprop.optim._capture import Capture
from beyondprop.optim._maps import LinearMap

D = torch.float64
SGD = torch.optim.SGD
Batches = list[Tensor]


class Recurrent(nn.Module):
    """One cell for all steps of a sequence `(N, time, 4)`, and a head for the last."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.Linear(4 + 5, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = x.new_zeros(len(x), 5)
        for now in x.unbind(1):
            h = torch.tanh(self.cell(torch.cat([now, h], 1)))
        return self.head(h)


class Tied(nn.Module):
    """An embedding whose weight is the output layer's, too."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.out = nn.Embedding(6, 4, padding_idx=0), nn.Linear(4, 6, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.embed(x)))


def _perceptron() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))


def _convolutions() -> nn.Module:
    first = nn.Conv2d(2, 4, 3, padding=1, padding_mode="circular")
    return nn.Sequential(first, nn.Tanh(), nn.Conv2d(4, 6, 2, stride=2, groups=2), nn.Flatten(), nn.Linear(24, 3))


def _tokens() -> nn.Module:
    return nn.Sequential(nn.Embedding(6, 4, padding_idx=0), nn.Tanh(), nn.Linear(4, 3))


def _rows(*shapes: tuple[int, ...]) -> Batches:
    return [torch.randn(shape, dtype=D) for shape in shapes]


def _indices(*shapes: tuple[int, ...]) -> Batches:
    return [torch.randint(6, shape) for shape in shapes]


# A net, and the batches of as many backward passes.
NETS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Batches]]] = {
    "equal": (_perceptron, lambda: _rows((6, 4), (6, 4), (6, 4))),
    "unequal": (_perceptron, lambda: _rows((7, 4), (2, 4), (7, 4), (1, 4))),
    "no batch dimension": (_perceptron, lambda: _rows((4,), (3, 4))),
    "sequences": (_perceptron, lambda: _rows((2, 5, 4), (3, 5, 4), (2, 3, 4), (2, 4))),
    "recurrent": (Recurrent, lambda: _rows((5, 3, 4))),
    "recurrent, accumulated": (Recurrent, lambda: _rows((5, 3, 4), (2, 4, 4))),
    "convolutions": (_convolutions, lambda: _rows((4, 2, 4, 4), (3, 2, 4, 4))),
    "tokens": (_tokens, lambda: _indices((4, 3), (4, 3), (2, 5), (7,))),
    "tied": (Tied, lambda: _indices((4, 3), (2, 3))),
}
LOCOPROP: dict[str, dict[str, Any]] = {
    "matching": {},
    "squared, by rows": {"loss": "squared", "gram": False},
    "squared, by X^T X": {"loss": "squared", "gram": True},
    "quadratic": {"loss": "quadratic"},
    "a share of the rows": {"rows": 0.4},
    "two rows": {"rows": 2},
    "two rows, squared": {"rows": 2, "loss": "squared", "gram": False},
    "two rows by X^T X": {"rows": 2, "loss": "squared", "gram": True},
}
PROJECTION: dict[str, dict[str, Any]] = {
    "inputs": {"side": "inputs"},
    "smaller": {},
    "running": {"forgetting": 0.5},
    "two rows": {"rows": 2},
}


def _locoprop(settings: dict[str, Any], model: nn.Module) -> Callable[[], Any]:
    return LocoProp(model, 0.05, target_lr=0.5, local_steps=4, local_optimizer=SGD, **settings).step


def _projection(settings: dict[str, Any], model: nn.Module) -> Callable[[], Any]:
    projection, optimizer = AffineProjection(model, reduction="sum", **settings), SGD(model.parameters(), 0.05)
    return lambda: (projection.step(), optimizer.step())


KINDS = {f"locoprop, {k}": partial(_locoprop, s) for k, s in LOCOPROP.items()}
KINDS |= {f"projection, {k}": partial(_projection, s) for k, s in PROJECTION.items()}


def _trained(model: nn.Module, batches: Batches, kind: str) -> list[Tensor]:
    twin = copy.deepcopy(model)
    step = KINDS[kind](twin)
    for _ in range(2):
        twin.zero_grad()
        for x in batches:
            twin(x).sin().sum().backward()
        step()
    return [p.detach() for p in twin.parameters()]


def _one_by_one(calls: Iterable[Any], rows: Any) -> list[_local.Alike]:
    return [alike for call in calls for alike in _TOGETHER([call], rows)]


_TOGETHER = _local.together


# Of a weight that is an embedding and an output layer there is no linear system.
CASES = [(net, kind) for net in NETS for kind in KINDS if net != "tied" or not kind.startswith("projection")]


@pytest.mark.parametrize(("net", "kind"), CASES)
def test_joined_calls_make_the_step_of_calls_one_by_one(net: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    build, draw = NETS[net]
    model, batches = build().double(), draw()
    found = _trained(model, batches, kind)
    for module in (_local, affine_projection):
        monkeypatch.setattr(module, "together", _one_by_one)
    expected = _trained(model, batches, kind)
    assert difference(found, list(model.parameters())) > 1e-4
    assert difference(found, expected) < 1e-12


@pytest.mark.parametrize(
    ("rows", "batches", "products"), [(None, (5, 2, 2), 1), (3, (5, 5, 2), 2), (0.5, (5, 5, 5), 1)]
)
@pytest.mark.parametrize("loss", ["matching", "squared"])
def test_a_local_step_multiplies_all_calls_at_once(
    loss: str, rows: Any, batches: tuple[int, ...], products: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, count = nn.Sequential(nn.Linear(4, 3), nn.Tanh()), 0
    optimizer = LocoProp(model, local_steps=4, loss=loss, gram=False, rows=rows)
    for n in batches:
        model(torch.ones(n, 4)).sum().backward()
    add = LinearMap.add_gradients

    def counted(*arguments: Any) -> None:
        nonlocal count
        count += 1
        add(*arguments)

    monkeypatch.setattr(LinearMap, "add_gradients", counted)
    optimizer.step()
    assert count == 3 * products  # the first local step is that of backpropagation


def test_moments_are_of_all_calls_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = nn.Linear(4, 3), []
    projection, moments = AffineProjection(model, side="inputs"), LinearMap.moments
    for n in (5, 2, 3):
        model(torch.ones(n, 4)).sum().backward()
    monkeypatch.setattr(LinearMap, "moments", lambda own, x, **how: seen.append(len(x)) or moments(own, x, **how))
    projection.step()
    assert seen == [10]


def test_one_call_is_not_copied() -> None:
    layer, x = nn.Linear(4, 3), torch.ones(5, 4)
    capture = Capture(layer)
    capture.output_layers = {""}
    capture.attach()
    layer(x).sum().backward()
    (unit,) = capture.units
    (call,) = unit.calls
    assert call.z is not None
    for rows in (1.0, 2):
        (alike,) = _local.together(unit.calls, rows)
        problem = _local._Direct(alike, _local.transfer("tanh"), {}, rows)
        assert problem.inputs[0].data_ptr() == x.data_ptr()
        assert problem.outputs[0].data_ptr() == call.z.data_ptr()


@pytest.mark.parametrize("bias", [True, False])
def test_a_unit_without_a_gradient_does_not_lose_the_calls_before(bias: bool) -> None:
    # What is left of a skipped step is told by its gradients, all 0: the first row alone does not tell.
    torch.manual_seed(0)
    halves = _rows((4, 3), (6, 3))
    models = [copy.deepcopy(model) for model in [nn.Linear(3, 2, bias).double()] * 2]
    for model, batches in zip(models, (halves, [torch.cat(halves)]), strict=True):
        optimizer = LocoProp(model, 0.05, target_lr=0.5, local_steps=3, local_optimizer=SGD)
        for x in batches:
            model(x)[:, 1].square().sum().backward()
        assert not model.weight.grad[0].any()  # type: ignore[index]
        optimizer.step()
    assert difference(models[0].parameters(), models[1].parameters()) < 1e-14
