"""The stage made of operations with closed forms: convolutions with pooling, dropout and normalisation, without autograd."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from beyondprop.stages.affine import AffinePullback, AffineStage
from beyondprop.stages.operations.base import RecordedRun
from beyondprop.stages.operations.elementary import AffineMap, AffineRecorded, operation, operations
from beyondprop.stages.stage import Pullback, Stage


class PipelineStage(Stage):
    """A run of modules that all have closed forms.

    `PipelineStage.fits` says whether a run of modules has this form.

    Attributes:
        top: the Linear or Conv that the run ends in, where nothing else has weights; None: there is none.
    """

    def __init__(self, name: str, modules: Sequence[tuple[str, nn.Module]]) -> None:
        super().__init__(name, modules)
        self.operations = operations(self.modules)
        for each in self.operations:
            each.share(self)
        carriers = [o for o in self.operations if o.has_weights]
        last = self.operations[-1]
        self.top: AffineStage | None = last.stage if carriers == [last] and isinstance(last, AffineMap) else None

    @staticmethod
    def fits(modules: Sequence[nn.Module]) -> bool:
        """Whether closed forms serve this run of modules."""
        return all(operation(m) is not None for m in modules)

    @property
    def couples_batch(self) -> bool:
        return any(o.couples_batch for o in self.operations)

    def record(self, z: Tensor, *, push: bool = False) -> PipelinePullback:
        """Run the stage on `z`.

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
        return not self.stage.couples_batch

    def __call__(self, cotangent: Tensor) -> Tensor:
        return self.run.pull(cotangent)

    @property
    def head_shape(self) -> torch.Size:
        return self.run.head_shape

    def pull_head(self, cotangent: Tensor) -> Tensor:
        return self.run.pull_head(cotangent)

    def push(self, tangent: Tensor, *, gated: bool = False) -> Tensor:
        del gated
        return self.run.push(tangent)

    def add_gradients(self, cotangent: Tensor, factor: float) -> None:
        self.run.add_gradients(cotangent, factor)

    def at(self, z: Tensor) -> PipelinePullback:
        return PipelinePullback(self.pipeline, z, self.run)

    def relinearize(self, before: Mapping[nn.Parameter, Tensor]) -> tuple[Pullback, Tensor]:
        if self.top is not None:
            return self, self.top.relinearize(before)[1]
        return self.rerun()
