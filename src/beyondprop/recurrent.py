"""The stage with a code for every time step: a recurrent layer, unrolled, with tied weights.

    s_t = cell(x_t, s_{t-1}),    t = 1 .. T

From outside it is a stage like the others. Inside, `sweep` walks back through time: a state is wished to change by what the
output wants of it and by what the next state's wish asks of it, and a code solver turns both into a delta, as it does between
stages. With plain gradients that is backpropagation through time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from beyondprop._moments import CellMoments, ElmanMoments, Heard
from beyondprop._operation import Operation, RecordedRun
from beyondprop.activations import closed_form
from beyondprop.affine import is_modified
from beyondprop.nn.recurrent import ElmanCell, Recurrent
from beyondprop.operations import operation
from beyondprop.stage import Pullback, Stage

Solve = Callable[[Pullback, Tensor, Tensor], Tensor]
"""Maps a moment (linearised at its state), the wish at its output and the gradient `J^T wish` to the state's delta."""


class RecurrentStage(Stage):
    """Modules with closed forms and without weights, then a `Recurrent` layer.

    `RecurrentStage.fits` says whether a run of modules has this form.
    """

    def __init__(self, name: str, modules: Sequence[tuple[str, nn.Module]]) -> None:
        super().__init__(name, modules)
        self.layer: Any = self.modules[-1]
        self.is_last = self.layer.outputs == "last"
        self.width: int = self.layer.cell.hidden_size
        self.heads: list[Operation] = [o for m in self.modules[:-1] if (o := operation(m)) is not None]
        cell = self.layer.cell
        is_plain = type(cell) is ElmanCell and not is_modified(cell) and not is_modified(cell.activation)
        known = closed_form(cell.activation) if is_plain else None
        is_elman = known is not None and known.factors is None  # units with target rules go by autograd
        self.moments = ElmanMoments(self) if is_elman else CellMoments(self)
        if isinstance(self.moments, CellMoments):
            self.moments.feedback = self.feedback

    @staticmethod
    def fits(modules: Sequence[nn.Module]) -> bool:
        """Whether this run of modules is a recurrent layer behind modules without parameters."""
        *heads, layer = modules
        found = [operation(m) for m in heads]
        return (
            type(layer) is Recurrent
            and not is_modified(layer)
            and all(o is not None and not o.has_weights and not o.couples_batch for o in found)
        )

    def record(self, z: Tensor, *, push: bool = False) -> RecurrentPullback:
        """See `Stage.record`.

        Raises:
            ValueError: if the sequence does not fit the cell.
        """
        return RecurrentPullback(self, z, push)

    def read(self, states: Sequence[Tensor]) -> Tensor:
        """Return what the layer shows of its states s_1 .. s_T."""
        if self.is_last:
            return states[-1][:, : self.width]
        return torch.stack([s[:, : self.width] for s in states], 1)


class RecurrentPullback(Pullback):
    """A `RecurrentStage` at one input.

    Attributes:
        states: s_0 .. s_T, each `(N, state_size)`.
    """

    def __init__(self, stage: RecurrentStage, z: Tensor, push: bool, first: RecurrentPullback | None = None) -> None:
        self.stage = self.recurrent = stage
        self.input = z
        self.input_shape = z.shape
        z, self.heads = RecordedRun.of(stage.heads, z, None if first is None else first.heads)
        stage.layer.check_input(z)
        self._push = push
        self._solve: Solve | None = None if first is None else first._solve
        self.run: Any = stage.moments.unroll(z, push, None if first is None else first.run)
        self.states = self.run.states
        self.output = stage.read(self.states[1:])
        self._swept: tuple[Tensor, int, list[Tensor]] | None = None

    def sweep(self, wish: Tensor, solve: Solve | None = None) -> list[Tensor]:
        """Give the states s_1 .. s_T their deltas, last first, and return them.

        Args:
            wish: how the output should change, shape of the output.
            solve: turns a state's problem into its delta; None: that of the last sweep, at first the gradient, that is
                backpropagation through time.
        """
        stage, run = self.recurrent, self.run
        solve = self._solve = solve or self._solve
        wishes = None if stage.is_last else wish.unbind(1)
        delta = self._of_state(wish if wishes is None else wishes[-1])
        deltas = [delta]
        for step in range(len(self.states) - 1, 1, -1):
            moment = run.moment(step)
            gradient = run.pull(step, delta)
            if wishes is None:
                delta = gradient if solve is None else solve(moment, delta, gradient)
            else:
                heard = wishes[step - 2]
                gradient = gradient + self._of_state(heard)
                both = torch.cat([delta, heard], 1)
                delta = gradient if solve is None else solve(Heard(moment, stage.width), both, gradient)
            deltas.append(delta)
        deltas.reverse()
        run.finish(deltas)
        self._swept = wish, wish._version, deltas
        return deltas

    def violation(self, input_delta: Tensor | None) -> Tensor:
        """Return how far the moved states of the last sweep are from what the cell makes of their moved inputs, `(N,)`.

        The sum over time of `|delta_t - change_t|^2`, with the nonlinearity as it is; where all states are shown, that of
        their distance to the wish, too.
        """
        assert self._swept is not None
        wish, _, deltas = self._swept
        x = self.input if input_delta is None else self.input + input_delta
        x, _ = RecordedRun.of(self.recurrent.heads, x, self.heads)
        total = deltas[0].new_zeros(len(deltas[0]))
        moved = [self.states[0], *(s + d for s, d in zip(self.states[1:], deltas, strict=True))]
        for t, (before, after) in enumerate(pairwise(moved)):
            total += (after - self.run.advance(t + 1, x[:, t], before)).square().sum(1)
        if not self.recurrent.is_last:
            total += (wish - self.recurrent.read(deltas)).flatten(1).square().sum(1)
        return total

    def _of_state(self, values: Tensor) -> Tensor:
        more = self.recurrent.layer.state_size - values.shape[1]
        return F.pad(values, (0, more)) if more else values

    def _deltas(self, cotangent: Tensor) -> list[Tensor]:
        if self._swept is None or self._swept[0] is not cotangent or self._swept[1] != cotangent._version:
            return self.sweep(cotangent)
        return self._swept[2]

    def __call__(self, cotangent: Tensor) -> Tensor:
        """See `Pullback.__call__`; by the deltas of the last sweep, if it was for this cotangent."""
        return self.pull_head(self.run.pull_inputs(self._deltas(cotangent)))

    @property
    def head_shape(self) -> torch.Size:
        """See `Pullback.head_shape`."""
        return self.heads.shapes[-1]

    def pull_head(self, cotangent: Tensor) -> Tensor:
        """See `Pullback.pull_head`."""
        return self.heads.pull(cotangent)

    def push(self, tangent: Tensor, *, gated: bool = False) -> Tensor:
        """See `Pullback.push`."""
        del gated
        return self.recurrent.read(self.run.push_inputs(self.heads.push(tangent)))

    def add_gradients(self, cotangent: Tensor, factor: float) -> None:
        """See `Pullback.add_gradients`."""
        self.run.add_gradients(self._deltas(cotangent), factor)

    def at(self, z: Tensor) -> RecurrentPullback:
        """See `Pullback.at`."""
        return RecurrentPullback(self.recurrent, z, self._push, first=self)

    def relinearize(self, before: Mapping[nn.Parameter, Tensor]) -> tuple[Pullback, Tensor]:
        """See `Pullback.relinearize`."""
        del before
        torch.clear_autocast_cache()  # it holds casts of the old weights
        fresh = self.at(self.input)
        return fresh, fresh.output - self.output
