"""What LocoProp and AffineProjection hold from the backward pass to the step, and what the model may go through meanwhile."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from functools import partial
from types import FunctionType, ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import blobs, convnet, descend, difference, images, mlp, state
from torch import Tensor, nn
from torch.optim import SGD, Adam

from beyondprop import AffineProjection, LocoProp, NonFiniteError

CE = nn.CrossEntropyLoss()
N = 12
# Numbers in inputs (6 + 8 + 5 a sample) and in outputs (8 + 5 + 3) of `mlp(6, 8, 5, 3)`.
INPUTS, OUTPUTS = 19 * N, 16 * N

BUILD: dict[str, Callable[[nn.Module], LocoProp | AffineProjection]] = {
    "matching": LocoProp,
    "quadratic": lambda m: LocoProp(m, loss="quadratic"),
    "squared": lambda m: LocoProp(m, loss="squared"),
    "mixed": lambda m: LocoProp(m, loss="squared", layers={"4": {"loss": "matching"}}),
    "inputs": lambda m: AffineProjection(m, side="inputs"),
    "samples": lambda m: AffineProjection(m, side="samples"),
    "smaller": AffineProjection,
    "running": lambda m: AffineProjection(m, forgetting=0.5),
}
LAW = {
    "matching": INPUTS + OUTPUTS,
    "quadratic": INPUTS + OUTPUTS,
    "squared": INPUTS,
    "mixed": INPUTS + 3 * N,
    "inputs": INPUTS,
    "samples": INPUTS + OUTPUTS,
    "smaller": INPUTS + OUTPUTS,
    "running": INPUTS,
}
every_kind = pytest.mark.parametrize("kind", list(BUILD))


def _net() -> nn.Sequential:
    return mlp(6, 8, 5, 3, activation="tanh")


def _backward(model: nn.Module) -> None:
    x, y = blobs(N)
    CE(model(x), y).backward()


def _held(owner: LocoProp | AffineProjection) -> int:
    """Bytes of the storages that the capture reaches; the model, its gradients and optimizers' state do not count."""
    capture = owner._capture
    own = {t.untyped_storage().data_ptr() for p in capture.root.parameters() for t in (p, p.grad) if t is not None}
    storages: dict[int, int] = {}
    seen: set[int] = set()
    pending: list[Any] = [capture]
    while pending:
        o = pending.pop()
        skipped = isinstance(o, nn.Module | torch.optim.Optimizer | type | FunctionType | ModuleType)
        if id(o) in seen or skipped:
            continue
        seen.add(id(o))
        if isinstance(o, Tensor):
            storages[o.untyped_storage().data_ptr()] = o.untyped_storage().nbytes()
        pending += gc.get_referents(o)
    return sum(size for place, size in storages.items() if place not in own)


@every_kind
def test_captures_hold_what_the_law_says_until_the_step(kind: str) -> None:
    model = _net()
    owner = BUILD[kind](model)
    for _ in range(3):
        model.zero_grad()
        _backward(model)
        assert _held(owner) == 4 * LAW[kind]
        owner.step()
        assert _held(owner) == 0


def test_accumulated_batches_are_held_together() -> None:
    model = _net()
    optimizer = LocoProp(model)
    for count in (1, 2, 3):
        _backward(model)
        assert _held(optimizer) == 4 * count * LAW["matching"]
    optimizer.zero_grad()
    assert _held(optimizer) == 0


def test_activations_in_place_are_held_once() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(inplace=True), nn.Linear(8, 3))
    optimizer = LocoProp(model)
    _backward(model)
    assert _held(optimizer) == 4 * N * (6 + 8 + 3)


def test_outputs_that_no_transfer_function_follows_are_not_held() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 5), nn.Tanh(), nn.Linear(5, 3))
    optimizer = LocoProp(model)
    _backward(model)
    optimizer.step()  # the first backward pass finds out
    _backward(model)
    assert _held(optimizer) == 4 * N * (6 + 8 + 5 + 5 + 3)


def test_excluded_and_frozen_layers_are_not_held() -> None:
    model = _net()
    model[2].requires_grad_(False)
    optimizer = LocoProp(model, exclude=["4"])
    _backward(model)
    assert _held(optimizer) == 4 * N * (6 + 8)


