"""A call of a function that can be made once more, in a backward pass: same weights, modes, random numbers and statistics."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parameter import is_lazy
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from beyondprop.errors import UnsupportedModelError


class Arguments:
    """What goes to every function beside its stream; the tensors in it apart, so that autograd may keep them."""

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        leaves, self._spec = tree_flatten((args, kwargs))
        self.tensors: list[Tensor] | None = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        self._rest = [_HOLE if isinstance(leaf, Tensor) else leaf for leaf in leaves]

    _spec: TreeSpec

    def taken(self) -> list[Tensor]:
        """Return the tensors, which are not held any more."""
        tensors, self.tensors = self.tensors or [], None
        return tensors

    def with_tensors(self, tensors: Sequence[Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return positional and named arguments with these tensors in them."""
        rest = iter(tensors)
        return tree_unflatten([next(rest) if leaf is _HOLE else leaf for leaf in self._rest], self._spec)


_HOLE = object()


class Weights:
    """The parameters that the functions of one forward pass use, each once, as they were then.

    A replay sees aliases of them: gradients are taken at these, so that hooks on parameters wait for the one gradient that is
    returned, and `functional_call`'s tensors, which the modules have lost by then, are there again.

    Attributes:
        tensors: detached, so that no graph is held; they share their version counters with the parameters.
        trainable: which of them require a gradient.
    """

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []
        self.trainable: list[bool] = []
        self._versions: list[int] = []
        self._norms: Tensor | None = None
        self._slots: dict[tuple[int, str], tuple[dict[str, Any], str, int]] = {}
        self._given: dict[int, tuple[int, Tensor]] = {}

    def add(self, owner: dict[str, Any], name: str, tensor: Tensor) -> int:
        """Return the number of the tensor that is parameter `name` of the module with the parameters `owner`."""
        found = self._given.get(id(tensor))
        if found is None:
            found = self._given[id(tensor)] = len(self.tensors), tensor
            self.tensors.append(tensor.detach())
            self.trainable.append(tensor.requires_grad)
            self._versions.append(version(tensor))
        self._slots[id(owner), name] = owner, name, found[0]
        return found[0]

    def seal(self) -> int:
        """After the pass, remember the values by their norms, as fused optimizers leave no version behind; return the bytes."""
        self._norms = self._measured()
        return 0 if self._norms is None else self._norms.nbytes

    def _measured(self) -> Tensor | None:
        floats = [t for t in self.tensors if t.is_floating_point() and t.numel() and t.layout is torch.strided]
        same = [t for t in floats if t.device == floats[0].device]
        if not same:
            return None
        dtype = torch.float32 if same[0].device.type == "mps" else torch.float64
        norms: list[Tensor] = torch._foreach_norm(same)  # type: ignore[reportPrivateImportUsage]
        if len({norm.dtype for norm in norms}) == 1:
            return torch.stack(norms).to(dtype)
        return torch.stack([norm.to(dtype) for norm in norms])

    def devices(self) -> set[torch.device]:
        """Return where they are."""
        return {tensor.device for tensor in self.tensors}

    def given(self) -> list[Tensor]:
        """Return the parameters themselves, once: they may have graphs."""
        found = [tensor for _, tensor in self._given.values()]
        self._given.clear()
        return found

    def check(self, calls: Iterable[Call]) -> None:
        """Raise `UnsupportedModelError` if one of them was changed in place since."""
        changed = [
            n for n, (t, before) in enumerate(zip(self.tensors, self._versions, strict=True)) if version(t) != before
        ]
        if not changed and self._norms is not None:
            norms = self._measured()
            assert norms is not None
            if torch.equal(norms.nan_to_num(-1), self._norms.nan_to_num(-1)):
                return
            changed = (norms != self._norms).nonzero()[:1, 0].tolist()
        for index in changed:
            name = next(call.name_of(index) for call in calls if index in call.slots)
            raise UnsupportedModelError(
                f"Parameter {name} was changed in place between the forward and the backward pass, which would run the "
                "function again with other weights. Call backward() before the optimizer's step."
            )

    def aliases(self) -> list[Tensor]:
        """Return new leaves with the parameters' values."""
        return [t.detach().requires_grad_(needs) for t, needs in zip(self.tensors, self.trainable, strict=True)]

    @contextlib.contextmanager
    def replaced(self, aliases: Sequence[Tensor]) -> Iterator[None]:
        """Have aliases in the places of the parameters for a while."""
        before = [(owner, name, owner.get(name)) for owner, name, _ in self._slots.values()]
        try:
            for owner, name, index in self._slots.values():
                owner[name] = aliases[index]
            yield
        finally:
            for owner, name, tensor in before:
                owner[name] = tensor


