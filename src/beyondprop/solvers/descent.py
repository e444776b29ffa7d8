"""Gradient steps of any torch optimizer on each stage's squared distance to its target."""

from __future__ import annotations

import torch

from beyondprop import _checks
from beyondprop.credit.base import Assignment, serves_one_rule
from beyondprop.errors import NonFiniteError
from beyondprop.optim._local import sum_over_ranks
from beyondprop.optim.factories import OptimizerFactory, adam
from beyondprop.solvers.base import Solver, step_all
from beyondprop.stages.chain import Chain


class Descent(Solver):
    """One or several steps of a torch optimizer on `|delta - (stage(input) - output)|^2 / 2`, mean over the batch.

    With one step, the gradient is `-delta^T input`: the published weight update of AM-SGD and AM-Adam. The last stage
    descends the task loss itself. Further local steps recompute what is left of the delta under the new weights.

    Args:
        optimizer: factory over the trainable parameters; default Adam, lr 3e-3, fused where the device has it.
        output: factory of a second optimizer for the last stage; default: the same one serves all.
        local_steps: optimizer steps a batch, >= 1. Where a later one is not finite, all weights go back to those before the
            batch; the optimizer keeps what it saw in the steps before.
    """

    def __init__(
        self, optimizer: OptimizerFactory | None = None, *, output: OptimizerFactory | None = None, local_steps: int = 1
    ) -> None:
        for name, factory in (("optimizer", optimizer), ("output", output)):
            if factory is not None and not callable(factory):
                raise TypeError(
                    f"{name} must be an optimizer factory such as partial(torch.optim.Adam, lr=3e-3), got "
                    f"{type(factory).__name__}."
                )
        self._factory = optimizer or adam()
        self._output_factory = output
        self.local_steps = _checks.at_least("local_steps", local_steps, 1)
        self.defers_update = local_steps == 1
        self.needs_codes = local_steps > 1
        self._collected: list[tuple[Assignment, float]] = []

    def bind(self, chain: Chain) -> None:
        serves_one_rule(self, chain)
        stages = list(chain)
        below = stages if self._output_factory is None else stages[:-1]
        groups = [(self._factory, [p for s in below for p in s.parameters if p.requires_grad])]
        if self._output_factory is not None:
            groups.append((self._output_factory, [p for p in stages[-1].parameters if p.requires_grad]))
        self.optimizers = tuple(factory(parameters) for factory, parameters in groups if parameters)
        for optimizer in self.optimizers:
            if isinstance(optimizer, torch.optim.LBFGS):
                raise TypeError("Descent takes optimizers whose step takes no closure, got LBFGS.")

    def collect(self, assignment: Assignment, factor: float) -> None:
        assignment.pullback.add_gradients(assignment.delta, factor)
        if self.local_steps > 1:
            self._collected.append((assignment, factor))

    @torch.no_grad()
    def solve(self) -> None:
        """Make all local steps but the last, which is the rule's."""
        if self.local_steps == 1:
            return
        collected, self._collected = self._collected, []
        before = {p: p.detach().clone() for stage in self._chain for p in stage.parameters if p.requires_grad}
        for _ in range(self.local_steps - 1):
            step_all(self.optimizers)
            for assignment, factor in collected:
                pullback, change = assignment.pullback.relinearize(before)
                pullback.add_gradients(assignment.remaining(change), factor)
            sum_over_ranks([p.grad for p in before if p.grad is not None], self.group)
            if not all(bool(p.grad.sum().isfinite()) for p in before if p.grad is not None):
                for p, value in before.items():
                    p.copy_(value)
                raise NonFiniteError(
                    "A local step after the first is not finite; no weight was changed. Lower the learning rate.",
                    where="loss",
                )

    def discard(self) -> None:
        self._collected = []
