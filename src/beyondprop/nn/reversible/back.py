"""The way back along a reversible chain: steps undone, gradients taken, one function at a time."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from beyondprop.nn.reversible.passes import Pass, Place
from beyondprop.nn.reversible.replay import check_leaves
from beyondprop.nn.reversible.streams import laid_out_as


class Undone(NamedTuple):
    """A step that was undone: the local graph of its function, from `inputs` to `out`."""

    place: Place
    x: Tensor | None
    out: Tensor
    inputs: list[Tensor]
    weights: list[int]


class WayBack:
    """Walks a pass from its end to its start.

    Args:
        way: the pass.
        streams: the two at its end.
        arguments: the further arguments' tensors.
        kept: what mode "checkpoint" kept, first step first; None: streams are reconstructed.

    Attributes:
        gradients: of the weights, by number.
        argument_gradients: of the further arguments' tensors.
        open: those of the further arguments' tensors that require a gradient.
    """

    def __init__(
        self,
        way: Pass,
        streams: Sequence[Tensor],
        arguments: Sequence[Tensor],
        kept: Sequence[Tensor] | None = None,
    ) -> None:
        self.way, self.streams = way, list(streams)
        self.aliases = way.weights.aliases()
        self.arguments = [t.detach().requires_grad_(t.requires_grad) for t in arguments]
        self.gradients: list[Tensor | None] = [None] * len(self.aliases)
        self.argument_gradients: list[Tensor | None] = [None] * len(self.arguments)
        self._kept = None if kept is None else list(kept)
        self._called = way.arguments.with_tensors(self.arguments)
        self.open = [t for t in self.arguments if t.requires_grad]

    def at(self, place: Place) -> contextlib.AbstractContextManager[None]:
        """Give the function of a step what it had around it in the forward pass, for a while."""
        return contextlib.nullcontext() if place.call is None else place.call.replayed(self.way.random)

    def undo(self, place: Place, *, pulls: bool = True, needs_input: bool = True) -> Undone:
        """Undo one step, at its place; where it is to be pulled through, its function's graph is in what is returned."""
        way, step, call = self.way, place.step, place.call
        target, other = step.target, 1 - step.target
        x: Tensor | None = None
        if self._kept is not None:
            x = self._kept.pop() if step.needs_input else None
            if call is not None:
                self.streams[other] = self._kept.pop()
        z = self.streams[other]
        inputs: list[Tensor] = []
        weights: list[int] = []
        if call is None:
            out = value = z
        else:
            z = z.detach().requires_grad_(pulls and needs_input)
            with torch.set_grad_enabled(pulls):
                args, kwargs = self._called
                out = call.function(z.to(way.fed), *args, **kwargs).to(way.shape.dtype)
            value = out.detach()
            if way.grid is not None:
                value = way.grid.snap(value)
            if out.requires_grad:
                weights = [index for index in call.slots if self.aliases[index].requires_grad]
                inputs = [z, *self.open, *(self.aliases[index] for index in weights)]
                check_leaves(out, inputs, call.name)
        if self._kept is None:
            y = self.streams[target]
            x = self.streams[target] = laid_out_as(y, step.undo(y, value))
        return Undone(place, x, out, inputs, weights)

    def pull(self, undone: Undone, cotangents: list[Tensor | None], *, retain: bool = False) -> None:
        """Send cotangents below a step, and add up the gradients on the way.

        None is a stream that nothing depends on: what leads there has no gradient either, as in ordinary autograd.
        """
        place, x, out, inputs, weights = undone
        target, other = place.step.target, 1 - place.step.target
        above = cotangents[target]
        if above is None:
            return
        cotangents[target], below = place.step.pull(x, out.detach(), above)
        through: Tensor | None = below
        if place.call is not None:
            if not out.requires_grad:
                return
            wanted = inputs if inputs[0].requires_grad else inputs[1:]
            found = list(torch.autograd.grad(out, wanted, below, retain_graph=retain, allow_unused=True))
            through = found.pop(0) if inputs[0].requires_grad else None
            for (sums, index), g in zip(self._sums(weights), found, strict=True):
                if g is not None:
                    before = sums[index]
                    sums[index] = g if before is None else before + g
        if through is not None:
            before = cotangents[other]
            cotangents[other] = laid_out_as(above, through if before is None else before + through)

    def _sums(self, weights: list[int]) -> list[tuple[list[Tensor | None], int]]:
        arguments = [(self.argument_gradients, i) for i, t in enumerate(self.arguments) if t.requires_grad]
        return [*arguments, *((self.gradients, index) for index in weights)]
