"""A linear operator's product with spikes and the two transposed ones, by the spikes alone where they are few."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)

SIZES = {"cpu": (2**20, 2**22)}
"""Numbers of a part by device, at least and at most: an eighth of the batch is little beside the spikes; caches are small."""

SIZES_ELSEWHERE = (2**24, 2**27)

LEAST_STATE = 2**12
"""Numbers of one step, at least, where the batch has as many: below, an operation's overhead is all of it."""

FEW = 0.2
"""Share of the steps in which trains spike, below which rows of weights are summed, spike by spike."""


def is_plain(op: nn.Module) -> bool:
    """Return whether an operator is its class's product with its own weight and nothing else: no hook, no parametrization."""
    hooks = (op._forward_hooks, op._forward_pre_hooks, op._backward_hooks, op._backward_pre_hooks)
    if any(hooks) or "forward" in vars(op) or op._modules or torch.nn.modules.module._has_any_global_hook():
        return False
    held = {name: value for name, value in op._parameters.items() if value is not None}
    if type(op) is nn.AvgPool2d:
        return not held
    if (
        type(op) not in (nn.Linear, *CONVOLUTIONS)
        or list(held) != ["weight"]
        or not isinstance(op.weight, nn.Parameter)
    ):
        return False
    return isinstance(op, nn.Linear) or (op.padding_mode == "zeros" and not isinstance(op.padding, str))  # type: ignore[union-attr]


def outputs_of(op: nn.Module, shape: Sequence[int]) -> int:
    """Return how many neurons a plain operator drives with one step of a sample of a shape, at most."""
    if isinstance(op, nn.Linear):
        return math.prod(shape[:-1]) * op.out_features
    if isinstance(op, nn.AvgPool2d):
        return math.prod(shape)
    if len(shape) != len(op.kernel_size) + 1:  # type: ignore[arg-type]
        raise ValueError(
            f"Spikes (N, T, channels, ...) are needed for a {type(op).__name__}, got steps of the shape {tuple(shape)}."
        )
    return op.out_channels * math.prod(size + 2 * pad for size, pad in zip(shape[1:], op.padding, strict=True))  # type: ignore[union-attr]


