"""Train PyTorch networks by what comes after plain backpropagation, side by side with it."""

from __future__ import annotations

import importlib
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from beyondprop.credit import (
        Assignment,
        CodeProblem,
        Codes,
        Credit,
        CreditBlock,
        Credited,
        DifferenceTargetPropagation,
        DirectFeedbackAlignment,
        FeedbackAlignment,
        RelativeDamping,
        TargetPropagation,
    )
    from beyondprop.errors import FrozenStageWarning, NonFiniteError, UnsupportedModelError
    from beyondprop.lab import Alignment, RuleSpec, alignment, evaluate, fit, register
    from beyondprop.optim import AffineProjection, LocoProp, register_layer
    from beyondprop.rules import (
        ADMM,
        BCD,
        MAC,
        AltMin,
        Backprop,
        DifferenceTargetProp,
        LearningRule,
        LocalRule,
        OfflineAltMin,
        OfflineRule,
        OnlineEWC,
        StepResult,
    )
    from beyondprop.solvers import Descent, Memory, Solver
    from beyondprop.stages import Chain, Pullback, Stage

try:
    __version__ = version("beyondprop")
except PackageNotFoundError:  # a source tree on the path, not installed
    __version__ = "0+unknown"

_ROOMS = ("errors", "optim", "stages", "credit", "solvers", "rules", "lab")

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
    "CreditBlock",
    "Credited",
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
    "register_layer",
]


def __getattr__(name: str) -> Any:
    # Loaded when asked for, lowest room first: `beyondprop --help` shall not wait for torch.
    if name in __all__:
        for room in map(importlib.import_module, (f"{__name__}.{room}" for room in _ROOMS)):
            if name in room.__all__:
                value = globals()[name] = getattr(room, name)
                return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
