"""Reversible chains: the same output and gradients as ordinary autograd, from the output alone."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from chains import TIGHT, chain, conv, every_coupling, every_mode, far, images, in_mode, same_as_stored
from torch import Tensor, nn

from beyondprop import UnsupportedModelError
from beyondprop.nn import (
    AdditiveCoupling,
    ReversibleSequential,
)

# ---- the behaviour matrix ------------------------------------------------------------------------------------------------


@every_mode
@every_coupling
def test_dropout_is_the_same_once_more_and_the_generator_is_left_alone(kind: str, mode: str) -> None:
    same_as_stored(chain(kind, dropout=0.5), mode)


class Drawing(nn.Module):
    """Draws from a generator of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.generator = nn.Conv2d(4, 4, 1), torch.Generator().manual_seed(0)

    def forward(self, x: Tensor) -> Tensor:
        out = self.linear(x)
        return out * torch.rand(out.shape, generator=self.generator, dtype=out.dtype) if self.training else out


@every_mode
def test_a_generator_of_ones_own_draws_the_same_once_more(mode: str) -> None:
    drawing = Drawing()
    model = ReversibleSequential(AdditiveCoupling(drawing, conv(4)), AdditiveCoupling(drawing, Drawing())).double()
    same_as_stored(model, mode)
    copied = in_mode(model, mode)
    y = copied(images())
    state = copied[0].f.generator.get_state()
    y.sum().backward()
    assert torch.equal(copied[0].f.generator.get_state(), state)
    assert not torch.equal(state, drawing.generator.get_state())
    assert far([copied.inverse(copied(images()))], [images()]) < TIGHT
    with torch.no_grad():
        y = copied(images())
    state = copied[0].f.generator.get_state()
    with pytest.raises(
        UnsupportedModelError, match=r"'g' of block '1'.* draws random numbers from a generator of its own"
    ):
        copied.inverse(y)
    assert torch.equal(copied[0].f.generator.get_state(), state)
    assert far([copied.eval().inverse(copied(images()))], [images()]) < TIGHT


@every_mode
def test_without_the_generators_state_dropout_is_refused(mode: str) -> None:
    model, without = in_mode(chain(dropout=0.5), mode), in_mode(chain(), mode)
    model.preserve_rng_state = without.preserve_rng_state = False
    value, state = model(images()).sum(), torch.get_rng_state()
    with pytest.raises(
        UnsupportedModelError, match=r"draws random numbers.*preserve_rng_state must be True, got False"
    ):
        value.backward()
    assert torch.equal(torch.get_rng_state(), state)
    same_as_stored(without, mode)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@every_mode
@every_coupling
def test_autocast_is_that_of_the_forward_pass_and_streams_stay_in_float32(
    kind: str, mode: str, dtype: torch.dtype
) -> None:
    model, seen = chain(kind, dropout=0.2).float(), []
    found: dict[str, list[Tensor]] = {}
    for way in ("store", mode):
        copied = in_mode(model, way)
        copied[1].f[-2].register_forward_hook(lambda m, args, out: seen.append(out.dtype))
        torch.manual_seed(1)
        x = images(torch.float32)
        with torch.autocast("cpu", dtype):
            y = copied(x)
        assert y.dtype == torch.float32
        found[way] = [y.detach(), *torch.autograd.grad(y.square().mean(), [x, *copied.parameters()])]
    assert set(seen) == {dtype}
    assert len(seen) == 3
    assert torch.equal(found[mode][0], found["store"][0])
    assert far(found[mode], found["store"]) < 1e-5


@every_mode
def test_autocast_around_the_backward_pass_changes_nothing(mode: str) -> None:
    model = in_mode(chain().float(), mode)
    right = torch.autograd.grad(model(images(torch.float32)).square().mean(), [*model.parameters()])
    y = model(images(torch.float32))
    with torch.autocast("cpu", torch.bfloat16):
        found = torch.autograd.grad(y.square().mean(), [*model.parameters()])
    assert far(found, right) < 1e-6


