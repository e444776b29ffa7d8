"""Which transfer function follows a layer, read from the autograd graph."""

from __future__ import annotations

import gc
from collections.abc import Iterable
from typing import Any

from torch import Tensor

from beyondprop.solvers.matching import Transfer, transfer

# Nodes that move numbers and change none.
_RESHAPES = {
    "ViewBackward0",
    "UnsafeViewBackward0",
    "ReshapeAliasBackward0",
    "TransposeBackward0",
    "TBackward0",
    "PermuteBackward0",
    "SqueezeBackward0",
    "SqueezeBackward1",
    "SqueezeBackward2",
    "UnsqueezeBackward0",
    "AliasBackward0",
    "CloneBackward0",
    "ToCopyBackward0",
}
_PLAIN = {
    "ReluBackward0": "relu",
    "TanhBackward0": "tanh",
    "SigmoidBackward0": "sigmoid",
    "BinaryCrossEntropyWithLogitsBackward0": "sigmoid",
}


def consumers() -> dict[Any, list[Any]]:
    """Return, for every node of every autograd graph that is alive, the nodes that use its output.

    A graph leads from the loss to its inputs and an optimizer is not given the loss; so the tensors that are alive are asked.
    During a backward pass the loss is among them. Takes about a tenth of a second.
    """
    # isinstance would call into proxies of other libraries.
    alive = [o for o in gc.get_objects() if issubclass(type(o), Tensor)]
    pending = [t.grad_fn for t in alive if t.requires_grad and t.grad_fn is not None]
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


def find_transfer(nodes: Iterable[Any], users: dict[Any, list[Any]], units: int) -> Transfer:
    """Return the transfer function behind a layer's outputs; the identity where there is none that all its calls share.

    Args:
        nodes: autograd nodes of the outputs.
        users: from `consumers`.
        units: how many units the layer has.
    """
    found = [_behind(node, users, units) for node in nodes]
    first = found[0] if found else None
    if first is None or any(other != first for other in found):
        return transfer("identity")
    name, settings = first
    return transfer(name, **settings)


def _behind(node: Any, users: dict[Any, list[Any]], units: int) -> tuple[str, dict[str, Any]] | None:
    while True:
        using = list({id(user): user for user in users.get(node, ())}.values())
        if len(using) != 1:
            return None  # a sum, a normalisation, attention: what follows is no function of this output alone
        node = using[0]
        name = node.name()
        if name not in _RESHAPES:
            return _named(name, node, units)


def _named(name: str, node: Any, units: int) -> tuple[str, dict[str, Any]] | None:
    if name in _PLAIN:
        return _PLAIN[name], {}
    if name == "LeakyReluBackward0":
        slope = float(node._saved_negative_slope)
        return ("leaky_relu", {"negative_slope": slope}) if slope >= 0 else None
    if name == "SoftplusBackward0":
        return "softplus", {"beta": float(node._saved_beta), "threshold": float(node._saved_threshold)}
    if name == "GeluBackward0":
        return ("gelu" if node._saved_approximate == "none" else "gelu_tanh"), {}
    if name in ("SoftmaxBackward0", "LogSoftmaxBackward0"):
        shape = list(node._input_metadata[0].shape)
        dim = int(node._saved_dim)
        dim = dim - 2**64 if dim >= 2**63 else dim  # saved as an unsigned number
        # Reshapes lie between: the units are known by their number, and must be the only dimension with it or the last.
        return (
            ("softmax", {})
            if shape[dim] == units and (shape.count(units) == 1 or dim in (-1, len(shape) - 1))
            else None
        )
    return None
