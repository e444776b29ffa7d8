"""Image transformers."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import nn

from beyondprop.lab.nets.options import check_weights, image_shape, options_of, parse_size
from beyondprop.nn.transformer import MeanOverPositions, Patches, Positions


def transformer(spec: str, input_shape: Sequence[int], outputs: int) -> nn.Sequential:
    """Build `transformer:WIDTHxDEPTH[:patch=SIZE]`."""
    width, depth = parse_size(spec)
    check_weights(spec, 8 * width**2 * depth)
    (patch,) = options_of(spec, ("patch=SIZE",))
    heads, embedding = embedded(spec, width, patch, input_shape)
    blocks = [
        nn.TransformerEncoderLayer(width, heads, 2 * width, 0.0, F.gelu, batch_first=True, norm_first=True)
        for _ in range(depth)
    ]
    return nn.Sequential(
        *embedding,
        *blocks,
        nn.LayerNorm(width),
        MeanOverPositions(),
        nn.Linear(width, outputs),
    )


def embedded(
    spec: str, width: int, patch: str | None, input_shape: Sequence[int]
) -> tuple[int, tuple[nn.Module, nn.Module, nn.Module]]:
    """Return the heads of an image transformer, one for 32 features, and what makes `width` features of square patches."""
    channels, height, breadth = image_shape(spec, input_shape)
    most = min(height, breadth)
    if patch is not None and not (patch.isdecimal() and 1 <= int(patch) <= most):
        raise ValueError(f"{spec!r}: accepted is patch=SIZE with 1 <= SIZE <= {most}, got 'patch={patch}'.")
    side = int(patch or 4)
    heads = max(1, width // 32)
    if width % heads:
        raise ValueError(f"{spec!r}: the width must be a multiple of its {heads} heads of 32 features, got {width}.")
    count = (height // side) * (breadth // side)
    return heads, (Patches(side), nn.Linear(channels * side * side, width), Positions(count, width))
