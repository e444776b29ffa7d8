"""Solvers: how each stage comes to produce what it should have produced."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from beyondprop.credit.base import Assignment
from beyondprop.stages.chain import Chain

_ZERO_GRAD = torch.optim.Optimizer.zero_grad


class Solver(abc.ABC):
    """Moves the weights of every stage toward its target; one instance serves one rule.

    Attributes:
        optimizers: the torch optimizers that write the weights; learning-rate schedulers attach to them.
        defers_update: whether all of its state changes inside optimizers, so that they can skip a step on the device.
        needs_codes: whether it looks at the stages' inputs and outputs; False saves their memory.
        group: process group whose ranks have parts of the batch.
    """

    optimizers: tuple[torch.optim.Optimizer, ...] = ()
    defers_update: bool = True
    needs_codes: bool = True
    group: dist.ProcessGroup | None = None
    _chain: Chain

    @abc.abstractmethod
    def bind(self, chain: Chain) -> None:
        """Take the chain whose stages are solved, when the rule is built; refuse what cannot be, naming the stage."""

    @abc.abstractmethod
    def collect(self, assignment: Assignment, factor: float) -> None:
        """Take one stage's assignment; no weight changes yet.

        Args:
            assignment: from the credit; stages come last first.
            factor: what a sum over samples of `(d output / d weights)^T delta` is multiplied with to become a gradient:
                negative, minus one over the batch size where the loss is a mean.
        """

    def reduce(self) -> None:
        """Sum over the ranks what was collected besides gradients; a hook."""

    def solve(self) -> None:
        """Forget what was collected, once the gradients say the step to be made; the rule steps `optimizers` right after."""

    def discard(self) -> None:
        """Forget what was collected; the rule clears the gradients."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state besides the optimizers'."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""


def step_all(optimizers: Sequence[torch.optim.Optimizer]) -> None:
    """Step every optimizer, then clear its gradients."""
    for optimizer in optimizers:
        optimizer.step()
    for optimizer in optimizers:
        if type(optimizer).zero_grad is not _ZERO_GRAD:
            optimizer.zero_grad(set_to_none=True)
            continue
        # The same without its profiler bookkeeping, which costs more than a small step's products.
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad = None
