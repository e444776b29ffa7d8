"""The slope of a count, against what counts do when weights change."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from beyondprop.nn import CubaLIF, SpikingLayer
from beyondprop.nn.spiking import scans, slopes

STEPS, ROWS = 100, 2000


def _drives(seed: int = 0) -> Tensor:
    """Return drives of trains at random, `(T, N, 1)`, through weights of both signs."""
    g = torch.Generator().manual_seed(seed)
    trains = (torch.rand(STEPS, ROWS, 60, generator=g) < 0.2).float()
    return trains @ (0.5 * torch.randn(60, 1, generator=g) + 0.3) / 6


def _measured(drive: Tensor, neuron: CubaLIF) -> tuple[float, float, float, float]:
    """Return the mean count, what a change of all weights moves it by, and what the two slopes say of that."""
    counts = [scans.simulate(drive * factor, neuron)[0].sum(0).mean() for factor in (1.05, 0.95)]
    sums = torch.zeros_like(drive[0])
    found = scans.simulate(drive, neuron, 0.0, None, sums)[0].sum(0)
    ours = (sums * slopes.of_counts(found, sums, neuron, STEPS)).mean()
    published = (sums / neuron.threshold).mean()
    return float(found.mean()), float((counts[0] - counts[1]) / 0.1), float(ours), float(published)


@pytest.mark.parametrize("refractory", [0, 2])
@pytest.mark.parametrize("tau_mem", [8.0, 16.0, 64.0])
@pytest.mark.parametrize("threshold", [0.7, 1.0, 3.0])
def test_counts_follow_weights_as_it_says(refractory: int, tau_mem: float, threshold: float) -> None:
    neuron = CubaLIF(tau_mem=tau_mem, threshold=threshold, refractory=refractory)
    seen, off, off_published = 0, [], []
    for scale in (0.3, 0.5, 0.75, 1.0, 1.4):
        count, true, ours, published = _measured(_drives() * scale * threshold, neuron)
        if count >= 4:
            seen += 1
            off.append(abs(math.log(ours / true)))
            off_published.append(abs(math.log(published / true)))
    assert seen >= 4
    assert max(off) < math.log(1.25)
    assert sum(off) / seen < 0.1
    assert sum(off) < 0.5 * sum(off_published)


def test_neurons_that_fire_as_often_as_they_can_have_hardly_a_slope() -> None:
    neuron = CubaLIF(refractory=2)
    count, _, ours, published = _measured(_drives() * 8.0, neuron)
    assert count > 0.95 * neuron.most_spikes(STEPS)
    assert ours < 0.03 * published


def test_a_constant_current_without_leak() -> None:
    """Between its jumps the count is, over a range of currents, its integral."""
    neuron = CubaLIF(tau_mem=1e6, tau_syn=1.0, refractory=3, delay=0)
    currents = torch.linspace(0.02, 0.3, 2001, dtype=torch.float64)
    steps = 1000
    sums = torch.zeros(1, 2001, dtype=torch.float64)
    drive = currents.expand(steps, 1, -1).clone()
    counts = scans.simulate(drive, neuron, 0.0, None, sums)[0].sum(0)
    # A current adds to all membranes alike.
    by_current = sums / currents * slopes.of_counts(counts, sums, neuron, steps)
    middle = 0.5 * (by_current[0, 1:] + by_current[0, :-1]) * currents.diff()
    for first, last, most in (
        (0, 1000, 1.05),
        (500, 1500, 1.06),
        (1000, 2000, 1.12),
    ):  # steps are coarse for large ones
        assert 1.0 < float(middle[first:last].sum() / (counts[0, last] - counts[0, first])) < most


def test_without_spikes_it_is_that_of_the_threshold_and_the_leak_is_bounded() -> None:
    neuron = CubaLIF(tau_mem=2.0, threshold=4.0)
    counts, sums = torch.tensor([[0.0, 1.0]]), torch.tensor([[-3.0, 4.0]])
    assert slopes.of_counts(counts, sums, neuron, 10_000).tolist() == [[0.25, 0.25 * slopes.MOST]]


def test_it_is_its_formula() -> None:
    neuron = CubaLIF(tau_mem=20.0, threshold=2.0, refractory=3)
    counts, sums = torch.tensor([[1.0, 4.0, 25.0]]), torch.tensor([[2.0, 10.0, 150.0]])
    leak = [(math.exp(n / 20.0) - 1.0) / (n / 20.0) for n in (100 / 2 - 3, 100 / 5 - 3, 1.0)]
    wanted = [leak[0] / 2.0, leak[1] * 2.0 / (2.5 * (2.5 + 6 * 0.5)), leak[2] * 2.0 / (6.0 * (6.0 + 6 * 4.0))]
    torch.testing.assert_close(slopes.of_counts(counts, sums, neuron, 100), torch.tensor([wanted]))


def test_thresholds_within_the_slack_of_firing_have_a_slope() -> None:
    op = nn.Linear(3, 2, bias=False)
    layer = SpikingLayer(op, CubaLIF(threshold=1e-7))
    x = torch.zeros(2, 10, 3)
    x[0, 5, 0] = 1.0
    counts = layer(x).sum(1)
    assert counts.min() > 0  # at rest, too
    counts.sum().backward()
    assert op.weight.grad is not None
    assert torch.isfinite(op.weight.grad).all()
