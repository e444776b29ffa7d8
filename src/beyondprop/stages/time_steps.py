"""A recurrent layer's moments: `s_{t-1} -> s_t`, each linearised at its state.

`ElmanRun` has closed forms; `CellMoments` differentiates any other cell by autograd, one moment at a time.
"""

from __future__ import annotations

import abc
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from beyondprop.stages.affine import whole
from beyondprop.stages.block import BlockStage
from beyondprop.stages.stage import Pullback, add_to_gradient


class LayerRun(abc.ABC):
    """A recurrent layer at one sequence.

    Attributes:
        states: s_0 .. s_T.
        walked: what `finish` left of the last way back, for `pull_inputs` and `add_gradients`; it can be put back.
    """

    states: list[Tensor]
    walked: Any

    @abc.abstractmethod
    def advance(self, step: int, x: Tensor, state: Tensor) -> Tensor:
        """Return what the cell makes of another input and state at `step`, under the masks of this run."""

    @abc.abstractmethod
    def moment(self, step: int) -> Pullback:
        """Return `s_{step - 1} -> s_step` as a pullback, for code solvers."""

    @abc.abstractmethod
    def pull(self, step: int, delta: Tensor) -> Tensor:
        """Return the gradient at `s_{step - 1}` of a delta of `s_step`; steps come last first."""

    @abc.abstractmethod
    def finish(self, deltas: list[Tensor]) -> None:
        """Note that all deltas of s_1 .. s_T are known."""

    @abc.abstractmethod
    def pull_inputs(self) -> Tensor:
        """Return the gradient of the last way back at the inputs, `(N, T, input_size)`; a new tensor."""

    @abc.abstractmethod
    def push_inputs(self, tangent: Tensor) -> list[Tensor]:
        """Return the tangents of s_1 .. s_T."""

    @abc.abstractmethod
    def add_gradients(self, factor: float) -> None:
        """Add `factor` times the weights' gradient of the last way back, summed over batch and time."""


class Moment(Pullback):
    """A time step between two states; its weights are the layer's."""

    def add_gradients(self, cotangent: Tensor, factor: float) -> None:
        raise NotImplementedError  # tied weights get their gradient from the whole sequence


class Heard(Moment):
    """A moment whose state is shown at the output, too: `s -> [s_next, shown part of s]`."""

    def __init__(self, moment: Pullback, width: int) -> None:
        self.stage, self.moment, self.width = moment.stage, moment, width
        self.input = moment.input
        self.output = torch.cat([moment.output, moment.input[:, :width]], 1)

    def __call__(self, cotangent: Tensor) -> Tensor:
        size = self.input.shape[1]
        gradient = self.moment(cotangent[:, :size])
        gradient[:, : self.width] += cotangent[:, size:]
        return gradient

    def push(self, tangent: Tensor, *, gated: bool = False) -> Tensor:
        return torch.cat([self.moment.push(tangent), tangent[:, : self.width]], 1)

    def at(self, z: Tensor) -> Heard:
        return Heard(self.moment.at(z), self.width)


class ElmanRun(LayerRun):
    """A `RecurrentStage`'s Elman layer at one sequence `(N, T, input_size)`, in closed form."""

    def __init__(self, stage: Any, x: Tensor) -> None:
        self.stage, self.x = stage, x
        cell = self.cell = stage.cell
        state = x.new_zeros(len(x), cell.hidden_size)
        self.states, self.features = [state], []
        self.walked: Tensor = x.new_empty(0)
        for driven in whole(F.linear(x, cell.weight_ih, cell.bias), x).unbind(1):
            feature = stage.activation.value(state)
            state = whole(torch.addmm(driven, feature, cell.weight_hh.t()), x)
            self.features.append(feature)
            self.states.append(state)

    def advance(self, step: int, x: Tensor, state: Tensor) -> Tensor:
        return whole(self.cell(x, state), state)

    def moment(self, step: int) -> ElmanMoment:
        return ElmanMoment(self.stage, self.states[step - 1], self.states[step], self.features[step - 1])

    def pull(self, step: int, delta: Tensor) -> Tensor:
        return self.moment(step)(delta)

    def finish(self, deltas: list[Tensor]) -> None:
        self.walked = torch.stack(deltas, 1)

    def pull_inputs(self) -> Tensor:
        return whole(self.walked @ self.stage.backward_weight(self.cell.weight_ih), self.walked)

    def push_inputs(self, tangent: Tensor) -> list[Tensor]:
        found = []
        driven_by = whole(tangent @ self.cell.weight_ih.t(), tangent)
        for step, driven in enumerate(driven_by.unbind(1), start=1):
            found.append(driven + self.moment(step).push(found[-1]) if found else driven)
        return found

    def add_gradients(self, factor: float) -> None:
        cell, rows = self.cell, self.walked.flatten(0, 1)
        if cell.weight_ih.requires_grad:
            add_to_gradient(cell.weight_ih, rows.t() @ self.x.flatten(0, 1), factor)
        if cell.weight_hh.requires_grad:
            add_to_gradient(cell.weight_hh, rows.t() @ torch.stack(self.features, 1).flatten(0, 1), factor)
        if cell.bias.requires_grad:
            add_to_gradient(cell.bias, rows.sum(0), factor)


