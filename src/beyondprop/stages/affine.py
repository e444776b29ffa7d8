"""The stage with closed forms: Linear or Conv behind reshapes and one common nonlinearity."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from beyondprop.nn.activations import Activation, closed_form
from beyondprop.nn.functional import ones, patches
from beyondprop.stages.stage import Pullback, Stage, add_to_gradient

RESHAPES = (nn.Flatten, nn.Unflatten, nn.Identity)
_GATE = torch.ops.aten.threshold_backward.grad_input  # zero where the value is not positive, in one pass
_CONVOLUTION_BACKWARD = torch.ops.aten.convolution_backward.default
_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class AffineStage(Stage):
    """`output = W f(z) + b` with `f` elementwise (or the identity), reshaped where asked; no autograd."""

    def __init__(self, name: str, modules: Sequence[tuple[str, nn.Module]]) -> None:
        super().__init__(name, modules)
        self.affine: Any = self.modules[-1]
        # Looked up once: nn.Module finds attributes slowly, which shows in small steps.
        self.weight: nn.Parameter = self.affine.weight
        self.bias: nn.Parameter | None = self.affine.bias
        self.reshapes = [m for m in self.modules[:-1] if isinstance(m, RESHAPES)]
        self.activation: Activation | None = next(filter(None, map(closed_form, self.modules[:-1])), None)
        self.is_linear = isinstance(self.affine, nn.Linear)

    @staticmethod
    def fits(modules: Sequence[nn.Module]) -> bool:
        """Whether closed forms serve this run of modules."""
        *inner, affine = modules
        is_conv = type(affine) in _CONVS and affine.padding_mode == "zeros" and not isinstance(affine.padding, str)
        if not (is_conv or type(affine) is nn.Linear) or any(map(is_modified, modules)) or any(map(moves_batch, inner)):
            return False
        rest = [m for m in inner if type(m) not in RESHAPES]
        return len(rest) <= 1 and all(closed_form(m) is not None for m in rest)

    def record(self, z: Tensor, *, push: bool = False) -> AffinePullback:
        return AffinePullback(self, z)  # closed forms push tangents at no extra cost


class AffinePullback(Pullback):
    """An `AffineStage` at one input.

    Attributes:
        features: input of the affine map, `f(z)` after the reshapes.
    """

    def __init__(self, stage: AffineStage, z: Tensor) -> None:
        self.stage = self.map = stage
        self.input = z
        self.input_shape = z.shape
        activation = stage.activation
        value = self._value = z if activation is None else activation.value(z)
        self._z = z if activation is not None and activation.needs_input else None
        for reshape in stage.reshapes:
            value = reshape(value)
        self.features = value
        self.output = self._map(value, stage.weight, stage.bias)
        self._slope: Tensor | None = None

    def _map(self, features: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        apply = F.linear if self.map.is_linear else self.map.affine._conv_forward
        return whole(apply(features, weight, bias), features)

    @property
    def slope(self) -> Tensor:
        """`f'(z)`; asked for only where the stage has a nonlinearity."""
        if self._slope is not None:
            return self._slope
        activation = self.map.activation
        assert activation is not None
        slope = activation.slope(self._value if self._z is None else self._z, self._value)
        if not activation.is_gate:  # a gate is cheaper to find again than to keep
            self._slope = slope
        return slope

    def __call__(self, cotangent: Tensor) -> Tensor:
        stage = self.map
        weight = stage.backward_weight(stage.weight) if stage.feedback else stage.weight
        if stage.is_linear:
            gradient = whole(torch.matmul(cotangent, weight), cotangent)
        else:
            gradient = self._convolution_backward(cotangent, weight, [True, False, False])[0]
        return self.pull_head(gradient)

    @property
    def head_shape(self) -> torch.Size:
        return self.features.shape

    def pull_head(self, cotangent: Tensor) -> Tensor:
        stage, gradient = self.map, cotangent
        if stage.reshapes:
            gradient = gradient.reshape(self.input_shape)
        if stage.activation is None:
            return gradient
        if stage.activation.is_gate:
            return _GATE(gradient, self._value, 0, grad_input=gradient)
        if stage.activation.factors is not None and self._slope is None and self._z is not None:
            self._slope = stage.activation.factors(self._z, gradient)
        return gradient.mul_(self.slope)

    def push(self, tangent: Tensor, *, gated: bool = False) -> Tensor:
        stage = self.map
        if stage.activation is not None and not (gated and stage.activation.is_gate):
            tangent = tangent * self.slope
        if stage.reshapes:
            tangent = tangent.reshape(self.features.shape)
        return self._map(tangent, stage.weight, None)

    def add_gradients(self, cotangent: Tensor, factor: float) -> None:
        stage = self.map
        weight, bias = stage.weight, stage.bias
        rows, features = cotangent, self.features
        if not stage.is_linear:
            wanted = [False, weight.requires_grad, bias is not None and bias.requires_grad]
            _, *found = self._convolution_backward(rows, weight, wanted)
            for p, gradient in zip((weight, bias), found, strict=True):
                if p is not None and p.requires_grad:
                    add_to_gradient(p, gradient, factor)
            return
        if rows.ndim != 2:
            rows, features = rows.reshape(-1, rows.shape[-1]), features.reshape(-1, features.shape[-1])
        if rows.dtype is not weight.dtype:  # what came in was of less precision, under autocast
            rows, features = rows.to(weight.dtype), features.to(weight.dtype)
        if weight.requires_grad:
            if keep := weight.grad is not None:
                grad = weight.grad
            else:
                grad = weight.grad = torch.empty_like(weight)
            grad.addmm_(rows.t(), features, beta=float(keep), alpha=factor)
        if bias is not None and bias.requires_grad:
            if keep := bias.grad is not None:
                grad = bias.grad
            else:
                grad = bias.grad = torch.empty_like(bias)
            grad.addmv_(rows.t(), ones(len(rows), rows.dtype, rows.device), beta=float(keep), alpha=factor)

    @property
    def is_closed_form(self) -> bool:
        return True

    def at(self, z: Tensor) -> AffinePullback:
        return AffinePullback(self.map, z)

    def relinearize(self, before: Mapping[nn.Parameter, Tensor]) -> tuple[Pullback, Tensor]:
        weight, bias = self.map.weight, self.map.bias
        of_bias = None if bias is None else bias - before.get(bias, bias)
        return self, self._map(self.features, weight - before.get(weight, weight), of_bias)

    def feature_rows(self) -> Tensor:
        """Return the affine map's inputs as rows `(M, in)`, with a last column of ones where it has a bias.

        A convolution's rows are its patches, one for each output position.
        """
        affine, features = self.map.affine, self.features
        rows = features.reshape(-1, affine.in_features) if self.map.is_linear else patches(features, affine)
        if affine.bias is not None:
            rows = F.pad(rows, (0, 1), value=1.0)
        return rows

    def _convolution_backward(self, cotangent: Tensor, weight: Tensor, wanted: list[bool]) -> tuple[Tensor, ...]:
        m = self.map.affine
        settings = (m.stride, m.padding, m.dilation, False, m.output_padding, m.groups)
        sizes = None if m.bias is None else m.bias.shape
        return _CONVOLUTION_BACKWARD(cotangent, self.features, weight, sizes, *settings, wanted)


def whole(values: Tensor, like: Tensor) -> Tensor:
    """Return `values` in the dtype of `like`: autocast multiplies in half precision, codes and deltas stay whole."""
    return values if values.dtype is like.dtype else values.to(like.dtype)


def is_modified(module: nn.Module) -> bool:
    """Whether hooks or parametrizations change what the module computes, so that autograd must see it."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or nn.utils.parametrize.is_parametrized(module)
    )


def moves_batch(module: nn.Module) -> bool:
    """Whether a reshape touches the first dimension, which is the batch."""
    return (type(module) is nn.Flatten and module.start_dim == 0) or (type(module) is nn.Unflatten and module.dim == 0)
