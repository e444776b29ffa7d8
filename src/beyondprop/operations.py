"""Operations with closed forms: what a `PipelineStage` is made of.

`operation(module).record(z)` runs a module and returns a `Recorded`: its output, `pull` (J^T v), `push` (J u) and the gradients
of its weights, without autograd. The Jacobian of a normalisation is symmetric up to its scale, so that tangents go through the
same kernel as gradients; max-pooling pushes a tangent by the indices that it chose.
"""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from beyondprop.activations import Activation, closed_form
from beyondprop.affine import AffinePullback, AffineStage, is_modified, moves_batch
from beyondprop.nn.residual import Residual, Shortcut, joined
from beyondprop.stage import Stage, add_to_gradient, too_few_values

_aten = torch.ops.aten


class Recorded(abc.ABC):
    """An operation at one input.

    Attributes:
        output: what it returned.
    """

    output: Tensor

    @abc.abstractmethod
    def pull(self, cotangent: Tensor) -> Tensor:
        """Return `J^T cotangent`: a view of it, or a new tensor."""

    @abc.abstractmethod
    def push(self, tangent: Tensor) -> Tensor:
        """Return `J tangent`."""

    def add_gradients(self, cotangent: Tensor, factor: float) -> None:
        """Add `factor` times the gradient of the operation's weights to their `.grad`."""
        del cotangent, factor


class Operation(abc.ABC):
    """A module with closed forms."""

    has_weights = False

    def __init__(self, module: Any) -> None:
        self.module = module

    def share(self, stage: Stage) -> None:
        """Know the stage that the operation belongs to: its name and its feedback."""
        del stage

    @staticmethod
    def fits(module: Any) -> bool:
        """Whether closed forms serve this module as it is set."""
        del module
        return True

    @property
    def couples_batch(self) -> bool:
        """Whether one sample's output depends on the others."""
        return False

    @abc.abstractmethod
    def record(self, z: Tensor, first: Any = None) -> Recorded:
        """Run on `z`.

        Args:
            z: the input.
            first: what an earlier run of the same step recorded: masks are taken from it, running statistics stay as they are.
        """


class RecordedRun(Recorded):
    """Operations at one input, one after the other."""

    def __init__(self, operations: Sequence[Operation], z: Tensor, first: RecordedRun | None = None) -> None:
        self.recorded: list[Recorded] = []
        for index, each in enumerate(operations):
            self.recorded.append(each.record(z, None if first is None else first.recorded[index]))
            z = self.recorded[-1].output
        self.output = z
        self._lowest = next((i for i, each in enumerate(operations) if each.has_weights), len(operations))
        self._last: tuple[int, list[Tensor]] | None = None

    def pull(self, cotangent: Tensor) -> Tensor:
        """See `Recorded.pull`."""
        version, below = cotangent._version, [cotangent]
        for each in reversed(self.recorded):
            below.append(each.pull(below[-1]))
        gradient = below.pop()
        self._last = version, below  # at the operations' outputs, last first
        return gradient

    def push(self, tangent: Tensor) -> Tensor:
        """See `Recorded.push`."""
        for each in self.recorded:
            tangent = each.push(tangent)
        return tangent

    def add_gradients(self, cotangent: Tensor, factor: float) -> None:
        """See `Recorded.add_gradients`; what an earlier `pull` of the same cotangent found is used."""
        known: list[Tensor] = []
        if self._last is not None and self._last[1][0] is cotangent and self._last[0] == cotangent._version:
            known = self._last[1]
        for index in reversed(range(self._lowest, len(self.recorded))):
            each = self.recorded[index]
            if known:
                cotangent = known[len(self.recorded) - 1 - index]
            each.add_gradients(cotangent, factor)
            if not known and index > self._lowest:
                cotangent = each.pull(cotangent)


def operation(module: nn.Module) -> Operation | None:
    """Return the closed forms of a module, or None where there are none."""
    if is_modified(module):
        return None
    if (activation := closed_form(module)) is not None:
        return _Elementwise(module, activation)
    if AffineStage.fits([module]):
        return _Affine(module)
    kind = _KINDS.get(type(module))
    return kind(module) if kind is not None and kind.fits(module) else None


class _Elementwise(Operation):
    def __init__(self, module: nn.Module, activation: Activation) -> None:
        super().__init__(module)
        self.activation = activation

    def record(self, z: Tensor, first: Any = None) -> Recorded:
        del first
        return _ElementwiseAt(self.activation, z)


