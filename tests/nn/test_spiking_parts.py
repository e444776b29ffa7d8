"""Encoders before spiking layers, pooling between them, and the monitor around them."""

from __future__ import annotations

import copy
import math
import warnings
from types import MethodType

import pytest
import torch
from torch import nn

from beyondprop.errors import SpikingWarning
from beyondprop.nn import (
    CubaLIF,
    CurrentEncoder,
    LatencyEncoder,
    PoissonEncoder,
    SpikeCounts,
    SpikeMonitor,
    SpikingLayer,
    SpikingSumPool2d,
)

every_encoder = pytest.mark.parametrize("encoder", [PoissonEncoder, CurrentEncoder, LatencyEncoder])


def test_poisson_rates_are_the_numbers() -> None:
    encoder = PoissonEncoder(4000, 0.5, generator=torch.Generator().manual_seed(0))
    x = torch.tensor([[0.0, 0.2, 1.0]])
    rates = encoder(x).mean(1)
    torch.testing.assert_close(rates, 0.5 * x, rtol=0, atol=4 * math.sqrt(0.25 / 4000))
    assert float(rates[0, 0]) == 0
    sure = PoissonEncoder(500)(torch.ones(1, 3, dtype=torch.bfloat16))
    assert sure.dtype == torch.bfloat16
    assert bool((sure == 1).all())


def test_poisson_rates_are_repeated_by_a_generator() -> None:
    x = torch.rand(3, 2, 4)
    first, again = (PoissonEncoder(9, generator=torch.Generator().manual_seed(7))(x) for _ in range(2))
    assert first.shape == (3, 9, 2, 4)
    assert torch.equal(first, again)
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    PoissonEncoder(9, generator=torch.Generator().manual_seed(7))(x)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_latencies_are_early_for_large_numbers() -> None:
    trains = LatencyEncoder(5)(torch.tensor([[0.0, 0.01, 0.5, 1.0]]))[0]
    assert trains.T.tolist() == [[0, 0, 0, 0, 0], [0, 0, 0, 0, 1], [0, 0, 1, 0, 0], [1, 0, 0, 0, 0]]
    small = torch.tensor([[1e-4, 1e-3, 1.0]])
    assert LatencyEncoder(300)(small.bfloat16()).sum(1).tolist() == [[1, 1, 1]]
    assert LatencyEncoder(1)(torch.tensor([[0.0, 0.4]])).tolist() == [[[0, 1]]]


def test_currents_are_the_numbers_in_every_step() -> None:
    x = torch.rand(2, 3, 4)
    assert torch.equal(CurrentEncoder(6)(x), x[:, None].repeat(1, 6, 1, 1))


@every_encoder
@pytest.mark.parametrize("bad", [-0.1, 1.1, math.nan])
def test_numbers_outside_the_range_are_refused(encoder: type[nn.Module], bad: float) -> None:
    with pytest.raises(ValueError, match=r"numbers in \[0, 1\]"):
        encoder(3)(torch.tensor([[0.5, bad]]))


@every_encoder
def test_integers_no_steps_and_no_samples(encoder: type[nn.Module]) -> None:
    with pytest.raises(ValueError, match=r"floating-point numbers in \[0, 1\], got torch.uint8 from 0 to 255"):
        encoder(3)(torch.tensor([[0, 255]], dtype=torch.uint8))
    with pytest.raises(ValueError, match="steps must be an integer >= 1"):
        encoder(0)
    assert encoder(3)(torch.zeros(0, 4)).shape == (0, 3, 4)


@pytest.mark.parametrize("rule", ["hm2bp", "surrogate"])
def test_pooling_is_a_layer_of_ones(rule: str) -> None:
    torch.manual_seed(0)
    neuron = CubaLIF(threshold=0.7, refractory=1)
    pool = SpikingSumPool2d(2, neuron, rule=rule)
    windows = nn.Conv2d(3, 3, 2, stride=2, groups=3, bias=False, dtype=torch.float64)
    nn.init.ones_(windows.weight)
    layer = SpikingLayer(windows.requires_grad_(False), neuron, rule=rule)
    x = (torch.rand(2, 20, 3, 6, 4, dtype=torch.float64) < 0.2).double()
    one, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    a, b = pool(one), layer(other)
    assert a.dtype == torch.float64
    assert torch.equal(a, b)
    assert a.any()
    assert not list(pool.parameters())
    coefficient = torch.randn_like(a[:, 0])
    (SpikeCounts()(a) * coefficient).sum().backward()
    (SpikeCounts()(b) * coefficient).sum().backward()
    assert one.grad is not None
    torch.testing.assert_close(one.grad, other.grad, rtol=1e-10, atol=1e-12)


def _net(first: float, second: float) -> nn.Sequential:
    torch.manual_seed(0)
    layers = []
    for inputs, units, threshold in ((20, 15, first), (15, 5, second)):
        op = nn.Linear(inputs, units, bias=False)
        nn.init.uniform_(op.weight, -0.3, 0.6)
        layers.append(SpikingLayer(op, CubaLIF(threshold=threshold)))
    return nn.Sequential(*layers, SpikeCounts())


