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
from beyondprop.nn.functional import check_ranks
from beyondprop.optim._local import total
from beyondprop.optim._maps import LayerMap
from beyondprop.optim._units import Batch, Call, find_layers, find_units, running_group, unwrapped


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
        watched: names of layers of which `on_arrival` is told.
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
        self.on_arrival: Callable[[Call], None] | None = None
        self.watched: set[str] = set()
        self.root, self.group = unwrapped(model)
        self.layers = find_layers(self.root, tuple(exclude))
        self.units = find_units(self.root, self.layers)
        self._unit_of = {layer.name: unit for unit in self.units for layer in unit.layers}
        taken = {p for unit in self.units for p in unit.parameters}
        self.others = [(name, p) for name, p in self.root.named_parameters() if p not in taken]
        self._batch: Batch | None = None
        self._last: Batch | None = None
        self._task = -1  # the latest backward pass
        self._accumulators: dict[nn.Parameter, Any] = {}  # the autograd nodes that add to `.grad`
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
        own: dict[str, Any] = {"_handles": [], "_accumulators": {}, "_batch": None, "_last": None, "group": self.group}
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

    def start(self, arguments: Any) -> None:
        """Note that the model is called."""
        if not torch.is_grad_enabled() or _in_backward():
            return
        if self.group is None:  # launchers wrap the model after the optimizer was built
            self.group = running_group()
        if self.on_start is not None:
            self.on_start()
        first = _first_tensor(arguments)
        self._batch = self._last = None if first is None else Batch(first.shape[0])
        self._drop_stale()

    def _drop_stale(self) -> None:
        """Forget the calls of a step that was skipped: those whose gradients have been thrown away."""
        pending = [unit for unit in self.units if unit.calls]
        for unit in pending:
            if all(p.grad is None for p in unit.parameters):
                unit.calls.clear()
        if not any(p.grad is not None and bool(p.grad.any()) for unit in pending for p in unit.parameters):
            for unit in pending:
                unit.calls.clear()

    def record(self, layer: LayerMap, x: Any, z: Any) -> Tensor | None:
        """Leave one call with the graph of its output; return the output that takes its place."""
        if not (torch.is_grad_enabled() and isinstance(z, Tensor) and z.requires_grad and isinstance(x, Tensor)):
            return None
        if not any(p.requires_grad for p in layer.parameters):
            return None
        inside = _in_backward()  # a checkpointed block runs again there
        if z._is_view():
            # An in-place operation on a view rewires the graph and loses the hook; on a tensor of its own it does not.
            z = torch.ops.aten._unsafe_view(z, z.shape)
        kept, weights = (z.detach(), layer.state()) if layer.name in self.output_layers else (None, ())
        batch = self._batch or (self._last if inside else None) or Batch(x.shape[0] if x.ndim else 1)
        call = Call(layer, x.detach(), x._version, kept, z._version, weights, batch, inside)
        alive = weakref.ref(self)

        def arrive(gradient: Tensor) -> None:
            capture = alive()
            if capture is not None:
                capture._arrive(call, gradient)

        z.register_hook(arrive)
        return z

    def _arrive(self, call: Call, gradient: Tensor) -> None:
        """Put a call on its unit's list, once; what only looks, such as `torch.autograd.grad`, has no effect."""
        name = call.layer.name
        if torch.is_grad_enabled():
            raise UnsupportedModelError(
                f"A backward pass with create_graph=True reached layer {name!r}: what is differentiated twice uses its "
                "weight besides its forward call. Differentiate without it, or a copy of the model."
            )
        unit, task = self._unit_of[name], torch._C._current_graph_task_id()
        if task != self._task and not call.is_inside:  # passes within passes do not begin a new one
            self._task = task
            self._drop_stale()
        if task != unit.task:
            unit.task = task
            unit.adds = any(p.requires_grad and self._adds_to(p) for p in unit.parameters)
        if not unit.adds:
            return
        known = call in unit.calls
        if self.gradients:
            gradient = gradient.detach()
            call.gradient = call.gradient + gradient if known and call.gradient is not None else gradient
        if not known:
            call.follows = None
            unit.calls[call] = None
        if self.on_arrival is not None and name in self.watched:
            self.on_arrival(call)

    def _adds_to(self, p: nn.Parameter) -> bool:
        """Whether the backward pass that runs adds to the `.grad` of a parameter."""
        known = self._accumulators.get(p)
        if known is not None and _will_run(known):
            return True
        with torch.enable_grad():  # a parameter that was converted or thawed has a new one
            node: Any = p.view_as(p).grad_fn
        self._accumulators[p] = node.next_functions[0][0]
        return self._accumulators[p] is not known and _will_run(self._accumulators[p])

    def check(self) -> None:
        """Raise `NonFiniteError` or `UnsupportedModelError` unless all gradients can be used; nothing has been changed then."""
        check_ranks("This optimizer", self.group)
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
                if call.x.layout is not torch.strided:
                    raise UnsupportedModelError(
                        f"The input of layer {call.layer.name!r} has the layout {call.x.layout}; a dense one is needed. Pass "
                        f"x.to_dense(), or exclude=[{call.layer.name!r}]."
                    )
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
                    "its weight was used directly, its output was not part of the backward pass, its gradient did not come "
                    "from backward(), or the model was compiled before the hooks were there. "
                    f"Pass exclude=[{unit.layers[0].name!r}], or build this before "
                    "the first forward pass."
                )
        if sums and not bool(torch.stack([s.to(sums[0]) for s in sums]).sum().isfinite()):
            where = next((n for n, p in named if p.grad is not None and not bool(_sum(p.grad).isfinite())), "a sum")
            raise NonFiniteError(
                f"The gradient of {where!r} is not finite. No weight was changed. Check the inputs or lower the learning rate.",
                where=where,
            )


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


def _will_run(node: Any) -> bool:
    try:
        return torch._C._will_engine_execute_node(node)
    except RuntimeError:  # torch.autograd.grad returns what would have been added
        return False


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
    return total(torch.view_as_real(gradient) if gradient.is_complex() else gradient)