@every_kind
def test_gradients_thrown_away_throw_the_captures_away(kind: str) -> None:
    """A skipped step: the model's gradients are cleared behind the optimizer's back."""
    model, twin = _net(), _net()
    twin.load_state_dict(model.state_dict())
    owner, other = BUILD[kind](model), BUILD[kind](twin)
    for _ in range(3):
        _backward(model)
        model.zero_grad()
    for m, own in ((model, owner), (twin, other)):
        _backward(m)
        own.step()
    assert _held(owner) == 0
    assert difference(model.parameters(), twin.parameters()) == 0
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(model.parameters(), twin.parameters(), strict=True))  # type: ignore[arg-type]


@every_kind
def test_a_refused_step_holds_nothing(kind: str) -> None:
    model = _net()
    owner = BUILD[kind](model)
    _backward(model)
    for p in model.parameters():
        assert p.grad is not None
        p.grad.fill_(float("inf"))
    with pytest.raises(NonFiniteError, match="The gradient of '0' is not finite"):
        owner.step()
    assert _held(owner) == 0


def _passes(model: nn.Module, how: str, count: int) -> list[weakref.ref[Tensor]]:
    x, _ = blobs(N)
    outputs = []
    for _ in range(count):
        if how == "no_grad":
            with torch.no_grad():
                outputs.append(weakref.ref(model(x)))
        elif how == "inference":
            with torch.inference_mode():
                outputs.append(weakref.ref(model(x)))
        else:
            outputs.append(weakref.ref(model(x)))
    return outputs


@pytest.mark.parametrize("kind", ["matching", "smaller"])
@pytest.mark.parametrize("how", ["no_grad", "inference", "eval", "unused"])
def test_passes_without_a_backward_leave_nothing(kind: str, how: str) -> None:
    model = _net()
    owner = BUILD[kind](model)
    _backward(model)
    owner.step()
    model.zero_grad()
    if how == "eval":
        model.eval()
    _passes(model, how, 1)
    gc.collect()
    before = sum(issubclass(type(o), Tensor) for o in gc.get_objects())
    assert not any(ref() is not None for ref in _passes(model, how, 50))
    assert sum(issubclass(type(o), Tensor) for o in gc.get_objects()) == before
    assert _held(owner) == 0
    before = state(model)
    owner.step()  # no gradients: nothing to do
    assert difference(before.values(), model.parameters()) == 0


@pytest.mark.parametrize("how", ["no_grad", "inference"])
def test_passes_before_the_first_backward_leave_nothing(how: str) -> None:
    model = _net()
    optimizer = LocoProp(model)
    assert not any(ref() is not None for ref in _passes(model, how, 50))
    assert _held(optimizer) == 0
    assert optimizer.transfers == {}
    _backward(model)
    optimizer.step()
    assert optimizer.transfers == {"0": "tanh", "2": "tanh", "4": "softmax"}


@every_kind
def test_a_replaced_optimizer_is_freed(kind: str) -> None:
    model, twin = _net(), _net()
    twin.load_state_dict(model.state_dict())
    first = BUILD[kind](model)
    _backward(model)
    freed, capture = weakref.ref(first), weakref.ref(first._capture)
    copied = copy.deepcopy(model)  # whose hooks keep nothing alive, nor do those of a graph
    pending = CE(model(blobs(N)[0]), blobs(N)[1])
    del first
    gc.collect()
    assert freed() is None
    assert capture() is None
    pending.backward()
    model.zero_grad()
    second, fresh = BUILD[kind](model), BUILD[kind](twin)
    for m, own in ((model, second), (twin, fresh)):
        _backward(m)
        assert _held(own) == 4 * LAW[kind]
        own.step()
    assert difference(model.parameters(), twin.parameters()) == 0
    _backward(copied)
    assert _held(second) == 0


def _numbers(values: Any) -> int:
    flat = [t for v in values for t in (v if isinstance(v, tuple) else (v,))]
    return sum(t.numel() for t in flat if isinstance(t, Tensor) and t.numel() > 1)


@pytest.mark.parametrize("loss", ["matching", "squared", "quadratic"])
def test_state_is_as_large_as_that_of_adam(loss: str) -> None:
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(108, 3))
    twin = copy.deepcopy(model)
    optimizers: list[torch.optim.Optimizer] = [LocoProp(model, loss=loss), Adam(twin.parameters())]
    x, y = torch.randn(4, 1, 8, 8), torch.arange(4) % 3
    sizes = []
    for m, optimizer in zip((model, twin), optimizers, strict=True):
        for _ in range(2):
            CE(m(x), y).backward()
            optimizer.step()
        sizes.append(_numbers(v for s in optimizer.state.values() for v in s.values()))
    assert sizes == [2 * sum(p.numel() for p in model.parameters())] * 2