class ElmanMoment(Moment):
    """`c -> W x_t + U f(c) + b` at one c."""

    def __init__(self, stage: Any, z: Tensor, output: Tensor, feature: Tensor) -> None:
        self.stage = self.recurrent = stage
        self.input, self.output, self.feature = z, output, feature
        self.slope = stage.activation.slope(z, feature)

    def __call__(self, cotangent: Tensor) -> Tensor:
        gradient = cotangent @ self.stage.backward_weight(self.recurrent.cell.weight_hh)
        return whole(gradient, cotangent).mul_(self.slope)

    def push(self, tangent: Tensor, *, gated: bool = False) -> Tensor:
        return whole((tangent * self.slope) @ self.recurrent.cell.weight_hh.t(), tangent)

    def at(self, z: Tensor) -> ElmanMoment:
        feature = self.recurrent.activation.value(z)
        change = whole((feature - self.feature) @ self.recurrent.cell.weight_hh.t(), z)
        return ElmanMoment(self.recurrent, z, self.output + change, feature)


class CellMoments(BlockStage):
    """Moments of any cell: `[s, x_t] -> s_next`, differentiated by autograd."""

    def __init__(self, stage: Any) -> None:
        super().__init__(stage.name, [(stage.name, stage.cell)])
        self.layer = stage.layer
        self.feedback = stage.feedback

    def forward(self, z: Tensor) -> Tensor:
        state, x = z.split([self.layer.state_size, self.layer.cell.input_size], 1)
        return self.layer.advance(x, state)


class CellRun(LayerRun):
    """Any cell at one sequence `(N, T, input_size)`, under the masks of `first`, an earlier run of the same step."""

    def __init__(self, moments: CellMoments, x: Tensor, push: bool, first: CellRun | None) -> None:
        self.size = moments.layer.state_size
        self.parameters = [p for p in moments.parameters if p.requires_grad]
        state = x.new_zeros(len(x), self.size)
        self.states: list[Tensor] = [state]
        self.pullbacks: list[Any] = []
        for t, moment in enumerate(x.unbind(1)):
            z = torch.cat([state, moment], 1)
            pullback: Any = moments.record(z, push=push) if first is None else first.pullbacks[t].at(z, push=push)
            state = pullback.output
            self.states.append(state)
            self.pullbacks.append(pullback)
        self.walked: tuple[list[Tensor | None], list[Tensor]] = ([], [])  # gradients of the weights, and at the inputs

    def advance(self, step: int, x: Tensor, state: Tensor) -> Tensor:
        return self.pullbacks[step - 1].at(torch.cat([state, x], 1)).output

    def moment(self, step: int) -> CellMoment:
        return CellMoment(self.pullbacks[step - 1], self.size)

    def pull(self, step: int, delta: Tensor) -> Tensor:
        if step == len(self.pullbacks):
            self.walked = ([None] * len(self.parameters), [])
        gradients, inputs = self.walked
        pullback = self.pullbacks[step - 1]
        gradient = pullback(delta)
        for i, g in enumerate(pullback.take_gradients(delta)):
            if g is not None:
                total = gradients[i]
                gradients[i] = g if total is None else total + g
        inputs.append(gradient[:, self.size :])
        return gradient[:, : self.size].clone()

    def finish(self, deltas: list[Tensor]) -> None:
        self.pull(1, deltas[0])

    def pull_inputs(self) -> Tensor:
        return torch.stack(self.walked[1][::-1], 1)

    def push_inputs(self, tangent: Tensor) -> list[Tensor]:
        state, found = torch.zeros_like(self.states[0]), []
        for pullback, moment in zip(self.pullbacks, tangent.unbind(1), strict=True):
            state = pullback.push(torch.cat([state, moment], 1))
            found.append(state)
        return found

    def add_gradients(self, factor: float) -> None:
        for p, g in zip(self.parameters, self.walked[0], strict=True):
            if g is not None:
                add_to_gradient(p, g, factor)


class CellMoment(Moment):
    """`s -> cell(x_t, s)` at one s."""

    def __init__(self, pullback: Pullback, size: int) -> None:
        self.stage, self.pullback, self.size = pullback.stage, pullback, size
        self.input, self.output = pullback.input[:, :size], pullback.output

    def __call__(self, cotangent: Tensor) -> Tensor:
        return self.pullback(cotangent)[:, : self.size].clone()

    def push(self, tangent: Tensor, *, gated: bool = False) -> Tensor:
        return self.pullback.push(F.pad(tangent, (0, self.pullback.input.shape[1] - self.size)))

    def at(self, z: Tensor) -> CellMoment:
        return CellMoment(self.pullback.at(torch.cat([z, self.pullback.input[:, self.size :]], 1)), self.size)
