"""Backpropagation through time with a surrogate slope: the baseline that HM2-BP is set beside."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from beyondprop.nn.spiking.hm2bp import precise, refuse_not_finite
from beyondprop.nn.spiking.neuron import CubaLIF
from beyondprop.nn.spiking.scans import SLACK, others

WIDTH = 2.0
"""Of the slope `1 / (1 + (pi / 2 * WIDTH * d)^2)`, d the distance from the threshold in units of it."""


class _Spike(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, distance: Tensor) -> Tensor:
        ctx.save_for_backward(distance)
        return (distance > 0).to(distance.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        (distance,) = ctx.saved_tensors
        return gradient / (1.0 + (math.pi / 2 * WIDTH * distance).square())


def fire(x: Tensor, op: nn.Module, neuron: CubaLIF, lateral: float = 0.0) -> Tensor:
    """Return the spikes of `scans.simulate`, differentiable in every step; the reset is not differentiated.

    Args:
        x: spikes `(T, N, ...)`.
        op: the operator.
        neuron: what fires.
        lateral: strength by which each spike inhibits all others of its sample in the next step.
    """
    whole = op(x.flatten(0, 1))
    whole = whole.reshape(*x.shape[:2], *whole.shape[1:])
    drive = precise(whole.flatten(2))
    v, p = torch.zeros_like(drive[0]), torch.zeros_like(drive[0])
    held = torch.zeros(drive.shape[1:], dtype=torch.int32, device=drive.device)
    found: list[Tensor] = []
    for t in range(len(drive)):
        v, p = v * (1.0 - 1.0 / neuron.tau_mem), p * (1.0 - 1.0 / neuron.tau_syn)
        if t >= neuron.delay:
            p = p + drive[t - neuron.delay]
        if lateral and found:
            p = p - lateral * others(found[-1])
        v = (v + p / neuron.tau_syn).masked_fill(held > 0, 0.0)
        held = (held - 1).clamp(min=0)
        spike = _Spike.apply((v - (neuron.threshold - SLACK)) / neuron.threshold)
        fired = spike.detach() > 0
        v, held = v.masked_fill(fired, 0.0), held.masked_fill(fired, neuron.refractory)
        found.append(spike)
    refuse_not_finite(p, drive, neuron)
    return torch.stack(found).to(whole.dtype).view(whole.shape)
