"""The exceptions and warnings that are this package's own."""

from __future__ import annotations

__all__ = [
    "DataIntegrityError",
    "DataUnavailableError",
    "FrozenStageWarning",
    "NonFiniteError",
    "ReconstructionWarning",
    "UnsupportedModelError",
]


class UnsupportedModelError(ValueError):
    """The model, or one module in it, cannot be trained by the rule that was asked for."""


class NonFiniteError(RuntimeError):
    """A NaN or Inf appeared; no weight, running statistic or optimizer state was changed by that step.

    Attributes:
        where: what was non-finite first: a stage's dotted name, `"x"`, `"y"` or `"loss"`.
    """

    def __init__(self, message: str, where: str) -> None:
        super().__init__(message)
        self.where = where


class FrozenStageWarning(UserWarning):
    """A stage with trainable weights does not move while others do."""


class ReconstructionWarning(UserWarning):
    """A reversible block's input is reconstructed with an error that spoils the gradients below it."""


class DataUnavailableError(FileNotFoundError):
    """A file of a data set is in none of the known places and could not be downloaded."""


class DataIntegrityError(ValueError):
    """A file of a data set is there, but its content is not what it must be."""
