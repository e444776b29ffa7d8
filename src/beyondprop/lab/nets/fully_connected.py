"""Fully connected nets, and those whose units send signs."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import nn

from beyondprop.lab.nets.options import initialise, options_of, parse_options, parse_probability, parse_size
from beyondprop.nn.binary import TARGET_RULES, Sign


def mlp(spec: str, input_shape: Sequence[int], outputs: int) -> nn.Sequential:
    """Build `mlp:WIDTHxDEPTH[:ACTIVATION][:bn][:dropout=P]`."""
    width, depth, activation, norm, dropout = parse_options(spec)
    layers: list[nn.Module] = [nn.Flatten()]
    inputs = math.prod(input_shape)
    for _ in range(depth):
        layers.append(nn.Linear(inputs, width))
        if norm:
            layers.append(nn.BatchNorm1d(width))
        layers.append(activation())
        if dropout:
            layers.append(nn.Dropout(dropout))
        inputs = width
    return initialise(nn.Sequential(*layers, nn.Linear(inputs, outputs)))


def binary(spec: str, input_shape: Sequence[int], outputs: int) -> nn.Sequential:
    """Build `binary:WIDTHxDEPTH[:first][:rule=NAME][:dropout=P]`."""
    width, depth = parse_size(spec)
    first, rule, dropout = False, "hardtanh", 0.0
    for option in options_of(spec):
        if option == "first":
            first = True
        elif option.startswith("dropout="):
            dropout = parse_probability(spec, option.removeprefix("dropout="))
        elif option.startswith("rule=") and option.removeprefix("rule=") in TARGET_RULES:
            rule = option.removeprefix("rule=")
        else:
            rules = ", ".join(f"rule={name}" for name in TARGET_RULES)
            raise ValueError(f"{spec!r}: unknown option {option!r}; accepted: first, dropout=P, {rules}.")
    layers: list[nn.Module] = [nn.Flatten()]
    inputs = math.prod(input_shape)
    for index in range(depth):
        layers += [nn.Linear(inputs, width), nn.BatchNorm1d(width)]
        layers += [nn.Dropout(dropout)] if dropout else []
        layers.append(nn.Tanh() if first and index else Sign(rule))
        inputs = width
    return initialise(nn.Sequential(*layers, nn.Linear(inputs, outputs)))
