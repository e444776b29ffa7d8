"""Convolutional and residual nets."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import nn

from beyondprop.lab.nets.options import (
    MOST_LAYERS,
    bounded,
    check_weights,
    image_shape,
    initialise,
    is_count,
    options_of,
    parse_options,
)
from beyondprop.lab.nets.reversible import preactivation
from beyondprop.nn.residual import Residual, Shortcut


def conv(spec: str, input_shape: Sequence[int], outputs: int) -> nn.Sequential:
    """Build `conv:WIDTHxDEPTH[:ACTIVATION][:bn]`."""
    width, depth, activation, norm, dropout = parse_options(spec)
    channels, height, breadth = image_shape(spec, input_shape)
    widths = _widths(width, depth, min(height, breadth))
    check_weights(
        spec, sum(9 * inputs * units for inputs, units in pairwise((channels, *(units for units, _ in widths))))
    )
    layers: list[nn.Module] = []
    for units, pools in widths:
        layers.append(nn.Conv2d(channels, units, 3, padding=1))
        if norm:
            layers.append(nn.BatchNorm2d(units))
        layers.append(activation())
        channels = units
        if pools:
            layers.append(nn.MaxPool2d(2))
            height, breadth = height // 2, breadth // 2
    layers.append(nn.Flatten())
    if dropout:
        layers.append(nn.Dropout(dropout))
    return initialise(nn.Sequential(*layers, nn.Linear(channels * height * breadth, outputs)))


def _widths(width: int, depth: int, side: int) -> list[tuple[int, bool]]:
    """Return every layer's width, and whether it is pooled after, while an image of `side` pixels has any left."""
    found = []
    for i in range(depth):
        pools = i % 2 == 1 and side >= 2
        found.append((width, pools))
        side, width = (side // 2, width * 2) if pools else (side, width)
    return found


def lenet5(spec: str, input_shape: Sequence[int], outputs: int) -> nn.Sequential:
    """Build `lenet5`."""
    options_of(spec, start=1)
    channels, height, breadth = image_shape(spec, input_shape)
    if min(height, breadth) < 16:
        raise ValueError(
            f"lenet5 needs images of 16x16 or more, got {height}x{breadth}; use 'mlp:100x2' or 'conv:16x2'."
        )
    rows, columns = ((((size - 4) // 2) - 4) // 2 for size in (height, breadth))
    layers = (
        nn.Conv2d(channels, 6, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 16, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(16 * rows * columns, 120),
        nn.ReLU(),
        nn.Linear(120, 84),
        nn.ReLU(),
        nn.Linear(84, outputs),
    )
    return initialise(nn.Sequential(*layers))


def basic_block(channels: int, width: int, stride: int) -> Residual:
    """Two 3x3 convolutions with BatchNorm and a skip without weights: He et al., CVPR 2016, figure 2 and option A."""
    branch = nn.Sequential(
        nn.Conv2d(channels, width, 3, stride, 1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Conv2d(width, width, 3, 1, 1, bias=False),
        nn.BatchNorm2d(width),
    )
    changes = stride > 1 or width > channels
    return Residual(branch, Shortcut(stride, (width - channels) // 2) if changes else None, nn.ReLU())


def resnet(spec: str, input_shape: Sequence[int], outputs: int) -> nn.Sequential:
    """Build `resnetDEPTH`, or `resnetDEPTH:preact[:bottleneck]`."""
    preact, bottleneck = options_of(spec, ("preact",), ("bottleneck",), start=1)
    if preact:
        return preactivation(spec, input_shape, outputs)
    if bottleneck:
        raise ValueError(f"{spec!r}: bottleneck units are for 'preact', as in resnet164:preact:bottleneck.")
    depth = spec.removeprefix("resnet")
    if not is_count(depth) or (layers := bounded(spec, "depth", depth, MOST_LAYERS)) < 8 or (layers - 2) % 6:
        raise ValueError(f"{spec!r}: the depth must be 6 n + 2, such as resnet20 or resnet32.")
    channels, *_ = image_shape(spec, input_shape)
    stages: list[nn.Module] = [nn.Conv2d(channels, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    channels = 16
    for width in (16, 32, 64):
        for i in range((layers - 2) // 6):
            stages.append(basic_block(channels, width, 2 if i == 0 and width > 16 else 1))
            channels = width
    model = nn.Sequential(*stages, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, outputs))
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    return model
