"""Recursions over time: the neuron itself, its filter without reset, and what sums over spike pairs collapse to.

Tensors are time first here, `(T, N, ...)`, and mostly views of batch first ones.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
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
    """The state of neurons between two steps: membrane v, current p, and what they fired lately.

    A membrane that fired and has a refraction before it is reset by that, in the next step.

    The membrane is counted in what an undelayed current of 1 adds to it, `1 / tau_syn`: two products fewer in every step.

    Args:
        drive: of one step, `(N, F)`, whose shape, kind and device the state has.
        neuron: the neuron.
        lateral: strength by which each spike inhibits all others of its sample in the next step.
    """

    def __init__(self, drive: Tensor, neuron: CubaLIF, lateral: float = 0.0) -> None:
        self.neuron, self.lateral = neuron, lateral
        self.v, self.p = torch.zeros_like(drive), torch.zeros_like(drive)
        self.threshold = drive.new_tensor((neuron.threshold - SLACK) * neuron.tau_syn)
        self.held = torch.zeros_like(drive)  # a running sum over long refractions, and room for one of two steps
        self.fired: deque[Tensor] = deque()  # spikes of as many steps as still matter, the last one last

    def advance(self, arriving: Tensor | None, fired: Tensor, sums: Tensor | None = None) -> Tensor:
        """Take a step with what arrives in it, None for nothing; write the spikes, 0 or 1, to `fired`, `(N, F)`.

        The membranes that fired are added to `sums`.
        """
        neuron, v, p = self.neuron, self.v, self.p
        keep_mem, keep_syn = 1.0 - 1.0 / neuron.tau_mem, 1.0 - 1.0 / neuron.tau_syn
        if arriving is None:
            p.mul_(keep_syn)
        else:
            torch.add(arriving, p, alpha=keep_syn, out=p)
        if self.lateral and self.fired:
            p.sub_(others(self.fired[-1]), alpha=self.lateral)
        torch.add(p, v, alpha=keep_mem, out=v)
        held = self._held()
        if held is not None:
            v.addcmul_(v, held, value=-1.0)
        torch.gt(v, self.threshold, out=fired)
        if sums is not None:
            sums.addcmul_(v, fired)
        if not neuron.refractory:  # else the refraction does it, a step later
            v.addcmul_(v, fired, value=-1.0)
        self.fired.append(fired)
        if len(self.fired) > max(neuron.refractory, 1):
            oldest = self.fired.popleft()
            if neuron.refractory > 2:
                self.held.sub_(oldest)
        if neuron.refractory > 2:
            self.held.add_(fired)
        return fired

    def _held(self) -> Tensor | None:
        """Return 1 for neurons in refraction, and 0, `(N, F)`; there is one spike at most in each."""
        refractory, fired = self.neuron.refractory, self.fired
        if not refractory or not fired:
            return None
        if len(fired) == 1:
            return fired[-1]
        return torch.add(fired[-1], fired[-2], out=self.held) if refractory == 2 else self.held

    def fits(self, drive: Tensor, neuron: CubaLIF, lateral: float) -> bool:
        """Return whether such a drive can go on into it, `(N, F)`."""
        mine, other = ((one.shape, one.dtype, one.device) for one in (self.v, drive))
        return mine == other and (self.neuron, self.lateral) == (neuron, lateral)

    def __str__(self) -> str:
        return f"{self.neuron}, lateral={self.lateral:g}, {self.v.dtype} on {self.v.device}"

    def copy(self) -> Membranes:
        """Return the same state, which does not change with this one."""
        found = Membranes(self.v, self.neuron, self.lateral)
        found.v, found.p, found.fired = self.v.clone(), self.p.clone(), self.fired.copy()
        found.held = self.held.clone()
        return found


def others(spikes: Tensor) -> Tensor:
    """Return what each neuron's others sum to, `(..., F)`."""
    return spikes.sum(-1, keepdim=True) - spikes


