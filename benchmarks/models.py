"""The MNIST deep autoencoder that optimizers are raced on, as the authors of LocoProp published it."""

from __future__ import annotations

import math

import torch
from torch import nn

ACTIVATIONS = {"tanh": nn.Tanh, "relu": nn.ReLU}
VARIANTS = {"standard": (1, 1), "wide": (2, 1), "deep": (1, 2)}  # multipliers of the widths and of the depth


def widths(width: int = 1, depth: int = 1) -> list[int]:
    """Return the layer sizes from the input to the code: 784-1000-500-250-30, scaled as the published code scales it.

    `width` multiplies every size but the input's, the code's 30 with the others; `depth` repeats the layer of 500 units.
    """
    for name, value in (("width", width), ("depth", depth)):
        if value < 1:
            raise ValueError(f"{name} must be 1 or more, got {value}.")
    return [784, *(width * size for size in (1000, *[500] * depth, 250, 30))]


def autoencoder(width: int = 1, depth: int = 1, activation: str = "tanh") -> nn.Sequential:
    """Build 784-1000-500-250-30-250-500-1000-784: images `(N, 784)` to logits `(N, 784)`.

    The code layer is linear; the sigmoid of the output is in the loss, `binary_cross_entropy_with_logits`. Weights are
    drawn from torch's global generator as in the published code: Glorot uniform, and biases alike, with both fans
    equal to their length n, that is from U(-sqrt(3/n), sqrt(3/n)).

    Raises:
        ValueError: A multiplier is less than 1, or there is no activation of this name.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}.")
    encoder = widths(width, depth)
    sizes = [*encoder, *encoder[-2::-1]]
    code, last = len(encoder) - 2, len(sizes) - 2
    layers: list[nn.Module] = []
    for i in range(last + 1):
        linear = nn.Linear(sizes[i], sizes[i + 1])
        bound = math.sqrt(3 / linear.out_features)
        nn.init.xavier_uniform_(linear.weight)
        with torch.no_grad():
            linear.bias.uniform_(-bound, bound)
        layers.append(linear)
        if i not in {code, last}:
            layers.append(ACTIVATIONS[activation]())
    return nn.Sequential(*layers)