def parts(samples: int, steps: int, width: int, device: torch.device) -> Iterator[slice]:
    """Yield slices of a batch whose samples have so many steps of so many numbers each."""
    least, most = SIZES.get(device.type, SIZES_ELSEWHERE)
    numbers = min(max(least, samples * steps * width // 8), most)
    size = max(1, numbers // max(1, steps * width), LEAST_STATE // max(1, width))
    for start in range(0, max(1, samples), size):
        yield slice(start, min(start + size, samples))


class Products:
    """The products of a plain operator with the parts of a batch; gradients add up over the parts.

    Args:
        op: the operator.
        weight: its weight; None for pooling, which has none.
    """

    def __init__(self, op: nn.Module, weight: Tensor | None) -> None:
        self.op, self.weight = op, weight
        self._by_input: Tensor | None = None  # the weight of a Linear, an input a row
        self._gradient: Tensor | None = None
        self._gradient_by_input: Tensor | None = None

    def drive(self, trains: Trains) -> Tensor:
        """Return the product with trains, `(N, T, ...)`."""
        if not isinstance(self.op, nn.Linear):
            flat = trains.x.flatten(0, 1)
            found = self.op(flat) if self.weight is None else self.op._conv_forward(flat, self.weight, None)  # type: ignore[operator]
            return found.view(trains.samples, trains.steps, *found.shape[1:])
        assert self.weight is not None
        where = self._few(trains, False)
        if where is None:
            return nn.functional.linear(trains.x, self.weight)
        if self._by_input is None:
            self._by_input = self.weight.T.contiguous()
        found = nn.functional.embedding_bag(where[0], self._by_input, where[1], mode="sum")
        return found.view(*trains.kept.shape[:1], trains.steps, *trains.kept.shape[2:-1], len(self.weight))

    def learn(self, trains: Trains, cotangent: Tensor, quiet: Tensor) -> None:
        """Add to the gradient.

        Args:
            trains: what the operator was applied to.
            cotangent: of every step, `(N, T, ...)`.
            quiet: of the trains that have any spike, as one step, `(N, ...)`.
        """
        assert self.weight is not None
        if not isinstance(self.op, nn.Linear):
            for x, of in ((trains.x.flatten(0, 1), cotangent.flatten(0, 1)), (trains.any, quiet)):
                self._add(_backward_of_convolution(self.op, self.weight, x, of, (False, True, False))[1])
            return
        where = self._few(trains, True)
        if where is None:
            self._add(cotangent.flatten(0, -2).T @ trains.x.flatten(0, -2))
        else:
            found = nn.functional.embedding_bag(where[0], cotangent.flatten(0, -2), where[1], mode="sum")
            one = self._gradient_by_input
            self._gradient_by_input = found if one is None else one.add_(found)
        self._add(quiet.flatten(0, -2).T @ trains.any.flatten(0, -2))

    def _add(self, found: Tensor) -> None:
        self._gradient = found if self._gradient is None else self._gradient.add_(found)

    def _few(self, trains: Trains, by_column: bool) -> tuple[Tensor, Tensor] | None:
        """Return where there are spikes, as `nn.functional.embedding_bag` has it, if it pays."""
        assert self.weight is not None
        if trains.bits is None or trains.bits.device.type != "cpu" or self.weight.dtype != torch.float32:
            return None
        return few(trains.bits.flatten(0, -2), by_column)

    @property
    def gradient(self) -> Tensor:
        """By the weight, of all parts."""
        assert self._gradient is not None
        rest = self._gradient_by_input
        return self._gradient if rest is None else self._gradient.add_(rest.T)

    def down(self, like: Tensor, cotangent: Tensor) -> Tensor:
        """Return the derivative by inputs of a shape, `(N, T, ...)`, of cotangents `(N, T, ...)`."""
        if isinstance(self.op, nn.Linear):
            assert self.weight is not None
            return cotangent @ self.weight
        flat = like.flatten(0, 1), cotangent.flatten(0, 1)
        if isinstance(self.op, nn.AvgPool2d):
            pairs = [
                (one, one) if isinstance(one, int) else one
                for one in (self.op.kernel_size, self.op.stride, self.op.padding)
            ]
            rest = (self.op.ceil_mode, self.op.count_include_pad, self.op.divisor_override)
            return torch.ops.aten.avg_pool2d_backward(flat[1], flat[0], *pairs, *rest).view(like.shape)
        assert self.weight is not None
        return _backward_of_convolution(self.op, self.weight, *flat, (True, False, False))[0].view(like.shape)


def few(bits: Tensor, by_column: bool) -> tuple[Tensor, Tensor] | None:
    """Return the columns of the spikes of every row, one after the other, and where each row begins; None if they are many.

    Args:
        bits: `(rows, columns)`, on a CPU.
        by_column: the same of the transpose.
    """
    rows = (bits.T.contiguous() if by_column else bits).numpy()
    if np.count_nonzero(rows) > FEW * rows.size or rows.size > np.iinfo(np.int32).max:
        return None
    where, width = np.flatnonzero(rows).astype(np.int32), np.int32(max(1, rows.shape[1]))
    begins = np.searchsorted(where, np.arange(len(rows), dtype=np.int32) * width).astype(np.int32)
    columns = where - where // width * width  # a division is vectorised, a remainder is not
    return torch.from_numpy(columns), torch.from_numpy(begins)


class Trains:
    """Spikes into a part of a batch, kept as bits where they are 0 and 1.

    Attributes:
        bits: bool `(N, T, ...)`, where they are 0 and 1.
        kept: the smallest tensor that they can be had from again.
        any: whether a train has a spike, `(N, ...)`, 0 or 1.
    """

    def __init__(
        self, x: Tensor | None, bits: Tensor | None, kept: Tensor, any_spike: Tensor, kind: torch.dtype
    ) -> None:
        self._x, self.bits, self.kept, self.kind = x, bits, kept, kind
        self.any = any_spike.to(kind)
        self.samples, self.steps = (x if bits is None else bits).shape[:2]  # type: ignore[union-attr]

    @classmethod
    def of(cls, x: Tensor) -> Trains:
        """Return spikes `(N, T, ...)`."""
        bits = x != 0
        if not torch.equal(bits.to(x.dtype), x):
            return cls(x, None, x, bits.any(1), x.dtype)
        kept = packed(bits)
        return cls(x, bits, kept, kept.amax(1) > 0, x.dtype)

    @classmethod
    def kept_as(cls, kept: Tensor, steps: int, kind: torch.dtype) -> Trains:
        """Return what was kept, of so many steps in a precision: itself, or bits in bytes."""
        if kept.dtype == kind:
            return cls(kept, None, kept, (kept != 0).any(1), kind)
        return cls(None, unpacked(kept, steps, torch.bool), kept, kept.amax(1) > 0, kind)

    @property
    def x(self) -> Tensor:
        """The spikes, `(N, T, ...)`."""
        if self._x is None:
            assert self.bits is not None
            self._x = self.bits.to(self.kind)
        return self._x


def _backward_of_convolution(op: Any, weight: Tensor, x: Tensor, cotangent: Tensor, wanted: tuple[bool, ...]) -> Any:
    return torch.ops.aten.convolution_backward(
        cotangent, x, weight, None, op.stride, op.padding, op.dilation, False, op.output_padding, op.groups, wanted
    )


def packed(bits: Tensor) -> Tensor:
    """Return bools `(N, T, ...)` as bytes `(N, T / 8, ...)`, eight steps of time in each."""
    steps = bits.shape[1]
    found = torch.zeros((len(bits), -(-steps // 8), *bits.shape[2:]), dtype=torch.uint8, device=bits.device)
    for k in range(min(8, steps)):
        some = bits[:, k::8].view(torch.uint8)
        found[:, : some.shape[1]] |= some << k
    return found


def unpacked(found: Tensor, steps: int, dtype: torch.dtype) -> Tensor:
    """Return what was packed, `(N, T, ...)` in any kind."""
    bits = torch.empty((len(found), steps, *found.shape[2:]), dtype=dtype, device=found.device)
    for k in range(min(8, steps)):
        some = bits[:, k::8]
        some.copy_((found[:, : some.shape[1]] >> k) & 1)
    return bits
