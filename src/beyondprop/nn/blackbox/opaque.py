"""A `BlackBox` under `torch.compile`: one operation that nobody looks into, and one for its backward pass."""

from __future__ import annotations

import itertools
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

_boxes: WeakValueDictionary[int, Any] = WeakValueDictionary()
_numbers = itertools.count(1)
_guessed: set[int] = set()


def registered(box: Any) -> int:
    """Return the number by which the operations find a box, as long as it lives."""
    number = next(_numbers)
    _boxes[number] = box
    return number


def opaque(box: Any, inputs: list[Tensor]) -> Any:
    """Call a box in a compiled program.

    Raises:
        RuntimeError: if it is not known how many numbers the box returns.
    """
    # Two calls at one input are two calls: what is joined with nothing, `empty`, keeps the compiler from making them one.
    *leaves, _ = torch.ops.beyondprop.black_box(inputs, torch.empty(0), box.handle)
    return box.structured(leaves)


def _call(handle: int, seed: int | None = None) -> Any:
    box = _boxes[handle]
    return box.new_call(seed)


def _black_box(inputs: list[Tensor], token: Tensor, handle: int) -> list[Tensor]:
    call = _call(handle)
    leaves = call.cast(call.value(inputs), inputs)
    box = _boxes[handle]
    if handle in _guessed and [tuple(leaf.shape[1:]) for leaf in leaves] != [(box.out_features,)]:
        raise RuntimeError(
            f"A black box was compiled for outputs (N, {box.out_features}) and returns others; call it once before it is "
            "compiled."
        )
    return [*leaves, torch.tensor(-1 if call.seed is None else call.seed)]


def _shaped(inputs: list[Tensor], token: Tensor, handle: int) -> list[Tensor]:
    box = _boxes[handle]
    shapes = box.caller.shapes
    if shapes is None:
        if box.out_features is None:
            raise RuntimeError(
                "The size of a black box's output is not known: give out_features, or call it once before it is compiled."
            )
        shapes = ((box.out_features,),)
        _guessed.add(handle)
    like = inputs[box.new_call(0).argnums(inputs)[0]]
    return [*(like.new_empty(like.shape[0], *shape) for shape in shapes), torch.empty((), dtype=torch.int64)]


def _pull(inputs: list[Tensor], cotangents: list[Tensor], seed: Tensor, handle: int) -> list[Tensor]:
    number = int(seed)
    call = _call(handle, None if number < 0 else number)
    call.restart(inputs)
    return [found.clone() for found in call.pull(inputs, cotangents)]


def _pull_shaped(inputs: list[Tensor], cotangents: list[Tensor], seed: Tensor, handle: int) -> list[Tensor]:
    return [torch.empty_like(inputs[i]) for i in _boxes[handle].new_call(0).argnums(inputs)]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    tensors, _, ctx.handle = inputs
    ctx.count = len(tensors)
    ctx.save_for_backward(*tensors, output[-1])


def _backward(ctx: Any, cotangents: list[Tensor]) -> tuple[list[Tensor | None], None, None]:
    *inputs, seed = ctx.saved_tensors
    found = torch.ops.beyondprop.black_box_pull(inputs, list(cotangents[:-1]), seed, ctx.handle)
    gradients: list[Tensor | None] = [None] * ctx.count
    for index, gradient in zip(_boxes[ctx.handle].new_call(0).argnums(inputs), found, strict=True):
        gradients[index] = gradient
    return gradients, None, None


# Not by `custom_op`, which loads torch's compiler with this module.
_library = torch.library.Library("beyondprop", "DEF")
_library.define("black_box(Tensor[] inputs, Tensor token, int handle) -> Tensor[]")
_library.define("black_box_pull(Tensor[] inputs, Tensor[] cotangents, Tensor seed, int handle) -> Tensor[]")
_library.impl("black_box", _black_box, "CompositeExplicitAutograd")
_library.impl("black_box_pull", _pull, "CompositeExplicitAutograd")
torch.library.register_fake("beyondprop::black_box", _shaped, lib=_library)
torch.library.register_fake("beyondprop::black_box_pull", _pull_shaped, lib=_library)
torch.library.register_autograd("beyondprop::black_box", _backward, setup_context=_setup, lib=_library)
