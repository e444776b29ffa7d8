"""A black box as autograd and `torch.func` see it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from beyondprop.nn.blackbox.call import Call


def _folded(info: Any, in_dims: Sequence[int | None], tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return tensors with the mapped dimension joined with the batch."""
    found = []
    for x, dim in zip(tensors, in_dims, strict=True):
        x = x.unsqueeze(0).expand(info.batch_size, *x.shape) if dim is None else x.movedim(dim, 0)
        if x.ndim < 2:
            raise ValueError(
                "The black box must get a batch (N, ...) inside vmap, too; give it x[None] and take [0] of what it returns."
            )
        found.append(x.reshape(-1, *x.shape[2:]))
    return found


def _unfolded(info: Any, tensors: Sequence[Tensor]) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    found = tuple(x.reshape(info.batch_size, -1, *x.shape[1:]) for x in tensors)
    return found, (0,) * len(found)


def _is_transformed() -> bool:
    """Whether a transformation of `torch.func` is at work."""
    functorch: Any = torch._C._functorch  # pyright: ignore[reportAttributeAccessIssue]
    return functorch.peek_interpreter_stack() is not None


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
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        inputs = ctx.saved_tensors
        if torch.is_grad_enabled() or _is_transformed():
            found = Product.apply(ctx.call, ctx.count, True, *_barred(inputs), *cotangents)
        else:  # nothing looks at what happens here
            found = ctx.call.pull(inputs, cotangents)
        gradients: list[Tensor | None] = [None] * ctx.count
        for index, gradient in zip(ctx.call.argnums(inputs), found, strict=True):
            gradients[index] = gradient
        return None, *gradients

    @staticmethod
    def jvp(ctx: Any, _: Any, *tangents: Tensor | None) -> tuple[Tensor, ...]:  # type: ignore[override]
        inputs = ctx.saved_tensors
        own = ctx.call.argnums(inputs)
        moved = [torch.zeros_like(inputs[i]) if (t := tangents[i]) is None else t for i in own]
        return Product.apply(ctx.call, ctx.count, False, *_barred(inputs), *moved)

    @staticmethod
    def vmap(info: Any, in_dims: Any, call: Call, *inputs: Tensor) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:  # type: ignore[override]
        return _unfolded(info, Evaluate.apply(Call(call.box, call.seed), *_folded(info, in_dims[1:], inputs)))


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
    """`J^T v`, or `J u`: linear in what is multiplied, so that each is the other's derivative; nothing is known of J's own."""

    @staticmethod
    def forward(call: Call, count: int, is_pull: bool, *tensors: Tensor) -> tuple[Tensor, ...]:
        multiply = call.pull if is_pull else call.push
        return tuple(multiply(tensors[:count], tensors[count:]))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.call, ctx.count, ctx.is_pull, *tensors = inputs
        ctx.save_for_backward(*tensors[: ctx.count])

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        inputs = ctx.saved_tensors
        # What is barred says so where it is asked for.
        nothing = [torch.zeros_like(x) if x.requires_grad else None for x in inputs]
        found = Product.apply(ctx.call, ctx.count, not ctx.is_pull, *_barred(inputs), *cotangents)
        return None, None, None, *nothing, *found

    @staticmethod
    def vmap(  # type: ignore[override]
        info: Any, in_dims: Any, call: Call, count: int, is_pull: bool, *tensors: Tensor
    ) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        inputs, factors = tensors[:count], tensors[count:]
        dims = in_dims[3 + count :]
        if all(dim is None for dim in in_dims[3 : 3 + count]):  # one Jacobian for all that is multiplied
            call.linearise(inputs)
            each = [
                Product.apply(
                    call,
                    count,
                    is_pull,
                    *inputs,
                    *(v if d is None else v.select(d, i) for v, d in zip(factors, dims, strict=True)),
                )
                for i in range(info.batch_size)
            ]
            found = tuple(torch.stack(parts) for parts in zip(*each, strict=True))
            return found, (0,) * len(found)
        folded = _folded(info, in_dims[3:], tensors)
        fresh = Call(call.box, call.seed)
        fresh.restart(folded[:count])
        return _unfolded(info, Product.apply(fresh, count, is_pull, *folded))
