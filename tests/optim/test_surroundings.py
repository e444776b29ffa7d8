"""What others do around a model changes no step: hooks of theirs, functional calls, outputs that nobody uses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import blobs, mlp, relative, state
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from beyondprop import AffineProjection, LocoProp, UnsupportedModelError

SETTINGS: dict[str, Any] = {"lr": 0.05, "target_lr": 1.0, "local_steps": 3, "local_optimizer": torch.optim.SGD}
KINDS: dict[str, Callable[[nn.Module], Any]] = {
    "matching": lambda m: LocoProp(m, **SETTINGS),
    "quadratic": lambda m: LocoProp(m, loss="quadratic", **SETTINGS),
    "projection": AffineProjection,
}
every_kind = pytest.mark.parametrize("kind", list(KINDS))


def _model() -> nn.Sequential:
    torch.manual_seed(1)
    return mlp(6, 9, 8, 3, activation="tanh").double()


def _batch() -> tuple[Tensor, Tensor]:
    x, y = blobs(24)
    return x.double(), y


def _result(model: nn.Module, kind: str) -> Tensor:
    own = [p.grad if kind == "projection" else p for p in model.parameters()]
    return torch.cat([torch.zeros(0) if t is None else t.detach().flatten() for t in own])


def _trained(kind: str, loss: Callable[[nn.Sequential], Tensor], before: Callable[[nn.Sequential], Any] = id) -> Tensor:
    model = _model()
    before(model)
    optimizer = KINDS[kind](model)
    loss(model).backward()
    optimizer.step()
    return _result(model, kind)


def _plain(model: nn.Sequential) -> Tensor:
    x, y = _batch()
    return cross_entropy(model(x), y)


HOOKS: dict[str, Callable[[nn.Sequential], Any]] = {
    "backward": lambda m: [part.register_full_backward_hook(lambda *_: None) for part in m],
    "before backward": lambda m: [part.register_full_backward_pre_hook(lambda *_: None) for part in m],
    "of the whole": lambda m: m.register_full_backward_hook(lambda *_: None),
}


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
@every_kind
@pytest.mark.parametrize("hook", list(HOOKS))
def test_a_backward_hook_of_others_changes_nothing(kind: str, hook: str) -> None:
    assert relative(_trained(kind, _plain, HOOKS[hook]), _trained(kind, _plain)) < 1e-12


class _Passing(torch.autograd.Function):
    """Hands on all tensors, as DistributedDataParallel(find_unused_parameters=True) does with outputs."""

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> Any:
        ctx.set_materialize_grads(False)
        return tuple(t.view_as(t) for t in tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return gradients


@every_kind
def test_a_call_that_the_loss_does_not_need_is_none(kind: str) -> None:
    x, y = _batch()

    def loss(passes: bool) -> Callable[[nn.Sequential], Tensor]:
        def value(model: nn.Sequential) -> Tensor:
            h = model[:4](x)
            outputs = model[4](h), model[4](2 * h)
            return cross_entropy((_Passing.apply(*outputs) if passes else outputs)[0], y)

        return value

    transfer = {"0": "tanh", "2": "tanh", "4": "softmax"}
    given = KINDS["matching"]
    KINDS["matching"] = lambda m: LocoProp(m, transfer=transfer, **SETTINGS)
    try:
        kinds = "matching" if kind == "quadratic" else kind
        assert relative(_trained(kinds, loss(True)), _trained(kinds, loss(False))) < 1e-12
    finally:
        KINDS["matching"] = given


def _doubled(module: nn.Module, inputs: Any, output: Any) -> Any:
    return 2 * output


@pytest.mark.parametrize("how", ["hook", "functional call", "bias"])
def test_a_gradient_of_zero_moves_nothing_whatever_made_the_output(how: str) -> None:
    model = _model()
    if how == "hook":
        model[0].register_forward_hook(_doubled)
    optimizer, before = LocoProp(model, **SETTINGS), state(model)
    named = {n: p + 0.3 for n, p in model.named_parameters() if how != "bias" or n.endswith("bias")}
    x, _ = _batch()
    output = model(x) if how == "hook" else torch.func.functional_call(model, named, (x,))
    (0 * output.square().sum()).backward()
    optimizer.step()
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


@every_kind
def test_torch_func_only_looks(kind: str) -> None:
    x, y = _batch()

    def loss(model: nn.Sequential) -> Tensor:
        value = cross_entropy(model(x), y)
        weights = {n: p.detach() for n, p in model.named_parameters()}

        def one(weights: dict[str, Tensor], row: Tensor, label: Tensor) -> Tensor:
            return cross_entropy(torch.func.functional_call(model, weights, (row[None],)), label[None])

        torch.func.vmap(torch.func.grad(one), in_dims=(None, 0, 0))(weights, x, y)
        torch.func.jacrev(model)(x[0])
        return value

    assert relative(_trained(kind, loss), _trained(kind, _plain)) < 1e-12


CHANGES: dict[str, Callable[[Any], Any]] = {
    "4": lambda m: m.__setitem__(4, nn.Linear(8, 3).double()),
    "5": lambda m: m.append(nn.Linear(3, 3).double()),
    "1": lambda m: m.__setitem__(1, nn.ReLU()),
    r"2\.adapter": lambda m: m[2].register_module("adapter", nn.Linear(8, 8)),
    r"2\.gain": lambda m: m[2].register_parameter("gain", nn.Parameter(torch.ones(1))),
}


@every_kind
@pytest.mark.parametrize("name", list(CHANGES))
def test_a_model_that_changed_is_refused_by_name(kind: str, name: str) -> None:
    model = _model()
    optimizer = KINDS[kind](model)
    _plain(model).backward()
    optimizer.step()
    CHANGES[name](model)
    before = state(model)
    model.zero_grad()
    _plain(model).backward()
    with pytest.raises(UnsupportedModelError, match=rf"'{name}' of this Sequential was .*build the optimizer anew"):
        optimizer.step()
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
