"""Drop-in optimizers: the user's loop, another weight update."""

from __future__ import annotations

from beyondprop.optim.affine_projection import AffineProjection
from beyondprop.optim.factories import OptimizerFactory, adam, centered_rmsprop, sgd_with_decay
from beyondprop.optim.layers import register_layer
from beyondprop.optim.locoprop import LocoProp
from beyondprop.optim.rmsprop import RMSProp

__all__ = [
    "AffineProjection",
    "LocoProp",
    "OptimizerFactory",
    "RMSProp",
    "adam",
    "centered_rmsprop",
    "register_layer",
    "sgd_with_decay",
]