def test_a_monitor_counts_and_says_nothing_of_a_healthy_net() -> None:
    net, x = _net(1.0, 1.0), (torch.rand(12, 30, 20) < 0.4).float()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with SpikeMonitor(net) as monitor:
            for rows in x.split(5):
                net(rows)
    first, second = monitor.activity
    spikes = net[0](x).detach()
    assert (first.name, second.name) == ("0", "1")
    assert first.samples == 12
    assert first.count == pytest.approx(float(spikes.sum(1).mean()), rel=1e-6)
    assert first.silent == pytest.approx(float((spikes.sum((0, 1)) == 0).double().mean()))
    assert "0: " in str(monitor)
    net(x)
    assert monitor.activity[0].samples == 12  # not watched any more


def test_a_silent_layer_is_named_with_a_threshold_that_wakes_it() -> None:
    net, x = _net(1.0, 1e3), (torch.rand(12, 30, 20) < 0.4).float()
    with (
        pytest.warns(SpikingWarning, match=r"^1: .*no neuron fires at threshold=1000; .*give threshold=") as caught,
        SpikeMonitor(net) as monitor,
    ):
        net(x)
    assert "1: 0.0 spikes, 100% silent" in str(monitor)
    advised = float(str(caught[0].message).rsplit("threshold=", 1)[1])
    assert net.get_submodule("1")(net[0](x)).sum() == 0
    woken = _net(1.0, advised)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with SpikeMonitor(woken) as monitor:
            woken(x)
    assert monitor.activity[1].count > 0


def test_a_saturated_layer_is_named() -> None:
    net, x = _net(1.0, 1.0), torch.ones(3, 30, 20)
    nn.init.ones_(net[0].get_submodule("op").get_parameter("weight"))
    with pytest.warns(SpikingWarning, match=r"^0: .*100% saturated; .*give threshold=2"), SpikeMonitor(net):
        net[0](x)


def test_a_monitor_begins_anew_in_every_block() -> None:
    net, x = _net(1.0, 1.0), (torch.rand(12, 30, 20) < 0.4).float()
    monitor = SpikeMonitor(net)
    with monitor:
        net(x)
    nn.init.zeros_(net[1].get_submodule("op").get_parameter("weight"))
    with pytest.warns(SpikingWarning, match="^1: 0.0 spikes, 100% silent"), monitor:
        net(x[:3])
    assert monitor.activity[0].samples == 3


def test_images_of_several_sizes_copies_and_named_arguments_are_watched() -> None:
    op = nn.Conv2d(3, 2, 3, bias=False).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    nn.init.constant_(op.weight, 1.0)
    net = nn.Sequential(SpikingLayer(op, CubaLIF(threshold=2.0)))
    with SpikeMonitor(net) as monitor:
        net(torch.ones(4, 10, 3, 8, 8))
        net[0](spikes=torch.zeros(1, 10, 3, 9, 9))
        twin = copy.deepcopy(net)
        twin(torch.ones(4, 10, 3, 8, 8))
    (found,) = monitor.activity
    assert found.samples == 5
    assert found.count == pytest.approx(4 / 5 * 9)  # every step but the first
    assert found.silent == pytest.approx(49 / (36 + 49))
    assert found.saturated == pytest.approx(36 / (36 + 49))
    net[0] = SpikingLayer(op, CubaLIF(threshold=1e4))
    monitor = SpikeMonitor(net)
    with pytest.warns(SpikingWarning, match="no neuron fires"), monitor:
        net(torch.ones(4, 10, 3, 8, 8))


def test_a_layer_that_nothing_reaches_is_told_so() -> None:
    net = _net(1.0, 1.0)
    with pytest.warns(SpikingWarning, match="look at the layer below"), SpikeMonitor(net):
        net(torch.zeros(3, 30, 20))


def _interrupted(net: nn.Module) -> None:
    with SpikeMonitor(net):
        net(torch.ones(3, 30, 20))
        raise KeyboardInterrupt


