"""Sums over the ranks of a process group."""

from __future__ import annotations

from collections.abc import Iterable

import torch.distributed as dist
from torch import Tensor, nn


def group_of(model: nn.Module) -> dist.ProcessGroup | None:
    """Return the process group of a `DistributedDataParallel`, None for every other module."""
    if isinstance(model, nn.parallel.DistributedDataParallel):
        return model.process_group
    inner = getattr(model, "_orig_mod", None)  # of torch.compile
    return group_of(inner) if isinstance(inner, nn.Module) else None


def sum_(tensors: Iterable[Tensor], group: dist.ProcessGroup | None) -> None:
    """Replace every tensor by its sum over the ranks; nothing happens without a group."""
    if group is not None:
        for work in [dist.all_reduce(t, group=group, async_op=True) for t in tensors]:
            if work is not None:
                work.wait()
