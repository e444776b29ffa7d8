"""Operations with closed forms: what a `PipelineStage` is made of.

`operation.record(z)` runs a module and returns its output and a `Recorded`: J^T v, J u and the gradients of its weights,
without autograd. A `Recorded` holds what these read and nothing else, so that an output which no derivative needs is free
as soon as its users have gone.
"""

from __future__ import annotations

import abc
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from beyondprop.errors import UnsupportedModelError
from beyondprop.nn.activations import Activation
from beyondprop.nn.blackbox import BlackBox
from beyondprop.nn.residual import Shortcut
from beyondprop.stages.affine import AffineStage
from beyondprop.stages.stage import Memo, Stage, add_to_gradient, too_few_values

_aten = torch.ops.aten


class Recorded(NamedTuple):
    """An operation at one input.

    Attributes:
        pull: `J^T cotangent`: a view of it, or a new tensor.
        push: `J tangent`.
        add_gradients: adds a factor times the gradient of the operation's weights, where it has any, to their `.grad`.
        again: runs the operation at another input of the same step, under the same masks and with running statistics as they
            are; None: as the first time.
    """

    pull: Callable[[Tensor], Tensor]
    push: Callable[[Tensor], Tensor]
    add_gradients: Callable[[Tensor, float], None] = lambda cotangent, factor: None
    again: Callable[[Tensor], tuple[Tensor, Recorded]] | None = None


Ran = tuple[Tensor, Recorded]
"""An operation's output, and the operation at this input."""


class Operation(abc.ABC):
    """A module with closed forms."""

    has_weights = False

    def __init__(self, module: Any) -> None:
        self.module = module

    @abc.abstractmethod
    def record(self, z: Tensor) -> Ran:
        """Run on `z`."""

    @property
    def couples_batch(self) -> bool:
        """Whether one sample's output depends on the others; default: no."""
        return False

    def share(self, stage: Stage) -> None:
        """Take from the stage that the operation belongs to what is needed of it, its name or feedback; default: nothing."""


class Plain(Operation):
    """An operation that is one function, of a module (or an activation) and an input."""

    def __init__(self, module: Any, function: Callable[[Any, Tensor], Ran], *, has_weights: bool = False) -> None:
        super().__init__(module)
        self.function, self.has_weights = function, has_weights

    def record(self, z: Tensor) -> Ran:
        return self.function(self.module, z)


def elementwise(activation: Activation, z: Tensor) -> Ran:
    """Record a nonlinearity."""
    value = activation.value(z)
    slope_of = z if activation.needs_input else value
    if activation.is_gate:

        def apply(change: Tensor) -> Tensor:
            return _aten.threshold_backward(change, value, 0)

    elif (first_factors := activation.factors) is not None and activation.needs_input:
        factors: Tensor | None = None

        def apply(change: Tensor) -> Tensor:
            nonlocal factors
            if factors is None:
                factors = first_factors(z, change)
            return change * factors

    else:

        def apply(change: Tensor) -> Tensor:
            return change * activation.slope(slope_of, value)

    return value, Recorded(apply, apply)


def _reshape(module: nn.Module, z: Tensor) -> Ran:
    before, output = z.shape, module(z)
    after = output.shape
    return output, Recorded(lambda v: v.reshape(before), lambda u: u.reshape(after))


def _dropout(module: Any, z: Tensor) -> Ran:
    if not module.training or module.p == 0.0:
        return z, Recorded(lambda v: v, lambda u: u)
    draw = F.dropout if type(module) is nn.Dropout else F.dropout2d
    return _masked(draw(torch.ones_like(z), module.p), z)  # the numbers that dropout of z itself would draw


def _masked(mask: Tensor, z: Tensor) -> Ran:
    def apply(change: Tensor) -> Tensor:
        return change * mask

    return z * mask, Recorded(apply, apply, again=partial(_masked, mask))


def _pairs(*values: Any) -> list[list[int]]:
    return [[value, value] if isinstance(value, int) else list(value) for value in values]


def _max_pool(m: Any, z: Tensor) -> Ran:
    settings = (*_pairs(m.kernel_size, m.stride, m.padding, m.dilation), m.ceil_mode)
    output, indices = _aten.max_pool2d_with_indices(z, *settings)
    return output, Recorded(
        lambda v: _aten.max_pool2d_with_indices_backward(v, z, *settings, indices),
        lambda u: u.flatten(-2).gather(-1, indices.flatten(-2)).view_as(indices),  # the places that were chosen
    )


def _average_pool(m: Any, z: Tensor) -> Ran:
    pairs = _pairs(m.kernel_size, m.stride, m.padding)
    settings = (*pairs, m.ceil_mode, m.count_include_pad, m.divisor_override)
    return _aten.avg_pool2d(z, *settings), Recorded(
        lambda v: _aten.avg_pool2d_backward(v.contiguous(), z, *settings),
        lambda u: _aten.avg_pool2d(u, *settings),
    )


def _adaptive_average_pool(module: nn.Module, z: Tensor) -> Ran:
    return module(z), Recorded(lambda v: _aten._adaptive_avg_pool2d_backward(v.contiguous(), z), module)


def _shortcut(module: Shortcut, z: Tensor) -> Ran:
    stride, padding, shape = module.stride, module.padding, z.shape

    def pull(cotangent: Tensor) -> Tensor:
        gradient = cotangent.new_zeros(shape)
        gradient[:, :, ::stride, ::stride] = cotangent[:, padding : cotangent.shape[1] - padding]
        return gradient

    return module(z), Recorded(pull, module)