def test_state_of_sgd_is_none_and_of_a_projection_its_moments() -> None:
    model = _net()
    optimizer, plain = LocoProp(model, local_optimizer=SGD), AffineProjection(model)
    running = AffineProjection(model, forgetting=0.5, refresh=3)
    for _ in range(2):
        _backward(model)
        plain.step()
        running.step()
        optimizer.step()
        optimizer.zero_grad()
    assert _numbers(v for s in optimizer.state.values() for v in s.values()) == 0
    assert plain.state_dict() == {}
    widths = {"0": 6, "2": 8, "4": 5}
    sizes = {name: _numbers(saved.values()) for name, saved in running.state_dict().items()}
    assert sizes == {name: n * n + n + (n + 1) ** 2 for name, n in widths.items()}


KINDS: dict[str, Callable[[nn.Module], LocoProp | AffineProjection]] = {
    "matching": partial(LocoProp, lr=1e-3, local_optimizer=SGD),
    "squared": partial(LocoProp, lr=1e-3, local_optimizer=SGD, loss="squared"),
    "quadratic": partial(LocoProp, lr=1e-3, local_optimizer=SGD, loss="quadratic"),
    "rmsprop": partial(LocoProp, lr=1e-4, rows=0.5),
    "projection": AffineProjection,
    "inputs": partial(AffineProjection, side="inputs"),
    "memory": partial(AffineProjection, forgetting=0.5, refresh=2),
}
every_use = pytest.mark.parametrize("kind", list(KINDS))


def _mean(output: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(output, y, reduction="sum") / max(len(output), 1)  # also of no sample


@every_use
def test_batches_of_no_and_of_one_sample(kind: str) -> None:
    model = _net()
    owner = KINDS[kind](model)
    x, y = blobs(1)
    before = state(model)
    descend(model, owner, x[:0], y[:0], loss=_mean)
    assert difference(before.values(), model.parameters()) == 0
    losses = descend(model, owner, x, y, 5)
    assert losses[-1] < losses[0]


@every_use
@pytest.mark.parametrize("layout", ["expanded", "channels_last", "strided"])
def test_the_layout_of_inputs_does_not_matter(kind: str, layout: str) -> None:
    model: Any = convnet(3).double()
    twin: Any = copy.deepcopy(model)
    x, y = images(12, torch.float64)
    given = x.expand(12, 3, 8, 8)
    whole = given.contiguous()
    if layout == "channels_last":
        given = whole.to(memory_format=torch.channels_last)
        twin.to(memory_format=torch.channels_last)
    elif layout == "strided":
        given = torch.empty(12, 3, 8, 16, dtype=torch.float64)[..., ::2].copy_(whole)
    assert not given.is_contiguous()
    start = state(model)
    descend(model, KINDS[kind](model), whole, y)
    descend(twin, KINDS[kind](twin), given, y)
    assert difference(start.values(), model.parameters()) > 1e-4
    assert difference(twin.parameters(), model.parameters()) < 1e-12


@every_use
def test_a_model_that_is_converted_later(kind: str) -> None:
    model = _net()
    owner = KINDS[kind](model)
    x, y = blobs(N)
    descend(model, owner, x, y)
    model.double()
    twin = copy.deepcopy(model)
    other = KINDS[kind](twin)
    other.load_state_dict(copy.deepcopy(owner.state_dict()))
    start = state(model)
    losses = descend(model, owner, x.double(), y), descend(twin, other, x.double(), y)
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert difference(start.values(), model.parameters()) > 1e-4
    assert all(p.dtype is torch.float64 for p in model.parameters())


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "memory"])
def test_a_layer_that_is_frozen_later_stays(kind: str) -> None:
    model = _net()
    owner = KINDS[kind](model)
    descend(model, owner, *blobs(N))
    model[2].requires_grad_(False)
    model[4].bias.requires_grad_(False)  # type: ignore[operator]
    before = state(model)
    descend(model, owner, *blobs(N))
    still = {n for n, p in model.named_parameters() if torch.equal(before[n], p)}
    assert still == {"2.weight", "2.bias", "4.bias"}
    model.requires_grad_(True)
    descend(model, owner, *blobs(N))
    assert not any(torch.equal(before[n], p) for n, p in model.named_parameters())