class _ElementwiseAt(Recorded):
    def __init__(self, activation: Activation, z: Tensor) -> None:
        self.activation = activation
        self.output = activation.value(z)
        self.z = z if activation.needs_input else None
        self.factors: Tensor | None = None

    def pull(self, cotangent: Tensor) -> Tensor:
        if self.activation.is_gate:
            return _aten.threshold_backward(cotangent, self.output, 0)
        if self.activation.factors is not None and self.z is not None:
            if self.factors is None:
                self.factors = self.activation.factors(self.z, cotangent)
            return cotangent * self.factors
        return cotangent * self.activation.slope(self.output if self.z is None else self.z, self.output)

    def push(self, tangent: Tensor) -> Tensor:
        return self.pull(tangent)


class _Affine(Operation):
    has_weights = True

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        self.stage = AffineStage("", [("", module)])

    def share(self, stage: Stage) -> None:
        self.stage.feedback = stage.feedback

    def record(self, z: Tensor, first: Any = None) -> Recorded:
        del first
        return AffineRecorded(self.stage.record(z))


class AffineRecorded(Recorded):
    """A Linear or Conv at one input."""

    def __init__(self, pullback: AffinePullback) -> None:
        self.pullback = pullback
        self.output = pullback.output

    def pull(self, cotangent: Tensor) -> Tensor:
        """See `Recorded.pull`."""
        return self.pullback(cotangent)

    def push(self, tangent: Tensor) -> Tensor:
        """See `Recorded.push`."""
        return self.pullback.push(tangent)

    def add_gradients(self, cotangent: Tensor, factor: float) -> None:
        """See `Recorded.add_gradients`."""
        self.pullback.add_gradients(cotangent, factor)


class _Reshape(Operation):
    @staticmethod
    def fits(module: Any) -> bool:
        return not moves_batch(module)

    def record(self, z: Tensor, first: Any = None) -> Recorded:
        del first
        return _ReshapeAt(z, self.module(z))


class _ReshapeAt(Recorded):
    def __init__(self, z: Tensor, output: Tensor) -> None:
        self.output = output
        self.shapes = z.shape, output.shape

    def pull(self, cotangent: Tensor) -> Tensor:
        return cotangent.reshape(self.shapes[0])

    def push(self, tangent: Tensor) -> Tensor:
        return tangent.reshape(self.shapes[1])


class _Dropout(Operation):
    def record(self, z: Tensor, first: Any = None) -> Recorded:
        if not self.module.training or self.module.p == 0.0:
            return _ReshapeAt(z, z)
        if first is not None:
            return _DropoutAt(z, first.mask)
        draw = F.dropout if type(self.module) is nn.Dropout else F.dropout2d
        return _DropoutAt(z, draw(torch.ones_like(z), self.module.p))  # the numbers that dropout of z itself would draw


class _DropoutAt(Recorded):
    def __init__(self, z: Tensor, mask: Tensor) -> None:
        self.mask = mask
        self.output = z * mask

    def pull(self, cotangent: Tensor) -> Tensor:
        return cotangent * self.mask

    def push(self, tangent: Tensor) -> Tensor:
        return tangent * self.mask


class _MaxPool(Operation):
    @staticmethod
    def fits(module: Any) -> bool:
        return not module.return_indices

    def record(self, z: Tensor, first: Any = None) -> Recorded:
        del first
        m = self.module
        settings = tuple(_pair(s) for s in (m.kernel_size, m.stride, m.padding, m.dilation))
        return _MaxPoolAt(z, (*settings, m.ceil_mode))


class _MaxPoolAt(Recorded):
    def __init__(self, z: Tensor, settings: tuple[Any, ...]) -> None:
        self.z, self.settings = z, settings
        self.output, self.indices = _aten.max_pool2d_with_indices(z, *settings)

    def pull(self, cotangent: Tensor) -> Tensor:
        return _aten.max_pool2d_with_indices_backward(cotangent, self.z, *self.settings, self.indices)

    def push(self, tangent: Tensor) -> Tensor:
        return tangent.flatten(-2).gather(-1, self.indices.flatten(-2)).view_as(self.indices)


class _AveragePool(Operation):
    def record(self, z: Tensor, first: Any = None) -> Recorded:
        del first
        m = self.module
        settings = (_pair(m.kernel_size), _pair(m.stride), _pair(m.padding), m.ceil_mode, m.count_include_pad)
        return _AveragePoolAt(z, (*settings, m.divisor_override))


