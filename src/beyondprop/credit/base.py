"""Credit: what each stage should have produced."""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from beyondprop.stages.chain import Chain, Trace
from beyondprop.stages.losses import LossPoint
from beyondprop.stages.stage import Pullback


@dataclass(slots=True)
class Assignment:
    """One stage's wish, in delta form.

    Attributes:
        index: the stage.
        pullback: the stage at the input that it saw.
        delta: how its output should change, `(N, ...)`, one wish a sample: target minus output, never their sum. For the
            last stage it is minus the gradient of each sample's loss, whatever the credit rule.
        input_delta: how its input moves if the stage below gets its wish, or None for the lowest stage.
        loss: the task loss at the stage's output, for the last stage only.
    """

    index: int
    pullback: Pullback
    delta: Tensor
    input_delta: Tensor | None
    loss: LossPoint | None = None

    def moved(self) -> Pullback:
        """Return the stage at its moved input, where the stage below has got its wish."""
        if self.input_delta is None:
            return self.pullback
        return self.pullback.at(self.pullback.input + self.input_delta)

    def remaining(self, change: Tensor) -> Tensor:
        """Return what is left of the wish after the output has changed by `change`, `(N, ...)`."""
        if self.loss is not None:
            return self.loss.again(self.pullback.output + change).cotangent.neg()
        return self.delta - change


class Credit(abc.ABC):
    """Gives every stage of a chain its delta; one instance serves one rule.

    Attributes:
        pushes: whether `assign` pushes tangents forward through stages.
        needs_codes: whether it looks at the stages' inputs and outputs; False saves their memory.
        optimizers: of weights that the credit learns itself, such as inverses; there after `bind`. The rule lists them with
            its own, checks their gradients with the model's and steps them in the same update.
    """

    pushes: bool = False
    needs_codes: bool = True
    optimizers: tuple[torch.optim.Optimizer, ...] = ()

    def bind(self, chain: Chain) -> None:
        """Look at the chain once, when the rule is built; refuse what cannot be served, naming the stage."""
        del chain

    @abc.abstractmethod
    def assign(self, trace: Trace, loss: LossPoint) -> Iterator[Assignment]:
        """Yield an assignment for every stage from the last down to `trace.lowest`.

        `loss.cotangent` is the gradient of each sample's loss at `trace.output`; `trace[i](delta)` pulls a delta through
        stage i, `trace[i].push(tangent)` sends a tangent up, `trace.take(i)` is `trace[i]` used for the last time. Where
        each wish follows from the one above, `top_down` is all but the formula.
        """

    @staticmethod
    def top_down(
        trace: Trace, loss: LossPoint, below: Callable[[int, Pullback, Tensor], Tensor]
    ) -> Iterator[Assignment]:
        """Yield an assignment for every stage from the last down, each stage's memory free for whoever takes it.

        Args:
            trace: the forward pass.
            loss: the loss at its output; the last stage's wish is minus its gradient.
            below: `below(index, pullback, wish)` returns the wish at a stage's input, shape of the input, for the wish at its
                output; asked once a stage, last stage first, and not for the lowest, whose input moves for nobody.
        """
        top = len(trace.pullbacks) - 1
        wish = loss.cotangent.neg()
        for index in range(top, trace.lowest, -1):
            delta = below(index, trace[index], wish)
            yield Assignment(index, trace.take(index), wish, delta, loss if index == top else None)
            wish = delta
            del delta
        # The lowest stage may be the last one, too, when all others are frozen.
        yield Assignment(trace.lowest, trace.take(trace.lowest), wish, None, loss if trace.lowest == top else None)

    def learn(self, trace: Trace, scale: float) -> None:
        """Add this batch's part, times `scale`, to the `.grad` of the credit's own weights; called before `assign`."""
        del trace, scale

    def update(self) -> None:
        """Change the credit's own weights by what `learn` gathered, and forget it; the rule's update calls it."""
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def discard(self) -> None:
        """Forget what the last batch left behind, apart from gradients; a refused step calls it."""

    def locate_nonfinite(self) -> str | None:
        """Return the name of what is not finite among the credit's own weights and their gradients, or None."""
        return None

    def energy(self, assignments: Sequence[Assignment]) -> Tensor | None:
        """Return the relaxed objective that the deltas lower, 0-d, where this credit has one."""
        del assignments
        return None

    def end_epoch(self) -> None:
        """Advance the credit's own schedules, where it has any."""

    def to(self, device: torch.device | str) -> None:
        """Move the credit's own weights, where it has any that optimizers write."""
        del device

    def state_dict(self) -> dict[str, object]:
        """Return the credit's own state (learned or random feedback weights, schedules)."""
        return {}

    def load_state_dict(self, state: dict[str, object]) -> None:
        """Restore what `state_dict` returned."""
        del state
