"""What holds for every registered network."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from cases import ADAM, equal
from torch import Tensor, nn

from beyondprop import AltMin, Backprop
from beyondprop.lab import nets, registry

# name: form, input shape, outputs
EXAMPLES: dict[str, tuple[str, tuple[int, ...], int]] = {
    "mlp": ("mlp:16x2:bn", (1, 8, 8), 4),
    "lenet5": ("lenet5", (1, 28, 28), 4),
    "conv": ("conv:4x3:bn", (3, 16, 16), 4),
    "binary": ("binary:16x2:dropout=0.1", (1, 8, 8), 4),
    "rnn": ("rnn:8:gru", (6, 5), 4),
    "transformer": ("transformer:32x1:patch=4", (1, 8, 8), 4),
    "resnet": ("resnet8", (3, 8, 8), 4),
    "revnet": ("revnet14", (3, 8, 8), 4),
    "revtransformer": ("revtransformer:32x1:patch=4", (1, 8, 8), 4),
    "autoencoder": ("autoencoder", (1, 8, 8), 64),
    "blackbox": ("blackbox:8", (1, 8, 8), 4),
    "spiking": ("spiking:8:surrogate:events", (31, 2, 5, 5), 4),
}
every_net = pytest.mark.parametrize("name", list(EXAMPLES))


def _net(name: str, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nets.build(*EXAMPLES[name])


def _batch(name: str, rows: int = 6) -> tuple[Tensor, Any]:
    _, shape, outputs = EXAMPLES[name]
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(rows, *shape, generator=generator)
    if outputs != 4:
        return x, torch.rand(rows, outputs, generator=generator)
    return x, torch.arange(rows) % outputs


def _loss(name: str) -> nn.Module:
    return nn.CrossEntropyLoss() if EXAMPLES[name][2] == 4 else nn.MSELoss()


def test_every_registered_net_is_here() -> None:
    registry.nets.names()
    built_in = [spec.name for spec in registry.nets if spec.build.__module__.startswith("beyondprop.")]
    assert sorted(built_in) == sorted(EXAMPLES)


@every_net
def test_weights_come_from_the_global_seed_alone(name: str) -> None:
    first, second, other = (_net(name, seed).state_dict() for seed in (0, 0, 1))
    assert equal(first, second)
    assert not equal(first, other)
    before = copy.deepcopy(first)
    nets.build(*EXAMPLES[name])  # shares nothing with one that was built before
    assert equal(first, before)


@every_net
def test_an_output_for_every_row_of_any_batch(name: str) -> None:
    model = _net(name).eval()
    for rows in (1, 2, 7):
        assert model(_batch(name, rows)[0]).shape == (rows, EXAMPLES[name][2])
    x, _ = _batch(name, 7)
    torch.testing.assert_close(model(x)[2:5], model(x[2:5]), rtol=1e-4, atol=1e-5)  # no row knows another


@every_net
@pytest.mark.parametrize("rule", [Backprop, AltMin])
def test_it_trains(name: str, rule: Any) -> None:
    trained = rule(_net(name), _loss(name), ADAM)
    torch.manual_seed(3)
    losses = [float(trained.step(*_batch(name)).loss) for _ in range(30)]
    assert sum(losses[-3:]) < sum(losses[:3])
    assert all(p.grad is None for p in trained.model.parameters())


@every_net
def test_it_is_copied_pickled_and_restored(name: str) -> None:
    model = _net(name).eval()
    x, _ = _batch(name)
    fresh = _net(name, seed=5).eval()
    fresh.load_state_dict(model.state_dict())
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), fresh):
        assert torch.equal(model(x), other(x))


@every_net
def test_what_is_wrong_with_a_form_is_named(name: str) -> None:
    form, shape, outputs = EXAMPLES[name]
    with pytest.raises(ValueError, match="nonsense"):
        nets.build(f"{form}:nonsense", shape, outputs)
    spec = registry.nets.get(name)
    assert spec.form.startswith(name)
    assert spec.summary
