"""Stages behind a backward pass, one by one or all at once, and what those of one forward pass have in common."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator, Sequence
from operator import attrgetter
from typing import Any, Protocol

import torch
from torch import Tensor
from torch._C import _autograd as autograd  # type: ignore[attr-defined]

from beyondprop.credit.base import Credit
from beyondprop.errors import UnsupportedModelError
from beyondprop.stages.affine import AffinePullback
from beyondprop.stages.chain import Chain, Trace
from beyondprop.stages.loss_behind import factor_of, loss_behind, unknown_loss
from beyondprop.stages.losses import LossPoint, OutputLoss
from beyondprop.stages.pipeline import PipelinePullback
from beyondprop.stages.reversible import ReversiblePullback, swept_once
from beyondprop.stages.stage import Pullback, Stage

_HOOKS = attrgetter("_backward_hooks")


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
        group: process group whose ranks have parts of it.
        factor: on a sum over samples in the gradients that come down, as far as the credit must know it.
        scale: of the loss, likewise.
    """

    def __init__(self, owner: Owner, device: str, last: int) -> None:
        self.owner, self.device, self.last, self.group = owner, device, last, owner.credit.group
        self.factor: float | Tensor = 1.0
        self.scale: float | Tensor = 1.0
        self._kept: dict[str, Any] = {}
        self._placed: weakref.ref[Pullback] | None = None
        self._autocast = torch.get_autocast_dtype(self.device) if torch.is_autocast_enabled(self.device) else None

    def place(self, pullback: Pullback) -> None:
        """Know the pullback of the next stage; one that can be undone gives the one below it its output."""
        below = None if self._placed is None else self._placed()
        if isinstance(pullback, ReversiblePullback):
            pullback.follow(below)
        self._placed = weakref.ref(pullback)

    def surroundings(self) -> contextlib.AbstractContextManager[Any]:
        """Return a context as the forward pass was in: its autocast, and what the credit remembers of this batch."""
        self.owner.credit.group = self.group  # another pass may have come between
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
        loss, credit = self.owner.output_loss, self.owner.credit
        self.assume(len(output))
        if loss is not None and not credit.is_homogeneous:
            shown = factor_of(loss, output, cotangent)
            if shown is not None:
                self.factor, self.scale = shown, shown / loss.scale(output)
        gradient = cotangent if self.factor == 1.0 else cotangent / self.factor
        return loss_behind(loss, output, gradient) if loss and credit.asks_curvature else unknown_loss(output, gradient)

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
        with _unseen_by_hooks():
            pullback = chain[index].record(z.detach(), push=credit.pushes)
        batch.place(pullback)
        output = pullback.output.detach()  # not the tensor itself, which would hold the graph that holds it
        if not credit.needs_codes:
            pullback.forget("input")
            if index + 1 < len(chain):
                pullback.forget("output")
        _hang(ctx, pullback, *([] if index else _kept_input(pullback, z)), *parameters[:count])
        ctx.batch, ctx.index, ctx.count, ctx.parameters, ctx.version = batch, index, count, parameters, output._version
        return output

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        batch, index = ctx.batch, ctx.index
        owner = batch.owner
        credit, stage = owner.credit, owner.chain[index]
        _check_first_order(credit, stage)
        pullback: Pullback = _hung(ctx, stage)
        with batch.surroundings(), _silent(ctx.parameters):
            loss: LossPoint | None = None
            if index == batch.last and (index + 1 < len(owner.chain) or not owner.is_top):
                batch.assume(len(cotangent))
            elif index == batch.last:
                _check_output(pullback.output, ctx.version, stage)
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
            with _gathered(ctx.parameters[: ctx.count]) as found:
                pullback.add_gradients(delta, float(-factor))
            found += [None if g is None else g * batch.scale for g in lessons]
            if below is not None:
                below = below.neg() if factor == 1.0 else below * -factor
        return (below, None, None, None, *found)