def test_autocasts_cache_keeps_no_cast_without_a_graph() -> None:
    """A weight that is used in the chain and behind it has both gradients."""
    model, caches = chain(norm=False).float(), []
    shared: Any = model[0].f[1]
    shared.register_forward_hook(lambda *_: caches.append(torch.is_autocast_cache_enabled()))
    with torch.autocast("cpu", torch.bfloat16):
        y = model(images(torch.float32, grad=False))
        behind = shared(y[:, :4].detach())
    y.sum().backward()
    assert caches == [False, True, False]
    assert behind.requires_grad
    assert bool(torch.autograd.grad(behind.sum(), shared.weight)[0].any())


@every_mode
def test_an_input_without_gradient(mode: str) -> None:
    def loss(model: nn.Module, x: Tensor) -> Tensor:
        return model(x.detach()).square().mean()

    same_as_stored(chain(dropout=0.2), mode, loss)


@every_mode
def test_autograd_grad_writes_no_grad(mode: str) -> None:
    model, x = chain(), images()
    weights = [*model.parameters()]
    right = torch.autograd.grad(in_mode(model, "store")(x).sum(), x)
    model.mode = mode
    found = torch.autograd.grad(model(x).sum(), [x, *weights])
    assert far(found[:1], right) < TIGHT
    assert x.grad is None
    assert all(p.grad is None for p in weights)
    assert far(torch.autograd.grad(model(x).sum(), weights[:2]), found[1:3]) < TIGHT


@every_mode
def test_functional_call_has_the_gradients_of_its_own_tensors(mode: str) -> None:
    model, x = chain(dropout=0.2), images()
    seeds = {name: p.detach() * 1.5 for name, p in model.named_parameters()}
    found = {}
    for way in ("store", mode):
        leaves = {name: p.clone().requires_grad_() for name, p in seeds.items()}
        torch.manual_seed(1)
        # Not leaves: a backward pass goes on through them.
        y: Any = torch.func.functional_call(in_mode(model, way), {n: p * 2 for n, p in leaves.items()}, (x,))
        y.square().mean().backward()
        found[way] = [p.grad for p in leaves.values()]
    assert far(found[mode], found["store"]) < TIGHT
    assert all(isinstance(p, nn.Parameter) for p in model.parameters())


@every_mode
def test_twice_with_retain_graph(mode: str) -> None:
    model, x = chain(dropout=0.5), images()
    model.mode = mode
    y = model(x)
    kept = y.detach().clone()
    first = torch.autograd.grad(y.square().mean(), [x, *model.parameters()], retain_graph=True)
    assert torch.equal(y, kept)
    second = torch.autograd.grad(y.square().mean(), [x, *model.parameters()])
    assert far(second, first) == 0
    with pytest.raises(RuntimeError, match="second time"):
        y.sum().backward()


@every_mode
def test_a_skip_around_the_chain_leaves_the_input_alone(mode: str) -> None:
    x = images()
    kept = x.detach().clone()

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        inside = x * 2
        return (model(inside) + inside).square().mean() + inside.sum()

    same_as_stored(chain(), mode, loss, x)
    assert torch.equal(x, kept)
    assert x.untyped_storage().nbytes() == x.nbytes


@every_mode
def test_shared_weights_count_once(mode: str) -> None:
    f = conv(4, dropout=0.2)
    block = AdditiveCoupling(f, conv(4))
    model = ReversibleSequential(block, AdditiveCoupling(conv(4), f), block, AdditiveCoupling(f, f)).double()
    same_as_stored(model, mode)
    assert len([*model.parameters()]) == len({id(p) for p in model.parameters()})


@every_mode
def test_weights_that_are_used_outside_too(mode: str) -> None:
    def loss(model: Any, x: Tensor) -> Tensor:
        return model[1].f(model(x)[:, :4]).square().mean()

    same_as_stored(chain(), mode, loss)


