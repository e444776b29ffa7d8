"""The stage made of operations with closed forms: convolutions with pooling, dropout and normalisation, without autograd."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from beyondprop.stages.affine import AffinePullback, AffineStage
from beyondprop.stages.operations.base import Operation, RecordedRun
from beyondprop.stages.operations.elementary import AffineMap, AffineRecorded, operation
from beyondprop.stages.stage import Pullback, Stage


class PipelineStage(Stage):
    """A run of modules that all have closed forms.

    `PipelineStage.fits` says whether a run of modules has this form.

    Attributes:
        top: the Linear or Conv that the run ends in, where nothing else has weights; None: there is none.
    """

    def __init__(self, name: str, modules: Sequence[tuple[str, nn.Module]]) -> None:
        super().__init__(name, modules)
        found = [operation(m) for m in self.modules]
        self.operations: list[Operation] = [o for o in found if o is not None]
        for each in self.operations:
            each.share(self)
        carriers = [o for o in self.operations if o.has_weights]
        last = self.operations[-1]
        self.top: AffineStage | None = last.stage if carriers == [last] and isinstance(last, AffineMap) else None
        self.head = next((i for i, o in enumerate(self.operations) if o.has_weights), len(self.operations))

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
            ValueError: if a channel's only value is to be normalised over the batch.
        """
        del push  # closed forms push tangents at no extra cost
        return PipelinePullback(self, z)


class PipelinePullback(Pullback):
    """A `PipelineStage` at one input."""

    def __init__(self, stage: PipelineStage, z: Tensor, first: RecordedRun | None = None) -> None:
        self.stage = self.pipeline = stage
        self.input = z
        self.input_shape = z.shape
        self.output, self.run = RecordedRun.of(stage.operations, z, first)

    @property
    def top(self) -> AffinePullback | None:
        """The Linear or Conv that the run ends in, at its own input; see `PipelineStage.top`."""
        last = self.run.recorded[-1]
        return last.pullback if self.pipeline.top is not None and isinstance(last, AffineRecorded) else None

    @property
    def is_closed_form(self) -> bool:
        """See `Pullback.is_closed_form`."""
        return not self.stage.couples_batch

    def __call__(self, cotangent: Tensor) -> Tensor:
        """See `Pullback.__call__`."""
        return self.run.pull(cotangent)

    @property
    def head_shape(self) -> torch.Size:
        """See `Pullback.head_shape`."""
        return self.run.shapes[self.pipeline.head]

    def pull_head(self, cotangent: Tensor) -> Tensor:
        """See `Pullback.pull_head`."""
        for each in reversed(self.run.recorded[: self.pipeline.head]):
            cotangent = each.pull(cotangent)
        return cotangent

    def push(self, tangent: Tensor, *, gated: bool = False) -> Tensor:
        """See `Pullback.push`."""
        del gated
        return self.run.push(tangent)

    def add_gradients(self, cotangent: Tensor, factor: float) -> None:
        """See `Pullback.add_gradients`."""
        self.run.add_gradients(cotangent, factor)

    def at(self, z: Tensor) -> PipelinePullback:
        """See `Pullback.at`."""
        return PipelinePullback(self.pipeline, z, self.run)

    def relinearize(self, before: Mapping[nn.Parameter, Tensor]) -> tuple[Pullback, Tensor]:
        """See `Pullback.relinearize`."""
        if self.top is not None:
            return self, self.top.relinearize(before)[1]
        torch.clear_autocast_cache()  # it holds casts of the old weights
        fresh = self.at(self.input)
        return fresh, fresh.output - self.output
