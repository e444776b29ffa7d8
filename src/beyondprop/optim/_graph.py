"""Which transfer function follows a layer, read from the autograd graph."""

from __future__ import annotations

import math
import sys
import threading
from collections.abc import Iterable
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from beyondprop.optim._maps import LayerMap
from beyondprop.optim._units import Call, Unit
from beyondprop.optim.matching import Transfer, transfer

# Nodes that move numbers and change none: all of them, some or beside others along a dimension that is saved, some otherwise.
# fmt: off
RESHAPES = {f"{name}Backward" for name in (
    "View", "UnsafeView", "ReshapeAlias", "Transpose", "T", "Permute", "Squeeze", "Unsqueeze", "Alias", "Clone", "ToCopy",
)}
_ALONG = {f"{name}Backward" for name in (
    "Select", "Slice", "Split", "SplitWithSizes", "UnsafeSplit", "UnsafeSplitWithSizes", "Unbind", "IndexSelect", "Cat",
    "Stack",
)}
_CHOICES = {f"{name}Backward" for name in (
    "Index", "Gather", "Expand", "Repeat", "PackPaddedSequence", "Take", "MaskedSelect", "MaskedFill", "Where", "Flip", "Roll",
    "ConstantPadNd", "IndexPut",
)}
# fmt: on
_ROWS = ("IndexBackward", "ExpandBackward", "RepeatBackward", "PackPaddedSequenceBackward", "ConstantPadNdBackward")
"""Of these, what leaves the units and all dimensions behind them their lengths leaves them alone."""
_PLAIN = {
    "ReluBackward": "relu",
    "TanhBackward": "tanh",
    "SigmoidBackward": "sigmoid",
    "BinaryCrossEntropyWithLogitsBackward": "sigmoid",
}
_PASSING = ("_DDPSinkBackward", "BackwardHookFunctionBackward")
_IDENTITY = transfer("identity")
COMPILED = "inside compiled code"
CUT = "outside the graph of the backward pass, as in a reentrant checkpoint or where backward() was given a gradient"
PARTS = "a softmax over other units than all of the layer's alone, or what was written into a part of a tensor"
"""Why a transfer function cannot be read."""


class Reader:
    """Notes what follows a call when the backward pass reaches it."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Let go of the graph."""
        self._task = -1
        self._users: dict[Any, list[Any]] = {}

    def read(self, call: Call) -> None:
        """Note in `call.follows` what `find_transfer` finds."""
        task = torch._C._current_graph_task_id()
        if task != self._task:
            self._task, self._users = task, consumers()
            engine: Any = torch.autograd.Variable._execution_engine  # pyright: ignore[reportAttributeAccessIssue]
            engine.queue_callback(self.forget)  # when the pass is over
        found = find_transfer(torch._C._current_autograd_node(), self._users, call.layer)
        call.follows = found if call.follows is None else common(call.follows, found)


def readings(units: Iterable[Unit]) -> dict[str, Transfer | str]:
    """Return what follows the layers whose calls were looked behind, by the layer's name."""
    found: dict[str, Transfer | str] = {}
    for call in (call for unit in units for call in unit.calls):
        if call.follows is not None:
            found[call.layer.name] = common(found.get(call.layer.name, call.follows), call.follows)
    return found


def kind(node: Any) -> str:
    """Return the name of a node without the number that tells variants apart, such as in-place ones."""
    return node.name().rstrip("0123456789")


def will_run(node: Any) -> bool:
    """Whether the backward pass under way executes a node, or has done so; the one root of a pass does not count."""
    try:
        return torch._C._will_engine_execute_node(node)
    except RuntimeError:  # torch.autograd.grad returns what would have been added
        return False


def consumers() -> dict[Any, list[Any]]:
    """Return, for every autograd node, the nodes that use its output, of those that the backward pass under way executes.

    What else is alive, such as outputs that are kept for a metric, does not count. Takes microseconds a node.
    """
    pending = roots()
    seen = set(pending)
    users: dict[Any, list[Any]] = {}
    while pending:
        node = pending.pop()
        for edge in node.next_functions:
            below = _led_to(*edge)
            if below is None:
                continue
            users.setdefault(below, []).append(node)
            if below not in seen:
                seen.add(below)
                pending.append(below)
    return users


def _led_to(node: Any, number: int) -> Any:
    """Return the node that an edge leads to, past those that hand on each of several tensors as it is.

    A module with a backward hook has one around its inputs and one around its outputs, `DistributedDataParallel` one around
    all outputs of the model, those that the loss does not need among them.
    """
    while node is not None and node.name() in _PASSING:
        node, number = node.next_functions[number]
    return node


def roots() -> list[Any]:
    """Return the nodes that the backward pass under way began with; none where torch.autograd.backward did not begin it.

    A graph leads from the loss to its inputs, and nobody is given the loss but that function: it is among its arguments. The
    hooks of a device run in a thread of their own.
    """
    own = threading.get_ident()
    frames = sys._current_frames()
    del frames[own]  # a frame that knows itself would keep everything that it and its callers know
    for frame in (sys._getframe(1), *frames.values()):
        at: FrameType | None = frame
        while at is not None and not (
            at.f_code.co_name == "backward" and at.f_globals.get("__name__") == "torch.autograd"
        ):
            at = at.f_back
        if at is not None:
            tensors = at.f_locals["tensors"]
            begun = [tensors] if isinstance(tensors, Tensor | torch.autograd.graph.GradientEdge) else tensors
            nodes = [_led_to(t.grad_fn if isinstance(t, Tensor) else t.node, t.output_nr) for t in begun]
            nodes = list(dict.fromkeys(node for node in nodes if node is not None))
            if any(_is_run(node) for root in nodes for node in (root, *(below for below, _ in root.next_functions))):
                return nodes
    return []