class Swept(torch.autograd.Function):
    """All stages of a network at once, by the sweep of the credit's `assign`: what lies between them asks for no gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, batch: Batch, *parameters: Tensor) -> Tensor:
        credit = batch.owner.credit
        with _unseen_by_hooks():
            trace = batch.owner.chain.record(x.detach(), push=credit.pushes, keep_codes=credit.needs_codes)
        output = trace.output.detach()
        _hang(ctx, trace, *_kept_input(trace.pullbacks[0], x), *parameters)
        ctx.batch, ctx.parameters, ctx.version = batch, parameters, output._version
        return output

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        batch: Batch = ctx.batch
        credit, stage = batch.owner.credit, batch.owner.chain[batch.last]
        _check_first_order(credit, stage)
        kept: Trace = _hung(ctx, stage)
        _check_output(kept.output, ctx.version, stage)
        trace = Trace(
            swept_once(kept.pullbacks), kept.lowest, kept.output
        )  # the graph may be retained, and swept again
        with batch.surroundings(), _silent(ctx.parameters), _gathered(ctx.parameters) as found:
            loss = batch.look(trace.output, cotangent)
            factor = float(-batch.factor)
            for assignment in credit.assign(trace, loss):
                assignment.pullback.add_gradients(assignment.delta, factor)
                del assignment
        return (None, None, *found)


def _hang(ctx: Any, kept: Any, *watched: Tensor) -> None:
    """Hang something on a tensor that is saved for the backward pass.

    It lives as long as autograd keeps such, and a checkpoint makes it anew. What is `watched` autograd refuses to find changed
    in place; a vector of weights, such as a bias, has no part in deltas.
    """
    ticket = torch.empty(0)
    ticket.untyped_storage().kept = kept  # type: ignore[attr-defined]
    ctx.save_for_backward(ticket, *(t for t in watched if t.ndim > 1))


def _hung(ctx: Any, stage: Stage) -> Any:
    ticket, *_ = ctx.saved_tensors
    kept = getattr(ticket.untyped_storage(), "kept", None)
    if kept is None:
        raise UnsupportedModelError(
            f"Hooks on saved tensors gave stage {stage.name!r} a copy of what it saved, and a stage is more than a tensor. "
            "Checkpoints around it work; where tensors are copied (save_on_cpu with pinned memory, compression), leave it out."
        )
    return kept


def _unseen_by_hooks() -> contextlib.AbstractContextManager[Any]:
    """Return a context in which a stage's own graph is not shown to hooks on saved tensors, which have the ticket.

    A checkpoint counts what it sees in both of its runs, and a stage looks at itself more closely in the first.
    """
    if autograd._top_saved_tensors_default_hooks(True) is None:
        return contextlib.nullcontext()
    return torch.autograd.graph.saved_tensors_hooks(Tensor.detach, lambda saved: saved)


def _silent(parameters: Sequence[Tensor]) -> contextlib.AbstractContextManager[Any]:
    """Return a context in which parameters' own hooks are silent: autograd calls them with what the stage returns."""
    return _without_hooks(parameters) if any(map(_HOOKS, parameters)) else contextlib.nullcontext()


@contextlib.contextmanager
def _without_hooks(parameters: Sequence[Tensor]) -> Iterator[None]:
    kept = [*map(_HOOKS, parameters)]
    for p in parameters:
        p._backward_hooks = None
    try:
        yield
    finally:
        for p, hooks in zip(parameters, kept, strict=True):
            p._backward_hooks = hooks


def _kept_input(pullback: Pullback | None, z: Tensor) -> list[Tensor]:
    """Return the input where a closed form goes on using it."""
    first: Any = pullback.recorded[0].pull if isinstance(pullback, PipelinePullback) else pullback
    features = first.features if isinstance(first, AffinePullback) else None
    is_same: Any = torch._C._is_alias_of  # type: ignore[attr-defined]
    return [z] if features is not None and is_same(features, z) else []


def _check_first_order(credit: Credit, stage: Stage) -> None:
    if torch.is_grad_enabled():
        raise UnsupportedModelError(
            f"A backward pass with create_graph=True reached stage {stage.name!r}: the deltas of "
            f"{type(credit).__name__} have no derivative. Differentiate without it."
        )


def _check_output(output: Tensor, version: int, stage: Stage) -> None:
    if output._version != version:
        raise RuntimeError(
            f"The output of stage {stage.name!r} was written over in place before the backward pass; use an operation that "
            "returns a new tensor."
        )


@contextlib.contextmanager
def _gathered(parameters: Sequence[Tensor]) -> Iterator[list[Tensor | None]]:
    """Give a list that has, behind the block, what was added to the parameters' `.grad` in it; these stay as they were."""
    kept, found = [p.grad for p in parameters], []
    try:
        for p in parameters:
            p.grad = None
        yield found
        found += [p.grad for p in parameters]
    finally:
        for p, gradient in zip(parameters, kept, strict=True):
            p.grad = gradient
