"""The deep autoencoder that LocoProp was published with."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import nn

from beyondprop.lab.nets.options import ACTIVATIONS, options_of


def autoencoder(spec: str, input_shape: Sequence[int], outputs: int) -> nn.Sequential:
    """Build inputs-1000-500-250-30-250-500-1000-outputs; the code layer and the output are linear.

    Weights are drawn as in the authors' code: Glorot uniform, and biases alike, with both fans equal to their length n, that
    is from U(-sqrt(3/n), sqrt(3/n)).
    """
    width = depth = 1
    activation = ACTIVATIONS["tanh"]
    for option in options_of(":".join(["", *spec.split(":")]), ("wide",), ("deep",)):
        if option in ACTIVATIONS:
            activation = ACTIVATIONS[option]
        elif option in ("wide", "deep"):
            width, depth = (2, depth) if option == "wide" else (width, 2)
        else:
            raise ValueError(f"{spec!r}: unknown option {option!r}; accepted: {', '.join(ACTIVATIONS)}, wide, deep.")
    inner = [width * size for size in (1000, *[500] * depth, 250, 30)]
    sizes = [math.prod(input_shape), *inner, *inner[-2::-1], outputs]
    layers: list[nn.Module] = [nn.Flatten()]
    for index, (inputs, units) in enumerate(pairwise(sizes), 1):
        linear = nn.Linear(inputs, units)
        bound = math.sqrt(3 / units)
        nn.init.xavier_uniform_(linear.weight)
        with torch.no_grad():
            linear.bias.uniform_(-bound, bound)
        layers.append(linear)
        if index not in (len(inner), len(sizes) - 1):
            layers.append(activation())
    return nn.Sequential(*layers)
