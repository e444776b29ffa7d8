"""Train PyTorch networks by what comes after plain backpropagation, side by side with it."""

from __future__ import annotations

import importlib
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from beyondprop.chain import Chain
    from beyondprop.credit.base import Assignment, Credit
    from beyondprop.credit.codes import CodeProblem, Codes
    from beyondprop.credit.damping import RelativeDamping
    from beyondprop.credit.feedback import DirectFeedbackAlignment, FeedbackAlignment
    from beyondprop.credit.targets import DifferenceTargetPropagation, TargetPropagation
    from beyondprop.diagnostics import Alignment, alignment
    from beyondprop.errors import FrozenStageWarning, NonFiniteError, UnsupportedModelError
    from beyondprop.optim.affine_projection import AffineProjection
    from beyondprop.optim.locoprop import LocoProp
    from beyondprop.registry import RuleSpec, register
    from beyondprop.rules.admm import ADMM
    from beyondprop.rules.altmin import AltMin
    from beyondprop.rules.backprop import Backprop
    from beyondprop.rules.base import LearningRule, StepResult
    from beyondprop.rules.bcd import BCD
    from beyondprop.rules.ewc import OnlineEWC
    from beyondprop.rules.local import LocalRule
    from beyondprop.rules.mac import MAC
    from beyondprop.rules.offline import OfflineRule
    from beyondprop.rules.offline_altmin import OfflineAltMin
    from beyondprop.rules.targetprop import DifferenceTargetProp
    from beyondprop.solvers.base import Solver
    from beyondprop.solvers.descent import Descent
    from beyondprop.solvers.memory import Memory
    from beyondprop.stage import Pullback, Stage
    from beyondprop.training import evaluate, fit

try:
    __version__ = version("beyondprop")
except PackageNotFoundError:  # a source tree on the path, not installed
    __version__ = "0+unknown"

# Loaded when asked for: `beyondprop --help` shall not wait for torch.
_HOMES = {
    "beyondprop.chain": ("Chain",),
    "beyondprop.credit.base": ("Assignment", "Credit"),
    "beyondprop.credit.codes": ("CodeProblem", "Codes"),
    "beyondprop.credit.damping": ("RelativeDamping",),
    "beyondprop.credit.feedback": ("DirectFeedbackAlignment", "FeedbackAlignment"),
    "beyondprop.credit.targets": ("DifferenceTargetPropagation", "TargetPropagation"),
    "beyondprop.diagnostics": ("Alignment", "alignment"),
    "beyondprop.errors": ("FrozenStageWarning", "NonFiniteError", "UnsupportedModelError"),
    "beyondprop.optim.affine_projection": ("AffineProjection",),
    "beyondprop.optim.locoprop": ("LocoProp",),
    "beyondprop.registry": ("RuleSpec", "register"),
    "beyondprop.rules.admm": ("ADMM",),
    "beyondprop.rules.altmin": ("AltMin",),
    "beyondprop.rules.backprop": ("Backprop",),
    "beyondprop.rules.base": ("LearningRule", "StepResult"),
    "beyondprop.rules.bcd": ("BCD",),
    "beyondprop.rules.ewc": ("OnlineEWC",),
    "beyondprop.rules.local": ("LocalRule",),
    "beyondprop.rules.mac": ("MAC",),
    "beyondprop.rules.offline": ("OfflineRule",),
    "beyondprop.rules.offline_altmin": ("OfflineAltMin",),
    "beyondprop.rules.targetprop": ("DifferenceTargetProp",),
    "beyondprop.solvers.base": ("Solver",),
    "beyondprop.solvers.descent": ("Descent",),
    "beyondprop.solvers.memory": ("Memory",),
    "beyondprop.stage": ("Pullback", "Stage"),
    "beyondprop.training": ("evaluate", "fit"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [  # noqa: RUF022 - in the order of sorted(), as a test has it
    "ADMM",
    "AffineProjection",
    "Alignment",
    "AltMin",
    "Assignment",
    "BCD",
    "Backprop",
    "Chain",
    "CodeProblem",
    "Codes",
    "Credit",
    "Descent",
    "DifferenceTargetProp",
    "DifferenceTargetPropagation",
    "DirectFeedbackAlignment",
    "FeedbackAlignment",
    "FrozenStageWarning",
    "LearningRule",
    "LocalRule",
    "LocoProp",
    "MAC",
    "Memory",
    "NonFiniteError",
    "OfflineAltMin",
    "OfflineRule",
    "OnlineEWC",
    "Pullback",
    "RelativeDamping",
    "RuleSpec",
    "Solver",
    "Stage",
    "StepResult",
    "TargetPropagation",
    "UnsupportedModelError",
    "alignment",
    "evaluate",
    "fit",
    "register",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_HOME_OF[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
