"""Reversible nets, and the residual nets of the same block that they are compared with."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from beyondprop.lab.nets.options import (
    MOST_LAYERS,
    bounded,
    check_weights,
    image_shape,
    is_count,
    options_of,
    parse_probability,
    parse_size,
)
from beyondprop.lab.nets.transformer import embedded
from beyondprop.nn import revnets
from beyondprop.nn.revtransformer import ReversibleEncoder
from beyondprop.nn.transformer import MeanOverPositions

MODES = tuple(f"mode={mode}" for mode in revnets.MODES)
_PUBLISHED = {
    "38": revnets.revnet38,
    "110": revnets.revnet110,
    "164": revnets.revnet164,
    "56": revnets.revnet56,
    "104": revnets.revnet104,
}
_BOTTLENECK = ("164", "56", "104")


def revnet(spec: str, input_shape: Sequence[int], outputs: int) -> nn.Sequential:
    """Build `revnetDEPTH[:mode=NAME]`."""
    depth = spec.partition(":")[0].removeprefix("revnet")
    (mode,) = options_of(spec, MODES, start=1)
    channels = _image_channels(spec, input_shape, pools=depth not in _BOTTLENECK)
    chosen = {"channels": channels, "mode": mode or "inverse"}
    if depth in _PUBLISHED:
        return _PUBLISHED[depth](outputs, **chosen)
    layers = bounded(spec, "depth", depth, MOST_LAYERS) if is_count(depth) else 0
    if layers < 14 or (layers - 2) % 12:
        raise ValueError(
            f"{spec!r}: the depth must be 12 n + 2, such as revnet38 or revnet110, or that of a published bottleneck net: "
            "revnet164 for small images, revnet56 and revnet104 for large ones."
        )
    return revnets.revnet(((layers - 2) // 12,) * 3, (32, 32, 64, 128), outputs, **chosen)


def preactivation(spec: str, input_shape: Sequence[int], outputs: int) -> nn.Sequential:
    """Build `resnetDEPTH:preact[:bottleneck]`."""
    depth = spec.partition(":")[0].removeprefix("resnet")
    _, bottleneck = options_of(spec, ("preact",), ("bottleneck",), start=1)
    unit = 9 if bottleneck else 6
    if not is_count(depth) or (layers := bounded(spec, "depth", depth, MOST_LAYERS)) < 8 or (layers - 2) % unit:
        example = "resnet164:preact:bottleneck" if bottleneck else "resnet32:preact"
        raise ValueError(f"{spec!r}: the depth must be {unit} n + 2, such as {example}.")
    channels = _image_channels(spec, input_shape, pools=not bottleneck)
    units = ((layers - 2) // unit,) * 3
    return revnets.preactivation_resnet(
        units, (16, 16, 32, 64), outputs, bottleneck=bottleneck is not None, channels=channels
    )


def _image_channels(spec: str, input_shape: Sequence[int], *, pools: bool) -> int:
    """Return the channels of images; skips that pool need a size that can be halved twice."""
    channels, height, breadth = image_shape(spec, input_shape)
    if pools and (height % 4 or breadth % 4):
        raise ValueError(f"{spec!r} takes images whose height and width are multiples of 4, got {height}x{breadth}.")
    return channels


def revtransformer(spec: str, input_shape: Sequence[int], outputs: int) -> nn.Sequential:
    """Build `revtransformer:WIDTHxDEPTH[:patch=SIZE][:dropout=P][:mode=NAME]`."""
    width, depth = parse_size(spec)
    check_weights(spec, 8 * width**2 * depth)
    patch, dropout, mode = options_of(spec, ("patch=SIZE",), ("dropout=P",), MODES)
    heads, embedding = embedded(spec, width, patch, input_shape)
    encoder = ReversibleEncoder(
        width, depth, heads, 2 * width, dropout=parse_probability(spec, dropout), mode=mode or "inverse"
    )
    return nn.Sequential(*embedding, encoder, MeanOverPositions(), nn.Linear(2 * width, outputs))