class _AveragePoolAt(Recorded):
    def __init__(self, z: Tensor, settings: tuple[Any, ...]) -> None:
        self.settings = settings
        self.z = z
        self.output = _aten.avg_pool2d(z, *settings)

    def pull(self, cotangent: Tensor) -> Tensor:
        return _aten.avg_pool2d_backward(cotangent.contiguous(), self.z, *self.settings)

    def push(self, tangent: Tensor) -> Tensor:
        return _aten.avg_pool2d(tangent, *self.settings)


class _AdaptiveAveragePool(Operation):
    def record(self, z: Tensor, first: Any = None) -> Recorded:
        del first
        return _AdaptiveAveragePoolAt(self.module, z)


class _AdaptiveAveragePoolAt(Recorded):
    def __init__(self, module: nn.Module, z: Tensor) -> None:
        self.module, self.z = module, z
        self.output = module(z)

    def pull(self, cotangent: Tensor) -> Tensor:
        return _aten._adaptive_avg_pool2d_backward(cotangent.contiguous(), self.z)

    def push(self, tangent: Tensor) -> Tensor:
        return self.module(tangent)


class _BatchNorm(Operation):
    has_weights = True
    name = ""

    def share(self, stage: Stage) -> None:
        self.name = stage.name

    @property
    def couples_batch(self) -> bool:
        return self.module.training or not self.module.track_running_stats

    def record(self, z: Tensor, first: Any = None) -> Recorded:
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
        return _BatchNormAt(m, z, statistics, self.couples_batch, 0.0 if share is None else share)


class _Norm(Recorded):
    """A normalisation with weight and bias; `_backward` returns the gradients that are asked for."""

    weight: nn.Parameter | None
    bias: nn.Parameter | None
    _found: tuple[Tensor, int, tuple[Tensor | None, Tensor | None]] | None = None

    def _backward(self, cotangent: Tensor, wanted: list[bool]) -> tuple[Tensor, ...]:
        raise NotImplementedError

    def _wanted(self) -> list[bool]:
        return [p is not None and p.requires_grad for p in (self.weight, self.bias)]

    def pull(self, cotangent: Tensor) -> Tensor:
        gradient, *own = self._backward(cotangent, [True, *self._wanted()])
        self._found = cotangent, cotangent._version, (own[0], own[1])
        return gradient

    def add_gradients(self, cotangent: Tensor, factor: float) -> None:
        wanted = self._wanted()
        if not any(wanted):
            return
        if self._found is not None and self._found[0] is cotangent and self._found[1] == cotangent._version:
            own = self._found[2]
        else:
            own = self._backward(cotangent, [False, *wanted])[1:]
        for p, gradient, is_wanted in zip((self.weight, self.bias), own, wanted, strict=True):
            if p is not None and gradient is not None and is_wanted:
                add_to_gradient(p, gradient, factor)


class _BatchNormAt(_Norm):
    def __init__(self, module: Any, z: Tensor, statistics: tuple[Any, Any], of_batch: bool, share: float) -> None:
        self.weight, self.bias, self.z = module.weight, module.bias, z
        self.of_batch, self.eps = of_batch, module.eps
        # The backward of a run with running statistics needs them as they were.
        self.statistics = (None, None) if of_batch else tuple(s.clone() for s in statistics)
        found = _aten.native_batch_norm(z, self.weight, self.bias, *statistics, of_batch, share, self.eps)
        self.output, *self.saved = found

    def _backward(self, cotangent: Tensor, wanted: list[bool]) -> tuple[Tensor, ...]:
        return _aten.native_batch_norm_backward(
            cotangent, self.z, self.weight, *self.statistics, *self.saved, self.of_batch, self.eps, wanted
        )

    def push(self, tangent: Tensor) -> Tensor:
        return self._backward(tangent, [True, False, False])[0]  # symmetric within a channel, and so is its scale


class _Shortcut(Operation):
    def record(self, z: Tensor, first: Any = None) -> Recorded:
        del first
        return _ShortcutAt(self.module, z)


class _ShortcutAt(Recorded):
    def __init__(self, module: Shortcut, z: Tensor) -> None:
        self.module, self.shape = module, z.shape
        self.output = module(z)

    def pull(self, cotangent: Tensor) -> Tensor:
        stride, padding = self.module.stride, self.module.padding
        gradient = cotangent.new_zeros(self.shape)
        gradient[:, :, ::stride, ::stride] = cotangent[:, padding : cotangent.shape[1] - padding]
        return gradient

    def push(self, tangent: Tensor) -> Tensor:
        return self.module(tangent)


