"""Layers with a backward of their own, or a code of their own; any optimizer and any rule trains them."""

from __future__ import annotations

from beyondprop.nn.binary import Sign, Step, register_target_rule
from beyondprop.nn.blackbox import BlackBox
from beyondprop.nn.recurrent import ElmanCell, Recurrent
from beyondprop.nn.residual import Residual, Shortcut
from beyondprop.nn.reversible import (
    AdditiveCoupling,
    AffineCoupling,
    Coupling,
    MomentumCoupling,
    Recomputed,
    ReversibleSequential,
    Unwound,
    gradient_angle,
    reconstruction_error,
    reversible_sequential,
)
from beyondprop.nn.revnets import (
    PooledShortcut,
    TransitionCoupling,
    preactivation_resnet,
    resnet32,
    resnet50,
    resnet101,
    resnet110,
    resnet164,
    revnet,
    revnet38,
    revnet56,
    revnet104,
    revnet110,
    revnet164,
)
from beyondprop.nn.revtransformer import ReversibleEncoder
from beyondprop.nn.spiking import (
    CubaLIF,
    CurrentEncoder,
    LatencyEncoder,
    PoissonEncoder,
    SpikeCountLoss,
    SpikeCounts,
    SpikeMonitor,
    SpikingLayer,
    SpikingSumPool2d,
    convert_to_spiking,
)
from beyondprop.nn.transformer import MeanOverPositions, Patches, Positions

__all__ = [
    "AdditiveCoupling",
    "AffineCoupling",
    "BlackBox",
    "Coupling",
    "CubaLIF",
    "CurrentEncoder",
    "ElmanCell",
    "LatencyEncoder",
    "MeanOverPositions",
    "MomentumCoupling",
    "Patches",
    "PoissonEncoder",
    "PooledShortcut",
    "Positions",
    "Recomputed",
    "Recurrent",
    "Residual",
    "ReversibleEncoder",
    "ReversibleSequential",
    "Shortcut",
    "Sign",
    "SpikeCountLoss",
    "SpikeCounts",
    "SpikeMonitor",
    "SpikingLayer",
    "SpikingSumPool2d",
    "Step",
    "TransitionCoupling",
    "Unwound",
    "convert_to_spiking",
    "gradient_angle",
    "preactivation_resnet",
    "reconstruction_error",
    "register_target_rule",
    "resnet32",
    "resnet50",
    "resnet101",
    "resnet110",
    "resnet164",
    "reversible_sequential",
    "revnet",
    "revnet38",
    "revnet56",
    "revnet104",
    "revnet110",
    "revnet164",
]
