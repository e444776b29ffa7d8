"""What a backward pass leaves behind of every layer with weights: its inputs, its outputs, the gradient at its outputs."""

from __future__ import annotations

import copy
import weakref
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.utils.hooks import RemovableHandle, unserializable_hook

from beyondprop.errors import NonFiniteError, UnsupportedModelError
from beyondprop.nn.functional import check_ranks, drop_inert_hooks
from beyondprop.nn.structure import Structure
from beyondprop.optim import _samples
from beyondprop.optim._graph import roots, will_run
from beyondprop.optim._local import total
from beyondprop.optim._maps import LayerMap
from beyondprop.optim._samples import Batch
from beyondprop.optim._units import Call, find_layers, find_units, running_group, unwrapped
from beyondprop.optim._uses import Uses

_C: Any = torch._C  # its type stubs have not all


class Capture:
    """Records the calls of a model's Linear, Conv, Embedding and registered layers through hooks, from `attach` on.

    A forward hook leaves the call with the autograd graph; when the gradient of the layer's output arrives there, the call is
    put on its unit's list. Whatever is never differentiated (evaluation, `no_grad`, the first pass of a checkpointed block)
    vanishes with its graph.

    Args:
        model: any module; a `DistributedDataParallel` is looked into.
        exclude: names of modules, or patterns such as `"head.*"`, that are left alone.
        pipelined: whether this process trains layers of its own, which no other has.

    Attributes:
        layers: those that are captured, as maps.
        units: the same in groups that share parameters, with their calls since the last step.
        on_start: called before the model is.
        on_arrival: called with a call of `watched` when the backward pass reaches it.
        output_layers: names of layers of which outputs are wanted, too.
        gradients: whether the gradients at outputs are wanted.
        counts: whether it is looked for what speaks against the first dimension as the number of samples.
        watched: names of layers of which `on_arrival` is told.
        root: the module inside wrappers.
        group: process group whose ranks have parts of the batch.
        exclude: as given.
        others: names and parameters that are not captured.
    """

    def __init__(self, model: nn.Module, exclude: Iterable[str] = (), *, pipelined: bool = False) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}.")
        self.gradients = self.counts = False
        self.output_layers: set[str] = set()
        self.on_start: weakref.WeakMethod[Callable[[], None]] | None = None  # weak, so that its owner goes at once
        self.on_arrival: Callable[[Call], None] | None = None
        self.watched: set[str] = set()
        self.root, self.group = unwrapped(model)
        self.pipelined = pipelined
        self._structure = Structure(self.root)
        self.exclude = tuple(exclude)
        self.layers = find_layers(self.root, self.exclude)
        self.units = find_units(self.root, self.layers)
        self._unit_of = {layer.name: unit for unit in self.units for layer in unit.layers}
        taken = {p for unit in self.units for p in unit.parameters}
        self.others = [(name, p) for name, p in self.root.named_parameters() if p not in taken]
        self._batch: Batch | None = None
        self._last: Batch | None = None
        self._task = self._counted = -1  # the latest backward pass, and that of which the loss was looked at
        self._averages: list[list[int]] = []  # of that one, as of `_samples.averaged`
        self._read: Counter[tuple[int, int]] = Counter()  # how often one was, by the lengths of inputs and outputs
        self._accumulators: dict[nn.Parameter, Any] = {}  # the autograd nodes that add to `.grad`
        self._uses: Uses | None = Uses()
        self._handles: list[RemovableHandle] = []

    def attach(self) -> None:
        """Install the hooks; they go with this object."""
        drop_inert_hooks(self.root)
        weakref.finalize(self, _take_off, self._handles).atexit = False
        whole: Any = _Hook(self, None)
        self._handles.append(self.root.register_forward_pre_hook(whole, with_kwargs=True))
        self._handles.append(self.root.register_forward_hook(whole, with_kwargs=True))
        for layer in self.layers:
            # First, so that it sees what the layer gave and not what others' hooks made of it.
            hook = layer.module.register_forward_hook(_Hook(self, layer), prepend=True, with_kwargs=True)
            self._handles.append(hook)
        for module in filter(_samples.is_sequence_first, self.root.modules() if self.counts else ()):
            self._handles.append(module.register_forward_pre_hook(_Hook(self, None, True), with_kwargs=True))

    def __deepcopy__(self, memo: dict[int, Any]) -> Capture:
        # The copied modules carry inert hooks; they get live ones of their own. Calls belong to the graph of the original.
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        own: dict[str, Any] = {"_handles": [], "_accumulators": {}, "_batch": None, "_last": None, "group": self.group}
        own |= {"on_start": None, "_uses": Uses()}  # of the original
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
        _take_off(self._handles)
        self.clear()

    def clear(self) -> None:
        """Forget the captured calls."""
        for unit in self.units:
            unit.calls.clear()
        self._forget_uses()

    def _forget_uses(self) -> None:
        if self._uses is not None:
            self._uses.reset()
            if self._uses.is_over:
                self._uses = None

    def start(self, arguments: Any) -> None:
        """Note that the model is called."""
        if not torch.is_grad_enabled() or _in_backward() or _C._is_tracing():
            return  # a trace would hold the length that is asked for
        if self.group is None:  # launchers wrap the model after the optimizer was built
            self.group = running_group()
        if self.on_start is not None and (told := self.on_start()) is not None:
            told()
        self._batch = self._last = _samples.of_model(arguments)
        if self.group is not None and self._batch is not None:
            self._batch.is_past = running_group() is None
        self._drop_stale()

    def end(self, output: Any) -> None:
        """Note that the model's call is over."""
        if self.counts and self._batch is not None:
            _samples.see_output(self._batch, output)
        self._batch = None

    def _drop_stale(self) -> None:
        """Forget the calls of a step that was skipped: those whose gradients have been thrown away."""
        pending = [unit for unit in self.units if unit.calls]
        for unit in pending:
            if all(p.grad is None for p in unit.parameters):
                unit.calls.clear()
        if not any(p.grad is not None and _is_any(p.grad) for unit in pending for p in unit.parameters):
            for unit in pending:
                unit.calls.clear()

    def record(self, layer: LayerMap, x: Any, z: Any) -> Tensor | None:
        """Leave one call with the graph of its output; return the output that takes its place."""
        if not (torch.is_grad_enabled() and isinstance(z, Tensor) and z.requires_grad and isinstance(x, Tensor)):
            return None
        if not any(p.requires_grad for p in layer.parameters):
            return None
        if _C._functorch.maybe_current_level() is not None or _C._is_tracing():
            return None  # torch.func returns gradients and adds to none
        if not layer.is_proven:
            layer.prove(x, z)
        inside = _in_backward()  # a checkpointed block runs again there
        if z._is_view():
            # An in-place operation on a view rewires the graph and loses the hook; on a tensor of its own it does not.
            z = torch.ops.aten._unsafe_view(z, z.shape)
        # With the weights of `torch.func.functional_call` the output is not that of the layer's own.
        is_kept = layer.name in self.output_layers and layer.is_current
        kept, weights = (z.detach(), layer.state()) if is_kept else (None, ())
        batch = self._batch or (self._last if inside else None) or Batch(layer.samples(x), is_outside=True)
        call = Call(layer, x.detach(), x._version, kept, z._version, weights, batch, inside)
        alive = weakref.ref(self)

        @unserializable_hook  # copies and saved files go without it, which is no reason for torch to warn
        def arrive(gradient: Tensor | None) -> None:
            capture = alive()
            # None: what is behind has no part in the loss.
            if capture is not None and (gradient is not None or capture._uses is not None):
                capture._arrive(call, gradient)

        z.register_hook(arrive)
        return z

    def _arrive(self, call: Call, gradient: Tensor | None) -> None:
        """Put a call on its unit's list, once; what only looks, such as `torch.autograd.grad`, has no effect."""
        name = call.layer.name
        if gradient is not None and torch.is_grad_enabled():
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
        if self._uses is not None:
            self._note_use(self._uses, task, call.layer)
        if gradient is None:
            return
        known = call in unit.calls
        if self.gradients:
            gradient = gradient.detach()
            call.gradient = call.gradient + gradient if known and call.gradient is not None else gradient
        if not known:
            call.follows = None
            unit.calls[call] = None
            if self.counts:
                self._count(call.batch, task)
        if self.on_arrival is not None and name in self.watched:
            self.on_arrival(call)

    def _note_use(self, uses: Uses, task: int, layer: LayerMap) -> None:
        if uses.is_new(task):
            if not any(unit.calls for unit in self.units):
                uses.reset()  # of passes whose gradients were thrown away
            held = (p for unit in self.units for p in unit.parameters if p.requires_grad)
            uses.read(task, {p: self._accumulators[p] for p in held if self._adds_to(p)})
        uses.explain(task, layer)

    def _count(self, batch: Batch, task: int) -> None:
        if task != self._counted:
            self._counted, self._averages = task, []
            lengths = batch.samples, batch.rows
            if self._read[lengths] < _READ:
                self._read[lengths] += 1
                self._averages = _samples.averaged(roots())
        if task != batch.task:
            batch.task = task
            if self._averages:
                batch.averages += self._averages

    def doubt(self) -> str | None:
        """Return why it is doubtful over how many samples the loss averaged; None where it is not."""
        return _samples.doubt(call.batch for unit in self.units for call in unit.calls)

    def _adds_to(self, p: nn.Parameter) -> bool:
        """Whether the backward pass that runs adds to the `.grad` of a parameter."""
        known = self._accumulators.get(p)
        if known is not None and will_run(known):
            return True
        with torch.enable_grad():  # a parameter that was converted or thawed has a new one
            node: Any = p.view_as(p).grad_fn
        self._accumulators[p] = node.next_functions[0][0]
        return self._accumulators[p] is not known and will_run(self._accumulators[p])

    def check(self) -> None:
        """Raise `NonFiniteError` or `UnsupportedModelError` unless all gradients can be used; nothing has been changed then."""
        if not self.pipelined:
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
        for layer in self.layers:
            if not layer.is_current:
                raise UnsupportedModelError(
                    f"The weight of layer {layer.name!r} is no longer the parameter that it was: it was replaced, pruned "
                    "or parametrized. Build the optimizer after that."
                )
        self._structure.check("optimizer")
        for unit in self.units:
            for call in unit.calls:
                if call.batch.is_past:
                    raise UnsupportedModelError(
                        f"The model with layer {call.layer.name!r} was called itself, past its DistributedDataParallel, whose "
                        "processes would drift apart: call the wrapper."
                    )
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
            used = [] if self._uses is None else [kind for p in unit.parameters for kind in self._uses.others(p)]
            if unit.calls and used:
                raise UnsupportedModelError(
                    f"A parameter of layer {unit.name!r} is used besides the layer's own calls, all uses being "
                    f"{', '.join(dict.fromkeys(used))}: that part of its gradient does not come from the layer's inputs. Pass "
                    f"exclude={[layer.name for layer in unit.layers]!r}, tie the weights of two modules instead of using one's "
                    "directly, or give a penalty a backward pass of its own or add its gradient to .grad by hand."
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


def _take_off(handles: list[RemovableHandle]) -> None:
    for handle in handles:
        handle.remove()
    handles.clear()


_READ = 8  # times that a loss is looked at, which takes as long as a few small products


class _Hook:
    """A forward hook that does not keep its capture alive and is inert in copies of the model."""

    def __init__(self, capture: Capture | None, layer: LayerMap | None, is_inner: bool = False) -> None:
        self.capture = None if capture is None else weakref.ref(capture)
        self.layer, self.is_inner = layer, is_inner

    @property
    def is_inert(self) -> bool:
        """Whether nobody listens."""
        return self.capture is None or self.capture() is None

    # torch.compiler.disable, but for what torch.optim has in its place: that loads the compiler, a second's work, not here but
    # at the first call. By then torch.optim has done so.
    @_disable_dynamo
    def __call__(self, module: nn.Module, *arguments: Any) -> Any:
        capture = None if self.capture is None else self.capture()
        if capture is None:
            return None
        if self.layer is not None:
            positional, named, output = arguments
            return capture.record(self.layer, positional[0] if positional else next(iter(named.values()), None), output)
        if len(arguments) == 3:
            capture.end(arguments[2])
        elif not self.is_inner:
            capture.start(arguments)
        elif capture._batch is not None:
            _samples.see_input(capture._batch, module, arguments)
        return None

    def __reduce__(self) -> Any:  # copying asks for it, too
        return _Hook, (None, None)


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


def _is_any(gradient: Tensor) -> bool:
    """Whether a gradient has an entry that is not 0: its first row tells mostly, and the whole takes as long as a product."""
    is_long = gradient.layout is torch.strided and gradient.ndim > 1
    return (is_long and bool(gradient[:1].any())) or bool(gradient.any())


def _sum(gradient: Tensor) -> Tensor:
    if gradient.layout is not torch.strided:
        gradient = gradient.coalesce().values()
    return total(torch.view_as_real(gradient) if gradient.is_complex() else gradient)