def _black_box(module: BlackBox, z: Tensor) -> Ran:
    """Record a black box: one call a sample, and those for its Jacobian once, however often that is multiplied."""
    call = module.new_call()
    output, *more = call.cast(call.value([z]), [z])
    if more:
        raise UnsupportedModelError(
            f"A stage passes one tensor on, and its BlackBox returns {1 + len(more)}; let the box return one, or join them in "
            "a module of your own around it."
        )

    def pull(cotangent: Tensor) -> Tensor:
        call.linearise([z])
        return call.pull([z], [cotangent])[0]

    return output, Recorded(pull, lambda tangent: call.push([z], [tangent])[0])


class AffineMap(Operation):
    """A Linear or Conv; its `Recorded.pull` is an `AffinePullback`."""

    has_weights = True

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        self.stage = AffineStage("", [("", module)])

    def share(self, stage: Stage) -> None:
        self.stage.feedback = stage.feedback

    def record(self, z: Tensor) -> Ran:
        pullback = self.stage.record(z)
        output = pullback.output
        pullback.forget("output")
        return output, Recorded(pullback, pullback.push, pullback.add_gradients)


class BatchNorm(Operation):
    """`nn.BatchNorm1d` to `3d`."""

    has_weights = True
    name = ""

    def share(self, stage: Stage) -> None:
        self.name = stage.name

    @property
    def couples_batch(self) -> bool:
        return self.module.training or not self.module.track_running_stats

    def record(self, z: Tensor, *, is_first: bool = True) -> Ran:
        m, of_batch = self.module, self.couples_batch
        m._check_input_dim(z)
        if of_batch and z.numel() == z.shape[1]:
            raise too_few_values(self.name)
        statistics, share = (m.running_mean, m.running_var), m.momentum
        if m.training and m.track_running_stats:
            if is_first:
                m.num_batches_tracked.add_(1)
                share = 1.0 / float(m.num_batches_tracked) if share is None else share
            else:
                statistics = (None, None)
        # The backward of a run with running statistics needs them as they were.
        kept = (None, None) if of_batch else (m.running_mean.clone(), m.running_var.clone())
        share = 0.0 if share is None else share
        weight, bias, eps = m.weight, m.bias, m.eps
        output, *saved = _aten.native_batch_norm(z, weight, bias, *statistics, of_batch, share, eps)

        def backward(cotangent: Tensor, wanted: list[bool]) -> tuple[Tensor, ...]:
            return _aten.native_batch_norm_backward(cotangent, z, weight, *kept, *saved, of_batch, eps, wanted)

        def push(tangent: Tensor) -> Tensor:  # symmetric within a channel, and so is its scale
            return backward(tangent, [True, False, False])[0]

        return output, _normalised((weight, bias), backward, push, partial(self.record, is_first=False))


def _layer_norm(m: nn.LayerNorm, z: Tensor) -> Ran:
    shape, weight, bias = list(m.normalized_shape), m.weight, m.bias
    output, *saved = _aten.native_layer_norm(z, shape, weight, bias, m.eps)

    def backward(cotangent: Tensor, wanted: list[bool]) -> tuple[Tensor, ...]:
        return _aten.native_layer_norm_backward(cotangent, z, shape, *saved, weight, bias, wanted)

    def push(tangent: Tensor) -> Tensor:  # symmetric up to its scale
        core = _aten.native_layer_norm_backward(tangent, z, shape, *saved, None, None, [True, False, False])[0]
        return core if weight is None else core * weight

    return output, _normalised((weight, bias), backward, push)


def _normalised(
    parameters: tuple[nn.Parameter | None, ...],
    backward: Callable[[Tensor, list[bool]], tuple[Tensor, ...]],
    push: Callable[[Tensor], Tensor],
    again: Callable[[Tensor], Ran] | None = None,
) -> Recorded:
    """Return a normalisation at one input; `backward` gives the gradients that are wanted, of input, weight and bias."""
    own: Memo[list[Tensor]] = Memo()

    def wanted() -> list[bool]:
        return [p is not None and p.requires_grad for p in parameters]

    def pull(cotangent: Tensor) -> Tensor:
        gradient, *found = backward(cotangent, [True, *wanted()])
        own.keep(cotangent, found)
        return gradient

    def add_gradients(cotangent: Tensor, factor: float) -> None:
        asked = wanted()
        if not any(asked):
            return
        found = own.find(cotangent) or backward(cotangent, [False, *asked])[1:]
        for p, gradient, is_asked in zip(parameters, found, asked, strict=True):
            if p is not None and gradient is not None and is_asked:
                add_to_gradient(p, gradient, factor)

    return Recorded(pull, push, add_gradients, again)


OPERATIONS: dict[type[nn.Module], Callable[[Any], Operation]] = {
    nn.Flatten: partial(Plain, function=_reshape),
    nn.Unflatten: partial(Plain, function=_reshape),
    nn.Identity: partial(Plain, function=_reshape),
    nn.Dropout: partial(Plain, function=_dropout),
    nn.Dropout2d: partial(Plain, function=_dropout),
    nn.MaxPool2d: partial(Plain, function=_max_pool),
    nn.AvgPool2d: partial(Plain, function=_average_pool),
    nn.AdaptiveAvgPool2d: partial(Plain, function=_adaptive_average_pool),
    Shortcut: partial(Plain, function=_shortcut),
    BlackBox: partial(Plain, function=_black_box),
    nn.BatchNorm1d: BatchNorm,
    nn.BatchNorm2d: BatchNorm,
    nn.BatchNorm3d: BatchNorm,
    nn.LayerNorm: partial(Plain, function=_layer_norm, has_weights=True),
}
