"""The two streams of a reversible chain: how a tensor is cut into them and put together, and the grid of exact mode."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from beyondprop.errors import UnsupportedModelError

Streams = tuple[Tensor, Tensor]


class Shape(NamedTuple):
    """How what a user passes, one tensor or a pair, is made of two streams.

    Attributes:
        dim: where one tensor is cut; None: a pair stays a pair.
        layout: the memory format of both streams. It is the same on the way back: kernels round by it.
        dtype: that of both streams.
    """

    dim: int | None
    layout: torch.memory_format
    dtype: torch.dtype

    def split(self, x: Tensor | Streams) -> Streams:
        """Return the two streams in memory of their own."""
        parts = x.chunk(2, self._dim) if isinstance(x, Tensor) else x
        return self._own(parts[0]), self._own(parts[1])

    def owned(self, parts: Sequence[Any]) -> list[Any]:
        """Return the streams of one tensor or two, in memory of their own; None stays None."""
        if len(parts) == 1:
            return [*self.split(parts[0])]
        return [None if part is None else self._own(part) for part in parts]

    def joined(self, streams: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Return one tensor or two of streams of which not all are None."""
        if self.dim is None:
            return [*streams]
        some = next(s for s in streams if s is not None)
        return [torch.cat([torch.zeros_like(some) if s is None else s for s in streams], self.dim)]

    def _own(self, part: Tensor) -> Tensor:
        return torch.empty_like(part, dtype=self.dtype, memory_format=self.layout).copy_(part)

    def join(self, streams: Streams) -> Tensor | Streams:
        """Return what a user gets of two streams: in one tensor, or the two as they are."""
        return streams if self.dim is None else torch.cat(streams, self.dim)

    @property
    def _dim(self) -> int:
        return 0 if self.dim is None else self.dim


def shape_of(x: Any, split_dim: int, stream_dtype: torch.dtype | None, owner: str) -> Shape:
    """Return how `x`, a tensor or a pair of tensors, is made of two streams.

    Raises:
        TypeError: if it is neither.
        UnsupportedModelError: if it cannot be cut into halves, or the tensors of a pair differ.
    """
    pair = [x] if isinstance(x, Tensor) else [*x] if isinstance(x, tuple | list) else []
    if not 1 <= len(pair) <= 2 or (len(pair) == 1 and pair[0] is not x) or not all(isinstance(p, Tensor) for p in pair):
        given = ", ".join(type(part).__name__ for part in pair)
        given = f"({given})" if isinstance(x, tuple | list) else type(x).__name__
        raise TypeError(f"{owner} takes a tensor or a pair of tensors, its two streams, got {given}.")
    first: Tensor = pair[0]
    kinds = {(tuple(part.shape), part.dtype, part.device) for part in pair}
    if len(kinds) > 1:
        given = " and ".join(f"{tuple(p.shape)} {p.dtype} on {p.device}" for p in pair)
        raise UnsupportedModelError(f"{owner}: both streams must have one shape, dtype and device, got {given}.")
    if not first.is_floating_point():
        raise UnsupportedModelError(f"{owner} takes floating-point streams, got {first.dtype}.")
    if len(pair) == 1:
        sizes = tuple(first.shape)
        if not -first.ndim <= split_dim < first.ndim:
            raise UnsupportedModelError(f"{owner} splits dimension {split_dim}, and got a tensor of shape {sizes}.")
        if sizes[split_dim] % 2:
            raise UnsupportedModelError(
                f"{owner} splits dimension {split_dim} into equal halves, and got {sizes[split_dim]} there, an odd number "
                f"(shape {sizes}). Use an even one, or pass a pair of streams."
            )
    dtype = first.dtype if stream_dtype is None else torch.promote_types(first.dtype, stream_dtype)
    return Shape(split_dim if len(pair) == 1 else None, _layout(first), dtype)


def laid_out_as(x: Tensor, y: Tensor) -> Tensor:
    """Return `y` with the strides of `x`."""
    return y if y.stride() == x.stride() else torch.empty_like(x).copy_(y)


def _layout(x: Tensor) -> torch.memory_format:
    for layout, ndim in ((torch.channels_last, 4), (torch.channels_last_3d, 5)):
        if x.ndim == ndim and x.is_contiguous(memory_format=layout) and not x.is_contiguous():
            return layout
    return torch.contiguous_format


class Grid:
    """Multiples of 2^-bits, whose sums are exact while they are below `limit`.

    Args:
        bits: s, binary digits behind the point.
        dtype: that of the streams; its significand has 24 digits in float32 and 53 in float64.
    """

    def __init__(self, bits: int, dtype: torch.dtype) -> None:
        self.scale = 2.0**bits
        self.limit = 2 / torch.finfo(dtype).eps / self.scale

    def snap(self, x: Tensor) -> Tensor:
        """Return the nearest points of the grid; the gradient passes straight through."""
        return _Snapped.apply(x, self.scale)  # type: ignore[return-value]


class _Snapped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float) -> Tensor:
        return (x * scale).round_().div_(scale)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return gradient, None
