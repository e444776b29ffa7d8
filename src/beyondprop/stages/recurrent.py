"""The stage with a code for every time step: a recurrent layer, unrolled, with tied weights.

    s_t = cell(x_t, s_{t-1}),    t = 1 .. T

From outside it is a stage like the others. Inside, `sweep` walks back through time: a state has to serve the delta of the
output and that of the next state, and a code solver turns both into its own, as it does between stages. With plain gradients
that is backpropagation through time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from beyondprop.nn.activations import closed_form
from beyondprop.nn.recurrent import ElmanCell, Recurrent
from beyondprop.stages.affine import is_modified
from beyondprop.stages.pipeline import PipelineStage
from beyondprop.stages.stage import Memo, Pullback, Stage
from beyondprop.stages.time_steps import CellMoments, CellRun, ElmanRun, Heard

Solve = Callable[[Pullback, Tensor, Tensor], Tensor]
"""Maps a moment (linearised at its state), the delta at its output and the gradient `J^T delta` to the state's delta."""


class RecurrentStage(Stage):
    """A `Recurrent` layer among modules with closed forms.

    Weights beside the layer get the gradient that backpropagation inside the stage gives them; codes are the layer's states.

    Attributes:
        heads, tails: what comes before and after the layer.
        activation: of an Elman cell.
        moments: the layer's time steps; None: those of an Elman cell, in closed form.
    """

    def __init__(self, name: str, modules: Sequence[tuple[str, nn.Module]]) -> None:
        super().__init__(name, modules)
        place = next(i for i, m in enumerate(self.modules) if type(m) is Recurrent)
        self.layer: Any = self.modules[place]
        self.cell: Any = self.layer.cell
        self.is_block = False  # its time steps have codes of their own
        self.is_last = self.layer.outputs == "last"
        self.width: int = self.cell.hidden_size
        self.heads, self.tails = PipelineStage(name, modules[:place]), PipelineStage(name, modules[place + 1 :])
        self.heads.share(self)
        self.tails.share(self)
        is_plain = type(self.cell) is ElmanCell and not is_modified(self.cell) and not is_modified(self.cell.activation)
        known = self.activation = closed_form(self.cell.activation) if is_plain else None
        # Units with target rules go by autograd.
        self.moments = CellMoments(self) if known is None or known.factors is not None else None

    @staticmethod
    def fits(modules: Sequence[nn.Module]) -> bool:
        """Whether this run of modules is one recurrent layer and, around it, modules with closed forms."""
        layers = [m for m in modules if type(m) is Recurrent]
        if len(layers) != 1 or is_modified(layers[0]):
            return False
        return PipelineStage.fits([m for m in modules if m is not layers[0]])

    @property
    def couples_batch(self) -> bool:
        return any(part.couples_batch for part in (self.moments, self.heads, self.tails) if part is not None)

    def record(self, z: Tensor, *, push: bool = False) -> RecurrentPullback:
        return RecurrentPullback(self, z, push)

    def read(self, states: Sequence[Tensor]) -> Tensor:
        """Return what the layer shows of its states s_1 .. s_T."""
        if self.is_last:
            return states[-1][:, : self.width]
        return torch.stack([s[:, : self.width] for s in states], 1)


