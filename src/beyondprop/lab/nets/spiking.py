"""Spiking nets that read images, rows of numbers or recordings of events, and count the spikes of their last layer."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from beyondprop.errors import NonFiniteError
from beyondprop.lab.nets.options import (
    bounded,
    check_weights,
    image_shape,
    is_count,
    options_of,
    parse_size,
)
from beyondprop.nn.spiking import (
    CubaLIF,
    PoissonEncoder,
    SpikeCountLoss,
    SpikeCounts,
    SpikingLayer,
    SpikingSumPool2d,
)
from beyondprop.nn.spiking.layer import RULES

STEPS = 50
"""T where a form says none."""

NEURON = CubaLIF(refractory=2)

BOUND = 1.6
"""Of the weights a neuron begins with, times the root of their number: some spikes, from images and from neurons."""

_MOST_STEPS = 10_000
_ROOM = 16  # pixels that two convolutions without frames, and two poolings, leave one of


class UnitRange(nn.Module):
    """Numbers `(N, ...)` to [0, 1]: 0 is the smallest that was seen in training, 1 the largest; others are clipped.

    The range is that of each feature of rows `(N, F)`, and of each channel of images `(N, C, ...)`.
    """

    def __init__(self, features: int) -> None:
        super().__init__()
        self.low: Tensor
        self.high: Tensor
        self.register_buffer("low", torch.full((features,), math.inf))
        self.register_buffer("high", torch.full((features,), -math.inf))

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim < 2 or x.shape[1] != len(self.low):
            raise ValueError(
                f"A spiking net for {len(self.low)} features or channels got input of shape {tuple(x.shape)}."
            )
        if not len(x):
            return x
        if not bool(torch.isfinite(x).all()):
            raise NonFiniteError("The input of a spiking net is NaN or Inf.", where="x")
        low, high = x.detach().transpose(0, 1).flatten(1).aminmax(dim=1)
        if self.training:
            self.low, self.high = torch.minimum(self.low, low), torch.maximum(self.high, high)
        seen = torch.isfinite(self.low)  # nothing, before the first batch
        low, high = torch.where(seen, self.low, low), torch.where(seen, self.high, high)
        shape = (-1, *[1] * (x.ndim - 2))
        width = torch.where(high > low, high - low, 1.0)
        return ((x - low.view(shape)) / width.view(shape)).clamp(0.0, 1.0)


class _Counted(nn.Module):
    """Spikes a row, in what was evaluated last: a mixin of spiking layers."""

    _spikes: Tensor | float = 0.0
    _rows = 0
    _is_over = True

    @property
    def counters(self) -> dict[str, float]:
        """Spikes a row of the layer; once they were asked for, the next evaluation counts anew."""
        self._is_over = True
        return {"spikes_a_row": float(self._spikes) / self._rows} if self._rows else {}

    def _count(self, spikes: Tensor) -> Tensor:
        if self.training:
            self._is_over = True
        else:
            if self._is_over:
                self._spikes, self._rows, self._is_over = 0.0, 0, False
            self._spikes = self._spikes + spikes.detach().sum(dtype=torch.float64)
            self._rows += len(spikes)
        return spikes


class Layer(_Counted, SpikingLayer):
    """A `SpikingLayer` that counts."""

    def forward(self, spikes: Tensor) -> Tensor:
        return self._count(super().forward(spikes))


class Pool(_Counted, SpikingSumPool2d):
    """A `SpikingSumPool2d` that counts."""

    def forward(self, spikes: Tensor) -> Tensor:
        return self._count(super().forward(spikes))


def spike_loss(form: str) -> SpikeCountLoss:
    """Return what a form is trained on, whatever its rule: counts near a target for the label, a tenth of it for the others."""
    target = float(_options(form)[2])
    return SpikeCountLoss(target, target / 10, target / 10)


def spiking(spec: str, input_shape: Sequence[int], outputs: int) -> nn.Sequential:
    """Build `spiking:WIDTH[xDEPTH][:hm2bp|surrogate][:T=STEPS][:target=COUNT][:conv][:events]`.

    Both rules start from the same weights and are shown the same spikes. The target is a fifth of the steps, and 10 for events.
    """
    width, depth = parse_size(spec, depth="1")
    rule, steps, target, conv, events = _options(spec)
    shape = tuple(input_shape[1:] if events else input_shape)
    if not shape:
        raise ValueError(
            f"{spec!r} takes {'(T, ...)' if events else 'rows or images'}, got samples of shape {tuple(input_shape)}."
        )
    most = NEURON.most_spikes(input_shape[0] if events else steps)
    if target > most:
        raise ValueError(
            f"{spec!r}: the target must be <= {most}, as many spikes as fit into the steps, got {target}; give target=COUNT."
        )
    layers: list[nn.Module] = [] if events else [UnitRange(shape[0]), PoissonEncoder(steps)]
    inputs = math.prod(shape)
    if conv:
        stem, inputs = _stem(spec, shape, rule)
        layers += stem
    layers.append(nn.Flatten(2))
    check_weights(spec, width * inputs + (depth - 1) * width**2)
    for _ in range(depth):
        layers.append(_layer(nn.Linear(inputs, width, bias=False), rule))
        inputs = width
    last = _layer(nn.Linear(inputs, outputs, bias=False), rule, lateral=0.3, injected=target)
    return nn.Sequential(*layers, last, SpikeCounts())


def _options(spec: str) -> tuple[str, int, int, bool, bool]:
    """Return the rule, the steps (a default, with events), the target, and whether there are convolutions, and events."""
    rule, steps, target, conv, events = options_of(spec, RULES, ("T=STEPS",), ("target=COUNT",), ("conv",), ("events",))
    if events and steps:
        raise ValueError(
            f"{spec!r}: T=STEPS is of the encoder, and 'events' have steps of their own; leave one of them out."
        )
    count = _number(spec, "T", steps, STEPS)
    return rule or "hm2bp", count, _number(spec, "target", target, max(1, count // 5)), bool(conv), bool(events)


def _number(spec: str, name: str, text: str | None, default: int) -> int:
    if text is None:
        return default
    if not is_count(text):
        raise ValueError(f"{spec!r}: {name} must be a whole number >= 1, got {text!r}.")
    return bounded(spec, name, text, _MOST_STEPS)


def _layer(op: nn.Linear | nn.Conv2d, rule: str, lateral: float = 0.0, injected: int = 0) -> Layer:
    bound = BOUND / math.sqrt(op.weight[0].numel())
    nn.init.uniform_(op.weight, -bound, bound)
    return Layer(op, NEURON, rule=rule, lateral=lateral, injected=injected)


def _stem(spec: str, shape: Sequence[int], rule: str) -> tuple[list[nn.Module], int]:
    """Return 15C5-P2-40C5-P2, with frames around small images so that they have room, and the features that they return."""
    channels, height, breadth = image_shape(spec, shape)
    if min(height, breadth) < 4:
        raise ValueError(f"{spec!r}: 'conv' takes images of 4x4 or more, got {height}x{breadth}.")
    padding = 0 if min(height, breadth) >= _ROOM else 2
    layers: list[nn.Module] = []
    for inputs, units in ((channels, 15), (15, 40)):
        layers.append(_layer(nn.Conv2d(inputs, units, 5, padding=padding, bias=False), rule))
        layers.append(Pool(2, NEURON, rule=rule))
        height, breadth = ((size + 2 * padding - 4) // 2 for size in (height, breadth))
    return layers, 40 * height * breadth
