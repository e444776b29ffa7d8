"""What the forms of networks share: sizes, activations and options in their text, and the weights that they start with."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

from torch import nn

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "leaky_relu": nn.LeakyReLU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "softplus": nn.Softplus,
    "gelu": nn.GELU,
}

_GAINS: dict[type[nn.Module], float] = {
    nn.ReLU: math.sqrt(2),
    nn.LeakyReLU: math.sqrt(2),
    nn.GELU: math.sqrt(2),
    nn.Tanh: 5 / 3,
    nn.Sigmoid: 1.0,
    nn.Softplus: 1.0,
}


def initialise(model: nn.Sequential) -> nn.Sequential:
    """Draw weights so that signals keep their size at any depth (He et al. 2015); biases are 0.

    torch's own default shrinks them by 2.4 a ReLU layer: at depth 16, nothing learns in an epoch, whatever the rule.
    """
    carriers = [m for m in model if isinstance(m, nn.Linear | nn.Conv2d)]
    activations = [m for m in model if type(m) in _GAINS]
    gain = _GAINS[type(activations[0])] if activations else 1.0
    for layer in carriers:
        fan_in = layer.weight[0].numel()
        nn.init.normal_(layer.weight, std=(1.0 if layer is carriers[-1] else gain) / math.sqrt(fan_in))
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
    return model


def image_shape(spec: str, input_shape: Sequence[int]) -> tuple[int, int, int]:
    """Return channels, height and width, or raise `ValueError` where samples are no images."""
    if len(input_shape) != 3:
        raise ValueError(f"{spec!r} takes images (C, H, W), got samples of shape {tuple(input_shape)}; use an mlp.")
    channels, height, breadth = input_shape
    return channels, height, breadth


def parse_size(spec: str) -> tuple[int, int]:
    """Return width and depth of `KIND:WIDTHxDEPTH...`."""
    size = [*spec.split(":"), ""][1]
    width, _, depth = size.partition("x")
    if not (width.isdecimal() and depth.isdecimal() and int(width) > 0 and int(depth) > 0):
        raise ValueError(f"{spec!r}: {size!r} must be WIDTHxDEPTH with both >= 1, such as 100x2.")
    return int(width), int(depth)


def options_of(spec: str, *groups: Iterable[str]) -> list[str]:
    """Return what follows a form's size; refuse two options of one group or name: the last would win, under the name of all."""
    options = spec.split(":")[2:]
    names = [option.partition("=")[0] for option in options]
    for group in (tuple(ACTIVATIONS), *map(tuple, groups), *((name,) for name in names)):
        given = [option for option, name in zip(options, names, strict=True) if name in group]
        if len(given) > 1:
            raise ValueError(f"{spec!r}: {' and '.join(map(repr, given))} are given; take one of them.")
    return options


def parse_options(spec: str) -> tuple[int, int, Callable[[], nn.Module], bool, float]:
    """Return width, depth, activation, whether to normalise, and the dropout probability."""
    width, depth = parse_size(spec)
    activation: Callable[[], nn.Module] = nn.ReLU
    norm, dropout = False, 0.0
    for option in options_of(spec):
        if option in ACTIVATIONS:
            activation = ACTIVATIONS[option]
        elif option == "bn":
            norm = True
        elif option.startswith("dropout="):
            dropout = parse_probability(spec, option.removeprefix("dropout="))
        else:
            raise ValueError(f"{spec!r}: unknown option {option!r}; accepted: {', '.join(ACTIVATIONS)}, bn, dropout=P.")
    return width, depth, activation, norm, dropout


def parse_probability(spec: str, text: str) -> float:
    """Return a dropout probability."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1:
        raise ValueError(f"{spec!r}: dropout must be in [0, 1), got {text!r}.")
    return value
