"""The stage that can be undone: a coupling, whose input is made of its output when the way back comes to it.

A run of such stages keeps the output of the last one alone, whatever the run's length: each reconstructs its input,
differentiates itself there, and hands the input to the stage below as its output.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from beyondprop.nn.reversible.chain import ReversibleSequential
from beyondprop.nn.reversible.couplings import Coupling
from beyondprop.nn.reversible.passes import Pass, Settings
from beyondprop.nn.reversible.unwinding import streams_before
from beyondprop.stages.affine import is_modified
from beyondprop.stages.block import BlockPullback, BlockStage, generator, is_deterministic
from beyondprop.stages.stage import Pullback, Stage

_CHECK_EVERY = 10
"""Passes from one check of a reconstruction in a chain to the next."""


class ReversibleStage(BlockStage):
    """One coupling.

    Where it could not be differentiated at the very numbers of the forward pass, the stage is stored like any other: with
    streams of less than float32, under autocast, which rounds what is off in a last bit, and in a chain whose `mode` is not
    `"inverse"`.

    Attributes:
        coupling: the coupling.
        chain: the chain that it is of; None: a coupling by itself.
    """

    def __init__(self, name: str, modules: Sequence[tuple[str, nn.Module]]) -> None:
        super().__init__(name, modules)
        (self.coupling,) = (m for m in self.modules if isinstance(m, Coupling))
        self.is_stochastic = any(not is_deterministic(m) for m in self.coupling.modules() if m is not self.coupling)
        self.chain: ReversibleSequential | None = None
        self.place = 0  # in the chain
        self._passes = 0
        self.warned: set[int] = set()

    @staticmethod
    def fits(modules: Sequence[nn.Module]) -> bool:
        """Whether this is a coupling alone, which nobody watches."""
        return len(modules) == 1 and isinstance(modules[0], Coupling) and not is_modified(modules[0])

    def is_watched(self) -> bool:
        """Return whether the chain's `check` is this stage's in this pass: each stage's in turn, the first one's first."""
        if self.chain is None or self.chain.check is None or self.warned:
            return False
        self._passes += 1
        return (self._passes - 1) % (_CHECK_EVERY * len(self.chain)) == _CHECK_EVERY * self.place

    def record(self, z: Tensor, *, push: bool = False) -> Pullback:
        rounds = z.dtype not in (torch.float32, torch.float64) or torch.is_autocast_enabled(z.device.type)
        if rounds or (self.chain is not None and self.chain.mode != "inverse"):
            return super().record(z, push=push)
        state = generator(z.device).get_state() if self.is_stochastic else None
        pullback = ReversiblePullback(self, z, push, state)
        self.check_samples_are_apart(z, state)
        return pullback


class ReversiblePullback(Pullback):
    """A `ReversibleStage` at one input, of which it keeps nothing but what its functions drew.

    Args:
        stage: the stage.
        z: the input.
        push: whether tangents will be pushed.
        random_state: of the generator, before the stage drew.
    """

    def __init__(self, stage: ReversibleStage, z: Tensor, push: bool, random_state: Tensor | None) -> None:
        self.stage = self.block = stage
        self.input = z
        self.input_shape = z.shape
        self.random_state, self._push = random_state, push
        coupling = stage.coupling
        check = None if stage.chain is None else stage.chain.check
        self._pass = Pass(
            [(stage.name, coupling)], Settings(coupling.split_dim, stream_dtype=None, check=check), z, (), {}
        )
        self._pass.weights.given()
        if stage.is_watched():
            self._pass.probe, self._pass.warned = 0, stage.warned
        self._probed: list[Tensor] = []
        with torch.no_grad():
            first, second = self._pass.forward(z, [], self._probed)
        self._pass.weights.seal()
        self.output = torch.cat((first, second), coupling.split_dim)
        self._end: Tensor | None = self.output
        self._below: ReversiblePullback | None = None
        self._inner: BlockPullback | None = None

    def follow(self, below: Pullback | None) -> None:
        """Know that `below` is the stage whose output came in: it gets it again from here, and need not keep it."""
        if isinstance(below, ReversiblePullback):
            below._end, self._below = None, below

    @property
    def inner(self) -> BlockPullback:
        """The stage with its local graph."""
        if self._inner is None:
            z: Tensor | None = vars(self).get("input")
            if z is None:
                if self._end is None:
                    raise RuntimeError(
                        f"Stage {self.stage.name!r} was asked before the stage above it, from which it has its output: credits "
                        "go through reversible stages from the last to the first."
                    )
                self._pass.weights.check(self._pass.calls())
                streams = streams_before(self._pass, self._end)
                if self._probed:
                    self._pass.check_reconstruction(streams, self._probed)
                z = torch.cat(streams, self.block.coupling.split_dim)
            self._inner = self.block.at(z, self.random_state, push=self._push)
            self._end = None
            if self._below is not None:
                self._below._end, self._below = z, None
        return self._inner

    def __call__(self, cotangent: Tensor) -> Tensor:
        return self.inner(cotangent)

    def push(self, tangent: Tensor, *, gated: bool = False) -> Tensor:
        return self.inner.push(tangent, gated=gated)

    def add_gradients(self, cotangent: Tensor, factor: float) -> None:
        self.inner.add_gradients(cotangent, factor)

    def at(self, z: Tensor) -> Pullback:
        return self.block.at(z, self.random_state)

    def relinearize(self, before: Mapping[nn.Parameter, Tensor]) -> tuple[Pullback, Tensor]:
        torch.clear_autocast_cache()
        fresh = self.at(self.input)
        return fresh, fresh.output - self.output


def swept_once(pullbacks: Sequence[Pullback | None]) -> list[Pullback | None]:
    """Return a trace's pullbacks for one of several sweeps: what can be undone as copies, whose graphs die with them."""
    found: list[Pullback | None] = []
    for pullback in pullbacks:
        if isinstance(pullback, ReversiblePullback):
            pullback = copy.copy(pullback)
            pullback.follow(found[-1] if found else None)
        found.append(pullback)
    return found


def know_chains(stages: Iterable[Stage], model: nn.Module) -> None:
    """Tell each of the stages that are couplings of which chain in the model."""
    chains = [m for m in model.modules() if isinstance(m, ReversibleSequential)]
    places = {block: (chain, place) for chain in chains for place, block in enumerate(chain)}
    for stage in stages:
        if isinstance(stage, ReversibleStage) and stage.coupling in places:
            stage.chain, stage.place = places[stage.coupling]
