"""Learning rules: what replaces the backward pass, one `step(x, y)` a batch."""

from __future__ import annotations

from beyondprop.rules.altmin import AltMin
from beyondprop.rules.backprop import Backprop
from beyondprop.rules.base import LearningRule, StepResult
from beyondprop.rules.ewc import OnlineEWC
from beyondprop.rules.local import LocalRule
from beyondprop.rules.offline import ADMM, BCD, MAC, OfflineAltMin, OfflineRule, OfflineState
from beyondprop.rules.targetprop import DifferenceTargetProp

__all__ = [
    "ADMM",
    "BCD",
    "MAC",
    "AltMin",
    "Backprop",
    "DifferenceTargetProp",
    "LearningRule",
    "LocalRule",
    "OfflineAltMin",
    "OfflineRule",
    "OfflineState",
    "OnlineEWC",
    "StepResult",
]
