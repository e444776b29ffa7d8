"""Train PyTorch networks by what comes after plain backpropagation, side by side with it."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from beyondprop.chain import Chain
from beyondprop.credit.base import Assignment, Credit
from beyondprop.credit.codes import CodeProblem, Codes
from beyondprop.diagnostics import Alignment, alignment
from beyondprop.errors import FrozenStageWarning, NonFiniteError, UnsupportedModelError
from beyondprop.registry import RuleSpec, register
from beyondprop.rules.altmin import AltMin
from beyondprop.rules.backprop import Backprop
from beyondprop.rules.base import LearningRule, StepResult
from beyondprop.rules.local import LocalRule
from beyondprop.solvers.base import Solver
from beyondprop.solvers.descent import Descent
from beyondprop.solvers.memory import Memory
from beyondprop.stage import Pullback, Stage

try:
    __version__ = version("beyondprop")
except PackageNotFoundError:  # a source tree on the path, not installed
    __version__ = "0+unknown"

__all__ = [
    "Alignment",
    "AltMin",
    "Assignment",
    "Backprop",
    "Chain",
    "CodeProblem",
    "Codes",
    "Credit",
    "Descent",
    "FrozenStageWarning",
    "LearningRule",
    "LocalRule",
    "Memory",
    "NonFiniteError",
    "Pullback",
    "RuleSpec",
    "Solver",
    "Stage",
    "StepResult",
    "UnsupportedModelError",
    "alignment",
    "register",
]
