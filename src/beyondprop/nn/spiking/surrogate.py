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
    """Whether membranes are above a threshold, 0 or 1; the slope is that of their distance from it in some unit."""

    @staticmethod
    def forward(ctx: Any, v: Tensor, threshold: float, unit: float) -> Tensor:
        ctx.save_for_backward(v)
        ctx.threshold, ctx.unit = threshold, unit
        return (v > v.new_tensor(threshold)).to(v.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        (v,) = ctx.saved_tensors
        distance = (v - ctx.threshold) * (math.pi / 2 * WIDTH / ctx.unit)
        return gradient / (distance.square() + 1.0) / ctx.unit, None, None


def fire(x: Tensor, op: nn.Module, neuron: CubaLIF, lateral: float = 0.0) -> Tensor:
    """Return the spikes of `scans.simulate`, differentiable in every step; the reset is not differentiated.

    Args:
        x: spikes `(N, T, ...)`.
        op: the operator.
        neuron: what fires.
        lateral: strength by which each spike inhibits all others of its sample in the next step.
    """
    whole = op(x.flatten(0, 1))
    whole = whole.reshape(*x.shape[:2], *whole.shape[1:])
    drive = precise(whole.flatten(2)).unbind(1)  # whose backward pass is linear in time, as that of indices is not
    keep_mem, keep_syn = 1.0 - 1.0 / neuron.tau_mem, 1.0 - 1.0 / neuron.tau_syn
    threshold = (neuron.threshold - SLACK) * neuron.tau_syn  # membranes are counted as in `scans.Membranes`
    v, p = torch.zeros_like(drive[0]), torch.zeros_like(drive[0])
    held = torch.zeros_like(v, dtype=torch.int32)
    found: list[Tensor] = []
    for t in range(len(drive)):
        p = torch.add(drive[t - neuron.delay], p, alpha=keep_syn) if t >= neuron.delay else p * keep_syn
        if lateral and found:
            p = torch.sub(p, others(found[-1]), alpha=lateral)
        v = torch.add(p, v, alpha=keep_mem)
        if neuron.refractory:
            v, held = v.masked_fill(held > 0, 0.0), (held - 1).clamp(min=0)
        spike = _Spike.apply(v, threshold, neuron.threshold * neuron.tau_syn)
        fired = spike.detach() > 0
        v, held = v.masked_fill(fired, 0.0), held.masked_fill(fired, neuron.refractory)
        found.append(spike)
    refuse_not_finite(v, p, *drive[len(drive) - min(neuron.delay, len(drive)) :])
    return torch.stack(found, 1).to(whole.dtype).view(whole.shape)
