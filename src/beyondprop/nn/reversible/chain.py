"""`ReversibleSequential`, and the same as a function."""

from __future__ import annotations

import copy
import math
from collections.abc import Generator, Iterable, Iterator
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo

from beyondprop.errors import UnsupportedModelError
from beyondprop.nn.reversible.couplings import Coupling
from beyondprop.nn.reversible.function import as_made, pass_of, recorded
from beyondprop.nn.reversible.passes import Pass, Settings, check_block
from beyondprop.nn.reversible.stored import measured
from beyondprop.nn.reversible.streams import Streams
from beyondprop.nn.reversible.unwinding import Unwound, reconstructed, unwound

_CHECK_EVERY = 10
"""Forward passes with gradients from one check of a reconstruction to the next."""


class ReversibleSequential(nn.Module):
    """Couplings one after the other, trained in activation memory that does not grow with their number.

    The output and the gradients are those of the same blocks with ordinary autograd. A backward pass runs every function once
    more, under the random numbers, autocast settings and modes of the forward pass, and leaves running statistics, random
    number generators and `.grad` alone.

    Args:
        blocks: couplings.
        split_dim: where one tensor is cut into two streams.
        mode: `"inverse"` keeps the output and reconstructs all else; `"checkpoint"` keeps one stream a function and runs the
            functions again; `"store"` is ordinary autograd. May be set at any time.
        preserve_rng_state: whether functions that draw random numbers draw the same on the way back. False saves a look at the
            generators in every call; a function that draws is then refused in the backward pass.
        stream_dtype: least precision of the streams; what comes in less is raised to it. Functions get what they were built
            for: streams as they are under autocast, which casts by itself, and the input's dtype else. None: the input's.
        exact_bits: s: functions' outputs are rounded to multiples of 2^-s, with a straight-through gradient, and so is the
            input: reconstruction is exact to the last bit while streams stay below 2^(24 - s) in float32, and raises beyond.
            For `AdditiveCoupling` with deterministic functions.
        check: relative error of a block's reconstructed input above which a `ReconstructionWarning` names the block, once. One
            block is looked at in every tenth forward pass, the first block first.

    Attributes:
        counters: `kept_bytes`, what the last forward pass with gradients kept for the backward pass, weights not counted.

    Raises:
        TypeError, ValueError: if an argument is of the wrong kind.
        UnsupportedModelError: on an input that cannot be cut, or a function that cannot be undone: the message names it. In a
            backward pass, if weights or the output were changed in place, or if it is to be differentiated itself.

    Example:
        >>> blocks = [AdditiveCoupling(nn.Linear(4, 4), nn.Linear(4, 4)) for _ in range(3)]
        >>> chain = ReversibleSequential(*blocks)
        >>> chain(torch.randn(2, 8)).sum().backward()

    Source: Gomez et al., "The Reversible Residual Network", NeurIPS 2017, arXiv 1707.04585, algorithm 1.
    """

    def __init__(
        self,
        *blocks: Coupling,
        split_dim: int = 1,
        mode: str = "inverse",
        preserve_rng_state: bool = True,
        stream_dtype: torch.dtype | None = torch.float32,
        exact_bits: int | None = None,
        check: float | None = None,
    ) -> None:
        super().__init__()
        self.split_dim, self.mode, self.preserve_rng_state = split_dim, mode, preserve_rng_state
        self.stream_dtype, self.exact_bits, self.check = stream_dtype, exact_bits, check
        self._settings()
        for number, block in enumerate(blocks):
            check_block(block, str(number))
            self.add_module(str(number), block)
        self.counters: dict[str, float] = {"kept_bytes": 0}
        self._passes = 0
        self._warned: set[int] = set()
        self._stored: tuple[Any, ...] = ()

    @_disable_dynamo
    def forward(self, x: Tensor | Streams, *args: Any, **kwargs: Any) -> Tensor | Streams:
        """Map a tensor, or a pair of streams, to the same shape; further arguments go to every function.

        Tensors among these get gradients, in lists and dicts, too.
        """
        way = self.passed(x, args, kwargs)
        if not (torch.is_grad_enabled() and way.trains(x)):
            return way.given_back(way.plain(x))
        return way.given_back(self._stored_pass(way, x) if self.mode == "store" else self._recorded(way, x))

    def _recorded(self, way: Pass, x: Tensor | Streams) -> Tensor | Streams:
        if self.check is not None and self.mode == "inverse" and len(self):
            probe = _spread(self._passes // _CHECK_EVERY, len(self))
            if self._passes % _CHECK_EVERY == 0 and probe not in self._warned:
                way.probe, way.warned = probe, self._warned
            self._passes += 1
        output, self._stored = recorded(way, x), ()
        self.counters["kept_bytes"] = way.kept_bytes
        return output

    def _stored_pass(self, way: Pass, x: Tensor | Streams) -> Tensor | Streams:
        parts = [x] if isinstance(x, Tensor) else x
        opens, cast = (*way.weights.trainable, *(p.requires_grad for p in parts)), way.autocast.is_on(parts[0].device)
        key = parts[0].shape, parts[0].dtype, self.training, opens, cast
        if key == self._stored:
            return way.plain(x)
        output, kept = measured(way, x)
        self.counters["kept_bytes"] = kept
        self._stored = () if math.isnan(kept) else key
        return output

    def inverse(self, y: Tensor | Streams, *args: Any, **kwargs: Any) -> Any:
        """Return the x of which `forward` made `y`, without a graph.

        Args:
            y: an output of `forward`. One with gradients knows the random numbers and modes that it was made with.
            args: what `forward` was given.
            kwargs: the same.

        Raises:
            UnsupportedModelError: if a function draws random numbers, and `y` does not know which.
        """
        return reconstructed(self.pass_behind(y, args, kwargs), as_made(y))

    def unwind(
        self, y: Tensor | Streams, dy: Tensor | Streams, *args: Any, **kwargs: Any
    ) -> Generator[Unwound, Any, None]:
        """Walk back from an output; yield each block with its input, output and the cotangent of its output, last block first.

        What is yielded unpacks into `block, x_in, y_out, cotangent`, and `pull` gives the gradients of the block's weights.
        One block's activations live at a time.
        The cotangent of the block below is the block's pullback of this one, or what was sent into the generator in its place.

        Args:
            y: an output of `forward`, as of `inverse`.
            dy: the cotangent of `y`, of its shape.
            args: what `forward` was given.
            kwargs: the same.

        Example:
            >>> chain = ReversibleSequential(*[AdditiveCoupling(nn.Linear(4, 4), nn.Linear(4, 4)) for _ in range(3)])
            >>> y = chain(torch.randn(2, 8))
            >>> [tuple(x_in.shape) for block, x_in, y_out, cotangent in chain.unwind(y, torch.ones_like(y))]
            [(2, 8), (2, 8), (2, 8)]
        """
        return unwound(self.pass_behind(y, args, kwargs), as_made(y), dy, [*self])

    def passed(self, x: Tensor | Streams, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Pass:
        """Return a pass that was not run yet."""
        return Pass([*self._modules.items()], self._settings(), x, args, kwargs)  # type: ignore[arg-type]

    def pass_behind(self, y: Tensor | Streams, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Pass:
        """Return the pass that made `y`, or one as the chain is now where `y` does not know."""
        found, fresh = pass_of(y), self.passed(y, args, kwargs)
        if found is None or [p.call and p.call.function for p in found.places] != [
            p.call and p.call.function for p in fresh.places
        ]:
            return fresh
        found.weights.check(found.calls())
        again = copy.copy(found)  # the backward pass has its own arguments
        again.arguments = fresh.arguments
        return again

    def _settings(self) -> Settings:
        return Settings(
            self.split_dim, self.mode, self.preserve_rng_state, self.stream_dtype, self.exact_bits, self.check
        )

    def __len__(self) -> int:
        return len(self._modules)

    def __iter__(self) -> Iterator[Coupling]:
        return iter(self._modules.values())  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> Coupling:
        return [*self][index]

    def _replicate_for_data_parallel(self) -> NoReturn:
        raise UnsupportedModelError(
            "nn.DataParallel's copies of a module have no parameters, which a reversible chain looks for; use "
            "DistributedDataParallel."
        )

    def extra_repr(self) -> str:
        return f"mode={self.mode!r}"


@_disable_dynamo
def reversible_sequential(
    blocks: Iterable[Coupling],
    x: Tensor | Streams,
    *args: Any,
    split_dim: int = 1,
    mode: str = "inverse",
    preserve_rng_state: bool = True,
    stream_dtype: torch.dtype | None = torch.float32,
    exact_bits: int | None = None,
    **kwargs: Any,
) -> Any:
    """Run `x` through couplings, as a `ReversibleSequential` of them does; like `torch.utils.checkpoint.checkpoint_sequential`.

    Args:
        blocks: couplings, such as an `nn.Sequential` or a slice of one.
        x: a tensor or a pair of streams.
        args: go to every function.
        split_dim: as of `ReversibleSequential`, and so are all options.
        mode: the same.
        preserve_rng_state: the same.
        stream_dtype: the same.
        exact_bits: the same.
        kwargs: go to every function.
    """
    settings = Settings(split_dim, mode, preserve_rng_state, stream_dtype, exact_bits)
    way = Pass([(str(number), block) for number, block in enumerate(blocks)], settings, x, args, kwargs)
    if torch.is_grad_enabled() and way.trains(x) and mode != "store":
        return way.given_back(recorded(way, x))
    return way.given_back(way.plain(x))


def _spread(turn: int, count: int) -> int:
    """Return 0, count / 2, count / 4, 3 count / 4, ...: van der Corput's sequence, over and over."""
    place, width = 0.0, 0.5
    turn %= count
    while turn:
        place, turn, width = place + width * (turn & 1), turn >> 1, width / 2
    return int(place * count)
