"""What a `Credited` has to do with wrappers: none inside of it, and with a `DistributedDataParallel` around it, ranks alike."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from beyondprop.credit.base import Credit
from beyondprop.errors import UnsupportedModelError
from beyondprop.optim._units import running_group
from beyondprop.stages import Chain

_OF_RANKS = ("DataParallel", "DistributedDataParallel", "FullyShardedDataParallel")


def check_plain(model: nn.Module) -> None:
    """Raise `UnsupportedModelError` where a model has wrappers inside, or weights that are not there or are parts of one."""
    for name, module in model.named_modules():
        kind = type(module).__name__
        if kind in _OF_RANKS or (module is model and kind == "OptimizedModule"):
            raise UnsupportedModelError(
                f"{f'Module {name!r}' if name else 'The model'} is wrapped ({kind}), and a credit would pass over what that "
                "does in a backward pass: give a credit to the module inside, and wrap what that makes."
            )
    for name, p in model.named_parameters():
        if p.is_meta:
            raise UnsupportedModelError(
                f"Parameter {name!r} is on the meta device and has no values yet: load the model first (from_pretrained, "
                "to_empty), then give it a credit."
            )
        if hasattr(p, "placements"):
            raise UnsupportedModelError(
                f"Parameter {name!r} is a DTensor: a part of a sharded weight (fully_shard, tensor parallelism) sends no delta "
                "down. Use nn.parallel.DistributedDataParallel."
            )


def group_of(credit: Credit) -> dist.ProcessGroup | None:
    """Return the process group whose ranks have parts of the batch that runs forward, None where this process has it all.

    Raises:
        UnsupportedModelError: if ranks may run out of batches before others.
    """
    if (
        torch._C._current_graph_task_id() != -1
    ):  # a checkpoint's second run, in a backward pass, outside of the wrapper's
        return credit.group
    group = running_group()
    if group is None:
        return None
    wrapper = nn.parallel.DistributedDataParallel._active_ddp_module
    assert wrapper is not None
    if wrapper._join_config.enable:
        raise UnsupportedModelError(
            f"The ranks of {type(credit).__name__} need equally many batches: DistributedDataParallel.join lets some run out "
            "of them, and a credit takes means over all ranks. Leave it out, and deal all as many (DistributedSampler does)."
        )
    return group


def make_alike(credit: Credit, chain: Chain, group: dist.ProcessGroup) -> None:
    """Give every rank what the first has drawn, as each drew it by the weights that it had before they were made equal.

    Raises:
        UnsupportedModelError: if the ranks' credits or stages are not the same.
    """
    own = _described(credit, chain)
    every: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(every, own, group=group)
    for rank, other in enumerate(every):
        for what, value in every[0].items() if other != every[0] else ():
            if other.get(what) != value:
                raise UnsupportedModelError(
                    f"The ranks' credits are not the same: {what} is {value} on the first rank and {other.get(what)} on rank "
                    f"{rank}. Build the same everywhere."
                )
    for tensor in credit.tensors().values():
        dist.broadcast(tensor, dist.get_global_rank(group, 0), group=group)


def _described(credit: Credit, chain: Chain) -> dict[str, str]:
    """Return what must be the same in all ranks, in words."""
    settings = {name: value for name, value in vars(credit).items() if name[0] != "_" and name not in ("seed", "group")}
    return {
        "the credit": type(credit).__name__,
        "the number of stages": str(len(chain)),
        **{f"stage {i}": f"{s!r} of {[tuple(p.shape) for p in s.parameters]}" for i, s in enumerate(chain)},
        **{name: text for name, value in settings.items() if (text := _shown(value)) is not None},
        "what it drew": str({name: tuple(tensor.shape) for name, tensor in credit.tensors().items()}),
    }


def _shown(value: Any) -> str | None:
    """Return a setting as it compares between processes, None for what does not."""
    if callable(value):
        return getattr(value, "__qualname__", type(value).__qualname__)
    is_plain = value is None or isinstance(value, (bool, int, float, str)) or dataclasses.is_dataclass(value)
    return repr(value) if is_plain else None
