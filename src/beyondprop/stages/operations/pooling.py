"""Pooling in closed form: max-pooling pushes a tangent by the indices that it chose."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from beyondprop.stages.operations.base import Operation, Recorded

_aten = torch.ops.aten


class MaxPool(Operation):
    """`nn.MaxPool2d`."""

    @staticmethod
    def fits(module: Any) -> bool:
        return not module.return_indices

    def record(self, z: Tensor, first: Any = None) -> tuple[Tensor, Recorded]:
        del first
        m = self.module
        settings = (*(_pair(s) for s in (m.kernel_size, m.stride, m.padding, m.dilation)), m.ceil_mode)
        output, indices = _aten.max_pool2d_with_indices(z, *settings)
        return output, _MaxPoolAt(z, settings, indices)


class _MaxPoolAt(Recorded):
    def __init__(self, z: Tensor, settings: tuple[Any, ...], indices: Tensor) -> None:
        self.z, self.settings, self.indices = z, settings, indices

    def pull(self, cotangent: Tensor) -> Tensor:
        return _aten.max_pool2d_with_indices_backward(cotangent, self.z, *self.settings, self.indices)

    def push(self, tangent: Tensor) -> Tensor:
        return tangent.flatten(-2).gather(-1, self.indices.flatten(-2)).view_as(self.indices)


class AveragePool(Operation):
    """`nn.AvgPool2d`."""

    def record(self, z: Tensor, first: Any = None) -> tuple[Tensor, Recorded]:
        del first
        m = self.module
        pairs = (_pair(s) for s in (m.kernel_size, m.stride, m.padding))
        settings = (*pairs, m.ceil_mode, m.count_include_pad, m.divisor_override)
        return _aten.avg_pool2d(z, *settings), _AveragePoolAt(z, settings)


class _AveragePoolAt(Recorded):
    def __init__(self, z: Tensor, settings: tuple[Any, ...]) -> None:
        self.z, self.settings = z, settings

    def pull(self, cotangent: Tensor) -> Tensor:
        return _aten.avg_pool2d_backward(cotangent.contiguous(), self.z, *self.settings)

    def push(self, tangent: Tensor) -> Tensor:
        return _aten.avg_pool2d(tangent, *self.settings)


class AdaptiveAveragePool(Operation):
    """`nn.AdaptiveAvgPool2d`."""

    def record(self, z: Tensor, first: Any = None) -> tuple[Tensor, Recorded]:
        del first
        return self.module(z), _AdaptiveAveragePoolAt(self.module, z)


class _AdaptiveAveragePoolAt(Recorded):
    def __init__(self, module: nn.Module, z: Tensor) -> None:
        self.module, self.z = module, z

    def pull(self, cotangent: Tensor) -> Tensor:
        return _aten._adaptive_avg_pool2d_backward(cotangent.contiguous(), self.z)

    def push(self, tangent: Tensor) -> Tensor:
        return self.module(tangent)


def _pair(value: Any) -> list[int]:
    return [value, value] if isinstance(value, int) else list(value)
