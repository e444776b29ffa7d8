"""Spiking nets in NIR files: what is written is what fires, and what NIR cannot carry is refused by name."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

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
        (nn.Linear(3, 2), (3,), "There is no SpikingLayer to write"),
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


class _Half(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * x


class _Own(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return self[1](self[0](x) + x)


def _layer(inputs: int = 6, outputs: int = 6, **neuron: Any) -> SpikingLayer:
    op = nn.Linear(inputs, outputs, bias=False)
    nn.init.uniform_(op.weight, 0.0, 0.6)
    return SpikingLayer(op, CubaLIF(8.0, 2.0, 0.5, **neuron))


def test_layers_that_stand_twice_are_written_twice() -> None:
    layer, pool, x = _layer(), SpikingSumPool2d(2, NEURON), _trains(3, 20, 6)
    found = export_nir(nn.Sequential(layer, layer), None, input_shape=(6,), sample=x)
    assert found.is_exact
    assert len(load_nir(found.graph)) == 2
    conv = [SpikingLayer(nn.Conv2d(1, 1, 1, bias=False), CubaLIF(threshold=0.1)) for _ in range(2)]
    for one in conv:
        nn.init.constant_(next(one.parameters()), 1.0)
    net = nn.Sequential(conv[0], pool, conv[1], pool)
    x = torch.ones(2, 30, 1, 8, 8)
    found = export_nir(net, None, input_shape=(1, 8, 8), sample=x)
    assert found.is_exact
    assert load_nir(found.graph)(x).shape == net(x).shape


@pytest.mark.parametrize(
    ("net", "said"),
    [
        (_Own(_layer(), _layer()), "no SpikingLayer to write"),
        (nn.Sequential(_layer(), _Half(), _layer()), "1 is a _Half"),
        (nn.Sequential(_layer(), SpikeCounts(), _layer()), "2 is a"),
        (nn.Sequential(_layer(), PoissonEncoder(9), _layer()), "1 is a PoissonEncoder"),
    ],
)
def test_nets_that_do_something_between_layers_are_refused(net: nn.Module, said: str) -> None:
    with pytest.raises(UnsupportedModelError, match=said):
        export_nir(net, None, input_shape=(6,))


def test_a_module_before_the_first_layer_and_between_layers_is_refused() -> None:
    half = _Half()
    export_nir(nn.Sequential(half, _layer()), None, input_shape=(6,))
    with pytest.raises(UnsupportedModelError, match="2 is a _Half"):
        export_nir(nn.Sequential(half, _layer(), half, _layer()), None, input_shape=(6,))


def test_nothing_is_exact_that_was_not_compared() -> None:
    assert not export_nir(_layer(), None, input_shape=(6,), sample=torch.zeros(2, 20, 6)).is_exact
    for sample in (torch.ones(0, 20, 6), torch.ones(1, 5, 6), torch.ones(1, 4, 6), torch.ones(5, 6)):
        with pytest.raises(ValueError, match=r"sample must be trains .* T > 5"):
            export_nir(_layer(delay=5), None, input_shape=(6,), sample=sample)


def test_weights_that_a_hook_makes_are_those_of_now() -> None:
    layer = _layer()
    prune.identity(layer.op, "weight")
    original = layer.get_parameter("op.weight_orig")
    with torch.no_grad():
        original.add_(1.0)
    graph = export_nir(layer, None, input_shape=(6,)).graph
    np.testing.assert_allclose(graph.nodes["linear_0"].weight, original.detach().numpy())
    hooked = _layer()
    hooked.op.register_forward_hook(lambda *called: 3.0 * called[-1])
    with pytest.raises(UnsupportedModelError, match="forward hooks"):
        export_nir(hooked, None, input_shape=(6,))


def _chain_of(*nodes: Any) -> Any:
    graph = export_nir(_layer(), None, input_shape=(6,)).graph
    graph.edges = [edge for edge in graph.edges if edge[1] != "output"]
    last = "neurons_0"
    for number, node in enumerate(nodes):
        graph.nodes[f"more_{number}"] = node
        graph.edges.append((last, f"more_{number}"))
        last = f"more_{number}"
    graph.edges.append((last, "output"))
    return graph


def test_more_graphs_of_other_kinds_are_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="must end in CubaLIF"):
        load_nir(_chain_of(nir.Delay(np.full(6, 3e-3))))
    graph = export_nir(_layer(), None, input_shape=(6,), delays="nodes").graph
    graph.nodes["delay_0"] = nir.Delay(np.full(6, 0.5e-3))
    with pytest.raises(UnsupportedModelError, match="one whole number of steps"):
        load_nir(graph)
    graph = export_nir(_layer(), None, input_shape=(6,)).graph
    graph.nodes["neurons_0"].v_threshold = np.linspace(1e-9, 9e-9, 6)
    with pytest.raises(UnsupportedModelError, match="different v_threshold"):
        load_nir(graph)
    graph = export_nir(_layer(), None, input_shape=(6,)).graph
    graph.nodes["beside"] = nir.Linear(np.ones((6, 6)))
    graph.edges.append(("beside", "neurons_0"))
    with pytest.raises(UnsupportedModelError, match="'beside' goes into 'neurons_0'"):
        load_nir(graph)
    graph.edges[-1] = ("gone", "neurons_0")
    with pytest.raises(UnsupportedModelError, match="'gone', of which there is no node"):
        load_nir(graph)
    part = nir.Flatten({"input": np.array([2, 3, 4])}, start_dim=1)
    with pytest.raises(UnsupportedModelError, match="some dimensions"):
        load_nir(_chain_of(part))


def test_graphs_without_a_length_of_steps() -> None:
    graph = export_nir(_layer(dt=1e-4), None, input_shape=(6,)).graph
    for metadata in (None, {}, {"dt": None}):
        graph.metadata = metadata
        with pytest.raises(UnsupportedModelError, match=r"Node 'neurons_0', in steps of 0.001 s \(dt\): tau_mem"):
            load_nir(graph)
        (layer,) = load_nir(graph, dt=1e-4)
        assert isinstance(layer, SpikingLayer)
        assert layer.neuron.tau_syn == 2.0


def test_one_neuron_has_no_others() -> None:
    layer = SpikingLayer(_layer(6, 1).op, NEURON, lateral=0.1)
    found = export_nir(layer, None, input_shape=(6,), sample=torch.ones(1, 30, 6))
    assert found.is_exact