class RecurrentPullback(Pullback):
    """A `RecurrentStage` at one input.

    A delta that was swept is pulled down by its states' deltas, every other cotangent by the Jacobian.

    Attributes:
        states: s_0 .. s_T, each `(N, state_size)`.
    """

    has_codes = True

    def __init__(self, stage: RecurrentStage, z: Tensor, push: bool, first: RecurrentPullback | None = None) -> None:
        self.stage = self.recurrent = stage
        self.input = z
        self.input_shape = z.shape
        heads, run, tails = (None, None, None) if first is None else (first.heads, first.run, first.tails)
        x, self.heads = stage.heads.run(z, heads)
        stage.layer.check_input(x)
        self._push = push
        self._solve: Solve | None = None if first is None else first._solve
        self._heard: float = 1.0 if first is None else first._heard
        self.run: Any = ElmanRun(stage, x) if stage.moments is None else CellRun(stage.moments, x, push, run)
        self.states = self.run.states
        self.output, self.tails = stage.tails.run(stage.read(self.states[1:]), tails)
        self._swept: Memo[list[Tensor]] = Memo()
        self._driven: Memo[Tensor] = Memo()

    def sweep(self, delta: Tensor, solve: Solve | None = None, *, heard: float = 1.0) -> list[Tensor]:
        """Give the states s_1 .. s_T their deltas, last first, and return them.

        Args:
            delta: how the output should change, shape of the output.
            solve: turns a state's problem into its delta; None: that of the last sweep, at first the gradient, that is
                backpropagation through time.
            heard: factor of what a state before the last hears from the output, in its problem; comes with `solve`.
        """
        if solve is not None:
            self._solve, self._heard = solve, heard
        deltas = self._walk(delta, self._solve, self._heard)
        self._swept.keep(delta, deltas)
        self._driven = Memo()
        return deltas

    def _walk(self, of_output: Tensor, solve: Solve | None, heard: float) -> list[Tensor]:
        stage, run = self.recurrent, self.run
        shown = self.tails(of_output)
        of_states = None if stage.is_last else shown.unbind(1)
        delta = self._of_state(shown if of_states is None else of_states[-1])
        deltas = [delta]
        for step in range(len(self.states) - 1, 1, -1):
            moment = run.moment(step)
            gradient = run.pull(step, delta)
            if of_states is None:
                delta = gradient if solve is None else solve(moment, delta, gradient)
            else:
                shown = of_states[step - 2] * heard
                gradient = gradient + self._of_state(shown)
                both = torch.cat([delta, shown], 1)
                delta = gradient if solve is None else solve(Heard(moment, stage.width), both, gradient)
            deltas.append(delta)
        deltas.reverse()
        run.finish(deltas)
        return deltas

    def relax(self, delta: Tensor, input_delta: Tensor | None, *, is_top: bool) -> tuple[Tensor, Tensor]:
        """Return the output at the moved states, and how far all are from where they should be, `(N,)`.

        `sum_t |delta_t - change_t|^2` with `change_t` what the cell makes of its moved inputs, nonlinearities as they are, and
        `|delta - change|^2` at the output. Where that is the network's (`is_top`), it is no code but has the loss itself: the
        output follows the last moved state below it, and neither the last state's term nor the output's is counted.
        """
        stage, deltas = self.recurrent, self._swept.find(delta) or self.sweep(delta)
        x, _ = stage.heads.run(self.input if input_delta is None else self.input + input_delta, self.heads)
        moved = [self.states[0], *(s + d for s, d in zip(self.states[1:], deltas, strict=True))]
        following = [self.run.advance(t + 1, x[:, t], before) for t, before in enumerate(moved[:-1])]
        if is_top:
            moved[-1] = following[-1]
        output, _ = stage.tails.run(stage.read(moved[1:]), self.tails)
        far = torch.stack([a - b for a, b in zip(moved[1:], following, strict=True)], 1).flatten(1).square().sum(1)
        if not is_top:
            far += (delta - (output - self.output)).flatten(1).square().sum(1)
        return output, far

    def _of_state(self, values: Tensor) -> Tensor:
        more = self.recurrent.layer.state_size - values.shape[1]
        return F.pad(values, (0, more)) if more else values

    def _at_layer(self, cotangent: Tensor) -> Tensor:
        """Return the gradient at what drives the layer: by its states' deltas where it was swept, else the Jacobian's own."""
        if self._swept.find(cotangent) is None:
            if self._solve is not None:  # a solver of the code below asks
                walked = self.run.walked
                self._walk(cotangent, None, 1.0)
                gradient = self.run.pull_inputs()
                self.run.walked = walked
                return gradient
            self.sweep(cotangent)
        gradient = self._driven.find(cotangent)
        if gradient is None:
            gradient = self.run.pull_inputs()
            if self.recurrent.heads.lowest is not None:  # they ask for it again
                self._driven.keep(cotangent, gradient)
        return gradient

    def __call__(self, cotangent: Tensor) -> Tensor:
        return self.heads(self._at_layer(cotangent))

    @property
    def head_shape(self) -> torch.Size:
        return self.heads.head_shape

    def pull_head(self, cotangent: Tensor) -> Tensor:
        return self.heads.pull_head(cotangent)

    def push(self, tangent: Tensor, *, gated: bool = False) -> Tensor:
        states = self.run.push_inputs(self.heads.push(tangent))
        return self.tails.push(self.recurrent.read(states))

    def add_gradients(self, cotangent: Tensor, factor: float) -> None:
        if self._swept.find(cotangent) is None:
            self.sweep(cotangent)
        self.run.add_gradients(factor)
        self.tails.add_gradients(cotangent, factor)
        if self.recurrent.heads.lowest is not None:
            self.heads.add_gradients(self._at_layer(cotangent), factor)

    def at(self, z: Tensor) -> RecurrentPullback:
        return RecurrentPullback(self.recurrent, z, self._push, first=self)
