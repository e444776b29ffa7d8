"""Layers with a backward of their own, or a code of their own; any optimizer and any rule trains them."""

from __future__ import annotations

from beyondprop.nn.binary import Sign, Step, register_target_rule
from beyondprop.nn.recurrent import ElmanCell, Recurrent
from beyondprop.nn.residual import Residual, Shortcut
from beyondprop.nn.transformer import MeanOverPositions, Patches, Positions

__all__ = [
    "ElmanCell",
    "MeanOverPositions",
    "Patches",
    "Positions",
    "Recurrent",
    "Residual",
    "Shortcut",
    "Sign",
    "Step",
    "register_target_rule",
]
