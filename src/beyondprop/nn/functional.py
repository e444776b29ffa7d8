"""Functions of tensors and modules that layers, optimizers and stages share."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

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
            f"{name} trains in {dist.get_world_size()} processes, and the model is in no DistributedDataParallel: their "
            "weights would drift apart. Put it into one and call that (Backprop, LocoProp and AffineProjection know it), or "
            "train in one process."
        )
