"""What an operation with closed forms is, and a run of them.

`operation.record(z)` runs a module and returns its output and a `Recorded`: `pull` (J^T v), `push` (J u) and the gradients of
its weights, without autograd. A `Recorded` holds what these read and nothing else, so that an output which no derivative needs
is free as soon as its users have gone.
"""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from beyondprop.stages.stage import Memo, Stage


class Recorded(abc.ABC):
    """An operation at one input."""

    @abc.abstractmethod
    def pull(self, cotangent: Tensor) -> Tensor:
        """Return `J^T cotangent`: a view of it, or a new tensor."""

    @abc.abstractmethod
    def push(self, tangent: Tensor) -> Tensor:
        """Return `J tangent`."""

    def add_gradients(self, cotangent: Tensor, factor: float) -> None:
        """Add `factor` times the gradient of the operation's weights to their `.grad`; default: it has none."""
        del cotangent, factor


class Operation(abc.ABC):
    """A module with closed forms."""

    has_weights = False

    def __init__(self, module: Any) -> None:
        self.module = module

    def share(self, stage: Stage) -> None:
        """Take from the stage that the operation belongs to what is needed of it, its name or feedback; default: nothing."""
        del stage

    @staticmethod
    def fits(module: Any) -> bool:
        """Whether closed forms serve this module as it is set; default: always."""
        del module
        return True

    @property
    def couples_batch(self) -> bool:
        """Whether one sample's output depends on the others; default: no."""
        return False

    @abc.abstractmethod
    def record(self, z: Tensor, first: Any = None) -> tuple[Tensor, Recorded]:
        """Run on `z`; return the output and the operation at this input.

        Args:
            z: the input.
            first: what an earlier run of the same step recorded: masks are taken from it, running statistics stay as they are.
        """


class RecordedRun(Recorded):
    """Operations at one input, one after the other; `RecordedRun.of` makes one.

    Attributes:
        recorded: each of them.
        shapes: of the input, and of what each of them returned.
    """

    def __init__(self, operations: Sequence[Operation], recorded: list[Recorded], shapes: list[Any]) -> None:
        self.operations, self.recorded, self.shapes = operations, recorded, shapes
        self._lowest = next((i for i, each in enumerate(operations) if each.has_weights), None)
        self._arrived: Memo[list[tuple[Recorded, Tensor]]] = Memo()

    @property
    def has_weights(self) -> bool:
        """Whether any of them has weights."""
        return self._lowest is not None

    @property
    def head_shape(self) -> torch.Size:
        """Shape of what the first one with weights is given; without any, of the last output."""
        return self.shapes[len(self.recorded) if self._lowest is None else self._lowest]

    def pull_head(self, cotangent: Tensor) -> Tensor:
        """Return the input's cotangent for one of what the first one with weights is given."""
        for each in reversed(self.recorded[: self._lowest]):
            cotangent = each.pull(cotangent)
        return cotangent

    @classmethod
    def of(
        cls, operations: Sequence[Operation], z: Tensor, first: RecordedRun | None = None
    ) -> tuple[Tensor, RecordedRun]:
        """Run on `z`; return the last output and the operations at their inputs; see `Operation.record`."""
        recorded, shapes = [], [z.shape]
        for index, each in enumerate(operations):
            z, found = each.record(z, None if first is None else first.recorded[index])
            recorded.append(found)
            shapes.append(z.shape)
        return z, cls(operations, recorded, shapes)

    def pull(self, cotangent: Tensor) -> Tensor:
        gradient, found = self._down(cotangent)
        if found:
            self._arrived.keep(cotangent, found)
        return gradient

    def _down(self, cotangent: Tensor, stop: int | None = None) -> tuple[Tensor, list[tuple[Recorded, Tensor]]]:
        """Pull down to the output of operation `stop`; return each one with weights, too, with the cotangent at its output."""
        found = []
        for index in reversed(range(len(self.recorded))):
            if self.operations[index].has_weights:
                found.append((self.recorded[index], cotangent))
            if index == stop:
                break
            cotangent = self.recorded[index].pull(cotangent)
        return cotangent, found

    def push(self, tangent: Tensor) -> Tensor:
        for each in self.recorded:
            tangent = each.push(tangent)
        return tangent

    def add_gradients(self, cotangent: Tensor, factor: float) -> None:
        # What an earlier `pull` of the same cotangent found is used.
        if self._lowest is None:
            return
        found = self._arrived.find(cotangent)
        if found is None:
            found = self._down(cotangent, self._lowest)[1]
        for each, arrived in found:
            each.add_gradients(arrived, factor)