def test_a_monitor_leaves_when_the_block_fails_and_refuses_other_models() -> None:
    net = _net(1e3, 1e3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(KeyboardInterrupt):
            _interrupted(net)
    assert not net[0]._forward_hooks
    with pytest.raises(ValueError, match="no SpikingLayer in this Linear"):
        SpikeMonitor(nn.Linear(2, 2))


@every_encoder
def test_no_gradient_goes_through_an_encoder(encoder: type[nn.Module]) -> None:
    assert not encoder(3)(torch.rand(2, 4, requires_grad=True)).requires_grad


def test_rates_that_are_no_probabilities_are_refused() -> None:
    with pytest.raises(ValueError, match="max_rate must be a probability"):
        PoissonEncoder(3, 1.5)


def _own(threshold: float = 0.5, **neuron: float) -> SpikingLayer:
    """Three neurons, each with a train of its own, that fire where it spikes, a step later."""
    op = nn.Linear(3, 3, bias=False)
    nn.init.eye_(op.weight)
    return SpikingLayer(op, CubaLIF(1.0, 1.0, threshold, **neuron))  # type: ignore[arg-type]


def _watched(net: nn.Module, *batches: torch.Tensor) -> SpikeMonitor:
    with SpikeMonitor(net) as monitor:
        for batch in batches:
            net(batch)
    return monitor


def _failing(monitor: SpikeMonitor, net: nn.Module, x: torch.Tensor) -> None:
    with monitor:
        net(x)
        raise KeyError


def test_a_monitor_joins_batches() -> None:
    net, x = nn.Sequential(_own()), torch.zeros(2, 20, 3)
    x[0, :, 0] = x[1, :, 1] = x[:, :, 2] = 1
    x[:, 5, 2] = 0  # 18 of 19
    for batches in (x.split(1), x.split(1)[::-1], [x]):
        (found,) = _watched(net, *batches).activity
        assert found.samples == 2
        assert found.silent == 0
        assert found.saturated == pytest.approx(1 / 3)
        assert found.count == pytest.approx((19 + 18) / 3)
    x[:, ::2, 2] = 0
    x[:, :3, 2] = 0  # no sample of any neuron but the first two is full, and these are in one sample each
    for batches in (x.split(1), x.split(1)[::-1], [x]):
        assert _watched(net, *batches).activity[0].saturated == 0


def test_the_first_steps_do_not_count_for_saturation() -> None:
    net = nn.Sequential(_own(delay=5), _own(refractory=2))
    with pytest.warns(SpikingWarning, match="100% saturated"), SpikeMonitor(net) as monitor:
        net(torch.ones(1, 12, 3))  # 7 of 7, and then at 6, 9: 2 of 4
    assert monitor.activity[0].saturated == 1
    assert monitor.activity[1].saturated == 0
    assert [CubaLIF(refractory=2, delay=1).most_spikes(n) for n in (0, 1, 2, 4, 5)] == [0, 0, 1, 1, 2]


def test_counts_in_half_precision_are_not_rounded_by_a_monitor() -> None:
    layer = _own().bfloat16()
    with pytest.warns(SpikingWarning, match="saturated"), SpikeMonitor(layer) as monitor:
        layer(torch.ones(1, 400, 3))
    assert monitor.activity[0].count == 399
    assert monitor.activity[0].name == "model"


def test_a_batch_of_none_does_not_hide_what_is_silent() -> None:
    net, x = nn.Sequential(_own(1e3)), torch.ones(2, 20, 3)
    x[:, :, 0] = 0
    net[0].get_submodule("op").get_parameter("weight").data[2, 2] = 100.0
    with pytest.warns(SpikingWarning, match=r"membranes reach 1: give threshold=0\.5$"):
        monitor = _watched(net, x, x[:0])
    assert monitor.activity[0].samples == 2


def test_a_layer_that_nothing_passed_through_is_no_warning() -> None:
    net = nn.Sequential(_own(), _own())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with SpikeMonitor(net) as monitor:
            pass
    assert [found.advice for found in monitor.activity] == ["nothing passed through it"] * 2


def test_a_monitor_shows_the_block_that_runs_and_keeps_no_batch() -> None:
    net, x = nn.Sequential(_own()), (torch.rand(4, 20, 3) < 0.4).float().requires_grad_()
    monitor = SpikeMonitor(net)
    for samples in (4, 3):
        with monitor:
            net(x[:samples])
            assert monitor.activity[0].samples == samples
            (watched,) = monitor._watched
            assert watched.last is not None
            assert not watched.last.requires_grad  # else the graph is kept, too
            twin = copy.deepcopy(net)
            twin(x)
            (hook,) = twin[0]._forward_hooks.values()
            assert isinstance(hook, MethodType)
            assert vars(hook.__self__)["last"] is None
        assert not monitor._watched
    with pytest.raises(KeyError):
        _failing(monitor, net, x)
    assert not monitor._watched
    assert monitor.activity == []


def test_pools_send_to_trains_below_what_they_are_told_for_silence() -> None:
    x = torch.ones(1, 5, 1, 2, 2, requires_grad=True)
    SpikingSumPool2d(2, CubaLIF(threshold=1e3), silent_ratio=0.3)(x).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, torch.full_like(x, 0.3 / 1e3))


@pytest.mark.parametrize(("dtype", "rate"), [(torch.bfloat16, 2.0**-10), (torch.float16, 2.0**-13)])
def test_small_rates_in_half_precision_are_not_those_of_its_grid(dtype: torch.dtype, rate: float) -> None:
    encoder, x = (
        PoissonEncoder(1000, generator=torch.Generator().manual_seed(0)),
        torch.full((100, 4), rate, dtype=dtype),
    )
    spikes, expected = float(encoder(x).float().sum()), 400_000 * rate
    assert abs(spikes - expected) < 5 * math.sqrt(expected)
