"""Which layers of a model are captured, and which of them share a problem."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from beyondprop.errors import UnsupportedModelError
from beyondprop.nn.reversible import Recomputed, ReversibleSequential
from beyondprop.optim._maps import LayerMap, layer_map, layer_type
from beyondprop.optim._samples import Batch
from beyondprop.optim.matching import Transfer


@dataclass(slots=True, eq=False)
class Call:
    """One forward call of a layer that the backward pass has reached."""

    layer: LayerMap
    x: Tensor  # its input
    x_version: int  # how often `x` had been written to when it was captured
    z: Tensor | None  # its output, None where it is not wanted
    version: int  # the same of `z`
    weights: tuple[Any, ...]  # the state of the weights that made `z`, as of `LayerMap.state`
    batch: Batch  # the forward pass that the call belongs to
    is_inside: bool  # whether that pass ran within a backward pass: a checkpointed block
    gradient: Tensor | None = None  # of the loss in `z`, None where it is not wanted
    follows: Transfer | str | None = None  # what follows it, as of `_graph.find_transfer`, None where nobody asked

    def prepared(self) -> Tensor:
        """Return the input as the layer's methods take it, in the dtype of the weight; what counts tokens as it is."""
        return self.layer.prepare(self.x.to(self.layer.weight.dtype) if self.x.is_floating_point() else self.x)


@dataclass(slots=True, eq=False)
class Unit:
    """Layers that share parameters, mostly one layer: what has a local problem of its own."""

    layers: list[LayerMap]
    parameters: list[nn.Parameter]  # theirs, each once
    calls: dict[Call, None] = field(default_factory=dict)  # since the last step, in the order of the backward pass
    task: int = -1  # the latest backward pass that reached it
    adds: bool = False  # whether that pass adds to a gradient of its parameters

    @property
    def name(self) -> str:
        """The dotted names of its layers."""
        return "+".join(layer.name for layer in self.layers)


def unwrapped(model: nn.Module) -> tuple[nn.Module, dist.ProcessGroup | None]:
    """Return the module inside `DistributedDataParallel` or `torch.compile`, and the process group of the former."""
    group = None
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel):
            model, group = model.module, model.process_group
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model, group


def running_group() -> dist.ProcessGroup | None:
    """Return the process group of the `DistributedDataParallel` whose forward pass runs, if one does."""
    if not (dist.is_available() and dist.is_initialized()):
        return None
    wrapper = nn.parallel.DistributedDataParallel._active_ddp_module
    return None if wrapper is None else wrapper.process_group


def find_layers(root: nn.Module, exclude: tuple[str, ...]) -> list[LayerMap]:
    """Return the layers that are captured, frozen ones among them; raise where one cannot be, naming it."""
    names = [name for name, _ in root.named_modules()]
    for pattern in exclude:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(f"exclude has {pattern!r}, which fits no module of the model; its modules are {names}.")
    layers = []
    inside = {id(m) for a in _attention(root) for m in a.modules()}
    replayed = {id(m): kind for kind, part in _replayed(root) for m in part.modules()}
    for name, module in root.named_modules():
        if layer_type(module) is None or id(module) in inside or any(fnmatchcase(name, pattern) for pattern in exclude):
            continue
        reason = _refusal(module)
        if id(module) in replayed and any(p.requires_grad for p in module.parameters(recurse=False)):
            raise UnsupportedModelError(
                f"Layer {name!r} is inside a {replayed[id(module)]}, which runs it without a graph and once more in the "
                'backward pass: set mode="store" there before this is built (a net by name: `:mode=store`), or pass '
                f"exclude=[{name!r}] to leave it to the base optimizer."
            )
        if reason is None:
            layers.append(layer_map(module, name))  # frozen ones too: they may be thawed later
        elif any(p.requires_grad for p in module.parameters(recurse=False)):
            raise UnsupportedModelError(
                f"Layer {name!r} {reason}. Pass exclude=[{name!r}] to leave it to the base optimizer."
            )
    if not any(p.requires_grad for layer in layers for p in layer.parameters):
        raise ValueError(
            "The model has no trainable Linear, Conv or Embedding layer to capture"
            + (f" besides exclude={list(exclude)}" if exclude else "")
            + "; register_layer makes others known."
        )
    return layers


