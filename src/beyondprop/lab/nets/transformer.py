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
    channels, height, breadth = image_shape(spec, input_shape)
    (patch,) = options_of(spec, ("patch=SIZE",))
    most = min(height, breadth)
    if patch is not None and not (patch.isdecimal() and 1 <= int(patch) <= most):
        raise ValueError(f"{spec!r}: accepted is patch=SIZE with 1 <= SIZE <= {most}, got 'patch={patch}'.")
    side = int(patch or 4)
    heads = max(1, width // 32)
    if width % heads:
        raise ValueError(f"{spec!r}: the width must be a multiple of its {heads} heads of 32 features, got {width}.")
    blocks = [
        nn.TransformerEncoderLayer(width, heads, 2 * width, 0.0, F.gelu, batch_first=True, norm_first=True)
        for _ in range(depth)
    ]
    return nn.Sequential(
        Patches(side),
        nn.Linear(channels * side * side, width),
        Positions((height // side) * (breadth // side), width),
        *blocks,
        nn.LayerNorm(width),
        MeanOverPositions(),
        nn.Linear(width, outputs),
    )
