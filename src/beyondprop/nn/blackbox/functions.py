"""A black box as autograd and `torch.func` see it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from beyondprop.nn.blackbox.call import Call

Mapped = tuple[tuple[Tensor, ...], tuple[int, ...]]
"""What a rule for `vmap` returns: outputs, and where their mapped dimension is."""


def _is_transformed() -> bool:
    """Whether a transformation of `torch.func` is at work."""
    functorch: Any = torch._C._functorch  # pyright: ignore[reportAttributeAccessIssue]
    return functorch.peek_interpreter_stack() is not None


def _to_front(size: int, dims: Sequence[int | None], tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return tensors with the mapped dimension first."""
    pairs = zip(tensors, dims, strict=True)
    return [x.unsqueeze(0).expand(size, *x.shape) if d is None else x.movedim(d, 0) for x, d in pairs]


def _folded(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return tensors with their first dimension joined with the batch."""
    if any(x.ndim < 2 for x in tensors):
        raise ValueError(
            "The black box must get a batch (N, ...) inside vmap, too; give it x[None] and take [0] of what it returns."
        )
    return [x.reshape(-1, *x.shape[2:]) for x in tensors]


class Evaluate(torch.autograd.Function):
    """The box, as autograd sees it."""

    @staticmethod
    def forward(call: Call, *inputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(call.cast(call.value(inputs), inputs))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.call, *tensors = inputs
        ctx.count = len(tensors)
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        inputs = ctx.saved_tensors
        if torch.is_grad_enabled() or _is_transformed():
            stacked = Product.apply(ctx.call, ctx.count, True, *_barred(inputs), *(v[None] for v in cotangents))
            found = [gradient[0] for gradient in stacked]
        else:  # nothing looks at what happens here
            found = _pulled(ctx.call, inputs, cotangents)
        gradients: list[Tensor | None] = [None] * ctx.count
        for index, gradient in zip(ctx.call.argnums(inputs), found, strict=True):
            gradients[index] = gradient
        return None, *gradients

    @staticmethod
    def jvp(ctx: Any, _: Any, *tangents: Tensor | None) -> tuple[Tensor, ...]:  # type: ignore[override]
        inputs = ctx.saved_tensors
        own = ctx.call.argnums(inputs)
        moved = [torch.zeros_like(inputs[i]) if (t := tangents[i]) is None else t for i in own]
        stacked = Product.apply(ctx.call, ctx.count, False, *_barred(inputs), *(u[None] for u in moved))
        return tuple(image[0] for image in stacked)

    @staticmethod
    def vmap(info: Any, in_dims: Any, call: Call, *inputs: Tensor) -> Mapped:  # type: ignore[override]
        folded = _folded(_to_front(info.batch_size, in_dims[1:], inputs))
        found = Evaluate.apply(Call(call.box, call.seed), *folded)
        return tuple(x.reshape(info.batch_size, -1, *x.shape[1:]) for x in found), (0,) * len(found)


def _pulled(call: Call, inputs: Sequence[Tensor], cotangents: Sequence[Tensor]) -> Sequence[Tensor]:
    try:
        return call.pull(inputs, cotangents)
    except RuntimeError as error:
        if "Batching rule not implemented" not in str(error):
            raise
        raise RuntimeError(
            "BlackBox takes no batched cotangents (vectorize=True, is_grads_batched=True), which autograd's engine keeps to "
            "itself; torch.func.jacrev and vmap sense once for all of them."
        ) from error


class _Barred(torch.autograd.Function):
    """An input behind which no second derivative goes; one with respect to the cotangent alone does not come here."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, tangent: Tensor) -> Tensor:  # type: ignore[override]
        raise RuntimeError(
            "BlackBox has first derivatives only: its Jacobian is sensed, and how that changes with the input is not known. "
            "Leave out create_graph=True (gradient penalties, Hessians), or detach the box's input there."
        )

    @staticmethod
    def vmap(info: Any, in_dims: Any, x: Tensor) -> tuple[Tensor, int | None]:  # type: ignore[override]
        return _Barred.apply(x), in_dims[0]


def _barred(inputs: Sequence[Tensor]) -> list[Tensor]:
    return [_Barred.apply(x) if x.requires_grad else x for x in inputs]


class Product(torch.autograd.Function):
    """`J^T v`, or `J u`, for K factors `(K, N, ...)`: linear in these, so that each is the other's derivative.

    Nothing is known of J's own derivative.
    """

    @staticmethod
    def forward(call: Call, count: int, is_pull: bool, *tensors: Tensor) -> tuple[Tensor, ...]:
        return call.products(tensors[:count], tensors[count:], is_pull=is_pull)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.call, ctx.count, ctx.is_pull, *tensors = inputs
        ctx.save_for_backward(*tensors[: ctx.count])

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        inputs = ctx.saved_tensors
        # What is barred says so where it is asked for.
        nothing = [torch.zeros_like(x) if x.requires_grad else None for x in inputs]
        found = Product.apply(ctx.call, ctx.count, not ctx.is_pull, *_barred(inputs), *cotangents)
        return None, None, None, *nothing, *found

    @staticmethod
    def vmap(  # type: ignore[override]
        info: Any, in_dims: Any, call: Call, count: int, is_pull: bool, *tensors: Tensor
    ) -> Mapped:
        size, inputs, own = info.batch_size, tensors[:count], in_dims[3 : 3 + count]
        factors = _to_front(size, in_dims[3 + count :], tensors[count:])  # (V, K, N, ...)
        if all(dim is None for dim in own):  # one Jacobian for all factors
            found = Product.apply(call, count, is_pull, *inputs, *_folded(factors))
            return tuple(x.reshape(size, -1, *x.shape[1:]) for x in found), (0,) * len(found)
        folded = _folded(_to_front(size, own, inputs))
        factors = [x.movedim(0, 1).reshape(x.shape[1], -1, *x.shape[3:]) for x in factors]  # (K, V * N, ...)
        found = Product.apply(_Restarted(call.box, call.seed), count, is_pull, *folded, *factors)
        return tuple(x.reshape(x.shape[0], size, -1, *x.shape[2:]) for x in found), (1,) * len(found)


class _Restarted(Call):
    """A pass whose values another call has asked for."""

    def products(self, inputs: Sequence[Tensor], factors: Sequence[Tensor], *, is_pull: bool) -> tuple[Tensor, ...]:
        self.restart(inputs)
        return super().products(inputs, factors, is_pull=is_pull)
