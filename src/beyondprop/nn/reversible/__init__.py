"""Reversible networks: activation memory that does not grow with depth.

`couplings` has the blocks, `streams` the two tensors that run through them, `replay` what a function needs to run once more,
`passes` and `back` the two directions, `function` both as one `torch.autograd.Function`, `chain` the module.
"""

from __future__ import annotations

from beyondprop.nn.reversible.chain import ReversibleSequential, reversible_sequential
from beyondprop.nn.reversible.couplings import AdditiveCoupling, AffineCoupling, Coupling, MomentumCoupling
from beyondprop.nn.reversible.measures import gradient_angle, reconstruction_error
from beyondprop.nn.reversible.recomputed import Recomputed
from beyondprop.nn.reversible.unwinding import Unwound

__all__ = [
    "AdditiveCoupling",
    "AffineCoupling",
    "Coupling",
    "MomentumCoupling",
    "Recomputed",
    "ReversibleSequential",
    "Unwound",
    "gradient_angle",
    "reconstruction_error",
    "reversible_sequential",
]
