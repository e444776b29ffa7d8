"""Functions of tensors and modules that layers, optimizers and stages share."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from beyondprop.errors import UnsupportedModelError


@contextmanager
def evaluation_mode(*models: nn.Module) -> Iterator[None]:
    """Put models in evaluation mode, and give every module its own mode back."""
    # Each module's own: a part of a model may be in evaluation mode during training, too.
    modes = [(module, module.training) for model in models for module in model.modules()]
    try:
        for model in models:
            model.eval()
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def patches(features: Tensor, conv: Any, *, padding: Sequence[int] | None = None) -> Tensor:
    """Return the inputs of every output position of a convolution, `(N * positions, channels * kernel)`.

    Views with strides, so any number of spatial dimensions.

    Args:
        features: `(N, channels, *spatial)`: all channels, or those of one group.
        conv: the convolution, for its kernel, stride and dilation.
        padding: zeros to add on both sides of each spatial dimension; default: the convolution's own.
    """
    around = [p for size in reversed(conv.padding if padding is None else padding) for p in (size, size)]
    windows = F.pad(features, around) if any(around) else features
    spatial = windows.ndim - 2
    for axis in range(spatial):
        reach = conv.dilation[axis] * (conv.kernel_size[axis] - 1) + 1
        windows = windows.unfold(axis + 2, reach, conv.stride[axis])
    windows = windows[(..., *(slice(None, None, step) for step in conv.dilation))]
    # (N, C, *positions, *kernel) -> (N, *positions, C, *kernel)
    order = [0, *range(2, 2 + spatial), 1, *range(2 + spatial, 2 + 2 * spatial)]
    return windows.permute(order).reshape(-1, features.shape[1] * math.prod(conv.kernel_size))


def check_ranks(name: str, group: dist.ProcessGroup | None) -> None:
    """Raise `UnsupportedModelError` where several processes train and no group of theirs keeps their weights equal."""
    if group is None and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        raise UnsupportedModelError(
            f"{name} trains in {dist.get_world_size()} processes, and no DistributedDataParallel keeps them equal: their "
            "weights would drift apart. Put the whole model into one and call that (Backprop, LocoProp, AffineProjection, "
            "Credited), give a rule with group= that group or the wrapper, or train in one process. Where each process has "
            "layers of its own, pass pipelined=True to an optimizer."
        )


def drop_inert_hooks(model: nn.Module) -> None:
    """Take off a model's forward hooks that say `is_inert`: their owner is gone, or has another copy of the model."""
    for module in model.modules():
        before, after = (
            (module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs),
            (
                module._forward_hooks,
                module._forward_hooks_with_kwargs,
            ),
        )
        for hooks, extra in (before, after):
            for key in [key for key, hook in hooks.items() if getattr(hook, "is_inert", False)]:
                del hooks[key]
                extra.pop(key, None)


def ones(count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return ones, `(count,)`, made once and not to be written: a sum by them and its factor are one operation."""
    return _filled((count,), 1.0, dtype, device)


def nothing(dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return NaN, 0-d, made once and not to be written."""
    return _filled((), math.nan, dtype, device)


def _filled(shape: tuple[int, ...], value: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    # What is made under a mode may be no tensor for others, as a fake one is not.
    make = _made if is_in_torch_dispatch_mode() else _made_once
    return make(shape, value, dtype, device)


def _made(shape: tuple[int, ...], value: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.full(shape, value, dtype=dtype, device=device)


_made_once = lru_cache(64)(_made)
