"""Which transfer function follows a layer, read from the autograd graph."""

from __future__ import annotations

import gc
from collections.abc import Iterable
from typing import Any

from torch import Tensor

from beyondprop.optim._maps import LayerMap
from beyondprop.optim.matching import Transfer, transfer

# Nodes that move numbers and change none.
# fmt: off
_RESHAPES = {f"{name}Backward" for name in (
    "View", "UnsafeView", "ReshapeAlias", "Transpose", "T", "Permute", "Squeeze", "Unsqueeze", "Alias", "Clone", "ToCopy",
)}
# fmt: on
_PLAIN = {
    "ReluBackward": "relu",
    "TanhBackward": "tanh",
    "SigmoidBackward": "sigmoid",
    "BinaryCrossEntropyWithLogitsBackward": "sigmoid",
}


def consumers() -> dict[Any, list[Any]]:
    """Return, for every node of every autograd graph that is alive, the nodes that use its output.

    A graph leads from the loss to its inputs and an optimizer is not given the loss; so the tensors that are alive are asked.
    During a backward pass the loss is among them. Takes about a tenth of a second.
    """
    # isinstance would call into proxies of other libraries.
    alive = [o for o in gc.get_objects() if issubclass(type(o), Tensor)]
    pending = [node for t in alive if (node := _node(t)) is not None]
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


def _node(tensor: Tensor) -> Any:
    try:
        return tensor.grad_fn if tensor.requires_grad else None
    except RuntimeError:  # a view that autograd has lost track of
        return None


def find_transfer(nodes: Iterable[Any], users: dict[Any, list[Any]], own: LayerMap) -> Transfer | None:
    """Return the transfer function behind a layer's outputs; the identity where there is none that all its calls share.

    None where what follows is inside compiled code. `nodes` are those of the outputs, `users` comes from `consumers`.
    """
    found = {_behind(node, users, own) for node in nodes}
    if None in found:
        return None
    return found.pop() if len(found) == 1 else transfer("identity")


def _behind(node: Any, users: dict[Any, list[Any]], own: LayerMap) -> Transfer | None:
    while True:
        using = list({id(user): user for user in users.get(node, ())}.values())
        if len(using) != 1:
            return transfer("identity")  # a sum, a normalisation, attention: no function of this output alone
        node = using[0]
        name = node.name().rstrip("0123456789")  # the number tells variants apart, such as in-place ones
        if name not in _RESHAPES:
            return _named(name, node, own)


def _named(name: str, node: Any, own: LayerMap) -> Transfer | None:
    if name in _PLAIN:
        return transfer(_PLAIN[name])
    if name.startswith("CompiledFunction"):
        return None
    if name == "LeakyReluBackward" and node._saved_negative_slope >= 0:
        return transfer("leaky_relu", negative_slope=float(node._saved_negative_slope))
    if name == "SoftplusBackward":
        return transfer("softplus", beta=float(node._saved_beta), threshold=float(node._saved_threshold))
    if name == "GeluBackward":
        return transfer("gelu" if node._saved_approximate == "none" else "gelu_tanh")
    if name in ("SoftmaxBackward", "LogSoftmaxBackward") and _is_over_units(node, own):
        return transfer("softmax")
    return transfer("identity")


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