class _Residual(Operation):
    has_weights = True

    def __init__(self, module: Any) -> None:
        super().__init__(module)
        self.branch, self.skip, self.after = (_run_of(part) for part in _parts(module))

    @staticmethod
    def fits(module: Any) -> bool:
        parts = [m for part in _parts(module) for m in part]
        # What works in place may overwrite what the skip hands on; closed forms would not.
        if is_modified(module.branch) or any(getattr(m, "inplace", False) for m in parts):
            return False
        return all(operation(m) is not None for m in parts)

    def share(self, stage: Stage) -> None:
        for run in (self.branch, self.skip, self.after):
            for each in run:
                each.share(stage)

    @property
    def couples_batch(self) -> bool:
        return any(each.couples_batch for run in (self.branch, self.skip, self.after) for each in run)

    def record(self, z: Tensor, first: Any = None) -> Recorded:
        return _ResidualAt(self, z, first)


class _ResidualAt(Recorded):
    def __init__(self, residual: _Residual, z: Tensor, first: Any) -> None:
        parts = (None, None, None) if first is None else (first.branch, first.skip, first.after)
        self.branch = RecordedRun(residual.branch, z, parts[0])
        self.skip = RecordedRun(residual.skip, z, parts[1])
        self.after = RecordedRun(residual.after, joined(self.skip.output, self.branch.output), parts[2])
        self.output = self.after.output
        self._inner: tuple[Tensor, int, Tensor] | None = None

    def pull(self, cotangent: Tensor) -> Tensor:
        inner = self.after.pull(cotangent)
        self._inner = cotangent, cotangent._version, inner
        return self.branch.pull(inner) + self.skip.pull(inner)

    def push(self, tangent: Tensor) -> Tensor:
        return self.after.push(self.branch.push(tangent) + self.skip.push(tangent))

    def add_gradients(self, cotangent: Tensor, factor: float) -> None:
        known = self._inner
        same = known is not None and known[0] is cotangent and known[1] == cotangent._version
        inner = known[2] if known is not None and same else self.after.pull(cotangent)
        self.after.add_gradients(cotangent, factor)
        self.branch.add_gradients(inner, factor)
        self.skip.add_gradients(inner, factor)


def _parts(module: Residual) -> tuple[list[nn.Module], list[nn.Module], list[nn.Module]]:
    return list(module.branch), [module.skip], [module.after]


def _run_of(modules: list[nn.Module]) -> list[Operation]:
    return [found for m in modules if (found := operation(m)) is not None]


class _LayerNorm(Operation):
    has_weights = True

    def record(self, z: Tensor, first: Any = None) -> Recorded:
        del first
        return _LayerNormAt(self.module, z)


class _LayerNormAt(_Norm):
    def __init__(self, module: Any, z: Tensor) -> None:
        self.weight, self.bias, self.z = module.weight, module.bias, z
        self.shape = list(module.normalized_shape)
        found = _aten.native_layer_norm(z, self.shape, self.weight, self.bias, module.eps)
        self.output, *self.saved = found

    def _backward(self, cotangent: Tensor, wanted: list[bool]) -> tuple[Tensor, ...]:
        return _aten.native_layer_norm_backward(
            cotangent, self.z, self.shape, *self.saved, self.weight, self.bias, wanted
        )

    def push(self, tangent: Tensor) -> Tensor:
        core = _aten.native_layer_norm_backward(
            tangent, self.z, self.shape, *self.saved, None, None, [True, False, False]
        )[0]
        return core if self.weight is None else core * self.weight


def _pair(value: Any) -> list[int]:
    return [value, value] if isinstance(value, int) else list(value)


_KINDS: dict[type[nn.Module], type[Operation]] = {
    nn.Flatten: _Reshape,
    nn.Unflatten: _Reshape,
    nn.Identity: _Reshape,
    nn.Dropout: _Dropout,
    nn.Dropout2d: _Dropout,
    nn.MaxPool2d: _MaxPool,
    nn.AvgPool2d: _AveragePool,
    nn.AdaptiveAvgPool2d: _AdaptiveAveragePool,
    nn.BatchNorm1d: _BatchNorm,
    nn.BatchNorm2d: _BatchNorm,
    nn.BatchNorm3d: _BatchNorm,
    nn.LayerNorm: _LayerNorm,
    Residual: _Residual,
    Shortcut: _Shortcut,
}
