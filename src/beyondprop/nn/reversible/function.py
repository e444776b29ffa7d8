"""A whole pass as one `torch.autograd.Function`: what it gives back are gradients of inputs, arguments and weights."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from beyondprop.errors import UnsupportedModelError
from beyondprop.nn.reversible.back import WayBack
from beyondprop.nn.reversible.passes import Pass
from beyondprop.nn.reversible.replay import is_same
from beyondprop.nn.reversible.streams import Streams


def recorded(way: Pass, x: Tensor | Streams) -> Tensor | Streams:
    """Run a pass whose way back is walked when `backward()` is called.

    Raises:
        UnsupportedModelError: inside a transform of `torch.func`.
    """
    check_transforms()
    with without_cast_cache():
        pair = (x,) if isinstance(x, Tensor) else x
        output: Any = _Reversed.apply(way, len(pair), *pair, *way.arguments.taken(), *way.weights.given())
    way.kept_bytes += way.weights.seal()
    return output


def pass_of(output: Any) -> Pass | None:
    """Return the pass that an output comes from, if it knows."""
    node, _ = _origin(output if isinstance(output, Tensor) else output[0])
    found = getattr(node, "way", None)
    return found if isinstance(found, Pass) else None


def as_made(output: Tensor | Streams) -> Tensor | Streams:
    """Return an output that knows its pass as the pass made it, where it was given back in less precision; else as it is."""
    made = []
    for number, tensor in enumerate((output,) if isinstance(output, Tensor) else output):
        node, is_cast = _origin(tensor)
        try:
            made.append(node.saved_tensors[number].detach() if is_cast else tensor)
        except RuntimeError:  # a backward pass has freed it
            made.append(tensor)
    return made[0] if isinstance(output, Tensor) else (made[0], made[1])


def _origin(output: Any) -> tuple[Any, bool]:
    """Return the node that an output comes from, and whether the output is a cast of that node's."""
    node: Any = output.grad_fn if isinstance(output, Tensor) else None
    below = node.next_functions[0][0] if node is not None and node.name() == "ToCopyBackward0" else None
    return (below, True) if isinstance(getattr(below, "way", None), Pass) else (node, False)


class _Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, way: Pass, count: int, *tensors: Tensor) -> Any:
        ctx.set_materialize_grads(False)
        first = len(tensors) - len(way.weights.tensors)
        x, arguments = tensors[:count], tensors[count:first]
        keep: list[Tensor] = []
        output = way.shape.join(_pair(way.forward(x[0] if count == 1 else _pair(x), arguments, keep)))
        outputs = [output] if isinstance(output, Tensor) else [*output]
        ctx.way, ctx.count, ctx.split = way, count, (len(outputs), len(arguments))
        saved = [*outputs, *arguments, *keep]
        way.kept_bytes += sum({t.untyped_storage().data_ptr(): t.nbytes for t in saved}.values())
        ctx.save_for_backward(*saved)
        return output

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        way: Pass = ctx.way
        if all(c is None for c in cotangents):
            return (None,) * len(ctx.needs_input_grad)
        outputs, arguments, kept = _split(saved_tensors(ctx, "The output of a reversible chain"), *ctx.split)
        below, walk = _walked(way, outputs, arguments, kept, cotangents, any(ctx.needs_input_grad[2 : 2 + ctx.count]))
        found = [*below, *walk.argument_gradients, *walk.gradients]
        if torch.is_grad_enabled():
            found = refusing(found, [*outputs, *arguments, *cotangents])
        return None, None, *found


def _walked(
    way: Pass,
    outputs: Sequence[Tensor],
    arguments: Sequence[Tensor],
    kept: Sequence[Tensor],
    cotangents: Sequence[Tensor | None],
    needs_input: bool,
) -> tuple[Sequence[Tensor | None], WayBack]:
    """Return the cotangents of the input, and the walk that has all other gradients."""
    way.weights.check(way.calls())
    is_inverse = way.settings.mode == "inverse"
    probed = kept[len(kept) - 2 :] if way.probe is not None else []
    with torch.no_grad():
        above = way.shape.owned(cotangents)
        # Where inputs were kept, no stream is looked at but those.
        streams = way.shape.owned(outputs) if is_inverse else [outputs[0], outputs[-1]]
        walk = WayBack(way, streams, arguments, None if is_inverse else kept[: len(kept) - len(probed)])
    first = 0 if needs_input or walk.open else way.lowest
    with way.surroundings(walk.aliases):
        before = [] if way.settings.preserve_rng_state else way.random.get()
        for number in range(len(way.places) - 1, first - 1, -1):
            place = way.places[number]
            with walk.at(place):
                walk.pull(walk.undo(place, needs_input=needs_input or number > first), above)
            if probed and way.starts(number):
                way.check_reconstruction(walk.streams, probed)
        if before and not is_same(before, way.random.get()):
            raise UnsupportedModelError(
                "A function of the chain draws random numbers, and these were others on the way back: preserve_rng_state must "
                "be True, got False."
            )
        if not needs_input:
            return [None] * len(cotangents), walk
        return way.shape.joined(above), walk


def _split(saved: Sequence[Tensor], outputs: int, arguments: int) -> tuple[Sequence[Tensor], ...]:
    return saved[:outputs], saved[outputs : outputs + arguments], saved[outputs + arguments :]


def _pair(tensors: Sequence[Tensor]) -> Streams:
    first, second = tensors
    return first, second


def check_transforms() -> None:
    """Raise `UnsupportedModelError` inside a transform of `torch.func`."""
    if torch._C._are_functorch_transforms_active():
        raise UnsupportedModelError(
            "What is run again in the backward pass cannot be transformed by torch.func (grad, vmap, jvp): set "
            'mode="store" there.'
        )


@contextlib.contextmanager
def without_cast_cache() -> Iterator[None]:
    """Leave no cast of a weight in autocast's cache: it has no graph, and others would use it (pytorch/pytorch#65766)."""
    cached = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(cached)


def saved_tensors(ctx: Any, what: str) -> tuple[Tensor, ...]:
    """Return what was saved, or say by name that it was changed in place."""
    try:
        return ctx.saved_tensors
    except RuntimeError as error:
        if "modified by an inplace operation" not in str(error):
            raise
        raise UnsupportedModelError(
            f"{what}, or a further argument, was changed in place after the forward pass, and the backward pass starts from "
            "it. Use an operation that returns a new tensor, such as inplace=False."
        ) from error


def refusing(found: Sequence[Tensor | None], above: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Return gradients that refuse to be differentiated, whatever for: what is cut off would be a silent zero."""
    there = [g for g in found if g is not None]
    refused = iter(_Refusing.apply(len(there), *there, *(t for t in above if t is not None)))  # type: ignore[arg-type]
    return [None if g is None else next(refused) for g in found]


class _TwiceError(UnsupportedModelError, RuntimeError):
    """A `RuntimeError`, too, as torch's own refusals are, so that who has another way then finds it."""


class _Refusing(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(t.clone() for t in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:  # type: ignore[override]
        raise _TwiceError(
            'What is run again in the backward pass cannot be differentiated twice: set mode="store" where second derivatives '
            "are taken (gradient penalties, Hessian products)."
        )
