"""What a backward pass leaves behind of every layer with weights: its inputs, its outputs, the gradient at its outputs."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.utils.hooks import RemovableHandle

from beyondprop.errors import NonFiniteError, UnsupportedModelError
from beyondprop.optim._maps import LayerMap
from beyondprop.optim._units import Batch, Call, find_layers, find_units, unwrapped


class Capture:
    """Records the calls of a model's Linear, Conv and Embedding layers through hooks, from `attach` on.

    A forward hook leaves the call with the autograd graph; when the gradient of the layer's output arrives there, the call is
    put on its unit's list. Whatever is never differentiated (evaluation, `no_grad`, the first pass of a checkpointed block)
    vanishes with its graph.

    Args:
        model: any module; a `DistributedDataParallel` is looked into.
        exclude: names of modules, or patterns such as `"head.*"`, that are left alone.

    Attributes:
        output_layers: names of layers of which outputs are wanted, too.
        gradients: whether the gradients at outputs are wanted.
        root: the module inside wrappers.
        group: process group whose ranks have parts of the batch.
        others: names and parameters that are not captured.
    """

    def __init__(self, model: nn.Module, exclude: Iterable[str] = ()) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}.")
        self.gradients = False
        self.output_layers: set[str] = set()
        self.on_start: Callable[[], None] | None = None
        self.on_arrival: Callable[[LayerMap], None] | None = None
        self.nodes: dict[str, list[Any]] = {}  # autograd nodes of outputs, for as long as `watched` has the layer
        self.watched: set[str] = set()
        self.root, self.group = unwrapped(model)
        self.layers = find_layers(self.root, tuple(exclude))
        self.units = find_units(self.root, self.layers)
        self._unit_of = {layer.name: unit for unit in self.units for layer in unit.layers}
        taken = {p for unit in self.units for p in unit.parameters}
        self.others = [(name, p) for name, p in self.root.named_parameters() if p not in taken]
        self._batch: Batch | None = None
        self._last: Batch | None = None
        self._handles: list[RemovableHandle] = []

    def attach(self) -> None:
        """Install the hooks."""
        whole: Any = _Hook(self, None)
        self._handles.append(self.root.register_forward_pre_hook(whole, with_kwargs=True))
        self._handles.append(self.root.register_forward_hook(whole, with_kwargs=True))
        for layer in self.layers:
            self._handles.append(layer.module.register_forward_hook(_Hook(self, layer), with_kwargs=True))

    def __deepcopy__(self, memo: dict[int, Any]) -> Capture:
        # The copied modules carry inert hooks; they get live ones of their own. Calls belong to the graph of the original.
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        own: dict[str, Any] = {"_handles": [], "nodes": {}, "_batch": None, "_last": None, "group": self.group}
        new.__dict__.update({k: copy.deepcopy(v, memo) for k, v in self.__dict__.items() if k not in own} | own)
        for unit in new.units:
            unit.calls.clear()
        if self._handles:
            new.attach()
        return new

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError("What has hooks on a model cannot be pickled; save its state_dict().")

    def remove(self) -> None:
        """Take the hooks off and forget what was captured."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.clear()

    def clear(self) -> None:
        """Forget the captured calls."""
        for unit in self.units:
            unit.calls.clear()
        self.nodes.clear()

    def start(self, arguments: Any) -> None:
        """Note that the model is called."""
        if not torch.is_grad_enabled() or _in_backward():
            return
        if self.on_start is not None:
            self.on_start()
        self.nodes.clear()  # of a pass that was never differentiated
        first = _first_tensor(arguments)
        self._batch = self._last = None if first is None else Batch(first.shape[0])
        gradients = [p.grad for unit in self.units if unit.calls for p in unit.parameters if p.grad is not None]
        if not any(bool(g.any()) for g in gradients):
            self.clear()  # of a step that was skipped: its gradients have been thrown away

    def record(self, layer: LayerMap, x: Any, z: Any) -> Tensor | None:
        """Leave one call with the graph of its output; return the output that takes its place."""
        if not (torch.is_grad_enabled() and isinstance(z, Tensor) and z.requires_grad and isinstance(x, Tensor)):
            return None
        if not any(p.requires_grad for p in layer.parameters):
            return None
        unit = self._unit_of[layer.name]
        inside = _in_backward()  # a checkpointed block runs again there
        if unit.calls and not inside and all(p.grad is None for p in unit.parameters):
            unit.calls.clear()
        if z._is_view():
            # An in-place operation on a view rewires the graph and loses the hook; on a tensor of its own it does not.
            z = torch.ops.aten._unsafe_view(z, z.shape)
        if layer.name in self.watched:
            self.nodes.setdefault(layer.name, []).append(z.grad_fn)
            del self.nodes[layer.name][:-_NODES]
        kept = z.detach() if layer.name in self.output_layers else None
        batch = self._batch or (self._last if inside else None) or Batch(x.shape[0] if x.ndim else 1)
        call = Call(layer, x.detach(), x._version, kept, z._version, batch)
        alive = weakref.ref(self)

        def arrive(gradient: Tensor) -> None:
            capture = alive()
            if capture is None:
                return
            if capture.on_arrival is not None and layer.name in capture.watched:
                capture.on_arrival(layer)
            if capture.gradients:
                call.gradient = gradient.detach()
            unit.calls.append(call)

        z.register_hook(arrive)
        return z

    def check(self) -> None:
        """Raise `NonFiniteError` or `UnsupportedModelError` unless all gradients can be used; nothing has been changed then."""
        named = [(unit.name, p) for unit in self.units for p in unit.parameters]
        for name, p in named:
            if p.grad is not None and p.grad.layout is not torch.strided:
                raise UnsupportedModelError(
                    f"The gradient of {name!r} is sparse; dense ones are needed. Build its Embedding with sparse=False."
                )
        named += self.others
        # A sum is finite if its terms are, but for an overflow, which is as bad.
        sums = [_sum(p.grad) for _, p in named if p.grad is not None]
        for unit in self.units:
            for layer in unit.layers:
                if layer.module._parameters.get("weight") is not layer.weight:
                    raise UnsupportedModelError(
                        f"The weight of layer {layer.name!r} is no longer the parameter that it was: it was replaced, pruned "
                        "or parametrized. Build the optimizer after that."
                    )
            for call in unit.calls:
                if call.x._version != call.x_version:
                    raise UnsupportedModelError(
                        f"The input of layer {call.layer.name!r} was written over between the forward pass and step(). Give "
                        "the model a copy of a buffer that is used again."
                    )
            if unit.calls or self.group is not None:  # in a group, all calls may be other ranks'
                continue
            if any(p.grad is not None and bool(p.grad.any()) for p in unit.parameters):
                raise UnsupportedModelError(
                    f"Layer {unit.name!r} has a gradient, but none of its forward calls was captured since the last step: "
                    "its weight was used directly, its output was not part of the backward pass, or the model was "
                    f"compiled before the hooks were there. Pass exclude=[{unit.layers[0].name!r}], or build this before "
                    "the first forward pass."
                )
        if sums and not bool(torch.stack([s.to(sums[0]) for s in sums]).sum().isfinite()):
            where = next((n for n, p in named if p.grad is not None and not bool(_sum(p.grad).isfinite())), "a sum")
            raise NonFiniteError(
                f"The gradient of {where!r} is not finite. No weight was changed. Check the inputs or lower the learning rate.",
                where=where,
            )


