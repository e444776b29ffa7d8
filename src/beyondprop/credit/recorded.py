"""One stage behind a backward pass, and what the stages of one forward pass have in common."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from beyondprop.credit.base import Credit
from beyondprop.errors import UnsupportedModelError
from beyondprop.stages.chain import Chain
from beyondprop.stages.loss_behind import factor_of, loss_behind, unknown_loss
from beyondprop.stages.losses import LossPoint, OutputLoss
from beyondprop.stages.stage import Pullback


class Owner(Protocol):
    """Whose stages they are: a `Credited`.

    Attributes:
        chain: the stages.
        output_loss: the loss at the last stage, where it is known.
        is_top: whether the last stage is the network's.
        loss_scale: see `Credited`.
    """

    chain: Chain
    output_loss: OutputLoss | None
    is_top: bool
    loss_scale: float | Callable[[], float]

    @property
    def credit(self) -> Credit:
        """What gives the stages their deltas."""
        ...


class Batch:
    """What the stages of one forward pass have in common.

    Attributes:
        owner: whose pass it is.
        device: the type of its device.
        last: index of the last stage that has part in it.
        factor: on a sum over samples in the gradients that come down, as far as the credit must know it.
        scale: of the loss, likewise.
    """

    def __init__(self, owner: Owner, device: str, last: int) -> None:
        self.owner, self.device, self.last = owner, device, last
        self.factor: float | Tensor = 1.0
        self.scale: float | Tensor = 1.0
        self._kept: dict[str, Any] = {}
        self._autocast = torch.get_autocast_dtype(self.device) if torch.is_autocast_enabled(self.device) else None

    def surroundings(self) -> contextlib.AbstractContextManager[Any]:
        """Return a context as the forward pass was in: its autocast, and what the credit remembers of this batch."""
        is_on = torch.is_autocast_enabled(self.device)
        if not self.owner.credit.of_batch and not is_on and self._autocast is None:
            return contextlib.nullcontext()
        return self._recalled()

    @contextlib.contextmanager
    def _recalled(self) -> Iterator[None]:
        state = vars(self.owner.credit)
        state.update(self._kept)  # another batch's backward pass may have come between
        with torch.autocast(self.device, dtype=self._autocast, enabled=self._autocast is not None):
            yield
        self._kept = {name: state[name] for name in self.owner.credit.of_batch if name in state}

    def look(self, output: Tensor, cotangent: Tensor) -> LossPoint:
        """Return the loss as it is seen from the gradient at the output, and note its factor."""
        loss = self.owner.output_loss
        self.assume(len(output))
        if loss is not None and not self.owner.credit.is_homogeneous:
            shown = factor_of(loss, output, cotangent)
            if shown is not None:
                self.factor, self.scale = shown, shown / loss.scale(output)
        gradient = cotangent / self.factor
        return unknown_loss(output, gradient) if loss is None else loss_behind(loss, output, gradient)

    def assume(self, samples: int) -> None:
        """Take the loss for what it was said to be, where the credit must know."""
        owner = self.owner
        if owner.credit.is_homogeneous:
            return
        self.scale = owner.loss_scale() if callable(owner.loss_scale) else owner.loss_scale
        is_mean = owner.output_loss is None or owner.output_loss.is_mean
        self.factor = self.scale / samples if is_mean else self.scale


class Recorded(torch.autograd.Function):
    """One stage: deltas come down in place of gradients."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, batch: Batch, index: int, count: int, *parameters: Tensor) -> Tensor:
        credit, chain = batch.owner.credit, batch.owner.chain
        pullback = chain[index].record(z.detach(), push=credit.pushes)
        output = pullback.output.detach()  # not the tensor itself, which would hold the graph that holds it
        if not credit.needs_codes:
            pullback.forget("input")
            if index + 1 < len(chain):
                pullback.forget("output")
        # The pullback hangs on a tensor that is saved for the backward pass: it lives as long as autograd keeps such, and a
        # checkpoint makes it anew.
        ticket = torch.empty(0)
        ticket.untyped_storage().pullback = pullback  # type: ignore[attr-defined]
        ctx.save_for_backward(ticket)
        ctx.batch, ctx.index, ctx.count, ctx.parameters, ctx.version = batch, index, count, parameters, output._version
        return output

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        batch, index = ctx.batch, ctx.index
        owner = batch.owner
        credit, stage = owner.credit, owner.chain[index]
        if torch.is_grad_enabled():
            raise UnsupportedModelError(
                f"A backward pass with create_graph=True reached stage {stage.name!r}: the deltas of "
                f"{type(credit).__name__} have no derivative. Differentiate without it."
            )
        (ticket,) = ctx.saved_tensors
        pullback: Pullback = ticket.untyped_storage().pullback
        with batch.surroundings():
            loss: LossPoint | None = None
            if index == batch.last and (index + 1 < len(owner.chain) or not owner.is_top):
                batch.assume(len(cotangent))
            elif index == batch.last:
                if pullback.output._version != ctx.version:
                    raise RuntimeError(
                        f"The output of stage {stage.name!r} was written over in place before the backward pass; use an "
                        "operation that returns a new tensor."
                    )
                loss = batch.look(pullback.output, cotangent)
            factor = batch.factor
            delta = cotangent.neg() if factor == 1.0 else cotangent / -factor
            lessons = credit.lesson(index, pullback) if len(ctx.parameters) > ctx.count else ()
            below = None
            if ctx.needs_input_grad[0] and (index or credit.reaches_input):
                below = credit.below(index, pullback, delta, loss)
            else:
                credit.lowest(pullback, delta, loss)
                below = pullback(delta) if ctx.needs_input_grad[0] else None
            found = _gradients(pullback, delta, -factor, ctx.parameters[: ctx.count])
            found += [None if g is None else g * batch.scale for g in lessons]
            if below is not None:
                below = below.neg() if factor == 1.0 else below * -factor
        return (below, None, None, None, *found)


def _gradients(pullback: Pullback, delta: Tensor, factor: Any, parameters: Sequence[Tensor]) -> list[Tensor | None]:
    """Return what a pullback would add to the parameters' `.grad`, which stay as they are."""
    kept = [p.grad for p in parameters]
    try:
        for p in parameters:
            p.grad = None
        pullback.add_gradients(delta, float(factor))
        return [p.grad for p in parameters]
    finally:
        for p, gradient in zip(parameters, kept, strict=True):
            p.grad = gradient
