"""Which transfer function follows a layer, read from the autograd graph."""

from __future__ import annotations

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

# Nodes that move numbers and change none.
# fmt: off
_RESHAPES = {f"{name}Backward" for name in (
    "View", "UnsafeView", "ReshapeAlias", "Transpose", "T", "Permute", "Squeeze", "Unsqueeze", "Alias", "Clone", "ToCopy",
)} | {"_DDPSinkBackward"}
# fmt: on
_PLAIN = {
    "ReluBackward": "relu",
    "TanhBackward": "tanh",
    "SigmoidBackward": "sigmoid",
    "BinaryCrossEntropyWithLogitsBackward": "sigmoid",
}
_IDENTITY = transfer("identity")
COMPILED, CUT = "inside compiled code", "outside the graph of the backward pass"
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


def consumers() -> dict[Any, list[Any]]:
    """Return, for every autograd node, the nodes that use its output, of those that the backward pass under way executes.

    What else is alive, such as outputs that are kept for a metric, does not count. Takes microseconds a node.
    """
    pending = _roots()
    seen = set(pending)
    users: dict[Any, list[Any]] = {}
    while pending:
        node = pending.pop()
        for below, _ in node.next_functions:
            if below is None:
                continue
            users.setdefault(below, []).append(node)
            if below not in seen:
                seen.add(below)
                pending.append(below)
    return users


def _roots() -> list[Any]:
    """Return the nodes that the backward pass under way began with; none where torch.autograd.backward did not begin it.

    A graph leads from the loss to its inputs, and nobody is given the loss but that function: it is among its arguments. The
    hooks of a device run in a thread of their own.
    """
    own = threading.get_ident()
    frames = sys._current_frames()
    for frame in (frames.pop(own), *frames.values()):
        at: FrameType | None = frame
        while at is not None and not (
            at.f_code.co_name == "backward" and at.f_globals.get("__name__") == "torch.autograd"
        ):
            at = at.f_back
        if at is not None:
            tensors = at.f_locals["tensors"]
            begun = [tensors] if isinstance(tensors, Tensor | torch.autograd.graph.GradientEdge) else tensors
            nodes = [t.grad_fn if isinstance(t, Tensor) else t.node for t in begun]
            nodes = list(dict.fromkeys(node for node in nodes if node is not None))
            if any(_is_run(node) for root in nodes for node in (root, *(below for below, _ in root.next_functions))):
                return nodes
    return []


def _is_run(node: Any) -> bool:
    # A pass with one root does not count the root itself.
    return node is not None and torch._C._will_engine_execute_node(node)


def common(a: Transfer | str, b: Transfer | str) -> Transfer | str:
    """Return the transfer function that two calls share: the identity where they differ, or why one cannot be read."""
    if a is b or isinstance(a, str):
        return a
    return b if isinstance(b, str) else _IDENTITY


def find_transfer(node: Any, users: dict[Any, list[Any]], own: LayerMap) -> Transfer | str:
    """Return the transfer function behind the output of `node`, the identity where there is none, or why it cannot be read.

    `users` comes from `consumers`.
    """
    while True:
        using = list({id(user): user for user in users.get(node, ())}.values())
        if not using:
            return CUT
        if len(using) != 1:
            return _IDENTITY  # a sum, a normalisation, attention: no function of this output alone
        node = using[0]
        name = node.name().rstrip("0123456789")  # the number tells variants apart, such as in-place ones
        if name not in _RESHAPES:
            return _named(name, node, own)


def _named(name: str, node: Any, own: LayerMap) -> Transfer | str:
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
    if name in ("SoftmaxBackward", "LogSoftmaxBackward") and _is_over_units(node, own):
        return transfer("softmax")
    return _IDENTITY


def _is_over_units(node: Any, own: LayerMap) -> bool:
    """Whether a softmax is over a layer's units; reshapes may lie between, so that they are known by their number."""
    shape = list(node._input_metadata[0].shape)
    dim = int(node._saved_dim)
    dim = (dim - 2**64 if dim >= 2**63 else dim) % len(shape)  # saved as an unsigned number
    if shape[dim] != own.units:
        return False
    if shape.count(own.units) == 1:
        return True
    if own.features == 1 and len(shape) == own.weight.ndim:
        return dim == 1
    return own.features == -1 and dim == len(shape) - 1
