"""What the forms of networks share: sizes, activations and options in their text, and the weights that they start with."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from string import ascii_uppercase

from torch import nn

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "leaky_relu": nn.LeakyReLU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "softplus": nn.Softplus,
    "gelu": nn.GELU,
}

MOST_UNITS, MOST_LAYERS, MOST_WEIGHTS = 100_000, 2000, 10**9
"""What a form may ask for: more takes all memory, or hours, before anything is trained."""

_GAINS: dict[type[nn.Module], float] = {
    **dict.fromkeys((nn.ReLU, nn.LeakyReLU, nn.GELU), math.sqrt(2)),
    **dict.fromkeys((nn.Sigmoid, nn.Softplus), 1.0),
    nn.Tanh: 5 / 3,
}


def initialise(model: nn.Sequential) -> nn.Sequential:
    """Draw weights so that signals keep their size at any depth (He et al. 2015); biases are 0.

    torch's own default shrinks them by 2.4 a ReLU layer: at depth 16, nothing learns in an epoch, whatever the rule.
    """
    carriers = [m for m in model if isinstance(m, nn.Linear | nn.Conv2d)]
    gain = next((_GAINS[type(m)] for m in model if type(m) in _GAINS), 1.0)
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


def parse_size(spec: str, depth: str = "") -> tuple[int, int]:
    """Return width and depth of `KIND:WIDTHxDEPTH...`; both are bounded, and the weights that they come to.

    Args:
        spec: the form.
        depth: where the form may have none, what it is then.
    """
    size = [*spec.split(":"), ""][1]
    width, times, given = size.partition("x")
    depth = given if times or not depth else depth
    if not (is_count(width) and is_count(depth)):
        raise ValueError(f"{spec!r}: {size!r} must be WIDTHxDEPTH with both >= 1, such as 100x2.")
    units, layers = bounded(spec, "width", width, MOST_UNITS), bounded(spec, "depth", depth, MOST_LAYERS)
    check_weights(spec, units**2 * (layers - 1))
    return units, layers


def is_count(text: str) -> bool:
    """Return whether a text is a whole number >= 1, of whatever size."""
    return text.isascii() and text.isdecimal() and text.strip("0") != ""


def bounded(spec: str, name: str, digits: str, most: int) -> int:
    """Return the number that a form has, or raise `ValueError` where it is larger than `most`."""
    if len(digits.lstrip("0")) > len(str(most)) or int(digits) > most:
        raise ValueError(
            f"{spec!r}: the {name} must be at most {most:,}, got {digits[:20]}{'...' * (len(digits) > 20)}."
        )
    return int(digits)


def check_weights(spec: str, count: int) -> None:
    """Raise `ValueError` unless a net of so many weights is one that a machine holds."""
    if count > MOST_WEIGHTS:
        raise ValueError(f"{spec!r} has {count:,} weights or more; at most {MOST_WEIGHTS:,} are accepted.")


def options_of(spec: str, *groups: Iterable[str], start: int = 2) -> list[str | None]:
    """Return what a form chooses from each group of options, None where nothing; of `NAME=VALUE` the value alone.

    Args:
        spec: the form.
        *groups: what is accepted, one of each group; capitals at the end, as in `dropout=P`, stand for any text.
        start: parts of the form before its options.

    Raises:
        ValueError: for an option of no group, and for two of one: the last would win, under the name of all.
    """
    words = [tuple(group) for group in groups]
    given: list[list[str]] = [[] for _ in groups]
    for option in spec.split(":")[start:]:
        fitting = (found for found, group in zip(given, words, strict=True) if any(_fits(option, w) for w in group))
        if (found := next(fitting, None)) is None:
            raise ValueError(f"{spec!r}: unknown option {option!r}; accepted: {', '.join(chain(*words)) or 'none'}.")
        found.append(option)
        if len(found) > 1:
            raise ValueError(f"{spec!r}: {' and '.join(map(repr, found))} are given; take one of them.")
    return [found[0].rpartition("=")[2] if found else None for found in given]


def _fits(option: str, word: str) -> bool:
    stem = word.rstrip(ascii_uppercase)
    return option == word or (stem != word and option.startswith(stem))


def parse_options(spec: str, depth: str = "") -> tuple[int, int, Callable[[], nn.Module], bool, float]:
    """Return width, depth, activation, whether to normalise, and the dropout probability."""
    width, layers = parse_size(spec, depth)
    activation, norm, dropout = options_of(spec, ACTIVATIONS, ("bn",), ("dropout=P",))
    return width, layers, ACTIVATIONS[activation or "relu"], norm is not None, parse_probability(spec, dropout)


def parse_probability(spec: str, text: str | None) -> float:
    """Return a dropout probability, 0 where there is none."""
    try:
        value = 0.0 if text is None else float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1:
        raise ValueError(f"{spec!r}: dropout must be in [0, 1), got {text!r}.")
    return value
