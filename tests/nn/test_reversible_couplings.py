"""Couplings: what they compute, that it is undone, and that a chain of them has the gradients of stored activations."""

from __future__ import annotations

import copy

import pytest
import torch
from chains import chain, every_coupling, every_mode, far, images, in_mode, same_as_stored
from torch import Tensor, nn

from beyondprop import UnsupportedModelError
from beyondprop.nn import (
    AdditiveCoupling,
    AffineCoupling,
    MomentumCoupling,
    ReversibleSequential,
    reversible_sequential,
)


@every_mode
@every_coupling
def test_gradients_are_those_of_stored_activations(kind: str, mode: str) -> None:
    same_as_stored(chain(kind), mode)


def test_additive_by_hand() -> None:
    f, g = nn.Linear(2, 2).double(), nn.Linear(2, 2).double()
    x = torch.randn(5, 4, dtype=torch.float64)
    x1, x2 = x.chunk(2, 1)
    y1 = x1 + f(x2)
    y2 = x2 + g(y1)
    assert torch.equal(AdditiveCoupling(f, g)(x), torch.cat((y1, y2), 1))


def test_affine_by_hand() -> None:
    f, g = nn.Linear(2, 4).double(), nn.Linear(2, 4).double()
    x = torch.randn(5, 4, dtype=torch.float64)
    x1, x2 = x.chunk(2, 1)
    r, t = f(x2).chunk(2, 1)
    y1 = x1 * torch.exp(2 * torch.tanh(r / 2)) + t
    r, t = g(y1).chunk(2, 1)
    y2 = x2 * torch.exp(2 * torch.tanh(r / 2)) + t
    torch.testing.assert_close(AffineCoupling(f, g, limit=2.0)(x), torch.cat((y1, y2), 1), rtol=1e-14, atol=1e-14)


def test_momentum_by_hand() -> None:
    f = nn.Linear(2, 2).double()
    x, v = torch.randn(2, 5, 2, dtype=torch.float64)
    found = MomentumCoupling(f, beta=0.8)((x, v))
    later = 0.8 * v + 0.2 * f(x)
    torch.testing.assert_close(found[1], later, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(found[0], x + later, rtol=1e-14, atol=1e-14)


@every_coupling
def test_a_coupling_and_a_chain_undo_what_they_do(kind: str) -> None:
    model, x = chain(kind).eval(), images(grad=False)
    assert far([model[0].inverse(model[0](x))], [x]) < 1e-13
    assert far([model.inverse(model(x))], [x]) < 1e-12
    assert far([model(model.inverse(x))], [x]) < 1e-12


@every_coupling
def test_a_coupling_by_itself_is_undone_without_a_trace_or_not_at_all(kind: str) -> None:
    block, x = chain(kind)[0], images(grad=False)
    y = block(x)
    before = copy.deepcopy(block.state_dict())
    assert far([block.inverse(y)], [x]) < 1e-13
    assert all(torch.equal(a, b) for a, b in zip(before.values(), block.state_dict().values(), strict=True))
    drawing, state = chain(kind, dropout=0.5)[0], torch.get_rng_state()
    with pytest.raises(
        UnsupportedModelError, match=r"Function '.' of .*Coupling draws random numbers, and nobody knows which"
    ):
        drawing.inverse(y)
    assert torch.equal(torch.get_rng_state(), state)


@every_coupling
def test_gradcheck(kind: str) -> None:
    """Against differences, in float64; batch statistics included."""
    model = chain(kind, 2)
    x = images()[:2, :, :2, :2].detach().requires_grad_()
    assert torch.autograd.gradcheck(model, (x,), atol=1e-6)


@every_mode
def test_one_stream_of_a_pair_with_a_gradient(mode: str) -> None:
    for open_streams in ((True, False), (False, True)):

        def loss(model: nn.Module, x: Tensor, opens: tuple[bool, bool] = open_streams) -> Tensor:
            streams = [part if is_open else part.detach() for part, is_open in zip(x.chunk(2, 1), opens, strict=True)]
            return model((streams[0], streams[1]))[0].square().mean()

        same_as_stored(chain(), mode, loss)


@every_mode
def test_a_pair_of_streams_stays_a_pair(mode: str) -> None:
    def loss(model: nn.Module, x: Tensor) -> Tensor:
        first, second = model([x[:, :4], x[:, 4:]])  # a list is as good as a tuple
        return first.square().mean() + second.sin().mean()

    same_as_stored(chain(), mode, loss)


@every_mode
def test_other_dimensions_are_split_and_channels_last_is_kept(mode: str) -> None:
    torch.manual_seed(0)
    blocks = [AdditiveCoupling(nn.Linear(3, 3), nn.Linear(3, 3)) for _ in range(3)]
    model = ReversibleSequential(*blocks, split_dim=-1).double()
    same_as_stored(model, mode, x=torch.randn(2, 5, 6, dtype=torch.float64))
    seen: list[bool] = []
    model = chain()
    model[1].f.register_forward_hook(lambda m, args, out: seen.append(_is_last(args[0])))
    same_as_stored(model, mode, x=images().detach().to(memory_format=torch.channels_last))
    assert seen
    assert all(seen)


def _is_last(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


@every_mode
def test_a_function_of_the_same(mode: str) -> None:
    """`reversible_sequential` is the chain without a module."""
    model, x = chain(dropout=0.3), images()
    torch.manual_seed(1)
    right = torch.autograd.grad(in_mode(model, mode)(x).sum(), x)
    torch.manual_seed(1)
    assert far(torch.autograd.grad(reversible_sequential([*model], x, mode=mode).sum(), x), right) == 0
    assert not isinstance(reversible_sequential([], x), tuple)