@every_mode
def test_evaluation(mode: str) -> None:
    model = chain(dropout=0.5)
    model(images()).sum().backward()
    same_as_stored(model.eval(), mode)
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        y = in_mode(model, mode)(images())
        assert not y.requires_grad
        assert torch.equal(y, in_mode(model, "store")(images()))
    with torch.inference_mode():
        assert torch.equal(in_mode(model, mode)(images()), y)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))


@every_mode
def test_the_mode_is_that_of_the_forward_pass(mode: str) -> None:
    """eval() between forward and backward, as loops that validate early do, or train()."""
    for training in (True, False):

        def loss(model: nn.Module, x: Tensor, training: bool = training) -> Tensor:
            model.train(training)
            value = model(x).square().mean()
            model.train(not training)
            return value

        model = chain(dropout=0.5)
        same_as_stored(model, mode, loss)
        copied = in_mode(model, mode)
        loss(copied, images()).backward()
        assert all(m.training != training for m in copied.modules())


@every_mode
def test_frozen_functions(mode: str) -> None:
    for frozen in ("f", "g", "fg"):
        model = chain(dropout=0.2)
        for number, block in enumerate(model):
            for name in frozen:
                getattr(block, name).requires_grad_(not (number < 3 or len(frozen) == 1))
        same_as_stored(model, mode)
        same_as_stored(model, mode, lambda m, x: m(x.detach()).square().mean())


@every_mode
def test_nothing_below_the_lowest_trained_function_runs_again(mode: str) -> None:
    model, calls = chain(), []
    for number, block in enumerate(model):
        block.requires_grad_(number >= 2)
        block.f.register_forward_hook(lambda *_, number=number: calls.append(number))
    model.mode = mode
    model(images(grad=False)).sum().backward()
    assert calls == [0, 1, 2, 3, 3, 2]


@every_mode
def test_an_output_without_a_use(mode: str) -> None:
    def loss(model: nn.Module, x: Tensor) -> Tensor:
        first, second = model((x[:, :4], x[:, 4:]))
        return second.square().mean() if mode == "inverse" else first.square().mean()

    same_as_stored(chain(), mode, loss)


# ---- second derivatives --------------------------------------------------------------------------------------------------


@every_mode
def test_second_derivatives_are_refused_however_they_are_asked_for(mode: str) -> None:
    model, x = chain(), images()
    model.mode = mode
    weights = [*model.parameters()]
    refused = pytest.raises(UnsupportedModelError, match='cannot be differentiated twice: set mode="store"')
    # A loss whose cotangent is a constant: what is lost would be a silent zero.
    (slope,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    with refused:
        slope.square().sum().backward()
    (slope,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    with refused:
        torch.autograd.grad(slope.square().sum(), weights, allow_unused=True)
    (slope,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
    with refused:
        torch.autograd.grad(slope.sum(), x, allow_unused=True)
    with pytest.raises(RuntimeError, match="twice"):  # as torch's own refusals, for those who have another way then
        slope.sum().backward()
    steep = torch.autograd.grad(model(x).square().sum(), weights, create_graph=True)
    with refused:
        (model(x).sum() + steep[0].square().sum()).backward()


def test_second_derivatives_of_the_stored_mode() -> None:
    model, x = chain(norm=False), images()
    model.mode = "store"
    (slope,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
    assert math.isfinite(float(torch.autograd.grad(slope.square().sum(), x)[0].sum()))
    weights = dict(model.named_parameters())

    def loss(weights: Any) -> Tensor:
        return torch.func.functional_call(model, weights, (x.detach(),)).square().sum()

    right = torch.autograd.grad(loss(weights), [*weights.values()])
    assert far([*torch.func.grad(loss)(weights).values()], right) < TIGHT
    model.mode = "inverse"
    with pytest.raises(UnsupportedModelError, match=r"torch\.func"):
        torch.func.grad(loss)(weights)
