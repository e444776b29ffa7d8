"""Running statistics and other buffers: changed once a step, and in the second run what they were in the first."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from chains import chain, conv, every_mode, far, images, in_mode, same_as_stored
from torch import Tensor, nn

from beyondprop.nn import AdditiveCoupling, ReversibleSequential


@every_mode
def test_running_statistics_are_updated_once_a_step(mode: str) -> None:
    model = chain()
    model.mode = mode
    norm: Any = model[0].f[0]
    x = images()
    model(x).sum().backward()
    assert norm.num_batches_tracked == 1
    stream = x.detach()[:, 4:]
    torch.testing.assert_close(norm.running_mean, 0.1 * stream.mean((0, 2, 3)), rtol=1e-12, atol=1e-12)
    variance = stream.transpose(0, 1).flatten(1).var(1)
    torch.testing.assert_close(norm.running_var, 0.9 + 0.1 * variance, rtol=1e-12, atol=1e-12)


class Counting(nn.Module):
    """A buffer that is changed in every call, and read."""

    def __init__(self, *, exchanged: bool) -> None:
        super().__init__()
        self.register_buffer("calls", torch.ones(()))
        self.linear, self.exchanged = nn.Conv2d(4, 4, 1), exchanged

    def forward(self, x: Tensor) -> Tensor:
        if self.exchanged:
            self.calls = self.calls + 1
        else:
            self.calls += 1
        return self.linear(x) * self.calls


@every_mode
def test_any_buffer_that_a_function_changes_is_what_it_was_for_the_second_run(mode: str) -> None:
    counting = [Counting(exchanged=exchanged) for exchanged in (False, True)]
    first, last = (AdditiveCoupling(counted, counting[1]) for counted in (counting[0], conv(4)))
    model = ReversibleSequential(first, last).double()
    same_as_stored(model, mode)
    model(images()).sum().backward()
    assert [float(counted.calls) for counted in counting] == [2, 3]


class OwnNorm(nn.Module):
    """Batch normalisation by the function, whose writing leaves no version; or a buffer that is changed and read."""

    def __init__(self, *, reads: bool) -> None:
        super().__init__()
        self.mean: Tensor
        self.var: Tensor
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("var", torch.ones(4))
        self.reads = reads

    def forward(self, x: Tensor) -> Tensor:
        if self.reads:
            self.mean += 0.5
            return x * self.mean.view(-1, 1, 1)
        return nn.functional.batch_norm(x, self.mean, self.var, training=True)


class Renorm(nn.BatchNorm2d):
    """A batch normalisation that reads its running statistics in training."""

    def forward(self, input: Tensor) -> Tensor:
        out = super().forward(input)
        assert self.num_batches_tracked is not None
        return out * self.num_batches_tracked.clone()


@every_mode
def test_normalisations_of_ones_own(mode: str) -> None:
    for norm in (OwnNorm(reads=False), OwnNorm(reads=True), Renorm(4), nn.InstanceNorm2d(4, track_running_stats=True)):
        blocks = (AdditiveCoupling(nn.Sequential(copy.deepcopy(norm), nn.Conv2d(4, 4, 1)), conv(4)) for _ in range(3))
        model = ReversibleSequential(*blocks).double()
        same_as_stored(model, mode)
        if not getattr(norm, "reads", False):  # ordinary autograd refuses to run twice through what it saved
            same_as_stored(model, mode, lambda m, x: m(x).sin().mean() + m(x * 2).square().mean())


def test_stored_tensors_that_are_changed_in_place_are_found_while_they_are_counted() -> None:
    counted = Counting(exchanged=False)
    model = ReversibleSequential(AdditiveCoupling(counted, counted), mode="store").double()
    for _ in range(2):
        value = model(images()).sum()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            value.backward()


@every_mode
def test_spectral_normalisation_iterates_once_a_step(mode: str) -> None:
    model = chain()
    for block in model:
        nn.utils.parametrizations.spectral_norm(block.f[2])
    same_as_stored(model, mode)


@every_mode
def test_twice_where_buffers_change(mode: str) -> None:
    counting = Counting(exchanged=False)
    model = in_mode(ReversibleSequential(AdditiveCoupling(counting, conv(4))).double(), mode)
    value = model(images()).square().mean()
    first = torch.autograd.grad(value, [*model.parameters()], retain_graph=True)
    assert far(torch.autograd.grad(value, [*model.parameters()]), first) == 0


class Masked(nn.Conv2d):
    """Sets some weights to zero in every call, as masked convolutions do; that leaves no version."""

    def forward(self, input: Tensor) -> Tensor:
        self.weight.data[:, :, 1:, 1:] = 0
        return super().forward(input)


@every_mode
def test_weights_that_a_function_masks_by_itself(mode: str) -> None:
    blocks = (AdditiveCoupling(Masked(4, 4, 3, padding=1), conv(4)) for _ in range(3))
    same_as_stored(ReversibleSequential(*blocks).double(), mode)
