"""Recursions over time: the neuron itself, its filter without reset, and what sums over spike pairs collapse to.

Tensors are time first here, `(T, N, ...)`: every step is then one piece of memory.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from beyondprop.nn.spiking.neuron import CubaLIF

SLACK = 1e-6
"""Below the threshold, what still fires: as in the authors' code."""


@dataclass(frozen=True)
class Filter:
    """Two leaky states in a row: what a synapse and a membrane do to spikes where nothing resets them.

    Attributes:
        keep_mem: what is left of the membrane after a step.
        keep_syn: what is left of the current after a step.
        gain: from the current to the membrane.
        delay: steps from a spike to its arrival.
    """

    keep_mem: float
    keep_syn: float
    gain: float
    delay: int

    @classmethod
    def of(cls, neuron: CubaLIF, kernel: str = "discrete") -> Filter:
        """Return a neuron's filter: `"discrete"` as it is simulated, or its `"continuous"` limit, sampled at the steps.

        Raises:
            ValueError: for the continuous kernel of a neuron with equal time constants, which is a limit of 0 / 0.
        """
        if kernel == "discrete":
            return cls(1.0 - 1.0 / neuron.tau_mem, 1.0 - 1.0 / neuron.tau_syn, 1.0 / neuron.tau_syn, neuron.delay)
        if neuron.tau_mem == neuron.tau_syn:
            raise ValueError(
                f"The continuous kernel divides by tau_mem - tau_syn, and both are {neuron.tau_mem:g}; take "
                'kernel="discrete", or make them differ.'
            )
        # Both recursions answer one spike by gain (m^(t + 1) - s^(t + 1)) / (m - s), one step ahead of the kernel.
        mem, syn = math.exp(-1.0 / neuron.tau_mem), math.exp(-1.0 / neuron.tau_syn)
        return cls(mem, syn, (mem - syn) / (1.0 - neuron.tau_syn / neuron.tau_mem), neuron.delay + 1)

    def delayed(self, delay: int) -> Filter:
        """Return the same with another delay."""
        return replace(self, delay=delay)


class Membranes:
    """The state of neurons between two steps: membrane v, current p, steps of refraction left, and who fired last.

    Args:
        drive: of one step, `(N, F)`, whose shape, kind and device the state has.
        neuron: the neuron.
        lateral: strength by which each spike inhibits all others of its sample in the next step.
    """

    def __init__(self, drive: Tensor, neuron: CubaLIF, lateral: float = 0.0) -> None:
        self.neuron, self.lateral = neuron, lateral
        self.v, self.p = torch.zeros_like(drive), torch.zeros_like(drive)
        self.held = torch.zeros(drive.shape, dtype=torch.int32, device=drive.device) if neuron.refractory else None
        self.fired: Tensor | None = None

    def advance(self, arriving: Tensor | None, out: Tensor) -> Tensor:
        """Take a step with what arrives in it, None for nothing; write the spikes to `out`, bool `(N, F)`."""
        neuron, v, p = self.neuron, self.v, self.p
        v.mul_(1.0 - 1.0 / neuron.tau_mem)
        p.mul_(1.0 - 1.0 / neuron.tau_syn)
        if arriving is not None:
            p.add_(arriving)
        if self.lateral and self.fired is not None:
            p.sub_(others(self.fired.to(p.dtype)), alpha=self.lateral)
        v.add_(p, alpha=1.0 / neuron.tau_syn)
        if self.held is not None:
            is_held = self.held > 0
            v.masked_fill_(is_held, 0.0)
            self.held.sub_(is_held.to(self.held.dtype))
        self.fired = torch.gt(v, neuron.threshold - SLACK, out=out)
        v.masked_fill_(self.fired, 0.0)
        if self.held is not None:
            self.held.masked_fill_(self.fired, neuron.refractory)
        return self.fired

    def fits(self, drive: Tensor, neuron: CubaLIF, lateral: float) -> bool:
        """Return whether such a drive can go on into it, `(N, F)`."""
        mine, other = ((one.shape, one.dtype, one.device) for one in (self.v, drive))
        return mine == other and (self.neuron, self.lateral) == (neuron, lateral)

    def __str__(self) -> str:
        return f"{self.neuron}, lateral={self.lateral:g}, {self.v.dtype} on {self.v.device}"

    def copy(self) -> Membranes:
        """Return the same state, which does not change with this one."""
        found = Membranes(self.v, self.neuron, self.lateral)
        found.v, found.p, found.fired = self.v.clone(), self.p.clone(), self.fired
        found.held = None if self.held is None else self.held.clone()
        return found


def others(spikes: Tensor) -> Tensor:
    """Return what each neuron's others sum to, `(..., F)`."""
    return spikes.sum(-1, keepdim=True) - spikes


def simulate(drive: Tensor, neuron: CubaLIF, lateral: float = 0.0) -> tuple[Tensor, Tensor]:
    """Return the spikes, bool `(T, N, F)`, of neurons that a drive `(T, N, F)` arrives at, and their last currents, `(N, F)`.

    Args:
        drive: what the synapses send in each step, before the delay.
        neuron: the neuron.
        lateral: strength by which each spike inhibits all others of its sample in the next step.
    """
    spikes = torch.empty(drive.shape, dtype=torch.bool, device=drive.device)
    state = Membranes(drive[0], neuron, lateral)
    for t in range(len(drive)):
        state.advance(drive[t - neuron.delay] if t >= neuron.delay else None, spikes[t])
    return spikes, state.p


def response(drive: Tensor, kernel: Filter) -> Tensor:
    """Return the membrane that a drive `(T, ...)` would cause without any reset, `(T, ...)`."""
    found = torch.empty_like(drive)
    v, p = torch.zeros_like(drive[0]), torch.zeros_like(drive[0])
    for t in range(len(drive)):
        v.mul_(kernel.keep_mem)
        p.mul_(kernel.keep_syn)
        if t >= kernel.delay:
            p.add_(drive[t - kernel.delay])
        v.add_(p, alpha=kernel.gain)
        found[t] = v
    return found


def adjoint_response(cotangent: Tensor, kernel: Filter) -> Tensor:
    """Return the transpose of `response` at `(T, ...)`."""
    found = torch.zeros_like(cotangent)
    m, s = torch.zeros_like(cotangent[0]), torch.zeros_like(cotangent[0])
    for t in reversed(range(len(cotangent))):
        m.mul_(kernel.keep_mem).add_(cotangent[t])
        s.mul_(kernel.keep_syn).add_(m, alpha=kernel.gain)
        if t >= kernel.delay:
            found[t - kernel.delay] = s
    return found


def weights_of_firings(spikes: Tensor, keep: float, refractory: int, dtype: torch.dtype) -> Tensor:
    """Return Q, `(T, N, F)`: the sum over time of Q times a response without reset is what it adds to the membranes that fire.

    At a firing f, a membrane released at r is `U(f) - keep^(f - r) U(r)`, as the current is not reset: 1 at f, and
    `-keep^(f - r)` at r.
    """
    ahead = torch.zeros(
        spikes.shape, dtype=dtype, device=spikes.device
    )  # keep to the power of steps to the next firing
    for t in reversed(range(len(spikes) - 1)):
        torch.mul(ahead[t + 1].masked_fill(spikes[t + 1], 1.0), keep, out=ahead[t])
    found = spikes.to(dtype)
    if refractory < len(spikes):
        found[refractory:] -= ahead[refractory:] * spikes[: len(spikes) - refractory]
    return found
