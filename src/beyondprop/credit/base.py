"""Credit: what each stage should have produced."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from beyondprop.stages import Chain, LossPoint, Pullback, Trace
from beyondprop.stages.stage import add_to_gradient


@dataclass(slots=True)
class Assignment:
    """What one stage should have produced, in delta form.

    Attributes:
        index: the stage.
        pullback: the stage at the input that it saw.
        delta: how its output should change, `(N, ...)`, sample by sample: target minus output, never their sum. For the last
            stage it is minus the gradient of each sample's loss, whatever the credit rule.
        input_delta: the delta of the stage below, by which the input moves if that stage reaches its target, or None for the
            lowest stage.
        loss: the task loss at the stage's output, for the last stage only.
    """

    index: int
    pullback: Pullback
    delta: Tensor
    input_delta: Tensor | None
    loss: LossPoint | None = None

    def moved(self) -> Pullback:
        """Return the stage at its moved input, where the stage below has reached its target."""
        if self.input_delta is None:
            return self.pullback
        return self.pullback.at(self.pullback.input + self.input_delta)

    def remaining(self, change: Tensor) -> Tensor:
        """Return what is left of the delta after the output has changed by `change`, `(N, ...)`."""
        if self.loss is not None:
            return self.loss.again(self.pullback.output + change).cotangent.neg()
        return self.delta - change


class Credit:
    """Gives every stage of a chain its delta; one instance serves one rule. A credit writes `below`; all else has defaults.

    Attributes:
        pushes: whether `below` pushes tangents forward through stages.
        needs_codes: whether it looks at the stages' inputs and outputs; False saves their memory.
        optimizers: of weights that the credit learns itself, such as inverses; there after `bind`. The rule lists them with
            its own, checks their gradients with the model's and steps them in the same update.
        modules: those weights, each module by the name that an error gives it; there after `bind`.
        of_batch: names of attributes that `below` leaves for the stages further down.
        reaches_input: whether `below` knows a way through the lowest stage, too.
        is_inside: whether units of the same network come into the chain, as into a `CreditBlock`; there before `bind`.
        group: process group whose ranks have parts of the batch.
        asks_curvature: whether it looks at more of the loss than its gradient.
        is_homogeneous: whether deltas grow in proportion to the loss, so that nobody need know what it was multiplied with.
    """

    pushes: bool = False
    needs_codes: bool = True
    optimizers: tuple[torch.optim.Optimizer, ...] = ()
    modules: Mapping[str, nn.Module] = {}
    of_batch: tuple[str, ...] = ()
    reaches_input: bool = True
    is_inside: bool = False
    is_homogeneous: bool = True
    asks_curvature: bool = True
    group: dist.ProcessGroup | None = None
    _chain: Chain

    def bind(self, chain: Chain) -> None:
        """Look at the chain once, when the rule is built; refuse what cannot be served, and a second chain."""
        serves_one_rule(self, chain)

    def below(self, index: int, pullback: Pullback, delta: Tensor, loss: LossPoint | None) -> Tensor:
        """Return the delta at a stage's input, shape of the input, from the delta at its output.

        Asked once a stage, last stage first, and not for the lowest, whose input moves for nobody. `pullback(delta)` pulls a
        delta through the stage, `pullback.push(tangent)` sends a tangent up; `loss` is there for the last stage only.
        """
        raise NotImplementedError(f"{type(self).__name__} writes neither `below` nor `assign`.")

    def assign(self, trace: Trace, loss: LossPoint) -> Iterator[Assignment]:
        """Yield an assignment for every stage from the last down to `trace.lowest`, each asked of `below`.

        Each stage's memory is free for whoever takes its assignment. A credit whose deltas do not follow one from the other
        has an `assign` of its own: `trace[i]` is a stage's pullback, `trace.take(i)` the same for the last time.
        """
        top = len(trace.pullbacks) - 1
        delta, own = loss.cotangent.neg(), loss
        for index in range(top, trace.lowest, -1):
            input_delta = self.below(index, trace[index], delta, own)
            yield Assignment(index, trace.take(index), delta, input_delta, own)
            delta, own = input_delta, None
            del input_delta
        # The lowest stage may be the last one, too, when all others are frozen.
        self.lowest(trace[trace.lowest], delta, own)
        yield Assignment(trace.lowest, trace.take(trace.lowest), delta, None, own)

    def lowest(self, pullback: Pullback, delta: Tensor, loss: LossPoint | None) -> None:
        """Take the delta at the output of the lowest stage, of whose input nobody asks `below`; a hook."""

    def learn(self, trace: Trace, scale: float) -> None:
        """Add this batch's part, times `scale`, to the `.grad` of the credit's own weights; called before `assign`."""
        for index in range(len(trace.pullbacks) - 2, trace.lowest, -1):
            parameters = self.learned(index)
            for p, gradient in zip(parameters, self.lesson(index, trace[index]) if parameters else (), strict=True):
                if gradient is not None:
                    add_to_gradient(p, gradient, scale)

    def learned(self, index: int) -> list[nn.Parameter]:
        """Return the credit's own weights that a stage teaches, those that require a gradient; a hook."""
        return []

    def lesson(self, index: int, pullback: Pullback) -> Sequence[Tensor | None]:
        """Return the gradients of `learned(index)`, mean over the batch; a hook."""
        return []

    def update(self) -> None:
        """Know that the rule's update takes what the last batch left behind; the rule steps the credit's optimizers."""

    def discard(self) -> None:
        """Forget what the last batch left behind, apart from gradients; a refused step calls it."""

    def energy(self, assignments: Sequence[Assignment]) -> Tensor | None:
        """Return the relaxed objective that the deltas lower, 0-d, where this credit has one."""

    def end_epoch(self) -> None:
        """Advance the credit's own schedules, where it has any."""

    def state_dict(self) -> dict[str, object]:
        """Return the credit's own state (learned or random feedback weights, schedules)."""
        return {}

    def load_state_dict(self, state: dict[str, object]) -> None:
        """Restore what `state_dict` returned; `ValueError` if it is of another network."""

    def tensors(self) -> dict[str, Tensor]:
        """Return what `state_dict` has besides the weights of `modules`, as tensors by dotted names; a hook."""
        return {}

    def load_tensors(self, saved: Mapping[str, Tensor]) -> None:
        """Restore what `tensors` returned; `ValueError` if it is of another credit or network; a hook."""
        if saved:
            raise ValueError(f"{type(self).__name__} has no state of its own, got {', '.join(saved)}.")


def serves_one_rule(owner: Any, chain: Chain) -> None:
    """Give a credit or solver its `_chain`, or raise `ValueError` if it has one already."""
    if hasattr(owner, "_chain"):
        raise ValueError(f"This {type(owner).__name__} serves another rule already; one instance serves one rule.")
    owner._chain = chain
