"""The task loss as credit rules see it: its value, its gradient at the output, and its curvature there.

Credit rules think per sample, so everything here is per sample: `cotangent` is the gradient of one sample's loss
(no 1/N inside), and `scale` is what a sum over samples is multiplied with to get the gradient of the loss that the
user sees: 1/N for a mean over the batch, 1 for a sum.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from beyondprop.nn.functional import ones

LossFunction = Callable[[Tensor, Tensor], Tensor]
_aten = torch.ops.aten
_CLOSED = (nn.CrossEntropyLoss, nn.MSELoss, nn.BCEWithLogitsLoss)
_NLL, _NLL_BACKWARD = _aten.nll_loss_forward.default, _aten.nll_loss_backward.default
_WHOLE = (torch.float32, torch.float64)
_EQUAL_DTYPES = (nn.MSELoss, nn.BCEWithLogitsLoss, nn.BCELoss)
_EQUAL_SHAPES = (
    *_EQUAL_DTYPES,
    *(nn.L1Loss, nn.SmoothL1Loss, nn.HuberLoss, nn.PoissonNLLLoss, nn.KLDivLoss),
    *(nn.SoftMarginLoss, nn.MultiLabelSoftMarginLoss, nn.HingeEmbeddingLoss),
)
Map = Callable[[Tensor], Tensor]
Evaluated = tuple[Tensor, Tensor, Map, Map | None]


@dataclass(slots=True)
class LossPoint:
    """The loss at one output.

    Attributes:
        value: the loss, 0-d, detached, as `loss(output, y)` would return it.
        cotangent: gradient of each sample's loss with respect to its output, shape of the output.
        scale: factor from a sum over samples to the gradient of `value`.
        hessian: maps a tangent (shape of the output) to the per-sample Hessian-vector product.
        again: evaluates the loss of the same targets at another output.
        curved: its curvature, where that is one number; 0 for cross-entropies in closed form, whose falls to 0 as targets are
            met; None: not known before it is asked for.
        bend: maps a tangent to `v^T H v` for every sample, never negative, where that takes less than `hessian`.
    """

    value: Tensor
    cotangent: Tensor
    scale: float
    hessian: Map
    again: Callable[[Tensor], LossPoint]
    curved: float | None = None
    bend: Map | None = None

    def curvature(self, tangent: Tensor) -> Tensor:
        """Return `v^T H v` for every sample, shape `(N,)`, never negative."""
        if self.bend is not None:
            return self.bend(tangent)
        product = tangent * self.hessian(tangent)
        return product.reshape(len(product), -1).sum(1).clamp_min_(0.0)

    def steepness(self, tangent: Tensor) -> Tensor | float:
        """Return `curved`, where it is known, else the curvature along a tangent: `v^T H v / |v|^2` over all samples, 0-d."""
        if self.curved is not None:
            return self.curved
        squared = tangent.square().sum()
        return self.curvature(tangent).sum() / squared.clamp_min_(torch.finfo(squared.dtype).tiny)


class OutputLoss:
    """A loss function and, where known, its closed-form gradient and Hessian.

    Closed forms: `nn.CrossEntropyLoss` on `(N, classes)` with class indices and no options, `nn.MSELoss`,
    `nn.BCEWithLogitsLoss` without weights. Every other callable goes through autograd on the output alone, and its
    Hessian through a second derivative there.

    Args:
        loss: `loss(output, y)` returning a scalar that is the mean (or, with `reduction="sum"`, the sum) of
            independent sample losses; `"batchmean"` is a mean, too.

    Raises:
        TypeError: if `loss` is not callable.
        ValueError: if its `reduction` is none of `"mean"`, `"batchmean"` and `"sum"`.
    """

    def __init__(self, loss: LossFunction) -> None:
        if not callable(loss):
            raise TypeError(f"loss must be callable as loss(output, y), got {type(loss).__name__}.")
        reduction = getattr(loss, "reduction", "mean")
        if reduction not in ("mean", "batchmean", "sum"):
            raise ValueError(f"loss must have reduction='mean' or 'sum', got reduction={reduction!r}.")
        self.loss: Any = loss
        self.is_mean = reduction != "sum"
        self._cleared: set[tuple[torch.Size, torch.Size]] = set()
        self.class_dims: dict[torch.Size, int] = {}  # of outputs, where `loss_behind` found them

    def __call__(self, output: Tensor, y: Tensor) -> Tensor:
        """Return the user's own `loss(output, y)`."""
        return self.loss(output, y)

    def scale(self, output: Tensor) -> float:
        """Return the factor from a sum over samples to the gradient of the loss."""
        return 1.0 / output.shape[0] if self.is_mean else 1.0

    @torch.no_grad()
    def at(self, output: Tensor, y: Tensor) -> LossPoint:
        """Evaluate the loss at `output`.

        Raises:
            ValueError: if `y` does not fit `output` (device, dtype, shape), saying what is accepted.
        """
        form = self._form(output, y)
        if form != self._cross_entropy or output.device.type != "cpu":
            self.check(output, y)
        value, cotangent, hessian, bend = form(output, y)
        curved = None if form == self._generic else 0.0
        if form == self._mean_squared_error:
            curved = 2.0 / output[0].numel() if self.is_mean else 2.0
        return LossPoint(value, cotangent, self.scale(output), hessian, lambda moved: self.at(moved, y), curved, bend)

    def _form(self, output: Tensor, y: Tensor) -> Callable[[Tensor, Tensor], Evaluated]:
        loss, kind = self.loss, type(self.loss)
        # Only what computes what its class says: no subclass, no hooks.
        if kind not in _CLOSED or loss._forward_hooks or loss._forward_pre_hooks:
            return self._generic
        if kind is nn.MSELoss:
            return self._mean_squared_error
        if loss._buffers["weight"] is not None:  # without the search that an attribute of a module takes
            return self._generic
        if kind is nn.BCEWithLogitsLoss:
            return self._binary_cross_entropy if loss.pos_weight is None else self._generic
        is_plain = loss.label_smoothing == 0.0 and output.ndim == 2 and y.ndim == 1 and y.dtype is torch.int64
        return self._cross_entropy if is_plain else self._generic

    def check(self, output: Tensor, y: Tensor) -> None:
        """Raise `ValueError` where `y` cannot be the target of `output`."""
        if y.device != output.device:
            raise ValueError(f"y is on {y.device}, the model's output on {output.device}; move y there.")
        if isinstance(self.loss, nn.CrossEntropyLoss):
            if y.is_floating_point():
                if y.dtype != output.dtype or y.shape != output.shape:
                    raise ValueError(
                        f"y of shape {tuple(y.shape)} and dtype {y.dtype} does not fit the output {tuple(output.shape)} "
                        f"of {output.dtype}: cross-entropy takes int64 class indices, or probabilities of that shape "
                        "and dtype."
                    )
            elif y.dtype != torch.int64:
                raise ValueError(f"y has dtype {y.dtype}: cross-entropy takes int64 class indices; use y.long().")
            elif y.shape != (wanted := output.shape[:1] + output.shape[2:]):
                raise ValueError(
                    f"y has shape {tuple(y.shape)}; cross-entropy on the output {tuple(output.shape)} takes class indices of "
                    f"shape {tuple(wanted)}."
                )
            elif y.device.type == "cpu" and y.numel():
                least, most, last = *map(int, y.aminmax()), output.shape[1] - 1
                # Where some are outside, those that are ignored may be all of them.
                if (least < 0 or most > last) and bool(
                    ((y < 0) | (y > last)).logical_and_(y != self.loss.ignore_index).any()
                ):
                    raise ValueError(f"y has labels from {least} to {most}; {last + 1} outputs accept 0 to {last}.")
        elif isinstance(self.loss, _EQUAL_SHAPES):
            kind = type(self.loss).__name__
            if y.dtype != output.dtype and isinstance(self.loss, _EQUAL_DTYPES):
                raise ValueError(f"y has dtype {y.dtype}, the output {output.dtype}: {kind} takes equal dtypes.")
            if y.shape != output.shape:
                raise ValueError(
                    f"y has shape {tuple(y.shape)}, the output {tuple(output.shape)}: {kind} takes equal shapes."
                )
        elif y.shape != output.shape and y.numel() == output.numel():
            self._check_broadcast(output, y)

    def _check_broadcast(self, output: Tensor, y: Tensor) -> None:
        """Raise `ValueError` where a function meets `(N, 1)` with `(N,)` sample by sample with all others, `(N, N)`."""
        shapes = (output.shape[1:], y.shape[1:])
        if shapes in self._cleared or not len(y):
            return
        rows = torch.arange(7, device=y.device) % len(y)  # a number that is hardly one of classes, too
        for few in (
            (output.detach()[rows], y[rows]),
            (output.detach(), y),
        ):  # the second where steps are as many as samples
            try:
                shape = torch.broadcast_shapes(few[0].shape, few[1].shape)
                break
            except RuntimeError:
                pass
        else:
            return  # torch itself refuses
        if shape.numel() > few[0].numel():
            with torch.no_grad(), _Shapes() as seen:
                self.loss(*few)
            if shape in seen.shapes:
                raise ValueError(
                    f"y has shape {tuple(y.shape)}, the output {tuple(output.shape)}: the loss broadcasts them, so that every "
                    "sample meets the targets of all others. Give y the output's shape, or reshape both inside the loss."
                )
        self._cleared.add(shapes)

    def _cross_entropy(self, output: Tensor, y: Tensor) -> Evaluated:
        # Autograd's own kernels, called directly: rows with ignore_index have no part in value, mean and gradient.
        reduction, ignore = (1 if self.is_mean else 2), self.loss.ignore_index
        log_p = torch.log_softmax(output, 1)
        try:
            value, total = _NLL(log_p, y, None, reduction, ignore)
        except (RuntimeError, IndexError):
            self.check(output, y)
            raise
        one, p = ones(1, total.dtype, total.device), log_p.exp()
        picked = _NLL_BACKWARD(one, log_p, y, None, 2, ignore, total)  # -1 at the label, nothing in ignored rows
        # The count is in the output's dtype, and bfloat16 counts to 256.
        if output.device.type == "cpu" and output.dtype in _WHOLE and float(total) == len(y):
            return value, picked.add_(p), *hessian_at(p)
        seen = picked.sum(1, keepdim=True).neg_()
        counted = seen.sum(dtype=torch.promote_types(seen.dtype, torch.float32))  # bfloat16 counts to 256
        weight = seen * (len(y) / counted.clamp_min_(1)) if self.is_mean else seen
        hessian, bend = hessian_at(p)
        cotangent = picked.addcmul_(p, seen).mul_(weight)
        return value, cotangent, lambda v: hessian(v).mul_(weight), lambda v: bend(v).mul_(weight[:, 0])

    def _mean_squared_error(self, output: Tensor, y: Tensor) -> Evaluated:
        residual = output - y
        value = residual.square().mean() if self.is_mean else residual.square().sum()
        factor = 2.0 / residual[0].numel() if self.is_mean else 2.0
        return value, residual * factor, lambda v: v * factor, None

    def _binary_cross_entropy(self, output: Tensor, y: Tensor) -> Evaluated:
        value = F.binary_cross_entropy_with_logits(output, y, reduction="mean" if self.is_mean else "sum")
        p = torch.sigmoid(output)
        factor = 1.0 / output[0].numel() if self.is_mean else 1.0
        return value, (p - y) * factor, lambda v: v * p * (1 - p) * factor, None

    def _generic(self, output: Tensor, y: Tensor) -> Evaluated:
        leaf = output.detach().requires_grad_()
        scale = self.scale(output)
        with torch.enable_grad():
            value = self.loss(leaf, y)
            if not isinstance(value, Tensor):
                raise TypeError(f"loss must return a tensor, got {type(value).__name__}.")
            if value.ndim:
                raise ValueError(
                    f"loss must return a scalar (mean or sum over the batch), got shape {tuple(value.shape)}; "
                    "use reduction='mean' or 'sum'."
                )
            if not value.requires_grad:
                raise ValueError(
                    "loss must follow the output by operations with a gradient; this one is detached from it."
                )
            (gradient,) = torch.autograd.grad(value, leaf, create_graph=True)

        def hessian(v: Tensor) -> Tensor:
            if not gradient.requires_grad:  # linear in the output
                return torch.zeros_like(v)
            (product,) = torch.autograd.grad(gradient, leaf, v, retain_graph=True, allow_unused=True)
            return torch.zeros_like(v) if product is None else product / scale

        return value.detach(), gradient.detach() / scale, hessian, None


def hessian_at(p: Tensor) -> tuple[Map, Map]:
    """Return the Hessian of cross-entropy at probabilities `(N, classes)`, and `v^T H v` for every sample, by functions."""

    def hessian(v: Tensor) -> Tensor:
        pv = p * v
        return pv.addcmul_(p, pv.sum(1, keepdim=True), value=-1.0)

    wide = p.float() if p.dtype in (torch.float16, torch.bfloat16) else p  # a sum in float16 ends at 65504

    def bend(v: Tensor) -> Tensor:
        v = v.to(wide.dtype)
        centred = v - (wide * v).sum(1, keepdim=True)
        return torch.linalg.vecdot(wide * centred, centred)

    return hessian, bend


class _Shapes(TorchDispatchMode):
    """Notes the shapes of all tensors that operations make."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: set[torch.Size] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        made = func(*args, **(kwargs or {}))
        self.shapes.update(
            part.shape for part in (made if isinstance(made, tuple | list) else (made,)) if isinstance(part, Tensor)
        )
        return made
