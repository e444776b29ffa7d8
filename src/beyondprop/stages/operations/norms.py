"""Normalisations in closed form.

The Jacobian of a normalisation is symmetric up to its scale, so that tangents go through the same kernel as gradients.
"""

from __future__ import annotations

import abc
from typing import Any

import torch
from torch import Tensor, nn

from beyondprop.stages.operations.base import Operation, Recorded
from beyondprop.stages.stage import Memo, Stage, add_to_gradient, too_few_values

_aten = torch.ops.aten


class _Norm(Recorded):
    """A normalisation with weight and bias; `_backward` returns the gradients that are asked for."""

    def __init__(self, module: Any) -> None:
        self.weight: nn.Parameter | None = module.weight
        self.bias: nn.Parameter | None = module.bias
        self._own: Memo[list[Tensor | None]] = Memo()

    @abc.abstractmethod
    def _backward(self, cotangent: Tensor, wanted: list[bool]) -> tuple[Tensor, ...]: ...

    def _wanted(self) -> list[bool]:
        return [p is not None and p.requires_grad for p in (self.weight, self.bias)]

    def pull(self, cotangent: Tensor) -> Tensor:
        gradient, *own = self._backward(cotangent, [True, *self._wanted()])
        self._own.keep(cotangent, list(own))
        return gradient

    def add_gradients(self, cotangent: Tensor, factor: float) -> None:
        wanted = self._wanted()
        if not any(wanted):
            return
        own = self._own.find(cotangent)
        if own is None:
            own = list(self._backward(cotangent, [False, *wanted])[1:])
        for p, gradient, is_wanted in zip((self.weight, self.bias), own, wanted, strict=True):
            if p is not None and gradient is not None and is_wanted:
                add_to_gradient(p, gradient, factor)


class BatchNorm(Operation):
    """`nn.BatchNorm1d` to `3d`."""

    has_weights = True
    name = ""

    def share(self, stage: Stage) -> None:
        self.name = stage.name

    @property
    def couples_batch(self) -> bool:
        return self.module.training or not self.module.track_running_stats

    def record(self, z: Tensor, first: Any = None) -> tuple[Tensor, Recorded]:
        m = self.module
        m._check_input_dim(z)
        if self.couples_batch and z.numel() == z.shape[1]:
            raise too_few_values(self.name)
        statistics, share = (m.running_mean, m.running_var), m.momentum
        if m.training and m.track_running_stats:
            if first is None:
                m.num_batches_tracked.add_(1)
                share = 1.0 / float(m.num_batches_tracked) if share is None else share
            else:
                statistics = (None, None)
        of_batch = self.couples_batch
        # The backward of a run with running statistics needs them as they were.
        kept = (None, None) if of_batch else (m.running_mean.clone(), m.running_var.clone())
        share = 0.0 if share is None else share
        output, *saved = _aten.native_batch_norm(z, m.weight, m.bias, *statistics, of_batch, share, m.eps)
        return output, _BatchNormAt(m, z, [*kept, *saved, of_batch, m.eps])


class _BatchNormAt(_Norm):
    def __init__(self, module: Any, z: Tensor, saved: list[Any]) -> None:
        self.z, self.saved = z, saved
        super().__init__(module)

    def _backward(self, cotangent: Tensor, wanted: list[bool]) -> tuple[Tensor, ...]:
        return _aten.native_batch_norm_backward(cotangent, self.z, self.weight, *self.saved, wanted)

    def push(self, tangent: Tensor) -> Tensor:
        return self._backward(tangent, [True, False, False])[0]  # symmetric within a channel, and so is its scale


class LayerNorm(Operation):
    """`nn.LayerNorm`."""

    has_weights = True

    def record(self, z: Tensor, first: Any = None) -> tuple[Tensor, Recorded]:
        del first
        m = self.module
        shape = list(m.normalized_shape)
        output, *saved = _aten.native_layer_norm(z, shape, m.weight, m.bias, m.eps)
        return output, _LayerNormAt(m, [z, shape, *saved])


class _LayerNormAt(_Norm):
    def __init__(self, module: Any, saved: list[Any]) -> None:
        self.saved = saved
        super().__init__(module)

    def _backward(self, cotangent: Tensor, wanted: list[bool]) -> tuple[Tensor, ...]:
        return _aten.native_layer_norm_backward(cotangent, *self.saved, self.weight, self.bias, wanted)

    def push(self, tangent: Tensor) -> Tensor:
        core = _aten.native_layer_norm_backward(tangent, *self.saved, None, None, [True, False, False])[0]
        return core if self.weight is None else core * self.weight