def _is_run(node: Any) -> bool:
    return node is not None and will_run(node)


def common(a: Transfer | str, b: Transfer | str) -> Transfer | str:
    """Return the transfer function that two calls share: the identity where they differ, or why one cannot be read."""
    if a is b or isinstance(a, str):
        return a
    return b if isinstance(b, str) else _IDENTITY


def find_transfer(node: Any, users: dict[Any, list[Any]], own: LayerMap) -> Transfer | str:
    """Return the transfer function behind the output of `node`, the identity where there is none, or why it cannot be read.

    What moves numbers may lie between. An elementwise function is then still one of each unit, whichever are chosen; a softmax
    is one of the layer's outputs only where it is over all of its units and no others. `users` comes from `consumers`.
    """
    units = _Units(_shape(node), own)
    while True:
        using = list({id(user): user for user in users.get(node, ())}.values())
        if not using:
            return CUT
        if len(using) != 1:
            return _IDENTITY  # a sum, a normalisation, attention: no function of this output alone
        node = using[0]
        name = kind(node)
        if not units.follow(name, node):
            return _named(name, node, units)


def _named(name: str, node: Any, units: _Units) -> Transfer | str:
    if name in _PLAIN:
        return transfer(_PLAIN[name])
    if name.startswith("CompiledFunction"):
        return COMPILED
    if name == "LeakyReluBackward" and node._saved_negative_slope >= 0:
        return transfer("leaky_relu", negative_slope=float(node._saved_negative_slope))
    if name == "SoftplusBackward":
        return transfer("softplus", beta=float(node._saved_beta), threshold=float(node._saved_threshold))
    if name == "GeluBackward":
        return transfer("gelu" if node._saved_approximate == "none" else "gelu_tanh")
    if name in ("SoftmaxBackward", "LogSoftmaxBackward"):
        if units.are_parts:
            return PARTS
        return transfer("softmax") if units.has_along(_signed(node._saved_dim)) else _IDENTITY
    return PARTS if name.endswith("CopySlices") else _IDENTITY


class _Units:
    """Where a layer's units are in what is made of its output.

    Attributes:
        shape: of the tensor.
        at: the dimension that has the units, None where it is not known: known by its length then.
        are_parts: whether some are missing, repeated, in another order, or beside others'.
    """

    def __init__(self, shape: list[int], own: LayerMap) -> None:
        self.shape, self.count, self.are_parts = shape, own.units, False
        at = own.features if own.features < 0 else own.features - (len(shape) == own.sample_ndim)
        self.at: int | None = at % len(shape) if shape and shape[at] == own.units else None

    def has_along(self, dim: int) -> bool:
        """Whether a dimension has all units."""
        if not self.shape:
            return False
        dim %= len(self.shape)
        if self.at is None:
            return self.shape[dim] == self.count and self.shape.count(self.count) == 1
        return dim == self.at

    def follow(self, name: str, node: Any) -> bool:
        """Go on to the output of a node that moves numbers, and return whether it is one."""
        if name in RESHAPES:
            step = self._reshape
        elif name in _ALONG:
            step = self._along
        elif name in _CHOICES:
            step = self._choose
        else:
            return False
        after = _shape(node)
        self.at, self.shape = step(name, node, after), after
        return True

    def _reshape(self, name: str, node: Any, after: list[int]) -> int | None:
        at, before = self.at, self.shape
        if at is None or len(before) == len(after) == 1:
            return at
        if name == "TransposeBackward":
            a, b = _signed(node._saved_dim0) % len(before), _signed(node._saved_dim1) % len(before)
            return {a: b, b: a}.get(at, at)
        if name == "TBackward":
            return 1 - at
        if name == "PermuteBackward":
            return [_signed(dim) % len(before) for dim in node._saved_dims].index(at)
        if before == after:
            return at
        ahead = math.prod(before[:at])
        same = (i for i, n in enumerate(after) if n == before[at] and math.prod(after[:i]) == ahead)
        return next(same, None)

    def _along(self, name: str, node: Any, after: list[int]) -> int | None:
        at, longer = self.at, len(after) - len(self.shape)
        if at is None:
            # Of one unit there is no part; elsewhere it may have been any dimension.
            self.are_parts |= self.count != 1
            return None
        dim = _signed(node._saved_dim) % max(len(self.shape), len(after))
        if dim != at or longer > 0:
            return at + (longer if dim <= at else 0)
        if longer < 0:
            self.are_parts |= self.shape[at] != 1
            return None
        self.are_parts |= after[at] != self.shape[at] or name == "IndexSelectBackward"
        return at

    def _choose(self, name: str, node: Any, after: list[int]) -> int | None:
        del node
        behind = 0 if self.at is None else len(self.shape) - self.at
        if name in _ROWS and behind and after[-behind:] == self.shape[-behind:]:
            return len(after) - behind
        self.are_parts = True
        return None


def _shape(node: Any) -> list[int]:
    """Return the shape of a node's first output, of no dimension where that is not known: of a function of the user's own."""
    known = getattr(node, "_input_metadata", ())
    return list(known[0].shape) if known else []


def _signed(dim: int) -> int:
    return int(dim) - 2**64 if dim >= 2**63 else int(dim)  # saved as an unsigned number
