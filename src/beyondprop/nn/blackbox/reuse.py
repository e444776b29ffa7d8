"""Jacobians of the batch before, which serve again where inputs have hardly moved, as in control loops."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from beyondprop import _checks
from beyondprop.func.sensing.linearised import Linearised, Sparse


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
        self.lock = threading.RLock()
        self.x: Tensor | None = None
        self.fixed: list[Tensor] = []
        self.found: Linearised | None = None
        self.age = torch.zeros(0, dtype=torch.int64)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, lock=threading.RLock())

    @property
    def is_on(self) -> bool:
        """Whether any Jacobian serves twice."""
        return self.refresh > 1

    def linearise(self, x: Tensor, fixed: Sequence[Tensor], sense: Callable[[Tensor | None], Linearised]) -> Linearised:
        """Return the Jacobians at `x` `(B, n)`, which is differentiated, and `fixed`, which is not.

        Args:
            x: may have moved a little.
            fixed: further inputs, each `(B, ...)`, which must be what they were.
            sense: returns the Jacobians of some rows; of all where it gets None.
        """
        with self.lock:
            return self._linearised(x, fixed, sense)

    def _linearised(
        self, x: Tensor, fixed: Sequence[Tensor], sense: Callable[[Tensor | None], Linearised]
    ) -> Linearised:
        stale = self._stale(x, fixed)
        rows = None if stale is None else torch.nonzero(stale).flatten()
        if rows is not None and self.found is not None and self.x is not None:
            if not len(rows):
                self.age += 1
                return self.found
            if len(rows) < len(x):
                others = sense(rows)
                if _is_alike(self.found, others):
                    self.found = self.found.replaced(rows, others)
                    self.x[rows] = x[rows]
                    self.age[rows] = 0
                    self.age += 1
                    self.fixed = [kept.clone() for kept in fixed]
                    return self.found
        self.found = sense(None)
        self.x, self.fixed = x.clone(), [kept.clone() for kept in fixed]
        self.age = torch.ones(len(x), dtype=torch.int64)
        return self.found

    def _stale(self, x: Tensor, fixed: Sequence[Tensor]) -> Tensor | None:
        """Return which rows must be sensed anew; None: all."""
        if self.x is None or self.x.shape != x.shape or [f.shape for f in fixed] != [f.shape for f in self.fixed]:
            return None
        stale = ((x - self.x).abs() > self.within * x.abs().clamp(min=1.0)).any(1) | (self.age >= self.refresh)
        for now, before in zip(fixed, self.fixed, strict=True):
            stale |= (now != before).reshape(len(x), -1).any(1).cpu()
        return stale


def _is_alike(found: Linearised, others: Linearised) -> bool:
    """Whether both have one form: a pattern that was found may have grown."""
    if isinstance(found, Sparse) and isinstance(others, Sparse):
        return found.pattern == others.pattern
    return type(found) is type(others)
