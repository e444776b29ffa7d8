"""One forward pass of a reversible chain, and the way back along it.

Forward, the functions run without a graph and nothing is kept but the output. On the way back each step is undone, last first:
its function runs once more, with a graph of its own, which gives the stream below and, with the cotangent of the stream above,
the gradients (algorithm 1 of Gomez et al., NeurIPS 2017). One function's graph lives at a time.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from beyondprop import _checks
from beyondprop.errors import ReconstructionWarning, UnsupportedModelError
from beyondprop.nn.reversible.couplings import Coupling, Step, check_out
from beyondprop.nn.reversible.replay import Arguments, Autocast, Call, Random, Weights, is_same, surroundings, version
from beyondprop.nn.reversible.streams import Grid, Streams, laid_out_as, shape_of

MODES = ("inverse", "checkpoint", "store")


@dataclass(frozen=True)
class Settings:
    """The options of a chain; `ReversibleSequential` says what they mean."""

    split_dim: int = 1
    mode: str = "inverse"
    preserve_rng_state: bool = True
    stream_dtype: torch.dtype | None = torch.float32
    exact_bits: int | None = None
    check: float | None = None

    def __post_init__(self) -> None:
        if isinstance(self.split_dim, bool) or not isinstance(self.split_dim, int):
            raise TypeError(f"split_dim must be an integer, got {self.split_dim!r}.")
        _checks.one_of("mode", self.mode, MODES)
        if self.stream_dtype is not None and not (
            isinstance(self.stream_dtype, torch.dtype) and self.stream_dtype.is_floating_point
        ):
            raise TypeError(f"stream_dtype must be a floating-point torch.dtype or None, got {self.stream_dtype!r}.")
        if self.exact_bits is not None:
            _checks.at_least("exact_bits", self.exact_bits, 0)
        if self.check is not None:
            _checks.positive("check", self.check)


class Place(NamedTuple):
    """A step and where it is."""

    step: Step
    block: int
    call: Call | None


class Pass:
    """One forward pass: the steps of all blocks, and what their functions need to run once more.

    Attributes:
        probe: the number of the block whose input is compared with its reconstruction.
        warned: numbers of blocks for which that has led to a warning.
        kept_bytes: what is kept for the way back.

    Args:
        blocks: couplings by name.
        settings: the chain's.
        x: the input.
        args: as of the chain.
        kwargs: as of the chain.

    Raises:
        TypeError, UnsupportedModelError: if a block is of the wrong kind, or the input does not fit.
    """

    def __init__(
        self,
        blocks: Sequence[tuple[str, Coupling]],
        settings: Settings,
        x: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        self.settings, self.names = settings, [name for name, _ in blocks]
        self.probe: int | None = None
        self.warned: set[int] = set()
        self.shape = shape_of(x, settings.split_dim, settings.stream_dtype, "A reversible chain")
        first = x if isinstance(x, Tensor) else x[0]
        self.weights = Weights()
        self.arguments = Arguments(args, kwargs)
        self.places: list[Place] = []
        for number, (name, block) in enumerate(blocks):
            check_block(block, name)
            for step in block.steps(settings.split_dim):
                function = step.function
                what = f"{step.name!r} of block {name!r} ({type(block).__name__})"
                call = None if function is None else Call(function, what, self.weights)
                self.places.append(Place(step, number, call))
                if settings.exact_bits is not None and not step.is_exact:
                    raise UnsupportedModelError(
                        f"exact_bits is for blocks that add, AdditiveCoupling; block {name!r} is a {type(block).__name__}."
                    )
        devices = {first.device, *self.weights.devices()}
        self.autocast, self.random = Autocast(devices), Random(devices)
        # Autocast casts by itself; else functions, and what comes behind the chain, get what they were built for.
        self.fed = self.shape.dtype if self.autocast.is_on(first.device) else first.dtype
        self.grid = None if settings.exact_bits is None else Grid(settings.exact_bits, self.shape.dtype)
        self.kept_bytes = 0

    def trains(self, x: Tensor | Streams) -> bool:
        """Return whether the input, a weight or a further argument requires a gradient."""
        given = [*(self.arguments.tensors or ()), *([x] if isinstance(x, Tensor) else x)]
        return any(self.weights.trainable) or any(t.requires_grad for t in given)

    def given_back(self, output: Tensor | Streams) -> Tensor | Streams:
        """Return the output in the dtype that is expected of the chain."""
        return output.to(self.fed) if isinstance(output, Tensor) else (output[0].to(self.fed), output[1].to(self.fed))

    def plain(self, x: Tensor | Streams) -> Tensor | Streams:
        """Return the output, with a graph where gradients are on."""
        first, second = self.forward(x, self.arguments.taken())
        return self.shape.join((first, second))

    @property
    def lowest(self) -> int:
        """The number of the first step with a weight that requires a gradient."""
        trainable = self.weights.trainable
        return next(n for n, p in enumerate(self.places) if p.call and any(trainable[index] for index in p.call.slots))

    def starts(self, number: int) -> bool:
        """Return whether a step is the first of the probed block."""
        return self.places[number].block == self.probe and (number == 0 or self.places[number - 1].block != self.probe)

    def start(self, x: Tensor | Streams) -> list[Tensor]:
        """Return the two streams of the input, in memory of their own, on the grid of exact mode."""
        return [stream if self.grid is None else self.grid.snap(stream) for stream in self.shape.split(x)]

    # ---- forward ---------------------------------------------------------------------------------------------------------

    def forward(
        self, x: Tensor | Streams, arguments: Sequence[Tensor], keep: list[Tensor] | None = None
    ) -> list[Tensor]:
        """Return the streams at the end; with `keep`, which gets what the way back needs, for functions that run again."""
        args, kwargs = self.arguments.with_tensors(arguments)
        streams = self.start(x)
        peaks = [] if self.grid is None else [_peak(stream) for stream in streams]
        is_watched = keep is not None and self.settings.preserve_rng_state
        random = self.random.get() if is_watched else []
        probed: list[Tensor] = []
        for number, (step, _, call) in enumerate(self.places):
            if self.starts(number):
                probed = [*streams]
            x, other = streams[step.target], streams[1 - step.target]
            if keep is not None and self.settings.mode == "checkpoint":
                keep.extend(self._inputs(step, streams))
            if call is None:
                out = other
            else:
                before = version(other)
                if keep is not None:
                    call.start()
                out = call.function(other.to(self.fed), *args, **kwargs)
                if version(other) != before:
                    raise UnsupportedModelError(
                        f"Function {call.name} changes its input in place, which is the other stream: use inplace=False."
                    )
                check_out(step, x, out, call.name)
                out = out.to(self.shape.dtype)
                if self.grid is not None:
                    out = self.grid.snap(out)
                if is_watched:
                    after = self.random.get()
                    if not is_same(random, after):
                        call.random, random = random, after
                if keep is not None:
                    self.kept_bytes += call.finish()
            y = streams[step.target] = laid_out_as(x, step.join(x, out))
            if self.grid is not None:
                peaks.append(_peak(y))
        self._check_range(peaks)
        if keep is not None:
            keep.extend(probed)
        return streams

    def _inputs(self, step: Step, streams: Sequence[Tensor]) -> list[Tensor]:
        """Return the streams that mode "checkpoint" keeps for a step."""
        other = [streams[1 - step.target]] if step.function is not None else []
        return [*other, *([streams[step.target]] if step.needs_input else [])]

    def _check_range(self, peaks: list[Tensor]) -> None:
        """Raise if a stream left the range in which sums on the grid are exact."""
        if self.grid is None:
            return
        reached = torch.stack(peaks).tolist()
        for number, peak in enumerate(reached):
            if not peak < self.grid.limit:
                place = None if number < 2 else self.places[number - 2]
                where = "The input" if place is None else f"Block {self.names[place.block]!r}"
                raise UnsupportedModelError(
                    f"{where} of the chain reached {peak:.3g}, and sums are exact below {self.grid.limit:g} with "
                    f"exact_bits={self.settings.exact_bits} in {self.shape.dtype}. Use fewer bits, or normalise the functions."
                )

    # ---- back ------------------------------------------------------------------------------------------------------------

    def surroundings(self, aliases: Sequence[Tensor]) -> contextlib.AbstractContextManager[None]:
        """Have what functions saw in the forward pass around them, and leave no trace."""
        return surroundings(self.autocast, self.random, self.weights, aliases)

    def calls(self) -> list[Call]:
        """Return the calls of functions, in their order."""
        return [place.call for place in self.places if place.call is not None]

    def check_reconstruction(self, streams: Sequence[Tensor], probed: Sequence[Tensor]) -> None:
        """Warn if the streams at the probed block are far from what they were."""
        error = relative_error(streams, probed)
        assert self.settings.check is not None
        assert self.probe is not None
        if not error <= self.settings.check:
            self.warned.add(self.probe)
            warnings.warn(
                f"The input of block {self.names[self.probe]!r} was reconstructed with a relative error of {error:.2g}, above "
                f"check={self.settings.check:g}: gradients below it are wrong by about as much. Normalise the functions, set "
                'exact_bits, or use mode="checkpoint".',
                ReconstructionWarning,
                stacklevel=2,
            )


def relative_error(found: Sequence[Tensor], right: Sequence[Tensor]) -> float:
    """Return the norm of the difference over that of what is right, over several tensors, in float64."""
    pairs = [(a.detach().double(), b.detach().double()) for a, b in zip(found, right, strict=True)]
    far = float(sum((a - b).square().sum() for a, b in pairs)) ** 0.5
    size = float(sum(b.square().sum() for _, b in pairs)) ** 0.5
    return far / size if size else far


def _peak(x: Tensor) -> Tensor:
    return x.detach().abs().max() if x.numel() else x.new_zeros(())


def check_block(block: Any, name: str) -> None:
    """Raise unless `block` is a coupling whose functions may be called in its place."""
    if not isinstance(block, Coupling):
        raise TypeError(
            f"Block {name!r} must be a coupling, such as AdditiveCoupling(f, g), got {type(block).__name__}."
        )
    if block._forward_hooks or block._forward_pre_hooks or block._backward_hooks or block._backward_pre_hooks:
        raise UnsupportedModelError(
            f"Block {name!r} has hooks, and a chain calls the functions of its blocks, not the blocks. Put them on "
            "its functions."
        )