_NODES = 64  # calls of a layer in one pass that its transfer function is looked for behind


class _Hook:
    """A forward hook that does not keep its capture alive and is inert in copies of the model."""

    def __init__(self, capture: Capture | None, layer: LayerMap | None) -> None:
        self.capture = None if capture is None else weakref.ref(capture)
        self.layer = layer

    # torch.compiler.disable, but for what torch.optim has in its place: that loads the compiler, a second's work, not here but
    # at the first call. By then torch.optim has done so.
    @_disable_dynamo
    def __call__(self, module: nn.Module, *arguments: Any) -> Any:
        capture = None if self.capture is None else self.capture()
        if capture is None:
            return None
        if self.layer is not None:
            positional, named, output = arguments
            return capture.record(self.layer, positional[0] if positional else named.get("input"), output)
        if len(arguments) == 2:
            capture.start(arguments)
        else:
            capture._batch = None  # the model's call is over
        return None

    def __reduce__(self) -> Any:  # copying asks for it, too
        return _Hook, (None, None)


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


def _first_tensor(value: Any) -> Tensor | None:
    """Return the first tensor with a batch dimension in nested arguments."""
    if isinstance(value, Tensor):
        return value if value.ndim else None
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    return next((found for part in parts if (found := _first_tensor(part)) is not None), None)


def _sum(gradient: Tensor) -> Tensor:
    if gradient.layout is not torch.strided:
        gradient = gradient.coalesce().values()
    return torch.view_as_real(gradient).sum() if gradient.is_complex() else gradient.sum()
