"""The stage that can be undone: a coupling, whose input is made of its output when the way back comes to it.

A run of such stages keeps the output of the last one alone, whatever the run's length: each reconstructs its input,
differentiates itself there, and hands the input to the stage below as its output.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from beyondprop.nn.reversible.couplings import Coupling
from beyondprop.nn.reversible.passes import Pass, Settings
from beyondprop.nn.reversible.unwinding import reconstructed
from beyondprop.stages.affine import is_modified
from beyondprop.stages.block import BlockPullback, BlockStage, generator, is_deterministic
from beyondprop.stages.stage import Pullback


class ReversibleStage(BlockStage):
    """One coupling.

    Attributes:
        coupling: the coupling.
    """

    def __init__(self, name: str, modules: Sequence[tuple[str, nn.Module]]) -> None:
        super().__init__(name, modules)
        (self.coupling,) = (m for m in self.modules if isinstance(m, Coupling))
        self.is_stochastic = any(not is_deterministic(m) for m in self.coupling.modules() if m is not self.coupling)

    @staticmethod
    def fits(modules: Sequence[nn.Module]) -> bool:
        """Whether this is a coupling alone, which nobody watches."""
        return len(modules) == 1 and isinstance(modules[0], Coupling) and not is_modified(modules[0])

    def record(self, z: Tensor, *, push: bool = False) -> Pullback:
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
        settings = Settings(coupling.split_dim, stream_dtype=None)
        self._pass = Pass([(stage.name, coupling)], settings, z, (), {})
        self._pass.weights.given()
        with torch.no_grad():
            first, second = self._pass.forward(z, [], [])
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
                found = reconstructed(self._pass, self._end)
                assert isinstance(found, Tensor)
                z = found
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
