"""Recurrent nets over images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from beyondprop.lab.nets.options import ACTIVATIONS, image_shape
from beyondprop.nn.recurrent import ElmanCell, Recurrent

CELLS: dict[str, Callable[[int, int], Any]] = {"elman": ElmanCell, "gru": nn.GRUCell, "lstm": nn.LSTMCell}
_GATES = {"gru": 3, "lstm": 4}
"""Parts of a cell's input weights; the third makes the new state."""


def rnn(spec: str, parts: list[str], input_shape: Sequence[int], num_classes: int) -> nn.Sequential:
    """Build `rnn:WIDTH[:ACTIVATION][:pixels|rows][:elman|gru|lstm]`."""
    width, *options = parts
    if not (width.isdecimal() and int(width) > 0):
        raise ValueError(f"{spec!r}: {width!r} must be the number of units, >= 1, such as 15.")
    channels, height, breadth = image_shape(spec, input_shape)
    if channels != 1:
        raise ValueError(f"{spec!r} reads grey images as sequences, got {channels} channels; use a conv or resnet.")
    activation: Callable[[], nn.Module] = nn.Tanh
    order, cell = "pixels", "elman"
    for option in options:
        if option in ACTIVATIONS:
            activation = ACTIVATIONS[option]
        elif option in ("pixels", "rows"):
            order = option
        elif option in CELLS:
            cell = option
        else:
            accepted = ", ".join([*ACTIVATIONS, "pixels", "rows", *CELLS])
            raise ValueError(f"{spec!r}: unknown option {option!r}; accepted: {accepted}.")
    if cell != "elman" and set(options) & set(ACTIVATIONS):
        raise ValueError(f"{spec!r}: a {cell} cell has activations of its own; leave the activation out, or the cell.")
    steps, size = (height * breadth, 1) if order == "pixels" else (height, breadth)
    units = int(width)
    unit = ElmanCell(size, units, activation()) if cell == "elman" else CELLS[cell](size, units)
    head = [activation()] if cell == "elman" else []  # an Elman cell's state is its pre-activation
    layout: list[nn.Module] = [nn.Flatten(), nn.Unflatten(1, (steps, size))]
    if order == "rows":
        return nn.Sequential(*layout, Recurrent(unit), *head, nn.Linear(units, num_classes))
    read = nn.Linear(units, 1)
    # One output unit, seen through a ReLU: with signs at random, every third net starts dead. It rises with its pixel instead.
    reads_pixel = unit.weight_ih if cell == "elman" else unit.weight_ih.chunk(_GATES[cell])[2]
    with torch.no_grad():
        read.weight.copysign_(reads_pixel.t())
        read.bias.zero_()
    top = [nn.Flatten(), nn.ReLU(), nn.Linear(steps, num_classes)]
    return nn.Sequential(*layout, Recurrent(unit, "all"), *head, read, *top)
