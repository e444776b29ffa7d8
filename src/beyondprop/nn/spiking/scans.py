"""Recursions over time: the neuron itself, its filter without reset, and what sums over spike pairs collapse to.

Tensors are time first here, `(T, N, ...)`: every step is then one piece of memory.
"""

from __future__ import annotations

import torch
from torch import Tensor

from beyondprop.nn.spiking.neuron import CubaLIF

SLACK = 1e-6
"""Below the threshold, what still fires: as in the authors' code."""


def simulate(drive: Tensor, neuron: CubaLIF, lateral: float = 0.0) -> Tensor:
    """Return the spikes, bool `(T, N, F)`, of neurons that a drive `(T, N, F)` arrives at.

    Args:
        drive: what the synapses send in each step, before the delay.
        neuron: the neuron.
        lateral: strength by which each spike inhibits all others of its sample in the next step.
    """
    spikes = torch.empty(drive.shape, dtype=torch.bool, device=drive.device)
    v, p = torch.zeros_like(drive[0]), torch.zeros_like(drive[0])
    held = torch.zeros(drive.shape[1:], dtype=torch.int32, device=drive.device) if neuron.refractory else None
    keep_v, keep_p, gain = 1.0 - 1.0 / neuron.tau_mem, 1.0 - 1.0 / neuron.tau_syn, 1.0 / neuron.tau_syn
    least = neuron.threshold - SLACK
    for t in range(len(drive)):
        v.mul_(keep_v)
        p.mul_(keep_p)
        if t >= neuron.delay:
            p.add_(drive[t - neuron.delay])
        if lateral and t:
            before = spikes[t - 1].to(p.dtype)
            p.sub_(before.sum(-1, keepdim=True) - before, alpha=lateral)
        v.add_(p, alpha=gain)
        if held is not None:
            is_held = held > 0
            v.masked_fill_(is_held, 0.0)
            held.sub_(is_held.to(held.dtype))
        fired = torch.gt(v, least, out=spikes[t])
        v.masked_fill_(fired, 0.0)
        if held is not None:
            held.masked_fill_(fired, neuron.refractory)
    return spikes


def response(drive: Tensor, neuron: CubaLIF) -> Tensor:
    """Return the membrane that a drive `(T, ...)` would cause without any reset, `(T, ...)`."""
    found = torch.empty_like(drive)
    v, p = torch.zeros_like(drive[0]), torch.zeros_like(drive[0])
    keep_v, keep_p, gain = 1.0 - 1.0 / neuron.tau_mem, 1.0 - 1.0 / neuron.tau_syn, 1.0 / neuron.tau_syn
    for t in range(len(drive)):
        v.mul_(keep_v)
        p.mul_(keep_p)
        if t >= neuron.delay:
            p.add_(drive[t - neuron.delay])
        v.add_(p, alpha=gain)
        found[t] = v
    return found


def adjoint_response(cotangent: Tensor, neuron: CubaLIF) -> Tensor:
    """Return the transpose of `response` at `(T, ...)`."""
    found = torch.zeros_like(cotangent)
    m, s = torch.zeros_like(cotangent[0]), torch.zeros_like(cotangent[0])
    keep_v, keep_p, gain = 1.0 - 1.0 / neuron.tau_mem, 1.0 - 1.0 / neuron.tau_syn, 1.0 / neuron.tau_syn
    for t in reversed(range(len(cotangent))):
        m.mul_(keep_v).add_(cotangent[t])
        s.mul_(keep_p).add_(m, alpha=gain)
        if t >= neuron.delay:
            found[t - neuron.delay] = s
    return found


def weights_of_firings(spikes: Tensor, neuron: CubaLIF, dtype: torch.dtype) -> Tensor:
    """Return Q, `(T, N, F)`: the sum over time of Q times a response without reset is what it adds to the membranes that fire.

    At a firing f, a membrane released at r is `U(f) - k^(f - r) U(r)`, k its leak, as the current is not reset: 1 at f, and
    `-k^(f - r)` at r.
    """
    keep, held = 1.0 - 1.0 / neuron.tau_mem, neuron.refractory
    ahead = torch.zeros(spikes.shape, dtype=dtype, device=spikes.device)  # k to the power of steps to the next firing
    for t in reversed(range(len(spikes) - 1)):
        torch.mul(ahead[t + 1].masked_fill(spikes[t + 1], 1.0), keep, out=ahead[t])
    found = spikes.to(dtype)
    if held < len(spikes):
        found[held:] -= ahead[held:] * spikes[: len(spikes) - held]
    return found
