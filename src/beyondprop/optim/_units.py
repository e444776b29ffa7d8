"""Which layers of a model are captured, and which of them share a problem."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

from beyondprop.errors import UnsupportedModelError
from beyondprop.optim._maps import LAYERS, LayerMap, layer_map


@dataclass(slots=True, eq=False)
class Batch:
    """One forward pass of the whole model: how many samples it had."""

    samples: int


@dataclass(slots=True, eq=False)
class Call:
    """One forward call of a layer that the backward pass has reached.

    Attributes:
        layer: the layer that was called.
        x: its input.
        x_version: how often `x` had been written to when it was captured.
        z: its output, None where it is not wanted.
        version: the same of `z`.
        gradient: of the loss in `z`, None where it is not wanted.
        batch: the forward pass that the call belongs to.
    """

    layer: Layer
    x: Tensor
    x_version: int
    z: Tensor | None
    version: int
    gradient: Tensor | None
    batch: Batch


@dataclass(slots=True, eq=False)
class Layer:
    """A captured module, and the parameters that it had then."""

    name: str
    map: LayerMap
    parameters: list[nn.Parameter]

    @property
    def module(self) -> Any:
        """The module itself."""
        return self.map.module


@dataclass(slots=True, eq=False)
class Unit:
    """Layers that share parameters, mostly one layer: what has a local problem of its own.

    Attributes:
        layers: its layers.
        parameters: theirs, each once.
        calls: calls since the last step.
    """

    layers: list[Layer]
    parameters: list[nn.Parameter]
    calls: list[Call] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The dotted names of its layers."""
        return "+".join(layer.name for layer in self.layers)


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the module inside `DistributedDataParallel` or `torch.compile`."""
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model


def uncaptured(model: nn.Module, units: Iterable[Unit]) -> list[tuple[str, nn.Parameter]]:
    """Return the parameters that belong to no unit, with their names."""
    taken = {p for unit in units for p in unit.parameters}
    return [(n, p) for n, p in unwrapped(model).named_parameters() if p not in taken]


def find_layers(root: nn.Module, exclude: tuple[str, ...]) -> list[Layer]:
    """Return the layers that are captured, frozen ones among them; raise where one cannot be, naming it."""
    names = [name for name, _ in root.named_modules()]
    for pattern in exclude:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(f"exclude has {pattern!r}, which fits no module of the model; its modules are {names}.")
    layers = []
    # The projections of MultiheadAttention are never called as modules; its parameters count as any others.
    inside = {id(m) for a in root.modules() if isinstance(a, nn.MultiheadAttention) for m in a.modules()}
    for name, module in root.named_modules():
        if not _is_layer(module) or id(module) in inside or any(fnmatchcase(name, pattern) for pattern in exclude):
            continue
        trains = any(p.requires_grad for p in module.parameters(recurse=False))
        try:
            _refuse(name, module)
        except UnsupportedModelError:
            if trains:
                raise
            continue
        # Frozen ones too: they may be thawed later.
        layers.append(Layer(name, layer_map(module), list(module.parameters(recurse=False))))
    if not any(p.requires_grad for layer in layers for p in layer.parameters):
        raise ValueError(
            "The model has no trainable Linear, Conv or Embedding layer to capture"
            + (f" besides exclude={list(exclude)}." if exclude else ".")
        )
    return layers


def _is_layer(module: nn.Module) -> bool:
    # A subclass with a forward of its own may do anything with its weight; a parametrized weight is no parameter.
    own = next((kind for kind in LAYERS if isinstance(module, kind)), None)
    if own is None or type(module).forward is not own.forward:
        return False
    return isinstance(module._parameters.get("weight"), nn.Parameter)


def _refuse(name: str, module: Any) -> None:
    out = f"Pass exclude=[{name!r}] to leave it to the base optimizer."
    for what, p in module.named_parameters(recurse=False):
        if isinstance(p, nn.parameter.UninitializedParameter):
            raise UnsupportedModelError(f"Layer {name!r} is lazy: run one batch through the model first.")
        if not p.is_floating_point():
            raise UnsupportedModelError(
                f"Layer {name!r} has a {what} of {p.dtype}; a real floating-point one is needed. {out}"
            )
        if type(p.data) is not Tensor:
            raise UnsupportedModelError(
                f"Layer {name!r} has a {what} of type {type(p.data).__name__}: sharded weights have no local problem. {out}"
            )
    if isinstance(module, nn.Embedding) and (module.sparse or module.max_norm is not None or module.scale_grad_by_freq):
        what = "sparse" if module.sparse else "max_norm" if module.max_norm is not None else "scale_grad_by_freq"
        raise UnsupportedModelError(f"Layer {name!r} is an Embedding with {what}, which is not supported. {out}")


def find_units(root: nn.Module, layers: list[Layer]) -> list[Unit]:
    """Join layers that share parameters; raise where one shares them with what is not captured."""
    captured = {id(layer.module) for layer in layers}
    homes: dict[nn.Parameter, list[str]] = {}
    for name, module in root.named_modules(remove_duplicate=True):
        for what, p in module.named_parameters(recurse=False):
            if id(module) not in captured:
                homes.setdefault(p, []).append(f"{name}.{what}" if name else what)
    units: list[Unit] = []
    for layer in layers:
        for p in layer.parameters:
            if p in homes:
                raise UnsupportedModelError(
                    f"Layer {layer.name!r} shares a parameter with {homes[p][0]!r}, which is not captured, so its local "
                    f"problem would miss that use. Pass exclude=[{layer.name!r}] to leave it to the base optimizer."
                )
        own = {id(p) for p in layer.parameters}
        joined = [unit for unit in units if any(id(p) in own for p in unit.parameters)]
        merged = Unit([layer], [])
        for unit in joined:
            merged.layers = unit.layers + merged.layers
            units.remove(unit)
        for member in merged.layers:
            merged.parameters += [p for p in member.parameters if not any(p is q for q in merged.parameters)]
        units.append(merged)
    return units
