"""Operations with closed forms: what a `PipelineStage` is made of."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from beyondprop.nn.activations import Activation, closed_form
from beyondprop.nn.residual import Residual, Shortcut
from beyondprop.stages.affine import AffinePullback, AffineStage, is_modified, moves_batch
from beyondprop.stages.operations.base import Operation, Recorded
from beyondprop.stages.operations.norms import BatchNorm, LayerNorm
from beyondprop.stages.operations.pooling import AdaptiveAveragePool, AveragePool, MaxPool
from beyondprop.stages.operations.residual import ResidualBlock, ShortcutSkip
from beyondprop.stages.stage import Stage

_aten = torch.ops.aten


def operation(module: nn.Module) -> Operation | None:
    """Return the closed forms of a module, or None where there are none."""
    if is_modified(module):
        return None
    if (activation := closed_form(module)) is not None:
        return _Elementwise(module, activation)
    if AffineStage.fits([module]):
        return AffineMap(module)
    if type(module) is Residual:
        return ResidualBlock.of(module, operation)
    kind = _KINDS.get(type(module))
    return kind(module) if kind is not None and kind.fits(module) else None


def operations(modules: Iterable[nn.Module]) -> list[Operation]:
    """Return the closed forms of all modules that have any."""
    return [found for m in modules if (found := operation(m)) is not None]


class _Elementwise(Operation):
    def __init__(self, module: nn.Module, activation: Activation) -> None:
        super().__init__(module)
        self.activation = activation

    def record(self, z: Tensor, first: Any = None) -> tuple[Tensor, Recorded]:
        del first
        value = self.activation.value(z)
        return value, _ElementwiseAt(self.activation, z, value)


class _ElementwiseAt(Recorded):
    def __init__(self, activation: Activation, z: Tensor, value: Tensor) -> None:
        self.activation, self.value = activation, value
        self.z = z if activation.needs_input else None
        self.factors: Tensor | None = None

    def pull(self, cotangent: Tensor) -> Tensor:
        if self.activation.is_gate:
            return _aten.threshold_backward(cotangent, self.value, 0)
        if self.activation.factors is not None and self.z is not None:
            if self.factors is None:
                self.factors = self.activation.factors(self.z, cotangent)
            return cotangent * self.factors
        return cotangent * self.activation.slope(self.value if self.z is None else self.z, self.value)

    def push(self, tangent: Tensor) -> Tensor:
        return self.pull(tangent)


class AffineMap(Operation):
    """A Linear or Conv."""

    has_weights = True

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        self.stage = AffineStage("", [("", module)])

    def share(self, stage: Stage) -> None:
        self.stage.feedback = stage.feedback

    def record(self, z: Tensor, first: Any = None) -> tuple[Tensor, Recorded]:
        del first
        pullback = self.stage.record(z)
        output = pullback.output
        pullback.forget("output")
        return output, AffineRecorded(pullback)


class AffineRecorded(Recorded):
    """A Linear or Conv at one input."""

    def __init__(self, pullback: AffinePullback) -> None:
        self.pullback = pullback

    def pull(self, cotangent: Tensor) -> Tensor:
        return self.pullback(cotangent)

    def push(self, tangent: Tensor) -> Tensor:
        return self.pullback.push(tangent)

    def add_gradients(self, cotangent: Tensor, factor: float) -> None:
        self.pullback.add_gradients(cotangent, factor)


class _Reshape(Operation):
    @staticmethod
    def fits(module: Any) -> bool:
        return not moves_batch(module)

    def record(self, z: Tensor, first: Any = None) -> tuple[Tensor, Recorded]:
        del first
        output = self.module(z)
        return output, _ReshapeAt(z.shape, output.shape)


class _ReshapeAt(Recorded):
    def __init__(self, *shapes: torch.Size) -> None:
        self.shapes = shapes

    def pull(self, cotangent: Tensor) -> Tensor:
        return cotangent.reshape(self.shapes[0])

    def push(self, tangent: Tensor) -> Tensor:
        return tangent.reshape(self.shapes[1])


class _Dropout(Operation):
    def record(self, z: Tensor, first: Any = None) -> tuple[Tensor, Recorded]:
        if not self.module.training or self.module.p == 0.0:
            return z, _ReshapeAt(z.shape, z.shape)
        if first is not None:
            mask = first.mask
        else:
            draw = F.dropout if type(self.module) is nn.Dropout else F.dropout2d
            mask = draw(torch.ones_like(z), self.module.p)  # the numbers that dropout of z itself would draw
        return z * mask, _DropoutAt(mask)


class _DropoutAt(Recorded):
    def __init__(self, mask: Tensor) -> None:
        self.mask = mask

    def pull(self, cotangent: Tensor) -> Tensor:
        return cotangent * self.mask

    def push(self, tangent: Tensor) -> Tensor:
        return tangent * self.mask


_KINDS: dict[type[nn.Module], type[Operation]] = {
    nn.Flatten: _Reshape,
    nn.Unflatten: _Reshape,
    nn.Identity: _Reshape,
    nn.Dropout: _Dropout,
    nn.Dropout2d: _Dropout,
    nn.MaxPool2d: MaxPool,
    nn.AvgPool2d: AveragePool,
    nn.AdaptiveAvgPool2d: AdaptiveAveragePool,
    nn.BatchNorm1d: BatchNorm,
    nn.BatchNorm2d: BatchNorm,
    nn.BatchNorm3d: BatchNorm,
    nn.LayerNorm: LayerNorm,
    Shortcut: ShortcutSkip,
}
