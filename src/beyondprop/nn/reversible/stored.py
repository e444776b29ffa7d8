"""What ordinary autograd keeps of a pass, counted."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from beyondprop.nn.reversible.passes import Pass
from beyondprop.nn.reversible.replay import version
from beyondprop.nn.reversible.streams import Streams


def measured(way: Pass, x: Tensor | Streams) -> tuple[Tensor | Streams, float]:
    """Run a pass with ordinary autograd; return its output and the bytes that are kept for the backward pass.

    Each storage counts once, and weights do not. Where other hooks take saved tensors elsewhere: nan.
    """
    hooked = torch._C._autograd._top_saved_tensors_default_hooks(True)  # type: ignore[reportAttributeAccessIssue]
    if hooked is not None or torch._C._are_functorch_transforms_active():
        return way.plain(x), math.nan
    weights = {t.untyped_storage().data_ptr() for t in way.weights.tensors}
    kept: dict[int, int] = {}

    def pack(saved: Tensor) -> tuple[Tensor, int]:
        storage = saved.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return saved, version(saved)

    with torch.autograd.graph.saved_tensors_hooks(pack, _unpack):
        output = way.plain(x)
    return output, sum(kept.values())


def _unpack(packed: tuple[Tensor, int]) -> Tensor:
    # Autograd leaves this check out where there are hooks.
    saved, before = packed
    if version(saved) != before:
        raise RuntimeError(
            "one of the variables needed for gradient computation has been modified by an inplace operation: a tensor of shape "
            f"{tuple(saved.shape)} is at version {version(saved)}; expected version {before} instead."
        )
    return saved
