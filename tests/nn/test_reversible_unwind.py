"""The way back as an iterator: blocks with what went in and came out, and learning rules on them."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from chains import TIGHT, chain, every_coupling, far, images, in_mode
from torch import Tensor, nn

from beyondprop import UnsupportedModelError
from beyondprop.nn import AdditiveCoupling, ReversibleSequential, Unwound, reconstruction_error


def _states(model: ReversibleSequential, x: Any) -> list[Any]:
    """The input of every block, and the output of the last, by running the blocks one after the other."""
    found = [x]
    for block in model:
        found.append(block(found[-1]))
    return found


@every_coupling
def test_what_goes_in_and_comes_out_and_the_gradients(kind: str) -> None:
    model, x = chain(kind).eval(), images()
    states = _states(model, x)
    dy = torch.randn_like(states[-1])
    cotangents = torch.autograd.grad(states[-1], states, dy, retain_graph=True)
    weights = [*model.parameters()]
    right = dict(zip(weights, torch.autograd.grad(states[-1], weights, dy, allow_unused=True), strict=True))
    seen, gradients = [], {}
    for item in model.unwind(model(x), dy):
        number = len(model) - 1 - len(seen)
        block, x_in, y_out, cotangent = item
        assert block is model[number]
        assert far([x_in, y_out, cotangent], [states[number], states[number + 1], cotangents[number + 1]]) < TIGHT
        below, own = item.pull()
        assert far([below], [cotangents[number]]) < TIGHT
        gradients.update(own)
        seen.append(number)
    assert seen == [3, 2, 1, 0]
    assert set(gradients) == {p for p, g in right.items() if g is not None}
    assert far([gradients[p] for p in weights], [right[p] for p in weights]) < TIGHT
    assert all(p.grad is None for p in weights)


def test_dropout_and_batch_statistics_are_those_of_the_forward_pass() -> None:
    model, x = chain(dropout=0.4), images()
    torch.manual_seed(1)
    y = model(x)
    right = torch.autograd.grad(y.square().mean(), [x, *model.parameters()], retain_graph=True)
    state, norm = torch.get_rng_state(), model[0].f[0]
    model.eval()
    gradients: dict[Tensor, Tensor] = {}
    below = None
    for item in model.unwind(y, torch.autograd.grad(y.square().mean(), y, retain_graph=True)[0]):
        torch.randn(3)  # what a rule draws in between is its own
        below, own = item.pull()
        gradients.update(own)
    assert norm.num_batches_tracked == 1
    assert not norm.training
    assert far([below, *(gradients[p] for p in model.parameters())], right) < TIGHT
    assert far([model.inverse(y)], [x]) < TIGHT
    assert not torch.equal(torch.get_rng_state(), state)  # three numbers were drawn above


def test_a_pair_stays_a_pair() -> None:
    model, x = chain().eval(), images(grad=False)
    y = model((x[:, :4], x[:, 4:]))
    found = model.inverse(y)
    assert far(found, (x[:, :4], x[:, 4:])) < TIGHT
    for item in model.unwind(y, (torch.ones_like(y[0]), torch.ones_like(y[1]))):
        (first, second), _ = item.pull()
        assert first.shape == second.shape == item.x_in[0].shape


def test_further_arguments_go_to_the_functions_again() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(3, 3)

        def forward(self, x: Tensor, scale: Tensor, *, shift: float) -> Tensor:
            return torch.tanh(self.inner(x)) * scale + shift

    torch.manual_seed(0)
    model = ReversibleSequential(*(AdditiveCoupling(Scaled(), Scaled()) for _ in range(3))).double()
    x, scale = torch.randn(4, 6).double(), torch.rand(3).double()
    y = model(x, scale, shift=0.5)
    assert far([model.inverse(y, scale, shift=0.5)], [x]) < TIGHT
    *_, last = model.unwind(y, torch.ones_like(y), scale, shift=0.5)
    assert far([last.x_in], [x]) < TIGHT
    # Others than those of the forward pass are the walk's alone.
    right = torch.autograd.grad(y.square().sum(), [*model.parameters()], retain_graph=True)
    assert far([model.inverse(y, scale + 1, shift=2.0)], [x]) > 0.1
    assert far(torch.autograd.grad(y.square().sum(), [*model.parameters()]), right) == 0


def test_what_is_sent_in_goes_down_in_place_of_the_gradient() -> None:
    """Feedback alignment: a fixed matrix in place of every transposed block."""
    torch.manual_seed(0)
    blocks = [AdditiveCoupling(nn.Sequential(nn.Tanh(), nn.Linear(3, 3)), nn.Linear(3, 3)) for _ in range(5)]
    model = ReversibleSequential(*blocks).double()
    x, feedback = torch.randn(7, 6).double(), [torch.randn(6, 6).double() for _ in model]
    dy = torch.randn(7, 6).double()

    right, cotangent = {}, dy
    states = _states(model, x)
    for number in reversed(range(5)):
        block, start = model[number], states[number].detach()
        gradients = torch.autograd.grad(block(start), [*block.parameters()], cotangent)
        right.update(zip(block.parameters(), gradients, strict=True))
        cotangent = cotangent @ feedback[number]

    found: dict[Tensor, Tensor] = {}
    way = model.unwind(model(x), dy)
    item = next(way)
    for number in itertools.count(4, -1):
        found.update(item.pull()[1])
        try:
            item = way.send(item.cotangent @ feedback[number])
        except StopIteration:
            break
    assert far([found[p] for p in model.parameters()], [right[p] for p in model.parameters()]) < TIGHT


def test_a_block_is_pulled_as_often_as_is_wanted_and_in_any_direction() -> None:
    model, x = chain().eval(), images()
    y = model(x)
    item = next(model.unwind(y, torch.ones_like(y)))
    first, gradients = item.pull()
    second, twice = item.pull(2 * torch.ones_like(y))
    assert far([second, *twice.values()], [2 * first, *(2 * g for g in gradients.values())]) < 1e-14
    assert far([item.pull()[0]], [first]) == 0


def test_one_block_is_alive_at_a_time() -> None:
    import gc
    import weakref

    model, x = chain(depth=6), images()
    y = model(x)
    alive: list[weakref.ref[Unwound]] = []
    gc.disable()
    try:
        for item in model.unwind(y, torch.ones_like(y)):
            alive.append(weakref.ref(item))
            assert sum(ref() is not None for ref in alive) <= 2  # this one, and the one that the loop had
    finally:
        gc.enable()


def test_random_numbers_that_nobody_knows_are_refused() -> None:
    model, x = chain(dropout=0.5), images(grad=False)
    with torch.no_grad():
        y = model(x)
    words = r"Function 'g' of block '3' \(AdditiveCoupling\) draws random numbers, and this output does not know which"
    state = torch.get_rng_state()
    with pytest.raises(UnsupportedModelError, match=words):
        model.inverse(y)
    with pytest.raises(UnsupportedModelError, match=words):
        next(model.unwind(y, y))
    assert torch.equal(torch.get_rng_state(), state)
    assert far([model.inverse(model(x))], [x]) < TIGHT
    model.preserve_rng_state = False
    with pytest.raises(UnsupportedModelError, match=words):
        model.inverse(model(x))
    model.eval()
    assert far([model.inverse(model(x))], [x]) < TIGHT


def test_an_output_of_other_weights_is_refused() -> None:
    model = chain()
    y = model(images())
    with torch.no_grad():
        model[0].f[2].weight.add_(1)
    with pytest.raises(
        UnsupportedModelError, match=r"Parameter '2.weight' of function 'f' of block '0'.*changed in place"
    ):
        model.inverse(y)
    with pytest.raises(UnsupportedModelError, match="changed in place"):
        next(model.unwind(y, y))


def test_the_output_of_another_chain_is_inverted_with_ones_own_functions() -> None:
    model, other = chain().eval(), in_mode(chain(), "inverse").eval()
    with torch.no_grad():
        for p in other.parameters():
            p.add_(0.01)
    y = other(images())
    assert far([model(model.inverse(y))], [y]) < TIGHT


def test_unwinding_does_not_depend_on_the_mode() -> None:
    x = images()
    for mode in ("inverse", "checkpoint", "store"):
        model = in_mode(chain(), mode)
        y = model(x)
        *_, last = model.unwind(y, torch.ones_like(y))
        assert far([last.x_in], [x]) < TIGHT
        (right,) = torch.autograd.grad(y.sum(), x)
        assert far([last.pull()[0]], [right]) < TIGHT


def test_an_output_in_less_precision_than_the_streams_knows_its_pass() -> None:
    torch.manual_seed(0)
    blocks = [AdditiveCoupling(nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)), nn.Linear(4, 4)) for _ in range(2)]
    chain = ReversibleSequential(*blocks).to(torch.bfloat16)
    x = torch.randn(6, 8, dtype=torch.bfloat16)
    y = chain(x)
    assert isinstance(y, torch.Tensor)
    assert y.dtype == torch.bfloat16
    found = chain.inverse(y)
    assert isinstance(found, torch.Tensor)
    # From the output as it was before it was rounded: exact but for float32.
    assert float((found - x).norm() / x.norm()) < 1e-5
    assert len([*chain.unwind(y, torch.ones_like(y))]) == 2
    assert reconstruction_error(chain, x) < 1e-5
    pair = chain((x[:, :4].contiguous(), x[:, 4:].contiguous()))
    back = chain.inverse(pair)
    assert float((torch.cat([*back], 1) - x).norm() / x.norm()) < 1e-5
    y.sum().backward()
    again = chain.inverse(y)  # what was rounded away is free now
    assert isinstance(again, torch.Tensor)
    assert float((again - x).norm() / x.norm()) < 0.02
