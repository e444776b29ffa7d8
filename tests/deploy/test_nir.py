"""Spiking nets in NIR files: what is written is what fires, and what NIR cannot carry is refused by name."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from beyondprop.deploy import export_nir, load_nir
from beyondprop.errors import UnsupportedModelError
from beyondprop.nn import CubaLIF, PoissonEncoder, SpikeCounts, SpikingLayer, SpikingSumPool2d

nir: Any = pytest.importorskip("nir", reason="NIR files need the package nir")
NEURON = CubaLIF(tau_mem=16.0, tau_syn=2.0, threshold=1.0)


def _linear(inputs: int, outputs: int) -> nn.Linear:
    op = nn.Linear(inputs, outputs, bias=False)
    nn.init.uniform_(op.weight, -0.3, 0.4)
    return op


def _net(first: CubaLIF = NEURON, second: CubaLIF = NEURON, lateral: float = 0.0) -> nn.Sequential:
    torch.manual_seed(0)
    layers = SpikingLayer(_linear(20, 30), first), SpikingLayer(_linear(30, 10), second, lateral=lateral)
    return nn.Sequential(PoissonEncoder(60), *layers, SpikeCounts())


def _trains(*shape: int) -> Tensor:
    return (torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.3).float()


@pytest.mark.parametrize("delays", ["shift", "nodes"])
@pytest.mark.parametrize("neuron", [NEURON, CubaLIF(7.0, 3.5, 0.4, 0, 3, 2e-3), CubaLIF(5.0, 5.0, 0.7, 0, 0)])
@pytest.mark.parametrize("lateral", [0.0, 0.05])
def test_every_spike_comes_back(tmp_path: Path, delays: str, neuron: CubaLIF, lateral: float) -> None:
    net, x = _net(neuron, neuron, lateral), _trains(6, 60, 20)
    found = export_nir(net, tmp_path / "net.nir", input_shape=(20,), sample=x, delays=delays)
    assert found.is_exact
    assert found.shift == (2 * neuron.delay if delays == "shift" else 0)
    again = load_nir(tmp_path / "net.nir")
    spikes, expected = again(x), net[1:-1](x)
    kept = 60 - found.shift
    assert expected.any()
    assert torch.equal(spikes[:, :kept], expected[:, found.shift :])
    assert found.drift[1].expected == found.drift[1].found == int(expected[:, found.shift :].sum())
    loaded = [layer for layer in again if isinstance(layer, SpikingLayer)]
    assert [layer.lateral for layer in loaded] == [0.0, pytest.approx(lateral)]
    assert loaded[0].neuron.dt == pytest.approx(neuron.dt)
    assert loaded[0].neuron.threshold == pytest.approx(neuron.threshold, abs=1e-6)


def test_pictures_and_pooling_come_back(tmp_path: Path) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(2, 4, 3, stride=2, padding=1, bias=False)
    nn.init.uniform_(conv.weight, -0.2, 0.5)
    mixed = nn.Sequential(nn.AvgPool2d(2), nn.Flatten(1), _linear(16, 9))
    nn.init.uniform_(next(mixed.parameters()), 0.0, 1.0)
    net = nn.Sequential(SpikingLayer(conv, NEURON), SpikingLayer(mixed, NEURON), SpikeCounts())
    x = _trains(3, 40, 2, 8, 8)
    found = export_nir(net, tmp_path / "net.nir", input_shape=(2, 8, 8), sample=x)
    assert found.is_exact
    assert all(layer.found > 0 for layer in found.drift)
    pooled = nn.Sequential(
        SpikingLayer(conv, NEURON),
        SpikingSumPool2d(2, NEURON),
        nn.Flatten(2),
        SpikingLayer(_linear(16, 5), NEURON),
        SpikeCounts(),
    )
    found = export_nir(pooled, None, input_shape=(2, 8, 8), sample=x)
    assert found.is_exact
    assert found.drift[1].found > 0
    assert "3 steps earlier at its end" in str(found)
    row = nn.Sequential(SpikingLayer(nn.Conv1d(2, 3, 3, padding=1, bias=False), CubaLIF(threshold=0.2)))
    assert export_nir(row, None, input_shape=(2, 9), sample=_trains(3, 40, 2, 9)).is_exact


def test_refraction_is_refused_or_its_drift_told(tmp_path: Path) -> None:
    net, x = _net(CubaLIF(threshold=1.0, refractory=2)), _trains(6, 60, 20)
    with pytest.raises(ValueError, match=r"1 has neurons with refractory=2.*allow_lossy=True"):
        export_nir(net, tmp_path / "net.nir", input_shape=(20,))
    assert not (tmp_path / "net.nir").exists()
    found = export_nir(net, tmp_path / "net.nir", input_shape=(20,), sample=x, allow_lossy=True)
    assert not found.is_exact
    first = found.drift[0]
    assert first.found > 1.2 * first.expected > 0
    assert first.differing >= first.found - first.expected
    assert f"{first.found} spikes for {first.expected}, {first.differing} differ" in str(found)


def test_a_file_is_one_of_the_norm(tmp_path: Path) -> None:
    export_nir(_net(), tmp_path / "net.nir", input_shape=(20,))
    graph = nir.read(tmp_path / "net.nir")  # checks the types of all nodes
    neurons = graph.nodes["neurons_0"]
    assert neurons.tau_mem.shape == neurons.v_threshold.shape == neurons.v_reset.shape == (30,)
    np.testing.assert_allclose(neurons.tau_mem, 16e-3, rtol=1e-6)
    np.testing.assert_allclose(neurons.tau_syn, 2e-3, rtol=1e-6)
    np.testing.assert_allclose(neurons.w_in * neurons.r, 16.0, rtol=1e-6)
    assert not export_nir(_net(), None, input_shape=(20,)).is_exact  # nothing was measured


class _Scaled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2.0 * x


@pytest.mark.parametrize(
    ("net", "shape", "said"),
    [
        (nn.Linear(3, 2), (3,), "Linear, of which NIR knows nothing"),
        (nn.Sequential(SpikingLayer(nn.Linear(3, 2, bias=False), NEURON), nn.Dropout()), (3,), "1 is a Dropout"),
        (SpikingLayer(_Scaled(), NEURON), (3,), "no node"),
        (SpikingLayer(nn.Linear(3, 2, bias=False), NEURON), (4, 3), "no node"),
        (SpikingLayer(nn.AvgPool2d(2, padding=1, count_include_pad=False), NEURON), (1, 4, 4), "no node"),
        (
            SpikingLayer(nn.Conv2d(1, 2, 3, padding=1, padding_mode="circular", bias=False), NEURON),
            (1, 4, 4),
            "no node",
        ),
        (SpikingLayer(nn.Conv2d(2, 2, 3, groups=2, bias=False), NEURON), (2, 4, 4), "in one group"),
        (SpikingLayer(nn.Conv2d(2, 2, (3, 1), bias=False), NEURON), (2, 4, 4), "square"),
        (SpikingLayer(nn.Conv1d(2, 2, 1, bias=False), NEURON, lateral=0.1), (2, 3), "inhibits laterally"),
    ],
)
def test_what_nir_cannot_carry_is_refused(tmp_path: Path, net: nn.Module, shape: tuple[int, ...], said: str) -> None:
    with pytest.raises(UnsupportedModelError, match=said):
        export_nir(net, tmp_path / "net.nir", input_shape=shape)
    assert not list(tmp_path.iterdir())


def test_steps_of_two_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="one length dt"):
        export_nir(_net(NEURON, CubaLIF(threshold=1.0, dt=2e-3)), None, input_shape=(20,))
    with pytest.raises(ValueError, match="delays must be one of"):
        export_nir(_net(), None, input_shape=(20,), delays="none")


def _graph() -> Any:
    return copy.deepcopy(export_nir(_net(lateral=0.1), None, input_shape=(20,)).graph)


def _change(graph: Any, name: str, key: str, at: int, value: float) -> Any:
    array = np.array(getattr(graph.nodes[name], key))
    array.flat[at] = value
    setattr(graph.nodes[name], key, array)
    return graph


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda g: _change(g, "neurons_0", "v_threshold", 3, 9.0), "different v_threshold"),
        (lambda g: _change(g, "lateral_1", "weight", 1, 9.0), "inhibit all others alike"),
        (lambda g: g.nodes.update(linear_1=nir.Affine(g.nodes["linear_1"].weight, np.ones(10))), "has no bias"),
        (lambda g: g.nodes.update(linear_1=nir.Threshold(np.ones(30))), "is a Threshold"),
        (lambda g: g.edges.append(("neurons_0", "output")), "goes on to 2 nodes"),
        (lambda g: g.nodes.update(other=nir.Input({"input": np.array([3])})), "one input, got 2"),
        (lambda g: g.nodes["neurons_0"].v_reset.fill(0.5), "v_reset must be 0"),
        (lambda g: g.nodes["neurons_0"].r.fill(-1.0), "must be > 0"),
    ],
)
def test_graphs_of_other_kinds_are_refused(change: Any, said: str) -> None:
    graph = _graph()
    change(graph)
    with pytest.raises(UnsupportedModelError, match=said):
        load_nir(graph)


def test_membranes_in_other_units_are_the_same_neurons() -> None:
    graph, x = _graph(), _trains(4, 40, 20)
    expected = load_nir(graph)(x)
    node = graph.nodes["neurons_0"]
    node.w_in, node.r, node.v_threshold = node.w_in * 3, node.r / 2, node.v_threshold * 1.5
    assert torch.equal(load_nir(graph)(x), expected)
    assert expected.any()


def test_norse_fires_the_same_spikes(tmp_path: Path) -> None:
    norse: Any = pytest.importorskip("norse.torch", reason="Norse is a peer: the benchmarks' extra has it")
    net, x = _net(), _trains(8, 100, 20)
    found = export_nir(net, tmp_path / "net.nir", input_shape=(20,))
    module, state, spikes = norse.from_nir(nir.read(tmp_path / "net.nir")), None, []
    for t in range(100):
        out, state = module(x[:, t], state)
        spikes.append(out.detach())
    expected = net[1:-1](x)
    assert expected.any()
    assert torch.equal(torch.stack(spikes, 1)[:, : 100 - found.shift], expected[:, found.shift :])
