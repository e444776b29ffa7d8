"""Recurrent nets over sequences and images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from beyondprop.lab.nets.options import (
    ACTIVATIONS,
    MOST_UNITS,
    bounded,
    check_weights,
    image_shape,
    is_count,
    options_of,
)
from beyondprop.nn.recurrent import ElmanCell, Recurrent

CELLS: dict[str, Callable[[int, int], Any]] = {"elman": ElmanCell, "gru": nn.GRUCell, "lstm": nn.LSTMCell}


def rnn(spec: str, input_shape: Sequence[int], outputs: int) -> nn.Sequential:
    """Build `rnn:WIDTH[:ACTIVATION][:pixels|rows][:elman|gru|lstm][:identity]`."""
    width = [*spec.split(":"), ""][1]
    if not is_count(width):
        raise ValueError(f"{spec!r}: {width!r} must be the number of units, >= 1, such as 15.")
    is_image = len(input_shape) == 3
    orders = ("pixels", "rows") if is_image else ()
    chosen, order, cell, identity = options_of(spec, ACTIVATIONS, orders, CELLS, ("identity",))
    cell = cell or "elman"
    units, is_elman = bounded(spec, "width", width, MOST_UNITS), cell == "elman"
    check_weights(spec, units**2 * {"elman": 1, "gru": 3, "lstm": 4}[cell])
    if chosen and not is_elman:
        raise ValueError(f"{spec!r}: a {cell} cell has activations of its own; leave the activation out, or the cell.")
    if identity and not is_elman:
        raise ValueError(f"{spec!r}: only an elman cell starts from the identity; leave out {cell}, or identity.")
    layout: list[nn.Module] = []
    by_pixels = is_image and order != "rows"
    if len(input_shape) == 2:
        steps, size = input_shape
    else:
        channels, height, breadth = image_shape(spec, input_shape)
        if channels != 1:
            raise ValueError(f"{spec!r} reads grey images as sequences, got {channels} channels; use a conv or resnet.")
        steps, size = (height * breadth, 1) if by_pixels else (height, breadth)
        layout = [nn.Flatten(), nn.Unflatten(1, (steps, size))]
    activation = ACTIVATIONS[chosen or "tanh"]
    unit = ElmanCell(size, units, activation(), identity=bool(identity)) if is_elman else CELLS[cell](size, units)
    head = [activation()] if is_elman else []  # an Elman cell's state is its pre-activation
    if not by_pixels:
        return nn.Sequential(*layout, Recurrent(unit), *head, nn.Linear(units, outputs))
    read = nn.Linear(units, 1)
    # One output unit, seen through a ReLU: with signs at random, every third net starts dead. It rises with its pixel instead.
    # The third part of a GRU's or an LSTM's input weights makes the new state.
    reads_pixel = unit.weight_ih if is_elman else unit.weight_ih[2 * units : 3 * units]
    with torch.no_grad():
        read.weight.copysign_(reads_pixel.t())
        read.bias.zero_()
    top = [nn.Flatten(), nn.ReLU(), nn.Linear(steps, outputs)]
    return nn.Sequential(*layout, Recurrent(unit, "all"), *head, read, *top)
