"""Spiking layers against a simulation step by step, and against sums over all pairs of spikes."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor, nn

from beyondprop import data
from beyondprop.nn.spiking import CubaLIF, PoissonEncoder, SpikeCountLoss, SpikeCounts, SpikingLayer, scans, slopes
from beyondprop.nn.spiking.hm2bp import SILENT_WEIGHT

NEURONS = [
    pytest.param(CubaLIF(tau_mem, tau_syn, 1.0, refractory, delay), id=f"{tau_mem}-{tau_syn}-{refractory}-{delay}")
    for tau_mem, tau_syn in ((16.0, 2.0), (5.0, 5.0), (1.0, 1.0), (7.3, 9.1))
    for refractory in (0, 1, 4)
    for delay in (0, 1, 3)
]
every_neuron = pytest.mark.parametrize("neuron", NEURONS)


def _case(seed: int, steps: int = 40) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = (torch.rand(steps, 3, 8, dtype=torch.float64, generator=generator) < 0.4).double()
    return x, 2 * torch.randn(5, 8, dtype=torch.float64, generator=generator)


def _linear(weight: Tensor) -> nn.Linear:
    op = nn.Linear(*reversed(weight.shape), bias=False).double()
    op.weight.data.copy_(weight)
    return op


def _stepped(drive: Tensor, neuron: CubaLIF) -> tuple[Tensor, Tensor]:
    """The neuron as its docstring has it: spikes, and the sum of the membranes that fired."""
    v, p, held = (torch.zeros_like(drive[0]) for _ in range(3))
    total, spikes = torch.zeros_like(v), []
    for t in range(len(drive)):
        v, p = v - v / neuron.tau_mem, p - p / neuron.tau_syn
        if t >= neuron.delay:
            p = p + drive[t - neuron.delay]
        v = v + p / neuron.tau_syn
        v, held = torch.where(held > 0, 0.0, v), (held - 1).clamp(min=0)
        fired = v > neuron.threshold - 1e-6
        total = total + torch.where(fired, v, 0.0)
        v, held = torch.where(fired, 0.0, v), torch.where(fired, float(neuron.refractory), held)
        spikes.append(fired)
    return torch.stack(spikes), total


def _pairwise(x: Tensor, spikes: Tensor, neuron: CubaLIF) -> Tensor:
    """e `(N, out, in)` as the paper has it: over all spikes of i and those of j before, from a membrane released at r."""
    steps, batch, inputs = x.shape
    kernel = scans.response(
        torch.eye(steps, dtype=torch.float64), scans.Filter.of(neuron)
    )  # [t, g]: of a spike at g, without reset
    keep = 1 - 1 / neuron.tau_mem
    found = torch.zeros(batch, spikes.shape[2], inputs, dtype=torch.float64)
    for b in range(batch):
        for i in range(spikes.shape[2]):
            release = None
            for f in torch.nonzero(spikes[:, b, i]).flatten().tolist():
                seen = kernel[f] if release is None else kernel[f] - keep ** (f - release) * kernel[release]
                found[b, i] += seen @ x[:, b]
                release = f + neuron.refractory
                if release >= steps:
                    break
    return found


@every_neuron
def test_membranes_that_fired_are_what_all_trains_contributed(neuron: CubaLIF) -> None:
    for seed in range(3):
        x, weight = _case(seed, 10 + 15 * seed)
        drive = x @ weight.T
        spikes, *_ = scans.simulate(drive, neuron)
        stepped, total = _stepped(drive, neuron)
        assert torch.equal(spikes.bool(), stepped)
        assert spikes.any()
        kernel = scans.Filter.of(neuron)
        q = scans.weights_of_firings(spikes, kernel.keep_mem, neuron.refractory)
        e = torch.einsum("tbi,tbj->bij", q, scans.response(x, kernel))
        torch.testing.assert_close((q * scans.response(drive, kernel)).sum(0), total, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close((e * weight).sum(2), total, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(e, _pairwise(x, spikes, neuron), rtol=1e-10, atol=1e-10)


@every_neuron
def test_the_adjoint_is_the_transpose(neuron: CubaLIF) -> None:
    x, y = torch.randn(2, 30, 4, 3, dtype=torch.float64)
    kernel = scans.Filter.of(neuron)
    left, right = (y * scans.response(x, kernel)).sum(), (x * scans.adjoint_response(y, kernel)).sum()
    torch.testing.assert_close(left, right, rtol=1e-12, atol=1e-12)


@every_neuron
@pytest.mark.parametrize("slope", ["discrete", "published"])
def test_gradients_are_those_of_the_pairwise_sums(neuron: CubaLIF, slope: str) -> None:
    x, weight = _case(7)
    x[:, 0, 0] = 0  # a train without spikes
    weight[0] = -1  # a neuron without
    op = _linear(weight)
    layer = SpikingLayer(op, neuron, slope=slope, silent_ratio=0.3)
    given = x.transpose(0, 1).clone().requires_grad_()
    counts = SpikeCounts()(layer(given))
    coefficient = torch.randn(counts.shape, dtype=torch.float64)
    counts.backward(coefficient)
    spikes, *_ = scans.simulate(x @ weight.T, neuron)
    e, o, below = _pairwise(x, spikes, neuron), spikes.sum(0), x.sum(0)
    a = (e * weight).sum(2)
    delta, h = coefficient / neuron.threshold, torch.zeros_like(coefficient)
    if slope == "published":
        h = torch.where(o > 0, a / (neuron.threshold * o.clamp(min=1)), 0.0)
    else:
        delta = coefficient * slopes.of_counts(o, a, neuron, len(x))
    heard = SILENT_WEIGHT * (below > 0).double()[:, None].expand_as(e)
    learned = torch.where((o == 0)[..., None], heard, e)
    torch.testing.assert_close(
        op.weight.grad, torch.einsum("bi,bij->ij", delta * (1 + h), learned), rtol=1e-9, atol=1e-9
    )
    spoke = (below > 0)[:, None] & (o > 0)[..., None]
    ratio = torch.where(spoke, e / below.clamp(min=1)[:, None], 0.3)
    sent = torch.einsum("bi,ij,bij->bj", delta, weight, ratio)
    assert given.grad is not None
    torch.testing.assert_close(given.grad, sent[:, None].expand_as(given), rtol=1e-9, atol=1e-9)


def test_gradients_do_not_depend_on_the_batch() -> None:
    x, weight = _case(3)
    op = _linear(weight)
    layer = SpikingLayer(op, CubaLIF(threshold=1.0))
    whole = torch.autograd.grad(layer(x.transpose(0, 1)).sum(), op.weight)[0]
    parts = [torch.autograd.grad(layer(x[:, b : b + 1].transpose(0, 1)).sum(), op.weight)[0] for b in range(3)]
    torch.testing.assert_close(whole, sum(parts), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("rule", ["hm2bp", "surrogate"])
def test_a_convolution_is_its_matrix(rule: str) -> None:
    torch.manual_seed(0)
    conv = nn.Conv1d(2, 3, 3, bias=False).double()
    nn.init.normal_(conv.weight, std=1.5)
    matrix = torch.stack([conv(torch.eye(16, dtype=torch.float64)[j].view(1, 2, 8)).flatten() for j in range(16)], 1)
    dense = nn.Linear(16, 18, bias=False).double()
    dense.weight.data.copy_(matrix.detach())
    x = (torch.rand(4, 30, 2, 8) < 0.4).double()
    neuron = CubaLIF(threshold=1.0, refractory=1)
    a, b = x.clone().requires_grad_(), x.flatten(2).clone().requires_grad_()
    one, other = SpikingLayer(conv, neuron, rule=rule)(a), SpikingLayer(dense, neuron, rule=rule)(b)
    assert torch.equal(one.flatten(2), other)
    assert one.any()
    coefficient = torch.randn_like(one[:, 0])
    (one.sum(1) * coefficient).sum().backward()
    (other.sum(1) * coefficient.flatten(1)).sum().backward()
    assert a.grad is not None
    assert b.grad is not None
    torch.testing.assert_close(a.grad.flatten(2), b.grad, rtol=1e-9, atol=1e-9)


def test_both_rules_have_the_same_spikes() -> None:
    x, weight = _case(5)
    for neuron in (CubaLIF(threshold=1.0), CubaLIF(8.0, 3.0, 2.0, 3, 2)):
        layers = [SpikingLayer(_linear(weight), neuron, rule=rule) for rule in ("hm2bp", "surrogate")]
        one, other = (layer(x.transpose(0, 1)) for layer in layers)
        assert torch.equal(one, other)


def _net(rule: str) -> nn.Sequential:
    torch.manual_seed(0)
    layers = []
    for inputs, units, threshold in ((64, 60, 3.0), (60, 10, 2.0)):
        op = nn.Linear(inputs, units, bias=False)
        nn.init.uniform_(op.weight, -0.3, 0.3)
        layers.append(SpikingLayer(op, CubaLIF(threshold=threshold), rule=rule))
    return nn.Sequential(PoissonEncoder(40), *layers, SpikeCounts())


@pytest.mark.parametrize("rule", ["hm2bp", "surrogate"])
def test_digits_are_learned(rule: str) -> None:
    assert _accuracy(_net(rule), 5e-3, 4) > 0.88


def _accuracy(model: nn.Module, lr: float, epochs: int) -> float:
    """Train on digits, and return the accuracy on its test rows."""
    digits, loss = data.load("digits", standardize=False), SpikeCountLoss()
    x, y = digits.x_train.flatten(1), digits.y_train
    optimizer = torch.optim.Adam(model.parameters(), lr)
    for _ in range(epochs):
        for rows in torch.randperm(len(x)).split(50):
            optimizer.zero_grad()
            loss(model(x[rows]), y[rows]).backward()
            optimizer.step()
    with torch.no_grad():
        found = model(digits.x_test.flatten(1)).argmax(1)
    return float((found == digits.y_test).double().mean())


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("tau_mem", 0.5, "tau_mem must be >= 1 step"),
        ("tau_syn", 0.0, "tau_syn must be a finite number > 0"),
        ("threshold", 0.0, "threshold must be a finite number > 0"),
        ("refractory", -1, "refractory must be an integer >= 0"),
        ("delay", 1.5, "delay must be an integer >= 0"),
        ("dt", math.inf, "dt must be a finite number > 0"),
    ],
)
def test_neurons_that_are_none_are_refused(name: str, value: float, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        CubaLIF(**{name: value})  # type: ignore[arg-type]


def test_layers_that_are_none_are_refused() -> None:
    with pytest.raises(ValueError, match="op must have no bias"):
        SpikingLayer(nn.Linear(3, 2), CubaLIF())
    with pytest.raises(ValueError, match="rule must be one of 'hm2bp', 'surrogate'"):
        SpikingLayer(nn.Linear(3, 2, bias=False), CubaLIF(), rule="bptt")
    layer = SpikingLayer(nn.Linear(3, 2, bias=False), CubaLIF())
    for shape in ((4, 3), (4, 0, 3)):
        with pytest.raises(ValueError, match="the time second"):
            layer(torch.zeros(shape))
    with pytest.raises(ValueError, match="target must be larger than off"):
        SpikeCountLoss(1.0, 2.0)


def test_bool_spikes_and_one_step() -> None:
    layer = SpikingLayer(nn.Linear(3, 2, bias=False), CubaLIF(threshold=0.1, delay=0))
    x = torch.rand(4, 1, 3) < 0.5
    assert torch.equal(layer(x), layer(x.float()))
    assert layer(x).shape == (4, 1, 2)


def test_two_hidden_layers_learn_with_the_defaults() -> None:
    torch.manual_seed(0)
    sizes = (64, 60, 60, 10)
    layers = [SpikingLayer(nn.Linear(a, b, bias=False), CubaLIF()) for a, b in itertools.pairwise(sizes)]
    assert _accuracy(nn.Sequential(PoissonEncoder(40), *layers, SpikeCounts()), 1e-2, 8) > 0.9
