"""Spiking layers around operators of every kind: plain, shared, hooked, quantised, in parts of a batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm
from trains import NEURON, every_rule, gradient, linear, spikes

from beyondprop.nn.spiking import CubaLIF, SpikingLayer, products


def test_a_module_that_stands_twice_in_an_operator_keeps_its_parameter() -> None:
    inner = nn.Linear(6, 6, bias=False)
    nn.init.uniform_(inner.weight, 0.0, 0.3)
    weight, x = inner.weight, spikes(3, 20, 6)
    layer = SpikingLayer(nn.Sequential(inner, inner), NEURON)
    layer(x).sum().backward()
    assert inner.weight is weight
    assert weight.grad is not None
    twins = SpikingLayer(nn.Sequential(nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False)), NEURON)
    for one in twins.op.modules():
        if isinstance(one, nn.Linear):
            one.weight = nn.Parameter(weight.detach().clone())
    assert torch.equal(twins(x), layer(x))
    twins(x).sum().backward()
    first, second = (p.grad for p in twins.parameters())
    assert first is not None
    assert second is not None
    torch.testing.assert_close(weight.grad, first + second)


def test_a_state_does_not_change_with_the_spikes_that_were_returned() -> None:
    for layer in (
        SpikingLayer(linear(), CubaLIF(8.0, 2.0, 0.5, refractory=2)),
        SpikingLayer(linear(), NEURON, lateral=0.5),
    ):
        x, state, found = torch.ones(1, 12, 6), None, []
        for t in range(12):
            out, state = layer.step(x[:, t], state)
            found.append(out.clone())
            out.zero_()
        assert torch.equal(torch.stack(found, 1), layer(x))


def test_every_backward_pass_has_the_buffers_of_the_forward_pass() -> None:
    torch.manual_seed(0)
    op = spectral_norm(linear())
    layer, x = SpikingLayer(op, CubaLIF(8.0, 2.0, 0.2)), spikes(3, 20, 6)
    layer(x)
    with torch.no_grad():
        layer.get_parameter("op.parametrizations.weight.original").add_(torch.randn(4, 6))
    given = x.clone().requires_grad_()
    loss = (layer(given).sum(1) * torch.randn(3, 4)).sum()
    wanted = [given, *layer.parameters()]
    first = torch.autograd.grad(loss, wanted, retain_graph=True)
    for one, other in zip(first, torch.autograd.grad(loss, wanted), strict=True):
        torch.testing.assert_close(one, other)


def test_a_linear_with_another_parameter_is_no_plain_one() -> None:
    x = spikes(3, 20, 6)
    op = linear()
    weight = op.weight
    del op.weight
    op.register_parameter("scale", nn.Parameter(torch.ones(3, 6)))
    op.weight = weight
    layer = SpikingLayer(op, NEURON)
    found = layer(x)
    assert torch.equal(found, SpikingLayer(linear(), NEURON)(x))
    found.sum().backward()
    assert weight.grad is not None
    assert weight.grad.any()


class _Quantised(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([[1]], dtype=dtype), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return x.float() @ self.weight.float()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8])
@every_rule
def test_whole_numbers_as_weights(dtype: torch.dtype, rule: str) -> None:
    x = torch.zeros(1, 16, 1)
    x[0, 5] = 0.9
    layer = SpikingLayer(_Quantised(dtype), CubaLIF(1.0, 1.0, 0.5), rule=rule)
    assert layer(x).sum() == 1


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
def test_backward_hooks_of_an_operator_are_called() -> None:
    op, called = linear(), []
    op.register_full_backward_hook(lambda *_: called.append(1))
    SpikingLayer(op, NEURON)(spikes(3, 20, 6).requires_grad_()).sum().backward()
    assert called


def test_a_convolution_without_channels_is_named() -> None:
    with pytest.raises(ValueError, match="channels"):
        SpikingLayer(nn.Conv2d(1, 4, 3, bias=False), NEURON)(torch.ones(2, 5, 8, 8))
    with pytest.raises(ValueError, match="Spikes of a step"):
        SpikingLayer(linear(), NEURON).step(torch.ones(6))


@pytest.mark.parametrize(
    "settings", [{}, {"lateral": 0.1}, {"injected": 4}, {"slope": "published", "silent": "reference"}]
)
@pytest.mark.parametrize("op", [nn.Linear(12, 5, bias=False), nn.Conv1d(3, 4, 2, bias=False), nn.AvgPool2d(2)])
def test_parts_of_a_batch_are_the_batch(
    op: nn.Module, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    for p in op.parameters():
        nn.init.uniform_(p, -0.2, 0.6)
    shape = {nn.Linear: (12,), nn.Conv1d: (3, 4), nn.AvgPool2d: (2, 4, 4)}[type(op)]  # type: ignore[index]
    layer, x = SpikingLayer(op.double(), CubaLIF(8.0, 2.0, 0.4), **settings), spikes(7, 21, *shape).double()
    coefficient = torch.randn(layer(x)[:, :1].shape, dtype=torch.float64)
    found = []
    for sizes in ((2**20, 2**22), (1, 1), (2 * 21 * 12, 2 * 21 * 12)):
        monkeypatch.setattr(products, "SIZES", {"cpu": sizes})
        monkeypatch.setattr(products, "LEAST_STATE", 1)
        given = x.clone().requires_grad_()
        out = layer(given)
        wanted = [given, *layer.parameters()]
        found.append([out, *torch.autograd.grad((out.sum(1, keepdim=True) * coefficient).sum(), wanted)])
    assert found[0][0].any()
    for other in found[1:]:
        for one, two in zip(found[0], other, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("density", [0.02, 0.4])
def test_rows_of_weights_are_the_product(density: float) -> None:
    op = nn.Linear(40, 30, bias=False)
    nn.init.uniform_(op.weight, -0.2, 0.6)
    x = (torch.rand(6, 50, 40, generator=torch.Generator().manual_seed(0)) < density).float()
    single, double = SpikingLayer(op, NEURON), SpikingLayer(linear(40, 30).double(), NEURON)
    double.load_state_dict({"op.weight": op.weight.detach().double()})
    found = []
    for layer, given in ((single, x.clone()), (double, x.double())):
        out = layer(given.requires_grad_())
        found.append([out, *torch.autograd.grad(out.sum(), [given, *layer.parameters()])])
    assert found[0][0].any()
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("op", "shape"),
    [
        (nn.Linear(12, 5, bias=False), (12,)),
        (nn.Conv2d(2, 3, 3, stride=2, padding=1, groups=1, bias=False), (2, 5, 5)),
        (nn.Conv1d(4, 6, 2, dilation=2, groups=2, bias=False), (4, 7)),
        (nn.AvgPool2d(3, stride=2, padding=1), (2, 5, 5)),
    ],
)
def test_a_plain_operator_is_one_that_is_called(op: nn.Module, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    for p in op.parameters():
        nn.init.uniform_(p, -0.6, 0.6)  # some of its neurons are silent
    x = spikes(3, 21, *shape).double()
    x[:, :, 0] = 0.0
    coefficient, found = None, []
    for called in (op.double(), nn.Sequential(op)):
        layer, given = SpikingLayer(called, NEURON), x.clone().requires_grad_()
        out = layer(given)
        coefficient = torch.randn_like(out[:, :1]) if coefficient is None else coefficient
        wanted = [given, *layer.parameters()]
        found.append([out, *torch.autograd.grad((out * coefficient).sum(), wanted)])
        counts = out.sum(1)
        assert counts.any()
        assert not counts.all()
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_a_train_is_heard_whenever_it_spikes() -> None:
    for step in range(10):
        x = torch.zeros(1, 10, 6)
        x[0, step, 2] = 1.0
        layer = SpikingLayer(linear(), CubaLIF(threshold=100.0))  # silent neurons
        layer(x).sum().backward()
        assert gradient(layer).nonzero()[:, 1].unique().tolist() == [2]
