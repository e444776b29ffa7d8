"""Credit: what each stage of a chain should have produced."""

from __future__ import annotations

from beyondprop.credit.asynchronous import AsynchronousPipeline
from beyondprop.credit.base import Assignment, Credit
from beyondprop.credit.behind_backward import CreditBlock, Credited
from beyondprop.credit.code_problem import CodeProblem
from beyondprop.credit.codes import Codes
from beyondprop.credit.damping import RelativeDamping
from beyondprop.credit.feedback import DirectFeedbackAlignment, FeedbackAlignment
from beyondprop.credit.targets import DifferenceTargetPropagation, TargetPropagation

__all__ = [
    "Assignment",
    "AsynchronousPipeline",
    "CodeProblem",
    "Codes",
    "Credit",
    "CreditBlock",
    "Credited",
    "DifferenceTargetPropagation",
    "DirectFeedbackAlignment",
    "FeedbackAlignment",
    "RelativeDamping",
    "TargetPropagation",
]
