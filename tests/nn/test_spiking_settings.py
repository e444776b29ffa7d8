"""What a spiking layer is told beside its operator: inhibition, injection, silence, kernels; and its loss."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from trains import NEURONS, every_rule, make_op, make_spikes, weight_gradient

from beyondprop.nn import CubaLIF, SpikeCountLoss, SpikingLayer
from beyondprop.nn.spiking import scans, slopes
from beyondprop.nn.spiking.hm2bp import _injected, lateral_factor


@pytest.mark.parametrize("neuron", [*NEURONS, CubaLIF(threshold=0.5, refractory=5)])
@pytest.mark.parametrize("lateral", [0.0, 0.4])
@every_rule
def test_steps_are_the_sequence(neuron: CubaLIF, lateral: float, rule: str) -> None:
    torch.manual_seed(0)
    layer, x = SpikingLayer(make_op(), neuron, rule=rule, lateral=lateral), make_spikes(3, 30, 6)
    whole, state, kept = layer(x), None, None
    for t in range(30):
        spikes, state = layer.step(x[:, t], state)
        assert torch.equal(spikes, whole[:, t])
        kept = state if t == 14 else kept
    assert whole.any()
    for t in range(15, 30):  # a state is not changed by what came after it
        again, kept = layer.step(x[:, t], kept)
        assert torch.equal(again, whole[:, t])
    with pytest.raises(ValueError, match="begin a new sequence"):
        layer.step(x[:2, 0], state)
    with pytest.raises(ValueError, match="begin a new sequence"):
        SpikingLayer(layer.op, CubaLIF(threshold=0.7)).step(x[:, 0], state)


@every_rule
def test_lateral_spikes_inhibit_all_others_a_step_later(rule: str) -> None:
    neuron = CubaLIF(tau_mem=10.0, tau_syn=1.0, threshold=1.0, delay=0)
    op = nn.Linear(3, 3, bias=False)
    op.weight.data.copy_(torch.eye(3) * 1.05)
    x = torch.zeros(1, 3, 3)
    x[0, 0, 0], x[0, 1, :] = 1, 1  # the first neuron fires at once, and then all are driven
    free = SpikingLayer(op, neuron, rule=rule)(x)[0]
    held = SpikingLayer(op, neuron, rule=rule, lateral=0.2)(x)[0]
    assert free.tolist() == [[1, 0, 0], [1, 1, 1], [0, 0, 0]]
    assert held.tolist() == [[1, 0, 0], [1, 0, 0], [0, 0, 0]]


@pytest.mark.parametrize("neuron", NEURONS)
def test_the_lateral_factor_is_the_sum_over_pairs(neuron: CubaLIF) -> None:
    torch.manual_seed(1)
    strength = 0.3
    spikes, *_ = scans.simulate(make_spikes(40, 2, 6) @ make_op().weight.detach().T, neuron, strength)
    spikes[:, 1, 2] = 0.0
    kernel = scans.Filter.of(neuron)
    q = scans.weights_of_firings(spikes, kernel.keep_mem, neuron.refractory)
    heard = scans.response(spikes, kernel.delayed(1))
    for b in range(2):
        for j in range(5):
            back = 0.0
            for other in range(5):
                counts = float(spikes[:, b, j].sum()), float(spikes[:, b, other].sum())
                if other != j and min(counts) > 0:
                    there = float((q[:, b, other] * heard[:, b, j]).sum()) / (counts[0] * neuron.threshold)
                    back += there * float((q[:, b, j] * heard[:, b, other]).sum()) / (counts[1] * neuron.threshold)
            expected = 1.0 / max(1.0 - strength**2 * back, 0.1)
            found = lateral_factor(q, spikes, strength, neuron, kernel)[b, j]
            torch.testing.assert_close(float(found), expected, rtol=1e-10, atol=1e-10)
    plain = SpikingLayer(make_op(), neuron, lateral=0.0)
    inhibited = SpikingLayer(copy.deepcopy(plain.op), neuron, lateral=1e-9)
    x, coefficient = make_spikes(2, 40, 6), torch.randn(2, 5, dtype=torch.float64)
    torch.testing.assert_close(weight_gradient(plain, x, coefficient), weight_gradient(inhibited, x, coefficient))


def test_spikes_are_injected_where_the_loss_wants_them() -> None:
    torch.manual_seed(0)
    neuron = CubaLIF(threshold=1e6)  # never fires
    op, x = make_op(), make_spikes(2, 21, 6)
    coefficient = torch.zeros(2, 5, dtype=torch.float64)
    coefficient[0, 1], coefficient[0, 2] = -3.0, 2.0
    layer = SpikingLayer(op, neuron, injected=4)
    found = weight_gradient(layer, x, coefficient)
    spikes = torch.zeros(21, 2, 5, dtype=torch.float64)
    spikes[[5, 10, 15, 20], 0, 1] = 1.0
    kernel = scans.Filter.of(neuron)
    q = scans.weights_of_firings(spikes, kernel.keep_mem, 0)
    e = torch.einsum("tbi,tbj->bij", q, scans.response(x.transpose(0, 1), kernel))
    torch.testing.assert_close(found[1], -3.0 / 1e6 * e[0, 1], rtol=1e-12, atol=0)
    torch.testing.assert_close(found[2], 2.0 / 1e6 * 0.1 * x[0].any(0).double(), rtol=1e-12, atol=0)
    assert not found[[0, 3, 4]].any()
    given = x.clone().requires_grad_()
    (layer(given).sum(1) * coefficient).sum().backward()
    assert given.grad is not None
    counts = x.sum(1)  # a neuron that was injected into is none that is silent; the others send a ratio
    sent = -3.0 / 1e6 * op.weight.detach()[1] * torch.where(counts[0] > 0, e[0, 1] / counts[0], 0.1)
    sent = sent + 2.0 / 1e6 * op.weight.detach()[2] * 0.1
    torch.testing.assert_close(given.grad[0, 0], sent, rtol=1e-10, atol=0)
    with pytest.raises(ValueError, match=r"injected must be <= 6.*refractory=2"):
        SpikingLayer(op, CubaLIF(refractory=2), injected=10)(x)


def test_silent_neurons_as_published() -> None:
    torch.manual_seed(0)
    op, x, coefficient = make_op(), make_spikes(2, 20, 6), torch.randn(2, 5, dtype=torch.float64)
    neuron = CubaLIF(threshold=50.0)
    heard = torch.einsum("bi,bj->bij", coefficient / 50.0, 0.1 * x.any(1).double())
    for slope in ("discrete", "published"):
        ours = weight_gradient(SpikingLayer(op, neuron, slope=slope), x, coefficient)
        torch.testing.assert_close(ours, heard.sum(0), rtol=1e-12, atol=1e-14)
    side = 1.0 + 0.5 / 50.0 * op.weight.detach().sum(1)
    reference = weight_gradient(SpikingLayer(op, neuron, slope="published", silent="reference"), x, coefficient)
    torch.testing.assert_close(reference, heard.sum(0) * side[:, None], rtol=1e-12, atol=1e-14)


def test_the_continuous_kernel_is_its_formula() -> None:
    mem, syn = 16.0, 3.0
    kernel = scans.Filter.of(CubaLIF(mem, syn, delay=2), "continuous")
    found = scans.response(torch.eye(1, 30, dtype=torch.float64)[0, :, None], kernel)[:, 0]
    t = torch.arange(28, dtype=torch.float64)
    expected = (torch.exp(-t / mem) - torch.exp(-t / syn)) / (1.0 - syn / mem)
    torch.testing.assert_close(found[2:], expected, rtol=1e-12, atol=1e-14)
    assert not found[:2].any()
    with pytest.raises(ValueError, match="tau_mem - tau_syn"):
        SpikingLayer(make_op(), CubaLIF(4.0, 4.0), kernel="continuous")


def test_the_kernels_agree_for_slow_neurons() -> None:
    torch.manual_seed(0)
    op, x, coefficient = make_op(), make_spikes(4, 400, 6), torch.randn(4, 5, dtype=torch.float64)
    neuron = CubaLIF(64.0, 8.0, 10.0, refractory=2)
    discrete, continuous = (
        weight_gradient(SpikingLayer(op, neuron, kernel=kernel), x, coefficient)
        for kernel in ("discrete", "continuous")
    )
    apart = float((discrete - continuous).norm() / discrete.norm())
    assert 1e-6 < apart < 0.1


def test_labels_and_counts_that_are_none_are_refused() -> None:
    loss = SpikeCountLoss()
    for counts, labels in (
        (torch.zeros(2, 5, 3), torch.zeros(2, dtype=torch.long)),
        (torch.zeros(2, 3), torch.zeros(2, 1, dtype=torch.long)),
        (torch.zeros(2, 3), torch.zeros(2)),
    ):
        with pytest.raises(ValueError, match=r"takes counts \(N, classes\)"):
            loss(counts, labels)
    assert float(loss(torch.tensor([[10.0, 2.0, 0.0]]), torch.tensor([0], dtype=torch.int32))) == 0


@pytest.mark.parametrize(("steps", "count"), [(40, 10), (39, 20), (100, 35), (59, 29), (2, 1)])
def test_as_many_spikes_are_injected_as_are_asked_for(steps: int, count: int) -> None:
    into = torch.tensor([[True, False]])
    found = _injected(torch.zeros(steps, 1, 2), into, count)
    assert found.sum(0).tolist() == [[count, 0]]
    assert len(set(found[:, 0, 0].nonzero().flatten().diff().tolist())) <= 1


def test_a_tie_fires_by_both_rules_or_by_none() -> None:
    op = nn.Linear(1, 1, bias=False)
    for level in (1.0, 31.0, 40.0, 1000.0):
        nn.init.constant_(op.weight, level)
        neuron = CubaLIF(tau_mem=10.0, tau_syn=1.0, threshold=level, delay=0)
        one, other = (SpikingLayer(op, neuron, rule=rule)(torch.ones(1, 3, 1)) for rule in ("hm2bp", "surrogate"))
        assert torch.equal(one, other)


def test_trains_learn_from_silent_neurons_behind_them() -> None:
    x = torch.ones(2, 20, 6, dtype=torch.float64, requires_grad=True)
    op = make_op()
    SpikingLayer(op, CubaLIF(threshold=1e3), silent_ratio=0.2)(x).sum(1).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad[0, 0], 0.2 / 1e3 * op.weight.detach().sum(0), rtol=1e-12, atol=0)


@pytest.mark.parametrize("slope", ["discrete", "published"])
@pytest.mark.parametrize("kernel", ["discrete", "continuous"])
def test_the_lateral_factor_is_in_what_is_learned(kernel: str, slope: str) -> None:
    torch.manual_seed(1)
    neuron, strength = CubaLIF(8.0, 3.0, 0.5, refractory=1, delay=3), 0.15
    op, x, coefficient = make_op(), make_spikes(2, 40, 6), torch.randn(2, 5, dtype=torch.float64)
    found = weight_gradient(SpikingLayer(op, neuron, lateral=strength, slope=slope, kernel=kernel), x, coefficient)
    spikes, *_ = scans.simulate(x.transpose(0, 1) @ op.weight.detach().T, neuron, strength)
    q = scans.weights_of_firings(spikes, scans.Filter.of(neuron, kernel).keep_mem, neuron.refractory)
    e = torch.einsum("tbi,tbj->bij", q, scans.response(x.transpose(0, 1), scans.Filter.of(neuron, kernel)))
    one_later = scans.Filter.of(CubaLIF(8.0, 3.0, 0.5, delay=1), kernel)  # a lateral spike arrives in the next step
    there = torch.einsum("tbi,tbj->bij", q, scans.response(spikes, one_later))
    ratio = there / (neuron.threshold * spikes.sum(0).double().clamp(min=1.0)[:, None])
    ratio = ratio * (1.0 - torch.eye(5, dtype=torch.float64)) * (spikes.any(0)[:, None] & spikes.any(0)[:, :, None])
    factor = 1.0 / (1.0 - strength**2 * torch.einsum("bij,bji->bi", ratio, ratio))
    assert 1.01 < float(factor.max()) < 9.0
    slopes_are = torch.full_like(coefficient, 1.0 / neuron.threshold)
    if slope == "discrete":  # of the membranes as they were, inhibited
        simulated = torch.zeros_like(coefficient)
        scans.simulate(x.transpose(0, 1) @ op.weight.detach().T, neuron, strength, None, simulated)
        slopes_are = slopes.of_counts(spikes.sum(0), simulated, neuron, 40)
    else:  # of what the trains contributed, without the inhibition
        own = (e * op.weight.detach()).sum(2) / (neuron.threshold * spikes.sum(0).clamp(min=1.0))
        factor = factor * (1.0 + torch.where(spikes.any(0), own, 0.0))
    quiet = torch.where(spikes.any(0)[..., None], e, 0.1 * x.any(1).double()[:, None])
    expected = torch.einsum("bi,bij->ij", coefficient * slopes_are * factor, quiet)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_the_lateral_factor_is_bounded() -> None:
    neuron = CubaLIF(threshold=0.1)
    spikes = torch.ones(40, 1, 5, dtype=torch.float64)
    kernel = scans.Filter.of(neuron)
    q = scans.weights_of_firings(spikes, kernel.keep_mem, 0)
    assert lateral_factor(q, spikes, 5.0, neuron, kernel).tolist() == [[pytest.approx(10.0)] * 5]


@pytest.mark.parametrize("silent", ["recover", "reference"])
def test_injected_spikes_have_a_side_effect_only_as_published(silent: str) -> None:
    torch.manual_seed(0)
    neuron, op, x = CubaLIF(threshold=50.0), make_op(), make_spikes(2, 21, 6)
    coefficient = torch.zeros(2, 5, dtype=torch.float64)
    coefficient[0, 1] = -3.0
    found = weight_gradient(SpikingLayer(op, neuron, injected=4, slope="published", silent=silent), x, coefficient)
    spikes = torch.zeros(21, 2, 5, dtype=torch.float64)
    spikes[[5, 10, 15, 20], 0, 1] = 1.0
    kernel = scans.Filter.of(neuron)
    q = scans.weights_of_firings(spikes, kernel.keep_mem, 0)
    e = torch.einsum("tbi,tbj->bij", q, scans.response(x.transpose(0, 1), kernel))[0, 1]
    side = float(e @ op.weight.detach()[1]) / (50.0 * 4) if silent == "reference" else 0.0
    torch.testing.assert_close(found[1], -3.0 / 50.0 * (1.0 + side) * e, rtol=1e-12, atol=0)


def test_nothing_is_injected_into_neurons_that_fire() -> None:
    torch.manual_seed(0)
    op, x = make_op(), make_spikes(2, 41, 6)
    nn.init.uniform_(op.weight, 0.5, 1.0)
    plain, injected = (SpikingLayer(op, CubaLIF(threshold=2.0, refractory=1), injected=n) for n in (0, 5))
    assert bool(plain(x).any(1).all())
    coefficient = -torch.ones(2, 5, dtype=torch.float64)
    assert torch.equal(weight_gradient(plain, x, coefficient), weight_gradient(injected, x, coefficient))


@pytest.mark.parametrize("lateral", [0.0, 0.3])
@pytest.mark.parametrize("neuron", NEURONS)
def test_surrogate_gradients_are_those_of_an_arctangent(neuron: CubaLIF, lateral: float) -> None:
    torch.manual_seed(0)
    op, x = make_op(), make_spikes(3, 25, 6).requires_grad_()
    coefficient = torch.randn(3, 25, 5, dtype=torch.float64)
    spikes = SpikingLayer(op, neuron, rule="surrogate", lateral=lateral)(x)
    found = torch.autograd.grad((spikes * coefficient).sum(), [op.weight, x])
    v, p, held, fired = (torch.zeros(3, 5, dtype=torch.float64) for _ in range(4))
    total, drive = torch.zeros((), dtype=torch.float64), x @ op.weight.T
    for t in range(25):
        v, p = v - v / neuron.tau_mem, p - p / neuron.tau_syn - lateral * (fired.sum(1, keepdim=True) - fired)
        p = p + drive[:, t - neuron.delay] if t >= neuron.delay else p
        v = torch.where(held > 0, 0.0, v + p / neuron.tau_syn)
        distance = (v - (neuron.threshold - 1e-6)) / neuron.threshold
        soft, hard = torch.atan(torch.pi * distance) / torch.pi, distance.detach() > 0
        fired = soft - soft.detach() + hard.double()
        held = torch.where(hard, float(neuron.refractory), (held - 1).clamp(min=0))
        v = torch.where(hard, 0.0, v)
        assert torch.equal(fired.detach(), spikes[:, t].detach())
        total = total + (fired * coefficient[:, t]).sum()
    for one, other in zip(found, torch.autograd.grad(total, [op.weight, x]), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


def test_a_tie_fires() -> None:
    op = nn.Linear(1, 1, bias=False)
    nn.init.constant_(op.weight, 1.0)
    neuron = CubaLIF(tau_mem=10.0, tau_syn=1.0, threshold=1.0, delay=0)
    for rule in ("hm2bp", "surrogate"):
        assert SpikingLayer(op, neuron, rule=rule)(torch.ones(1, 3, 1)).all()


@every_rule
def test_steps_have_no_gradient_and_a_drive_is_not_rounded(rule: str) -> None:
    layer, x = SpikingLayer(make_op(dtype=torch.float32), CubaLIF(threshold=0.5), rule=rule), torch.rand(3, 9, 6)
    spikes, state = layer.step(x[:, 0])
    assert not spikes.requires_grad
    assert not state.membranes.p.requires_grad
    assert not state.waiting[0].requires_grad
    expected = layer.drive(x)
    with torch.autocast("cpu", torch.bfloat16):
        found = layer.drive(x)
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"lateral": -0.1}, "lateral must be a finite number >= 0"),
        ({"silent_ratio": 0.0}, "silent_ratio must be a finite number > 0"),
        ({"injected": -1}, "injected must be an integer >= 0"),
        ({"silent": "reference"}, 'give slope="published"'),
        ({"slope": "exact"}, "slope must be one of 'discrete', 'published'"),
        ({"silent": "no"}, "silent must be one of"),
        ({"kernel": "no"}, "kernel must be one of"),
    ],
)
def test_settings_that_are_none_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        SpikingLayer(make_op(), CubaLIF(), **settings)


def test_as_many_spikes_as_fit_behind_the_first_step_are_injected() -> None:
    x = make_spikes(2, 20, 6)
    SpikingLayer(make_op(), CubaLIF(), injected=19)(x)
    with pytest.raises(ValueError, match="injected must be <= 19"):
        SpikingLayer(make_op(), CubaLIF(), injected=20)(x)


def test_losses_of_counts_are_half_the_squared_distance_outside_of_the_margin() -> None:
    counts = torch.tensor([[7.0, 3.0, 2.0], [10.0, 1.0, 9.0]], requires_grad=True)
    loss = SpikeCountLoss()(counts, torch.tensor([0, 2]))
    loss.backward()
    assert loss.item() == 0.5 * (9 + 4 + 81) / 2
    assert counts.grad is not None
    assert counts.grad.tolist() == [[-1.5, 1.0, 0.0], [4.5, 0.0, 0.0]]
    many = torch.tensor([[300.0, 1.0]]).bfloat16()  # which has no 300.5
    assert float(SpikeCountLoss(target=300.5, margin=0.0)(many, torch.tensor([0]))) == 0.125
    for settings in ({"margin": -1.0}, {"off": -1.0}):
        with pytest.raises(ValueError, match="must be a finite number >= 0"):
            SpikeCountLoss(**settings)
