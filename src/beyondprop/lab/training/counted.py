"""What a model counts, and what it holds for the backward pass."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from beyondprop.func.sensing.calls import Counts
from beyondprop.lab.training.work import copied
from beyondprop.nn.blackbox import BlackBox
from beyondprop.nn.structure import is_costly
from beyondprop.rules.base import LearningRule

KEPT = "kept_bytes"
"""The counter of modules that keep less than autograd does: where a net has it, all nets are measured."""


def counters(model: nn.Module) -> dict[str, float]:
    """Return what the modules of a model have counted (`module.counters`, numbers by name), added up by name."""
    found: dict[str, float] = {}
    # Copies of a black box count together, and each has the whole count.
    owners = {id(getattr(module, "caller", module)): module for module in model.modules()}
    for module in owners.values():
        for key, value in (getattr(module, "counters", None) or {}).items():
            number = value.item() if isinstance(value, Tensor) else value
            found[key] = found.get(key, 0) + number
    return found


def counted_anew(model: nn.Module) -> nn.Module:
    """Return a model whose black boxes count, and budget, their calls from 0, whoever else calls what is in them."""
    boxes = [module for module in model.modules() if isinstance(module, BlackBox)]
    fresh = {id(box.caller): replace(box.caller, counts=Counts()) for box in boxes}
    for box in boxes:
        box.caller = fresh[id(box.caller)]
    return model


def measured(rule: LearningRule, wanted: bool | None, batch: Callable[[], tuple[Any, Tensor]]) -> dict[str, float]:
    """Return `kept_bytes` as a counter; nothing where it is not wanted (None: where no module counts it) or not known."""
    if wanted is None:
        wanted = KEPT in counters(rule.model)
    if not wanted or not rule.is_autograd or is_costly(rule.model):
        return {}
    x, y = batch()
    rule.check_batch(x, y)
    return {KEPT: kept_bytes(rule, x, y)}


class _Held:
    """A tensor that a graph holds, until the graph lets go of it."""

    __slots__ = ("__weakref__", "tensor")

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def kept_bytes(rule: LearningRule, x: Any, y: Tensor) -> int:
    """Return the bytes that are held between the forward and the backward pass on a batch, its loss among it.

    Memory counts once, however many tensors are views of it; weights, buffers and the batch are there anyway, and do not count.
    The pass is done by a copy of the model: the model and the global random state stay as they are.

    Args:
        rule: one that trains by `loss.backward()` alone.
        x: inputs `(N, ...)`.
        y: their targets.
    """
    twin = copied(rule)
    held: weakref.WeakSet[_Held] = weakref.WeakSet()

    def pack(tensor: Tensor) -> _Held:
        found = _Held(tensor)
        held.add(found)
        return found

    devices = [y.device] if y.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.enable_grad():
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda found: found.tensor):
            loss = twin.loss(twin.model(x), y)
        own = [*twin.model.parameters(), *twin.model.buffers(), *tree_leaves((x, y))]
        there = {tensor.untyped_storage().data_ptr() for tensor in own if isinstance(tensor, Tensor)}
        found = (one.tensor.untyped_storage() for one in list(held))
        sizes = {storage.data_ptr(): storage.nbytes() for storage in found}
        del loss
    return sum(size for place, size in sizes.items() if place not in there)
