"""Jacobians of functions that autograd cannot see, from as few calls as their structure allows."""

from beyondprop.func.sensing.calls import Counts
from beyondprop.func.sensing.coloring import Coloring, color_columns
from beyondprop.func.sensing.discovery import Detection
from beyondprop.func.sensing.functional import detect_pattern, jacobian, verify, vjp
from beyondprop.func.sensing.patterns import Pattern
from beyondprop.func.sensing.verification import Verification

__all__ = [
    "Coloring",
    "Counts",
    "Detection",
    "Pattern",
    "Verification",
    "color_columns",
    "detect_pattern",
    "jacobian",
    "verify",
    "vjp",
]