def simulate(
    drive: Tensor, neuron: CubaLIF, lateral: float = 0.0, spikes: Tensor | None = None, sums: Tensor | None = None
) -> tuple[Tensor, Membranes]:
    """Return what neurons fire that a drive `(T, N, F)` arrives at, 0 or 1, and their last state.

    Args:
        drive: what the synapses send in each step, before the delay.
        neuron: the neuron.
        lateral: strength by which each spike inhibits all others of its sample in the next step.
        spikes: where to write them, `(T, N, F)`; None: memory like the drive's.
        sums: what the membranes that fire are added to, `(N, F)`.
    """
    spikes = torch.empty_like(drive) if spikes is None else spikes
    state = Membranes(drive[0], neuron, lateral)
    own = None if sums is None else torch.zeros_like(sums)
    for t in range(len(drive)):
        state.advance(drive[t - neuron.delay] if t >= neuron.delay else None, spikes[t], own)
    if sums is not None and own is not None:
        sums.add_(own, alpha=1.0 / neuron.tau_syn)
    return spikes, state


def response(drive: Tensor, kernel: Filter) -> Tensor:
    """Return the membrane that a drive `(T, ...)` would cause without any reset, `(T, ...)`."""
    found = torch.empty_like(drive)
    v, p = torch.zeros_like(drive[0]), torch.zeros_like(drive[0])
    for t in range(len(drive)):
        if t >= kernel.delay:
            torch.add(drive[t - kernel.delay], p, alpha=kernel.keep_syn, out=p)
        v = torch.add(p, v, alpha=kernel.keep_mem, out=found[t])
    return found.mul_(kernel.gain)


def adjoint_response(cotangent: Tensor, kernel: Filter) -> Tensor:
    """Return the transpose of `response` at `(T, ...)`."""
    found = torch.empty_like(cotangent)
    found[len(cotangent) - min(kernel.delay, len(cotangent)) :] = 0.0
    m, s = torch.zeros_like(cotangent[0]), torch.zeros_like(cotangent[0])
    for t in reversed(range(kernel.delay, len(cotangent))):
        torch.add(cotangent[t], m, alpha=kernel.keep_mem, out=m)
        s = torch.add(m, s, alpha=kernel.keep_syn, out=found[t - kernel.delay])
    return found.mul_(kernel.gain)


def weights_of_firings(spikes: Tensor, keep: float, refractory: int) -> Tensor:
    """Return Q, `(T, N, F)`: the sum over time of Q times a response without reset is what it adds to the membranes that fire.

    At a firing f, a membrane released at r is `U(f) - keep^(f - r) U(r)`, as the current is not reset: 1 at f, and
    `-keep^(f - r)` at r.
    """
    found = spikes.clone()
    for t, ahead in _until_the_next(spikes, keep, refractory):
        found[t].addcmul_(ahead, spikes[t - refractory], value=-1.0)
    return found


def adjoint_of_firings(spikes: Tensor, kernel: Filter, refractory: int) -> Tensor:
    """Return `adjoint_response(weights_of_firings(spikes))` over the gain, `(T, N, F)`, in one scan."""
    found = torch.empty_like(spikes)
    found[len(spikes) - min(kernel.delay, len(spikes)) :] = 0.0
    m, s = torch.zeros_like(spikes[0]), torch.zeros_like(spikes[0])
    ahead = _until_the_next(spikes, kernel.keep_mem, refractory)
    for t in reversed(range(kernel.delay, len(spikes))):
        torch.add(spikes[t], m, alpha=kernel.keep_mem, out=m)
        if t >= refractory:
            m.addcmul_(next(ahead)[1], spikes[t - refractory], value=-1.0)
        s = torch.add(m, s, alpha=kernel.keep_syn, out=found[t - kernel.delay])
    return found


def _until_the_next(spikes: Tensor, keep: float, refractory: int) -> Iterator[tuple[int, Tensor]]:
    """Yield steps from the last to that of the refraction, and `keep` to the power of steps to the next firing, `(N, F)`.

    That is 0 where there is none.
    """
    ahead, one = torch.zeros_like(spikes[0]), spikes.new_ones(()).expand(spikes.shape[1:])
    for t in reversed(range(refractory, len(spikes))):
        if t + 1 < len(spikes):
            torch.lerp(ahead, one, spikes[t + 1], out=ahead).mul_(keep)
        yield t, ahead
