"""The stage made of operations with closed forms: convolutions with pooling, dropout and normalisation, without autograd."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from beyondprop.operations import AffineRecorded, Operation, Recorded, operation
from beyondprop.stage import Pullback, Stage, check_normalized


class PipelineStage(Stage):
    """A run of modules that all have closed forms.

    `PipelineStage.fits` says whether a run of modules has this form.
    """

    def __init__(self, name: str, modules: Sequence[tuple[str, nn.Module]]) -> None:
        super().__init__(name, modules)
        found = [operation(m) for m in self.modules]
        self.operations: list[Operation] = [o for o in found if o is not None]

    @staticmethod
    def fits(modules: Sequence[nn.Module]) -> bool:
        """Whether closed forms serve this run of modules."""
        return all(operation(m) is not None for m in modules)

    @property
    def couples_batch(self) -> bool:
        """See `Stage.couples_batch`."""
        return any(o.couples_batch for o in self.operations)

    def record(self, z: Tensor, *, push: bool = False) -> PipelinePullback:
        """See `Stage.record`.

        Raises:
            ValueError: if one sample is to be normalised over the batch.
        """
        del push  # closed forms push tangents at no extra cost
        check_normalized(self.name, self.modules, z)
        return PipelinePullback(self, z)


class PipelinePullback(Pullback):
    """A `PipelineStage` at one input."""

    def __init__(self, stage: PipelineStage, z: Tensor, first: PipelinePullback | None = None) -> None:
        self.stage = self.pipeline = stage
        self.input = z
        self.recorded: list[Recorded] = []
        for index, each in enumerate(stage.operations):
            self.recorded.append(each.record(z, None if first is None else first.recorded[index]))
            z = self.recorded[-1].output
        self.output = z
        self._last: tuple[int, list[Tensor]] | None = None

    @property
    def is_closed_form(self) -> bool:
        """See `Pullback.is_closed_form`."""
        return not self.stage.couples_batch

    def __call__(self, cotangent: Tensor) -> Tensor:
        """See `Pullback.__call__`."""
        version, below = cotangent._version, [cotangent]
        for each in reversed(self.recorded):
            below.append(each.pull(below[-1]))
        gradient = below.pop()
        self._last = version, below  # at the operations' outputs, last first
        return gradient

    def push(self, tangent: Tensor, *, gated: bool = False) -> Tensor:
        """See `Pullback.push`."""
        del gated
        for each in self.recorded:
            tangent = each.push(tangent)
        return tangent

    def add_gradients(self, cotangent: Tensor, factor: float) -> None:
        """See `Pullback.add_gradients`."""
        known: list[Tensor] = []
        if self._last is not None and self._last[1][0] is cotangent and self._last[0] == cotangent._version:
            known = self._last[1]
        lowest = next(i for i, o in enumerate(self.pipeline.operations) if o.has_weights)
        for index in reversed(range(lowest, len(self.recorded))):
            each = self.recorded[index]
            if known:
                cotangent = known[len(self.recorded) - 1 - index]
            each.add_gradients(cotangent, factor)
            if not known and index > lowest:
                cotangent = each.pull(cotangent)

    def at(self, z: Tensor) -> PipelinePullback:
        """See `Pullback.at`."""
        return PipelinePullback(self.pipeline, z, first=self)

    def relinearize(self, before: Mapping[nn.Parameter, Tensor]) -> tuple[Pullback, Tensor]:
        """See `Pullback.relinearize`."""
        top = self.recorded[-1]
        if isinstance(top, AffineRecorded) and sum(o.has_weights for o in self.pipeline.operations) == 1:
            return self, top.pullback.relinearize(before)[1]
        torch.clear_autocast_cache()  # it holds casts of the old weights
        fresh = self.at(self.input)
        return fresh, fresh.output - self.output
