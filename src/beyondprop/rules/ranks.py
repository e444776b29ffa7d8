"""The processes that hold parts of every batch: a rule sums over them what it gathered, so that all write the same."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from beyondprop.errors import UnsupportedModelError
from beyondprop.optim._local import sum_over_ranks


class Ranks:
    """A process group, or this process alone.

    Args:
        model: the module, made equal in all ranks: weights and buffers are those of the group's first.
        group: the process group; None: this process alone.

    Raises:
        UnsupportedModelError: if the ranks' models differ in their parameters' shapes.
    """

    def __init__(self, model: nn.Module, group: dist.ProcessGroup | None) -> None:
        self.group = group
        if group is None:
            return
        shapes = [list(p.shape) for p in model.parameters()]
        every: list[list[list[int]] | None] = [None] * dist.get_world_size(group)
        dist.all_gather_object(every, shapes, group=group)
        if any(other != shapes for other in every):
            raise UnsupportedModelError(
                f"The ranks' models are not the same: their parameters have the shapes {every}. Build the same everywhere."
            )
        self.broadcast([*model.parameters(), *model.buffers()])

    @torch.no_grad()
    def broadcast(self, tensors: Iterable[Tensor]) -> None:
        """Give every rank the tensors of the first."""
        if self.group is not None:
            first = dist.get_global_rank(self.group, 0)
            for tensor in tensors:
                dist.broadcast(tensor, first, group=self.group)

    def share(self, samples: int, like: Tensor) -> float:
        """Return this rank's share of a batch's samples; 1 alone."""
        if self.group is None:
            return 1.0
        total = torch.tensor(float(samples), dtype=torch.float64, device=like.device)
        dist.all_reduce(total, group=self.group)
        return samples / float(total)

    @torch.no_grad()
    def sum_gradients(self, parameters: Sequence[Tensor]) -> None:
        """Sum `.grad` over the ranks; one that has none adds nothing."""
        if self.group is None:
            return
        for p in parameters:
            if p.requires_grad and p.grad is None:
                p.grad = torch.zeros_like(p)
        sum_over_ranks([p.grad for p in parameters if p.grad is not None], self.group)

    def alarm(self, seen: Sequence[Tensor]) -> list[Tensor]:
        """Return what is not finite in all ranks where `seen` is not in one, so that all refuse together."""
        if self.group is None:
            return []
        own = torch.stack([t.detach().sum(dtype=torch.float64) * 0 for t in seen]).sum()
        dist.all_reduce(own, group=self.group)
        return [own]

    def __deepcopy__(self, memo: dict[int, object]) -> Ranks:
        return self  # of the same processes


def unwrapped(model: nn.Module, group: dist.ProcessGroup | None) -> tuple[nn.Module, dist.ProcessGroup | None]:
    """Return the module inside a `DistributedDataParallel` and its process group, else both as they are."""
    if isinstance(model, nn.parallel.DistributedDataParallel):
        return model.module, group or model.process_group
    return model, group
