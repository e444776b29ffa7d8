"""The exceptions and warnings that are this package's own."""

from __future__ import annotations

__all__ = [
    "BlackBoxError",
    "CallBudgetExceededError",
    "DataIntegrityError",
    "DataUnavailableError",
    "FrozenStageWarning",
    "NonFiniteError",
    "ReconstructionWarning",
    "SensingWarning",
    "SpikingWarning",
    "UnsupportedModelError",
]


class UnsupportedModelError(ValueError):
    """The model, or one module in it, cannot be trained by the rule that was asked for."""


class NonFiniteError(RuntimeError):
    """A NaN or Inf appeared; no weight, running statistic or optimizer state was changed by that step.

    Attributes:
        where: what was non-finite first: a stage's dotted name, `"x"`, `"y"`, `"loss"`, `"input of a black box"`, or
            `"drive"` of spiking neurons.
    """

    def __init__(self, message: str, where: str) -> None:
        super().__init__(message)
        self.where = where


class FrozenStageWarning(UserWarning):
    """A stage with trainable weights does not move while others do."""


class ReconstructionWarning(UserWarning):
    """A reversible block's input is reconstructed with an error that spoils the gradients below it."""


class BlackBoxError(RuntimeError):
    """A call of a black box failed, or returned what no derivative can be taken of."""


class CallBudgetExceededError(RuntimeError):
    """A black box would have been called more often than its budget allows; it was not.

    Attributes:
        calls: calls that were made.
        asked: calls that were asked for in addition.
        max_calls: the budget.
    """

    def __init__(self, calls: int, asked: int, max_calls: int) -> None:
        super().__init__(
            f"{asked} more calls of the black box would make {calls + asked}, and its budget is max_calls={max_calls}; none of "
            "them was made. Raise max_calls, or take fewer probes."
        )
        self.calls, self.asked, self.max_calls = calls, asked, max_calls

    def __reduce__(self) -> tuple[type, tuple[int, int, int]]:
        return type(self), (self.calls, self.asked, self.max_calls)


class SensingWarning(UserWarning):
    """What a black box returned does not fit what its Jacobian was said to be, or is too noisy to tell."""


class DataUnavailableError(FileNotFoundError):
    """A file of a data set is in none of the known places and could not be downloaded."""


class DataIntegrityError(ValueError):
    """A file of a data set is there, but its content is not what it must be."""


class SpikingWarning(UserWarning):
    """All neurons of a spiking layer are silent, or fire in nearly every step."""
