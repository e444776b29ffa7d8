"""The Linear layers that offline rules solve for, and their codes, chunk by chunk of the rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from beyondprop.nn.activations import Activation
from beyondprop.rules.offline.proximal import Pieces

CHUNK = 4096
"""Rows that are worked on at once, so that what is needed in passing stays small beside the codes."""

Weights = tuple[Tensor, Tensor | None]
"""One layer's weight `(out, in)` and bias `(out,)`."""


@dataclass(slots=True)
class OfflineLayer:
    """One Linear stage as offline rules see it, with the nonlinearities `before` and `after` it, None for the identity.

    There is none before the first, whose inputs are features; `pieces` are those of `before`, None where they are unknown.
    """

    name: str
    weight: nn.Parameter
    bias: nn.Parameter | None
    before: Activation | None
    pieces: Pieces | Any
    trains: bool
    after: Activation | None = None

    def features(self, code: Tensor) -> Tensor:
        """Return the Linear's input for the code `(N, in)` below it."""
        return value_of(self.before, code)

    @property
    def now(self) -> Weights:
        """The present weights, detached."""
        return self.weight.detach(), None if self.bias is None else self.bias.detach()

    def write(self, weights: Weights) -> None:
        """Copy new weights into the user's model; call it without gradients."""
        weight, bias = weights
        self.weight.copy_(weight)
        if self.bias is not None and bias is not None:
            self.bias.copy_(bias)


def value_of(activation: Activation | None, z: Tensor) -> Tensor:
    """Return an activation's value at z; None is the identity."""
    return z if activation is None else activation.value(z)


def with_slope(activation: Activation | None, z: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return an activation's value and slope at z; None is the identity, whose slope of 1 is None."""
    if activation is None:
        return z, None
    value = activation.value(z)
    return value, activation.slope(z, value)


def rows(count: int) -> Iterator[slice]:
    """Yield slices of `CHUNK` rows."""
    for first in range(0, count, CHUNK):
        yield slice(first, min(first + CHUNK, count))


def row_pairs(activation: Activation | None, below: Tensor, wanted: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield a Linear's inputs and targets chunk by chunk, for codes `below` `(N, in)` behind its activation."""
    for part in rows(len(below)):
        yield value_of(activation, below[part]), wanted[part]


def pre_activations(layers: Sequence[OfflineLayer], features: Tensor) -> list[Tensor]:
    """Return what every layer gives under its present weights, `(N, width)` each."""
    pre: list[Tensor] = []
    for layer in layers:
        below = pre[-1] if pre else features
        pre.append(torch.cat([F.linear(layer.features(below[part]), *layer.now) for part in rows(len(below))]))
    return pre


def post_activations(layers: Sequence[OfflineLayer], pre: Sequence[Tensor]) -> list[Tensor]:
    """Return s(u) of every hidden layer for codes u, a tensor of its own also where s is the identity."""
    found = [(u, value_of(layer.after, u)) for layer, u in zip(layers[:-1], pre, strict=False)]
    return [v.clone() if v is u else v for u, v in found]


def in_dtype(weights: Weights, like: Tensor) -> Weights:
    """Return a layer's weights in the dtype of `like`."""
    weight, bias = weights
    return weight.to(like.dtype), None if bias is None else bias.to(like.dtype)
