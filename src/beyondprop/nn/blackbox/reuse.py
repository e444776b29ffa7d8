"""Jacobians of the batch before, which serve again where inputs have hardly moved, as in control loops."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from beyondprop import _checks
from beyondprop.func.sensing.linearised import Linearised


class Reuse:
    """Jacobians that are kept, sample by sample.

    Args:
        refresh: how many backward passes a Jacobian serves.
        within: how far each input may move, relative to its size where that is above 1.

    Raises:
        ValueError: if there is no such distance: samples of one place in two batches have nothing in common by themselves.
    """

    def __init__(self, refresh: int, within: float | None) -> None:
        _checks.at_least("refresh", refresh, 1)
        if refresh > 1 and within is None:
            raise ValueError(
                "refresh > 1 needs refresh_within, how far an input may move before its Jacobian is sensed anew; in training, "
                "the samples of one batch are not those of the next."
            )
        if within is not None:
            _checks.non_negative("refresh_within", within)
        self.refresh, self.within = refresh, within or 0.0
        self.x: Tensor | None = None
        self.found: Linearised | None = None
        self.age = torch.zeros(0, dtype=torch.int64)

    @property
    def is_on(self) -> bool:
        """Whether any Jacobian serves twice."""
        return self.refresh > 1

    def linearise(self, x: Tensor, sense: Callable[[Tensor | None], Linearised]) -> Linearised:
        """Return the Jacobians at `x` `(B, n)`.

        Args:
            x: the inputs.
            sense: returns the Jacobians of some rows; of all where it gets None.
        """
        if self.x is None or self.found is None or self.x.shape != x.shape:
            found = sense(None)
            self.x, self.found, self.age = x.clone(), found, torch.ones(len(x), dtype=torch.int64)
            return found
        moved = ((x - self.x).abs() > self.within * x.abs().clamp(min=1.0)).any(1)
        rows = torch.nonzero(moved | (self.age >= self.refresh)).flatten()
        if len(rows):
            self.found = self.found.replaced(rows, sense(rows))
            self.x[rows] = x[rows]
            self.age[rows] = 0
        self.age += 1
        return self.found