class Call:
    """One call of a function: what `replayed` needs to make the same call again.

    Attributes:
        function: the module.
        name: what errors call it.
        slots: where its parameters are, by their numbers in `Weights`.
        random: the generators' states before the call, if it drew random numbers.
    """

    def __init__(self, function: nn.Module, name: str, weights: Weights) -> None:
        self.function, self.name = function, name
        self.slots: dict[int, tuple[dict[str, Any], str]] = {}
        self.random: list[Tensor] | None = None
        self._modes: list[tuple[nn.Module, bool]] = []
        self._generators: list[tuple[torch.Generator, Tensor]] = []
        self._buffers: list[_Buffer] | None = None
        for module in function.modules():
            self._modes.append((module, module.training))
            parameters = module._parameters
            for key, tensor in parameters.items():
                if tensor is not None:
                    if is_lazy(tensor):
                        raise UnsupportedModelError(
                            f"Function {name} has lazy parameters, whose shapes are not known yet: call it once by itself."
                        )
                    self.slots[weights.add(parameters, key, tensor)] = parameters, key

    def start(self) -> list[_Buffer]:
        """Before the call, note what it may read and change: buffers, and generators of its own."""
        modules = [module for module, _ in self._modes]
        self._generators = [
            (value, value.get_state())
            for module in modules
            for value in vars(module).values()
            if type(value) is torch.Generator  # isinstance asks its metaclass, in Python
        ]
        self._buffers = [
            _Buffer(module, key, tensor)
            for module in modules
            for key, tensor in module._buffers.items()
            if tensor is not None
        ]
        return self._buffers

    def finish(self) -> int:
        """After the call, keep what it did change, as it was; return the bytes."""
        self._generators = [(g, state) for g, state in self._generators if not torch.equal(state, g.get_state())]
        states = [*(self.random or ()), *(state for _, state in self._generators)]
        return sum(buffer.finish() for buffer in self._buffers or ()) + sum(state.nbytes for state in states)

    def name_of(self, weight: int) -> str:
        """Return what an error calls a parameter."""
        owner, key = self.slots[weight]
        paths = (path for path, module in self.function.named_modules() if module._parameters is owner)
        return f"{'.'.join(filter(None, (next(paths, ''), key)))!r} of function {self.name}"

    @contextlib.contextmanager
    def replayed(self, random: Random) -> Iterator[None]:
        """Give the function its modes, buffers and random numbers back for a while."""
        if self.random is not None:
            random.set(self.random)
        modes = [(module, was) for module, was in self._modes if module.training != was]
        is_known = self._buffers is not None
        buffers = self.start() if self._buffers is None else self._buffers
        before = [(b.owner, b.key, b.owner.get(b.key)) for b in buffers]
        own = [(generator, generator.get_state()) for generator, _ in self._generators]
        try:
            for module, was in modes:
                module.training = was
            for buffer in buffers:
                buffer.owner[buffer.key] = buffer.again(self.name)
            for generator, state in self._generators:
                generator.set_state(state)
            yield
            if not is_known and any(not torch.equal(state, g.get_state()) for g, state in self._generators):
                raise UnsupportedModelError(
                    f"Function {self.name} draws random numbers from a generator of its own, and nobody knows which."
                )
        finally:
            for owner, key, tensor in before:
                owner[key] = tensor
            for module, was in modes:
                module.training = not was
            for generator, state in own:
                generator.set_state(state)


