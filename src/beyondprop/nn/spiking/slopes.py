"""How a count follows the membranes that it is made of."""

from __future__ import annotations

import torch
from torch import Tensor

from beyondprop.nn.spiking.neuron import CubaLIF

MOST = 10.0
"""What the leak at most magnifies a slope by: a neuron that seldom fires is moved by single spikes, not by its mean drive."""


def of_counts(counts: Tensor, sums: Tensor, neuron: CubaLIF, steps: int) -> Tensor:
    """Return the derivative of counts by the sum of membranes at firings, `(N, F)`: `g nu / (mean (mean + 2 R (mean - nu)))`.

    A count would be that sum over the threshold nu, if all membranes fired at nu, and none leaked. In discrete time a constant
    current d fires every `n + R` steps, n being nu / d rounded up, nu / d + 1/2 in the mean: membranes fire at
    `mean = nu + d / 2`, and what is above nu is lost with the reset. A neuron that fires as often as it can gains nothing by
    more current. With a leak, an interval of n steps between release and firing has n by nu / d in
    `n = -tau log(1 - nu / (d tau))`: a change of d moves n by `g = (exp(n / tau) - 1) / (n / tau)` times as much as without.

    Args:
        counts: of spikes, `(N, F)`.
        sums: of the membranes that fired, `(N, F)`; without a spike, the slope is 1 / nu.
        neuron: the neuron.
        steps: of the presentation.

    Source: our derivation; of trains at random it holds within a quarter for mean counts from 4 to nine tenths of the most.
    """
    nu, refractory = neuron.threshold, neuron.refractory
    # Below a threshold as small as the slack of firing, membranes fire that are 0.
    mean = torch.where(counts > 0, sums / counts.clamp(min=1.0), nu).clamp(min=nu)
    interval = (steps / (counts + 1.0) - refractory).clamp(min=1.0) / neuron.tau_mem
    leak = torch.where(counts > 0, torch.expm1(interval) / interval, 1.0).clamp(max=MOST)
    return leak * nu / (mean * (mean + 2.0 * refractory * (mean - nu)))
