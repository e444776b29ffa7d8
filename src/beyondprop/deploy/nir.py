"""Spiking nets to files of the Neuromorphic Intermediate Representation, which other simulators and chips read, and back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from beyondprop import _checks
from beyondprop.deploy._nodes import delay_of, lateral_of, linear_node, module_of, neuron_node, neuron_of, parts
from beyondprop.errors import UnsupportedModelError
from beyondprop.nn.spiking import SpikeCounts, SpikingLayer

DELAYS = ("shift", "nodes")


@dataclass(frozen=True)
class LayerDrift:
    """What a layer fires in the file's network, beside what it fires here.

    Attributes:
        name: of the layer.
        shift: steps by which the file's network is earlier.
        expected: spikes here, in the steps that both have.
        found: spikes in the file's network.
        differing: neurons and steps in which one fires and the other does not.
    """

    name: str
    shift: int
    expected: int
    found: int
    differing: int

    def __str__(self) -> str:
        return f"{self.name}: {self.found} spikes for {self.expected}, {self.differing} differ"


@dataclass(frozen=True)
class NIRExport:
    """What was written.

    Attributes:
        path: the file; None if none was.
        graph: the `nir.NIRGraph`, as it was read back from the file.
        shift: steps by which the file's network is earlier than this one at its end.
        drift: layer by layer, of the sample; empty without one.
    """

    path: Path | None
    graph: Any
    shift: int
    drift: tuple[LayerDrift, ...]

    @property
    def is_exact(self) -> bool:
        """Whether every spike of the sample is the same; False without a sample, and where nothing fires."""
        return any(layer.expected for layer in self.drift) and not any(layer.differing for layer in self.drift)

    def __str__(self) -> str:
        told = [f"{self.path or 'a graph'} of {len(self.graph.nodes)} nodes, {self.shift} steps earlier at its end"]
        return "\n".join([*told, *map(str, self.drift)])


def export_nir(
    net: nn.Module,
    path: str | Path | None,
    *,
    input_shape: Sequence[int],
    sample: Tensor | None = None,
    delays: str = "shift",
    allow_lossy: bool = False,
) -> NIRExport:
    """Write the spiking layers of a net to a NIR file, read it back, and compare what both fire.

    What makes trains of numbers stays behind: encoders, and everything before the first spiking layer; and so does the count.
    Lateral inhibition becomes a recurrent connection, which arrives a step later in every simulator of steps.

    Args:
        net: a `SpikingLayer`, or `nn.Sequential`s with such layers in them, `nn.Flatten(2)` between them, and `SpikeCounts`.
        path: of the file, which is replaced; None: no file, the graph alone.
        input_shape: of one step of one sample into the first spiking layer.
        sample: trains `(N, T, *input_shape)` to measure the drift on.
        delays: `"shift"` leaves a layer's delay out, so that it fires so many steps earlier; `"nodes"` writes it as a Delay, of
            which not every reader knows.
        allow_lossy: write neurons with refraction, which NIR does not have, as neurons without.

    Raises:
        ModuleNotFoundError: without the package `nir`.
        UnsupportedModelError: for what NIR has no node for, by its name.
        ValueError: for neurons with refraction, unless that is allowed; for neurons with steps of different lengths.
    """
    nir = _nir()
    _checks.one_of("delays", delays, DELAYS)
    layers = list(_layers(net))
    if len({layer.neuron.dt for _, layer, _ in layers}) > 1:
        raise ValueError("All neurons must have steps of one length dt.")
    for name, layer, _ in layers:
        if layer.neuron.refractory and not allow_lossy:
            raise ValueError(
                f"{name} has neurons with refractory={layer.neuron.refractory}, and NIR has no refraction: they would fire "
                "more often. Train with refractory=0, or pass allow_lossy=True, and a sample to see what it does."
            )
    shift = sum(_shift(layer, delays) for _, layer, _ in layers)
    if sample is not None and (sample.ndim < 3 or not len(sample) or sample.shape[1] <= shift):
        raise ValueError(
            f"sample must be trains (N, T, ...), N >= 1 and T > {shift}, the steps by which the file's network is earlier, got "
            f"{tuple(sample.shape)}."
        )
    graph = _graph(nir, layers, tuple(int(n) for n in input_shape), delays)
    if path is not None:
        path = Path(path)
        nir.write(path, graph)
        graph = nir.read(path)
    drift = () if sample is None else _drift(layers, _network(nir, graph, None), sample)
    return NIRExport(path, graph, shift, drift)


def load_nir(source: str | Path | Any, *, dt: float | None = None) -> nn.Sequential:
    """Return spiking layers from a NIR file, or a `nir.NIRGraph`: one path of linear nodes and CubaLIF nodes.

    Trains `(N, T, ...)` go in, and spikes `(N, T, ...)` come out.

    Args:
        source: the file, or the graph.
        dt: length of a step in seconds; None: that of the graph's metadata, and 1 ms where it has none.

    Raises:
        ModuleNotFoundError: without the package `nir`.
        UnsupportedModelError: for nodes that are none of ours, neurons of one node that differ, and graphs that branch.
    """
    nir = _nir()
    return _network(nir, nir.read(source) if isinstance(source, str | Path) else source, dt)


def _nir() -> ModuleType:
    try:
        import nir
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("NIR files need the package nir: pip install 'beyondprop[nir]'.") from error
    return nir


def _layers(net: nn.Module) -> Iterator[tuple[str, SpikingLayer, bool]]:
    """Yield the spiking layers by name, and whether the spikes are flattened before each."""
    flattens = has_begun = has_ended = False
    for key, module in _chain(net, ""):
        name = key or "net"
        if isinstance(module, SpikingLayer) and not has_ended:
            yield name, module, flattens
            flattens, has_begun = False, True
        elif isinstance(module, SpikeCounts):
            has_ended = has_begun
        elif type(module) is nn.Flatten and (module.start_dim, module.end_dim) == (2, -1) and not has_ended:
            flattens = True
        elif not isinstance(module, nn.Identity) and has_begun:
            raise UnsupportedModelError(
                f"{name} is a {type(module).__name__}, of which NIR knows nothing there; SpikingLayer, nn.Flatten(2) and, at "
                "the end, SpikeCounts are written, and what is before the first spiking layer stays behind."
            )


def _chain(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
    if isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward:
        for key, child in module._modules.items():  # all of them: a pool may stand at several places
            if child is not None:
                yield from _chain(child, f"{name}.{key}" if name else key)
    else:
        yield name, module


def _shift(layer: SpikingLayer, delays: str) -> int:
    return layer.neuron.delay if delays == "shift" else 0


def _graph(nir: Any, layers: list[tuple[str, SpikingLayer, bool]], shape: tuple[int, ...], delays: str) -> Any:
    if not layers:
        raise UnsupportedModelError("There is no SpikingLayer to write in what is an nn.Sequential, or is one itself.")
    nodes: dict[str, Any] = {"input": nir.Input({"input": np.array(shape)})}
    edges: list[tuple[str, str]] = []
    last = "input"

    def add(name: str, node: Any) -> None:
        nonlocal last
        nodes[name] = node
        edges.append((last, name))
        last = name

    for number, (name, layer, flattens) in enumerate(layers):
        modules = [nn.Flatten(1)] if flattens and len(shape) > 1 else []
        for position, module in enumerate([*modules, *parts(layer.op)]):
            with torch.no_grad():  # called first: a hook may make its weight, as pruning does
                like = next((p for p in module.parameters()), torch.zeros(()))
                following = tuple(module(torch.zeros(1, *shape, dtype=like.dtype, device=like.device)).shape[1:])
            add(f"linear_{number}" + (f"_{position}" if position else ""), linear_node(nir, module, shape, name))
            shape = following
        neuron = layer.neuron
        if delays == "nodes" and neuron.delay:
            add(f"delay_{number}", nir.Delay(np.full(shape, neuron.delay * neuron.dt, dtype=np.float32)))
        add(f"neurons_{number}", neuron_node(nir, neuron, shape))
        if layer.lateral and shape != (1,):  # one neuron has no others
            if len(shape) != 1:
                raise UnsupportedModelError(
                    f"{name} inhibits laterally neurons of shape {shape}; NIR has that for rows alone."
                )
            weight = (layer.lateral * (np.eye(shape[0]) - 1.0)).astype(np.float32)
            nodes[f"lateral_{number}"] = nir.Linear(weight=weight)
            edges += [(last, f"lateral_{number}"), (f"lateral_{number}", last)]
    add("output", nir.Output({"output": np.array(shape)}))
    metadata = {"dt": layers[0][1].neuron.dt, "made_by": "beyondprop"}
    return nir.NIRGraph(nodes, edges, metadata)


def _network(nir: Any, graph: Any, dt: float | None) -> nn.Sequential:
    if strange := {name for edge in graph.edges for name in edge} - set(graph.nodes):
        raise UnsupportedModelError(f"An edge names {sorted(strange)[0]!r}, of which there is no node.")
    following: dict[str, list[str]] = {name: [] for name in graph.nodes}
    coming: dict[str, list[str]] = {name: [] for name in graph.nodes}
    for source, target in graph.edges:
        following[source].append(target)
        coming[target].append(source)
    names = [name for name, node in graph.nodes.items() if isinstance(node, nir.Input)]
    if len(names) != 1:
        raise UnsupportedModelError(f"A graph must have one input, got {len(names)}.")
    step = float(dt if dt is not None else (graph.metadata or {}).get("dt") or 1e-3)
    layers: list[nn.Module] = []
    linear: list[nn.Module] = []
    name, delay, seen = names[0], 0, set[str]()
    while not isinstance(node := graph.nodes[name], nir.Output):
        if name in seen:
            raise UnsupportedModelError(f"Node {name!r} is in a cycle that is no lateral inhibition.")
        seen.add(name)
        back = [one for one in following[name] if name in following[one]] if isinstance(node, nir.CubaLIF) else []
        targets = [one for one in following[name] if one not in back]
        if isinstance(node, nir.CubaLIF):
            lateral = sum(_lateral(graph, one, following[one] == [name]) for one in back)
            op = linear[0] if len(linear) == 1 else nn.Sequential(*linear)
            layers.append(SpikingLayer(op, neuron_of(node, name, step, delay), lateral=lateral))
            linear, delay = [], 0
        elif isinstance(node, nir.Delay):
            delay += delay_of(node, name, step)
        elif not isinstance(node, nir.Input):
            linear.append(module_of(nir, node, name))
        if len(targets) != 1:
            raise UnsupportedModelError(f"Node {name!r} goes on to {len(targets)} nodes; one path alone is supported.")
        (name,) = targets
        if others := [one for one in coming[name] if one not in seen and name not in coming[one]]:
            raise UnsupportedModelError(
                f"Node {others[0]!r} goes into {name!r} beside the path from the input; one alone is supported."
            )
    if linear or delay or not layers:
        raise UnsupportedModelError("The graph must end in CubaLIF neurons.")
    return nn.Sequential(*layers)


def _lateral(graph: Any, name: str, returns: bool) -> float:
    strength = lateral_of(getattr(graph.nodes[name], "weight", np.zeros(0)))
    if strength is None or not returns:
        raise UnsupportedModelError(f"Node {name!r}: a recurrent connection must inhibit all others alike.")
    return strength


@torch.no_grad()
def _drift(
    layers: list[tuple[str, SpikingLayer, bool]], other: nn.Sequential, sample: Tensor
) -> tuple[LayerDrift, ...]:
    found: list[LayerDrift] = []
    here, there, shift = sample, sample.to(torch.float32), 0
    other.to(sample.device)
    for (name, layer, flattens), twin in zip(layers, other, strict=True):
        here = layer(here.flatten(2) if flattens else here)
        there = twin(there)
        assert isinstance(twin, SpikingLayer)
        shift += layer.neuron.delay - twin.neuron.delay
        ours, theirs = here[:, shift:] != 0, there[:, : there.shape[1] - shift] != 0
        theirs = theirs.view(ours.shape)
        found.append(LayerDrift(name, shift, int(ours.sum()), int(theirs.sum()), int((ours != theirs).sum())))
    return tuple(found)