class _Buffer:
    """A buffer as a function found it."""

    __slots__ = ("copy", "is_gathered", "key", "owner", "tensor", "version")

    def __init__(self, module: nn.Module, key: str, tensor: Tensor) -> None:
        self.owner, self.key, self.tensor, self.version = module._buffers, key, tensor, version(tensor)
        # Torch's own do not read their running statistics where they gather them.
        is_own = isinstance(module, _NormBase) and type(module).__module__.startswith("torch.nn.")
        self.is_gathered = is_own and module.training
        self.copy = None if self.is_gathered else tensor.clone()

    def finish(self) -> int:
        if self.copy is None:
            return 0
        if version(self.tensor) == self.version and self.owner.get(self.key) is self.tensor:
            self.copy = None
            return 0
        return self.copy.nbytes

    def again(self, name: str) -> Tensor:
        """Return its value for a replay, in other memory: not every change of a buffer leaves a trace."""
        if self.copy is None and not self.is_gathered and version(self.tensor) != self.version:
            raise UnsupportedModelError(
                f"Buffer {self.key!r} of function {name} was changed in place between the forward and the backward pass, which "
                "would run the function again with other values. Call backward() first."
            )
        return (self.tensor if self.copy is None else self.copy).clone()


def version(tensor: Tensor) -> int:
    """Return how often a tensor was changed in place; tensors of inference mode do not count."""
    return 0 if tensor.is_inference() else tensor._version


class Random:
    """The random number generators of the CPU and of some devices.

    Args:
        devices: those of the tensors; others than the CPU count once.
    """

    def __init__(self, devices: Iterable[torch.device]) -> None:
        self._devices = [device for device in dict.fromkeys(devices) if device.type not in ("cpu", "meta")]

    def get(self) -> list[Tensor]:
        """Return their states."""
        return [torch.get_rng_state(), *(_generator(d).get_rng_state(*_own(d)) for d in self._devices)]

    def set(self, states: Sequence[Tensor]) -> None:
        """Set their states."""
        torch.set_rng_state(states[0])
        for device, state in zip(self._devices, states[1:], strict=True):
            _generator(device).set_rng_state(state, *_own(device))

    @contextlib.contextmanager
    def kept(self) -> Iterator[None]:
        """Leave them as they are at the start."""
        states = self.get()
        try:
            yield
        finally:
            self.set(states)


def _generator(device: torch.device) -> Any:
    return torch.get_device_module(device)


def _own(device: torch.device) -> list[torch.device]:
    return [] if device.type == "mps" else [device]  # there is one


def is_same(states: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    """Return whether no random number was drawn between two lists of states."""
    return all(torch.equal(a, b) for a, b in zip(states, others, strict=True))


class Autocast:
    """The autocast settings of the CPU and of some devices, as they are now."""

    def __init__(self, devices: Iterable[torch.device]) -> None:
        kinds = dict.fromkeys(["cpu", *(device.type for device in devices)])
        kinds = [kind for kind in kinds if torch.amp.is_autocast_available(kind)]
        self._settings = [(kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in kinds]

    def is_on(self, device: torch.device) -> bool:
        """Return whether operations on a device are cast."""
        return any(enabled for kind, enabled, _ in self._settings if kind == device.type)

    @contextlib.contextmanager
    def again(self) -> Iterator[None]:
        """Have these settings for a while, without the cache: a cast belongs to the graph of one function."""
        with contextlib.ExitStack() as stack:
            for kind, enabled, dtype in self._settings:
                if enabled or torch.is_autocast_enabled(kind):
                    stack.enter_context(torch.autocast(kind, dtype, enabled, cache_enabled=False))
            yield


@contextlib.contextmanager
def surroundings(autocast: Autocast, random: Random, weights: Weights, aliases: Sequence[Tensor]) -> Iterator[None]:
    """Have around functions what they saw in the forward pass, with aliases for weights, and leave no trace."""
    with torch.no_grad(), autocast.again(), weights.replaced(aliases), random.kept():
        yield


def check_leaves(out: Tensor, known: Iterable[Tensor], name: str) -> None:
    """Raise `UnsupportedModelError` if a function's graph ends at a tensor that it was not given.

    Its forward pass had no graph, so that tensor's gradient would be lost in silence.
    """
    accepted = {id(tensor) for tensor in known}
    nodes: list[Node | None] = [out.grad_fn]
    seen: set[Any] = set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if leaf is not None and id(leaf) not in accepted:
            raise UnsupportedModelError(
                f"Function {name} uses a tensor of shape {tuple(leaf.shape)} that requires a gradient and is neither a "
                "parameter of its modules nor an argument: its gradient would be lost. Register it, or pass it as an argument."
            )
        nodes.extend(above for above, _ in node.next_functions)
