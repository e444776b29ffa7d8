"""The stage made of operations with closed forms: convolutions with pooling, dropout and normalisation, without autograd."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from beyondprop.nn.activations import closed_form
from beyondprop.nn.residual import Residual, joined
from beyondprop.stages.affine import AffinePullback, AffineStage, is_modified, moves_batch
from beyondprop.stages.operations import OPERATIONS, AffineMap, Operation, Plain, Ran, Recorded, elementwise
from beyondprop.stages.stage import Memo, Pullback, Stage


class PipelineStage(Stage):
    """A run of modules that all have closed forms.

    Other stages and operations are made of such runs, too.

    Attributes:
        operations: the modules' closed forms.
        lowest: index of the first one with weights; None: there is none.
        top: the Linear or Conv that the run ends in, where nothing else has weights; None: there is none.
    """

    def __init__(self, name: str, modules: Sequence[tuple[str, nn.Module]]) -> None:
        super().__init__(name, modules)
        self.operations = [found for m in self.modules if (found := _operation(m)) is not None]
        self.share(self)
        carriers = [i for i, each in enumerate(self.operations) if each.has_weights]
        self.lowest = carriers[0] if carriers else None
        last = self.operations[-1] if carriers == [len(self.operations) - 1] else None
        self.top: AffineStage | None = last.stage if isinstance(last, AffineMap) else None

    @staticmethod
    def fits(modules: Sequence[nn.Module]) -> bool:
        """Whether closed forms serve this run of modules."""
        return all(_operation(m) is not None for m in modules)

    @property
    def couples_batch(self) -> bool:
        return any(o.couples_batch for o in self.operations)

    def share(self, stage: Stage) -> None:
        """Let the operations take what they need from the stage that they belong to."""
        for each in self.operations:
            each.share(stage)

    def record(self, z: Tensor, *, push: bool = False) -> PipelinePullback:
        return PipelinePullback(self, z)  # closed forms push tangents at no extra cost

    def run(self, z: Tensor, first: PipelinePullback | None = None) -> tuple[Tensor, PipelinePullback]:
        """Run as part of another stage: return the output and the pullback without codes; see `PipelinePullback`."""
        pullback = PipelinePullback(self, z, first)
        output = pullback.output
        pullback.forget("input")
        pullback.forget("output")
        return output, pullback


class PipelinePullback(Pullback):
    """A `PipelineStage` at one input.

    Args:
        stage: the stage.
        z: the input.
        first: what an earlier run of the same step recorded: masks are taken from it, running statistics stay as they are.

    Attributes:
        recorded: each operation at its input.
        shapes: of the input, and of what each operation returned.
    """

    def __init__(self, stage: PipelineStage, z: Tensor, first: PipelinePullback | None = None) -> None:
        self.stage = self.pipeline = stage
        self.input = z
        self.input_shape = z.shape
        self.recorded: list[Recorded] = []
        self.shapes = [z.shape]
        for index, each in enumerate(stage.operations):
            again = None if first is None else first.recorded[index].again
            z, found = each.record(z) if again is None else again(z)
            self.recorded.append(found)
            self.shapes.append(z.shape)
        self.output = z
        self._arrived: Memo[list[tuple[Recorded, Tensor]]] = Memo()

    @property
    def top(self) -> AffinePullback | None:
        """The Linear or Conv that the run ends in, at its own input; see `PipelineStage.top`."""
        last = self.recorded[-1].pull
        return last if self.pipeline.top is not None and isinstance(last, AffinePullback) else None

    @property
    def is_closed_form(self) -> bool:
        return not self.stage.couples_batch

    def __call__(self, cotangent: Tensor) -> Tensor:
        gradient, found = self._down(cotangent)
        if found:
            self._arrived.keep(cotangent, found)
        return gradient

    def _down(self, cotangent: Tensor, stop: int | None = None) -> tuple[Tensor, list[tuple[Recorded, Tensor]]]:
        """Pull down to the output of operation `stop`; return each one with weights, too, with the cotangent at its output."""
        found, operations = [], self.pipeline.operations
        for index in reversed(range(len(operations))):
            if operations[index].has_weights:
                found.append((self.recorded[index], cotangent))
            if index == stop:
                break
            cotangent = self.recorded[index].pull(cotangent)
        return cotangent, found

    @property
    def head_shape(self) -> torch.Size:
        lowest = self.pipeline.lowest
        return self.shapes[-1 if lowest is None else lowest]  # without weights, that of the output

    def pull_head(self, cotangent: Tensor) -> Tensor:
        for each in reversed(self.recorded[: self.pipeline.lowest]):
            cotangent = each.pull(cotangent)
        return cotangent

    def push(self, tangent: Tensor, *, gated: bool = False) -> Tensor:
        for each in self.recorded:
            tangent = each.push(tangent)
        return tangent

    def add_gradients(self, cotangent: Tensor, factor: float) -> None:
        # What an earlier pull of the same cotangent found is used.
        if self.pipeline.lowest is None:
            return
        found = self._arrived.find(cotangent) or self._down(cotangent, self.pipeline.lowest)[1]
        for each, arrived in found:
            each.add_gradients(arrived, factor)

    def at(self, z: Tensor) -> PipelinePullback:
        return PipelinePullback(self.pipeline, z, self)

    def relinearize(self, before: Mapping[nn.Parameter, Tensor]) -> tuple[Pullback, Tensor]:
        return super().relinearize(before) if self.top is None else (self, self.top.relinearize(before)[1])


class ResidualBlock(Operation):
    """`nn.Residual`, its parts runs of operations."""

    has_weights = True

    def __init__(self, module: Residual) -> None:
        super().__init__(module)
        parts = (list(module.branch), [module.skip], [module.after])
        self.branch, self.skip, self.after = (PipelineStage("", [("", m) for m in part]) for part in parts)

    @staticmethod
    def fits(module: Residual) -> bool:
        """Whether closed forms serve all parts of the block."""
        if is_modified(module.branch) or getattr(module.skip, "inplace", False):
            return False
        for part in module.branch:  # behind a map with parameters, what works in place has a tensor of its own
            if getattr(part, "inplace", False):
                return False
            if any(True for _ in part.parameters()):
                break
        return PipelineStage.fits([*module.branch, module.skip, module.after])

    def share(self, stage: Stage) -> None:
        for part in (self.branch, self.skip, self.after):
            part.share(stage)

    @property
    def couples_batch(self) -> bool:
        return any(part.couples_batch for part in (self.branch, self.skip, self.after))

    def record(self, z: Tensor, first: Sequence[PipelinePullback | None] = (None, None, None)) -> Ran:
        branch, low = self.branch.run(z, first[0])
        skip, past = self.skip.run(z, first[1])
        output, after = self.after.run(joined(skip, branch), first[2])
        inner_of: Memo[Tensor] = Memo()

        def pull(cotangent: Tensor) -> Tensor:
            inner = after(cotangent)
            inner_of.keep(cotangent, inner)
            return low(inner) + past(inner)

        def push(tangent: Tensor) -> Tensor:
            return after.push(low.push(tangent) + past.push(tangent))

        def add_gradients(cotangent: Tensor, factor: float) -> None:
            inner = inner_of.find(cotangent)
            if inner is None:
                inner = after(cotangent)
            after.add_gradients(cotangent, factor)
            low.add_gradients(inner, factor)
            past.add_gradients(inner, factor)

        return output, Recorded(pull, push, add_gradients, partial(self.record, first=(low, past, after)))


def _operation(module: nn.Module) -> Operation | None:
    """Return the closed forms of a module, or None where there are none."""
    if is_modified(module) or moves_batch(module) or getattr(module, "return_indices", False):
        return None
    if (activation := closed_form(module)) is not None:
        return Plain(activation, elementwise)
    if AffineStage.fits([module]):
        return AffineMap(module)
    if isinstance(module, Residual) and type(module) is Residual:
        return ResidualBlock(module) if ResidualBlock.fits(module) else None
    build = OPERATIONS.get(type(module))
    return None if build is None else build(module)
