"""Online elastic weight consolidation: backpropagation that holds on to the weights that past tasks need.

Kirkpatrick et al., "Overcoming catastrophic forgetting in neural networks", PNAS 2017, arXiv 1612.00796, in the online form of
Schwarz et al., "Progress & Compress", ICML 2018, arXiv 1805.10370, equations 8 and 9:

    loss + strength / 2 * sum_i F_i (w_i - w*_i)^2        w*: weights at the end of the last task
    F <- decay F + F_task                                 F_task: diagonal of the Fisher information there

One pass and nothing stored, so F_task is a moving average over the batches as they pass. For each, labels are drawn from the
network's own prediction; their gradients are independent with mean 0, so that batch size times the squared mean gradient has
the Fisher's diagonal as its expectation, whatever the batch size. It costs a second backward pass.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from beyondprop import _checks
from beyondprop.optim._local import sum_over_ranks
from beyondprop.optim.factories import OptimizerFactory, adam
from beyondprop.rules.base import LearningRule, StepResult, trainable
from beyondprop.stages.losses import LossFunction
from beyondprop.stages.stage import add_to_gradient


class OnlineEWC(LearningRule):
    """Backpropagation with a quadratic penalty on leaving the weights of past tasks; `end_task` ends one.

    Args:
        model: any module that gives `(N, classes)`.
        loss: `nn.CrossEntropyLoss`: labels must be drawn from what the outputs predict.
        optimizer: factory called with the trainable parameters; default Adam, lr 3e-3.
        strength: lambda >= 0 of the penalty; the loss is a mean over samples, so as many as a task has weigh it up.
        decay: gamma in [0, 1]: what is kept of the Fisher information of the tasks before.
        rate: in (0, 1]: weight of the newest batch in the present task's Fisher information.
    """

    takes_ranks = True
    defers_update = False  # the Fisher information changes outside the optimizer

    def __init__(
        self,
        model: nn.Module,
        loss: LossFunction,
        optimizer: OptimizerFactory | None = None,
        *,
        strength: float = 100.0,
        decay: float = 1.0,
        rate: float = 0.01,
        nonfinite: str | None = None,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__(model, loss, nonfinite=nonfinite, group=group)
        if not isinstance(loss, nn.CrossEntropyLoss):
            raise TypeError(
                f"loss must be nn.CrossEntropyLoss, whose labels OnlineEWC can draw, got {type(loss).__name__}."
            )
        self.strength = _checks.non_negative("strength", strength)
        for name, value in (("decay", decay), ("rate", rate)):
            if _checks.non_negative(name, value) > 1:
                raise ValueError(f"{name} must be in [0, 1], got {value!r}.")
        self.decay = decay
        self.rate = _checks.positive("rate", rate)
        self._trained = trainable(self.model)
        self.optimizers = ((optimizer or adam())(self._trained),)
        self.fisher: list[Tensor] = []  # of past tasks, by trained parameter; empty in the first
        self.anchor: list[Tensor] = []
        self._present = [torch.zeros_like(p) for p in self._trained]
        self._pending: list[list[Tensor | None]] = []
        self.batches = 0

    def backward(self, x: Tensor, y: Tensor, *, scale: float = 1.0, diagnostics: bool = False) -> StepResult:
        """Add the gradients of loss and penalty; the loss that is returned is the task's alone."""
        del diagnostics
        output = self.model(x)
        if output.ndim != 2:
            raise ValueError(f"OnlineEWC needs a model with outputs (N, classes), got {tuple(output.shape)}.")
        self.loss.check(output, y)
        drawn = torch.multinomial(output.detach().nan_to_num().softmax(1), 1).squeeze(1)
        surprise = nn.functional.cross_entropy(output, drawn)
        now = [p for p in self._trained if p.requires_grad]  # asked anew: layers may be frozen since
        found = torch.autograd.grad(surprise, now, retain_graph=True, materialize_grads=True)
        share = self.ranks.share(len(x), x)
        if self.ranks.group is not None:  # of the joint batch's mean
            found = [gradient * share for gradient in found]
            sum_over_ranks(found, self.ranks.group)
        squares = {p: len(x) / share * gradient.square() for p, gradient in zip(now, found, strict=True)}
        self._pending.append([squares.get(p) for p in self._trained])
        loss = self.loss(output, y)
        scale *= share
        (loss if scale == 1.0 else loss * scale).backward()
        with torch.no_grad():
            for p, fisher, anchor in zip(self._trained, self.fisher, self.anchor, strict=False):
                if p.requires_grad:
                    add_to_gradient(p, fisher * (p - anchor), scale * self.strength)
        return StepResult(loss.detach(), output.detach())

    def can_follow(self, parameters: set[nn.Parameter]) -> bool:
        """Return whether every parameter has its Fisher information still."""
        return parameters <= set(self._trained)

    @torch.no_grad()
    def prepare(self) -> None:
        pending, self._pending = self._pending, []
        for squares in pending:
            self.batches += 1
            for present, square in zip(self._present, squares, strict=True):
                if square is not None:
                    present.lerp_(square, max(self.rate, 1 / self.batches))

    def gathered(self) -> list[Tensor]:
        return [square for squares in self._pending for square in squares if square is not None]

    def forget(self) -> None:
        self._pending = []

    def end_task(self) -> None:
        """Take the task's Fisher information and weights into the penalty."""
        if not self.batches:
            return
        past = self.fisher or [torch.zeros_like(p) for p in self._trained]
        self.fisher = [f * self.decay + present for f, present in zip(past, self._present, strict=True)]
        self.anchor = [p.detach().clone() for p in self._trained]
        self._present = [torch.zeros_like(p) for p in self._trained]
        self.batches = 0

    def own_state(self) -> dict[str, Any]:
        kept = {"fisher": self.fisher, "anchor": self.anchor, "present": self._present}
        copies = {name: [value.clone() for value in values] for name, values in kept.items()}
        return {**copies, "batches": self.batches}

    def load_own_state(self, state: Mapping[str, Any]) -> None:
        self.fisher, self.anchor, self._present = (
            [value.to(p.device, copy=True) for value, p in zip(state[name], self._trained, strict=False)]
            for name in ("fisher", "anchor", "present")
        )
        self.batches = int(state["batches"])