def _attention(root: nn.Module) -> list[nn.Module]:
    """Return the MultiheadAttentions, whose projections are never called as modules: their parameters count as any others."""
    return [m for m in root.modules() if isinstance(m, nn.MultiheadAttention)]


def left_over(root: nn.Module, others: list[tuple[str, nn.Parameter]], exclude: tuple[str, ...]) -> str | None:
    """Return what to say of trainable weights that are neither captured nor excluded; None where they are few."""
    modules = dict(root.named_modules())
    inside = {id(m): a for a in _attention(root) for m in a.modules()}
    left: Counter[str] = Counter()
    of_kind: dict[str, str] = {}
    for name, p in others:
        path = name.split(".")[:-1]
        places = [".".join(path[:depth]) for depth in range(bool(path), len(path) + 1)]
        if p.requires_grad and not any(fnmatchcase(place, pattern) for place in places for pattern in exclude):
            module = modules[places[-1]]
            kind = type(inside.get(id(module), module)).__name__
            left[kind] += p.numel()
            of_kind.setdefault(kind, places[-1])
    if any(isinstance(p, nn.parameter.UninitializedParameter) for p in root.parameters()):
        return None  # lazy ones that are excluded have no numbers yet
    whole = sum(p.numel() for p in root.parameters() if p.requires_grad)
    if left.total() <= _LARGE * whole:
        return None
    kinds = ", ".join(f"{kind} {count / whole:.0%}" for kind, count in left.most_common(3))
    example = of_kind[left.most_common(1)[0][0]]
    return (
        f"{left.total() / whole:.0%} of the trainable weights are in no layer that is captured, and take steps of the base "
        f"optimizer: those of {kinds}. Where these are linear layers of another package, make them known by register_layer; "
        f"where it is meant, name them in exclude, such as exclude=[{example!r}]."
    )


_LARGE = 0.4  # more than the packed projections of a transformer's blocks


def _replayed(root: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return the parts of a model whose activations are not kept, with their classes' names."""
    parts = [m for m in root.modules() if isinstance(m, ReversibleSequential | Recomputed) and m.mode != "store"]
    return [(type(part).__name__, part) for part in parts]


def _refusal(module: Any) -> str | None:
    for what, p in module.named_parameters(recurse=False):
        if isinstance(p, nn.parameter.UninitializedParameter):
            return "is lazy: run one batch through the model first"
        if not p.is_floating_point():
            return f"has a {what} of {p.dtype}; a real floating-point one is needed"
        if type(p.data) is not Tensor:
            return f"has a {what} of type {type(p.data).__name__}: sharded weights have no local problem"
    if isinstance(module, nn.Embedding) and (module.sparse or module.max_norm is not None or module.scale_grad_by_freq):
        what = "sparse" if module.sparse else "max_norm" if module.max_norm is not None else "scale_grad_by_freq"
        return f"is an Embedding with {what}, of another gradient; build it without"
    return None


def find_units(root: nn.Module, layers: list[LayerMap]) -> list[Unit]:
    """Join layers that share parameters; raise where one shares them with what is not captured."""
    captured = {id(layer.module) for layer in layers}
    homes: dict[nn.Parameter, str] = {}
    for name, module in root.named_modules():
        if id(module) not in captured:
            for where, p in module.named_parameters(name, recurse=False):
                homes.setdefault(p, where)
    units: list[Unit] = []
    for layer in layers:
        for p in layer.parameters:
            if p in homes:
                raise UnsupportedModelError(
                    f"Layer {layer.name!r} shares a parameter with {homes[p]!r}, which is not captured, so its local "
                    f"problem would miss that use. Pass exclude=[{layer.name!r}] to leave it to the base optimizer."
                )
        joined = [unit for unit in units if not set(unit.parameters).isdisjoint(layer.parameters)]
        members = [member for unit in reversed(joined) for member in unit.layers] + [layer]
        units = [unit for unit in units if unit not in joined]
        units.append(Unit(members, list(dict.fromkeys(p for member in members for p in member.parameters))))
    return units
