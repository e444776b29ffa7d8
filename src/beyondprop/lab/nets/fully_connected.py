"""Fully connected nets: plain, with units that send signs, and the deep autoencoder that LocoProp was published with."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import nn

from beyondprop.lab.nets.options import (
    ACTIVATIONS,
    initialise,
    options_of,
    parse_options,
    parse_probability,
    parse_size,
)
from beyondprop.nn.binary import TARGET_RULES, Sign


def mlp(spec: str, input_shape: Sequence[int], outputs: int) -> nn.Sequential:
    """Build `mlp:WIDTH[xDEPTH][:ACTIVATION][:bn][:dropout=P]`."""
    width, depth, activation, norm, dropout = parse_options(spec, depth="1")
    layers: list[nn.Module] = [nn.Flatten()]
    for inputs in (math.prod(input_shape), *[width] * (depth - 1)):
        layers.append(nn.Linear(inputs, width))
        layers += [nn.BatchNorm1d(width)] if norm else []
        layers.append(activation())
        layers += [nn.Dropout(dropout)] if dropout else []
    return initialise(nn.Sequential(*layers, nn.Linear(width, outputs)))


def binary(spec: str, input_shape: Sequence[int], outputs: int) -> nn.Sequential:
    """Build `binary:WIDTHxDEPTH[:first][:rule=NAME][:dropout=P]`."""
    width, depth = parse_size(spec)
    first, share, rule = options_of(spec, ("first",), ("dropout=P",), (f"rule={name}" for name in TARGET_RULES))
    dropout = parse_probability(spec, share)
    layers: list[nn.Module] = [nn.Flatten()]
    for index, inputs in enumerate((math.prod(input_shape), *[width] * (depth - 1))):
        layers += [nn.Linear(inputs, width), nn.BatchNorm1d(width)]
        layers += [nn.Dropout(dropout)] if dropout else []
        layers.append(nn.Tanh() if first and index else Sign(rule or "hardtanh"))
    return initialise(nn.Sequential(*layers, nn.Linear(width, outputs)))


def autoencoder(spec: str, input_shape: Sequence[int], outputs: int) -> nn.Sequential:
    """Build inputs-1000-500-250-30-250-500-1000-outputs; the code layer and the output are linear.

    Weights are drawn as in the authors' code: Glorot uniform, and biases alike, with both fans equal to their length n, that
    is from U(-sqrt(3/n), sqrt(3/n)).
    """
    activation, wide, deep = options_of(spec, ACTIVATIONS, ("wide",), ("deep",), start=1)
    inner = [(2 if wide else 1) * size for size in (1000, *[500] * (2 if deep else 1), 250, 30)]
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
            layers.append(ACTIVATIONS[activation or "tanh"]())
    return nn.Sequential(*layers)
