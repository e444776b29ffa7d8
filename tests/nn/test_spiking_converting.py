"""ReLU networks as spiking ones."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from beyondprop import data
from beyondprop.errors import UnsupportedModelError
from beyondprop.nn import CubaLIF, CurrentEncoder, PoissonEncoder, SpikeCounts, SpikingLayer, convert_to_spiking

NEURON = CubaLIF(tau_mem=20.0, tau_syn=2.0, threshold=1.0)


def _conv_net() -> nn.Sequential:
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(1, 4, 3, padding=1, bias=False), nn.ReLU()),
        nn.AvgPool2d(2),
        nn.Identity(),
        nn.Conv2d(4, 6, 3, bias=False),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(24, 5, bias=False),
    )


@pytest.mark.parametrize("rule", ["hm2bp", "surrogate"])
def test_relus_become_layers_around_the_linear_modules_before_them(rule: str) -> None:
    torch.manual_seed(0)
    model = _conv_net()
    found = convert_to_spiking(model, NEURON, rule=rule, encoder=PoissonEncoder(30))
    assert [type(module) for module in found] == [PoissonEncoder, *[SpikingLayer] * 3, SpikeCounts]
    layers = [module for module in found if isinstance(module, SpikingLayer)]
    assert [type(layer.op) for layer in layers] == [nn.Conv2d, nn.Sequential, nn.Sequential]
    assert {layer.rule for layer in layers} == {rule}
    for one, other in zip(found.parameters(), model.parameters(), strict=True):
        assert torch.equal(one, other)
        assert one is not other
    x = torch.rand(3, 1, 8, 8)
    found(x).sum().backward()
    assert all(p.grad is not None for p in found.parameters())
    trains = convert_to_spiking(model, NEURON)((torch.rand(3, 30, 1, 8, 8) < 0.3).float())
    assert trains.shape == (3, 5)


def test_a_trained_network_keeps_what_it_has_learned() -> None:
    torch.manual_seed(0)
    digits = data.load("digits")
    x, y = digits.x_train.flatten(1), digits.y_train
    model = nn.Sequential(nn.Linear(64, 60, bias=False), nn.ReLU(), nn.Linear(60, 10, bias=False))
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(10):
        for rows in torch.randperm(len(x)).split(50):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()
    slow = CubaLIF(tau_mem=500.0, tau_syn=1.0, threshold=1e3)
    found = convert_to_spiking(model, slow, encoder=CurrentEncoder(100), inputs=x[:200])
    with torch.no_grad():
        expected = (model(digits.x_test.flatten(1)).argmax(1) == digits.y_test).double().mean()
        accuracy = (found(digits.x_test.flatten(1)).argmax(1) == digits.y_test).double().mean()
        untouched = convert_to_spiking(model, slow, encoder=CurrentEncoder(100))
        plain = (untouched(digits.x_test.flatten(1)).argmax(1) == digits.y_test).double().mean()
    assert float(expected) > 0.93
    assert float(accuracy) > float(expected) - 0.05
    assert float(plain) < 0.2  # without a threshold that fits, nothing fires


@pytest.mark.parametrize(("interval", "refractory"), [(4, 0), (4, 2), (9, 0)])
def test_the_most_driven_neurons_fire_at_the_interval(interval: int, refractory: int) -> None:
    torch.manual_seed(0)
    neuron = CubaLIF(tau_mem=20.0, tau_syn=1.0, refractory=refractory)
    op = nn.Sequential(nn.Linear(6, 4, bias=False), nn.ReLU())
    x = torch.rand(50, 6)
    found = convert_to_spiking(op, neuron, encoder=CurrentEncoder(90), inputs=x, interval=interval)
    highest = found(x).detach().amax(1)
    assert abs(float(highest.quantile(0.99)) - 90 / interval) <= 0.15 * 90 / interval


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (nn.Sequential(nn.Linear(3, 2), nn.ReLU()), "0 is a Linear with a bias"),
        (nn.Sequential(nn.Linear(3, 2, bias=False), nn.BatchNorm1d(2), nn.ReLU()), "1 is a BatchNorm1d.*fold it"),
        (nn.Sequential(nn.Linear(3, 2, bias=False), nn.Dropout(), nn.ReLU()), "1 is a Dropout.*no dropout"),
        (nn.Sequential(nn.Conv1d(3, 2, 1, bias=False), nn.MaxPool1d(2), nn.ReLU()), "average pooling"),
        (
            nn.Sequential(nn.Sequential(nn.Linear(3, 2, bias=False), nn.Tanh())),
            "0.1 is a Tanh, which has no spiking form",
        ),
        (nn.Sequential(nn.ReLU(), nn.Linear(3, 2, bias=False)), "0 is a ReLU with no weights"),
        (nn.Sequential(nn.Linear(3, 2, bias=False), nn.ReLU(), nn.Flatten()), "has no weights; leave it out"),
        (nn.Sequential(), "no ReLU and no weights"),
        (nn.LSTM(3, 2), "model is a LSTM"),
    ],
)
def test_what_has_no_spiking_form_is_named(model: nn.Module, said: str) -> None:
    with pytest.raises(UnsupportedModelError, match=said):
        convert_to_spiking(model, NEURON)


def test_intervals_and_inputs_that_are_none_are_refused() -> None:
    model = nn.Sequential(nn.Linear(3, 2, bias=False), nn.ReLU())
    with pytest.raises(ValueError, match="interval must be > 4"):
        convert_to_spiking(model, CubaLIF(refractory=4))
    nn.init.constant_(next(model.parameters()), -1.0)
    with pytest.raises(ValueError, match="No neuron of layer 0 is driven"):
        convert_to_spiking(model, NEURON, inputs=torch.ones(2, 20, 3))


def test_modules_that_stand_at_several_places() -> None:
    relu, shared, pool = nn.ReLU(), nn.Linear(5, 5, bias=False), nn.AvgPool2d(2)
    model = nn.Sequential(nn.Linear(4, 5, bias=False), relu, shared, relu, shared, relu, nn.Linear(5, 3, bias=False))
    found = convert_to_spiking(model, NEURON)
    layers = [module for module in found if isinstance(module, SpikingLayer)]
    assert len(layers) == 4
    assert layers[1].op is layers[2].op
    assert len(list(found.parameters())) == 3
    conv = nn.Sequential(
        nn.Conv2d(1, 3, 3, bias=False),
        nn.ReLU(),
        pool,
        nn.Conv2d(3, 3, 2, bias=False),
        nn.ReLU(),
        pool,
        nn.Conv2d(3, 2, 1, bias=False),
    )
    expected = conv(torch.rand(1, 1, 12, 12)).shape
    assert convert_to_spiking(conv, NEURON)(torch.ones(1, 20, 1, 12, 12)).shape == expected
    tied = nn.Sequential(nn.Linear(5, 5, bias=False), nn.ReLU(), nn.Linear(5, 5, bias=False))
    tied[2].weight = tied[0].weight
    assert len(list(convert_to_spiking(tied, NEURON).parameters())) == 1


def test_what_would_fail_at_the_first_call_is_refused() -> None:
    for flatten in (nn.Flatten(0), nn.Flatten(0, 1), nn.Flatten(2)):
        with pytest.raises(UnsupportedModelError, match=r"nn.Flatten\(1\) alone"):
            convert_to_spiking(nn.Sequential(flatten, nn.Linear(4, 2, bias=False), nn.ReLU()), NEURON)
    pruned = nn.Linear(4, 2, bias=False)
    prune.identity(pruned, "weight")
    with pytest.raises(UnsupportedModelError, match="with hooks"):
        convert_to_spiking(nn.Sequential(pruned, nn.ReLU()), NEURON)
