"""Any credit with any solver: the rule that all stage-wise methods are made of."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from beyondprop import _checks
from beyondprop.credit.base import Assignment, Credit
from beyondprop.credit.code_problem import tiny
from beyondprop.errors import UnsupportedModelError
from beyondprop.rules.base import LearningRule, StepResult, trainable
from beyondprop.solvers import Descent, Memory, Solver
from beyondprop.stages import Chain, LossFunction
from beyondprop.stages.chain import Cuts


class LocalRule(LearningRule):
    """One forward pass, one sweep of credit from the last stage to the first, then every stage solves for itself.

    Args:
        model: `nn.Sequential`, or any module with `cuts` naming its blocks; see `Chain`.
        loss: `loss(output, y)`, mean or sum over the batch.
        credit: gives every stage its delta.
        solver: moves every stage's weights toward it.
        cuts: where stages end; see `Chain`.
        weight_inputs: `"old"`: a stage solves for its target at the input that it saw (all stages in parallel);
            `"new"`: at the input that the stage below should send (the published order; one more forward pass).
        nonfinite, group: of `LearningRule`.

    Attributes:
        teaches_credit: whether `backward` also lets the credit `learn`, for the next `update`, its own weights.

    Raises:
        UnsupportedModelError: if the model cannot be cut; the message names the module and the way out.
    """

    takes_ranks = True

    def __init__(
        self,
        model: nn.Module,
        loss: LossFunction,
        credit: Credit,
        solver: Solver,
        *,
        cuts: Cuts = "linear",
        weight_inputs: str = "old",
        nonfinite: str | None = None,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__(model, loss, nonfinite=nonfinite, group=group)
        model = self.model
        _checks.one_of("weight_inputs", weight_inputs, ("old", "new"))
        self.chain = Chain(model, cuts)
        self._stages = {stage.name: stage.parameters for stage in self.chain}
        trainable(model)
        self.credit = credit
        self.solver = solver
        self.weight_inputs = weight_inputs
        self._structure = None  # the chain asks in every pass
        if self.ranks.group is not None and type(solver).reduce is Solver.reduce and not isinstance(solver, Descent):
            raise UnsupportedModelError(
                f"{type(solver).__name__} does not say what it sums over ranks: give it a `reduce`, or train in one process."
            )
        credit.group = solver.group = self.ranks.group
        credit.bind(self.chain)
        solver.bind(self.chain)
        self.optimizers = (*solver.optimizers, *credit.optimizers)
        self.teaches_credit = bool(credit.optimizers)
        self._parameters += tuple(p for o in credit.optimizers for group in o.param_groups for p in group["params"])
        self.defers_update = solver.defers_update
        self.is_wary = not (solver.defers_update or isinstance(solver, Descent | Memory))

    why_still = "Their delta may vanish on the way down: use normalize=True, or another credit solver."

    def can_freeze(self, parameter: nn.Parameter) -> bool:
        """Return whether the rest of the parameter's stage is solved for without it: by steps, or where there is no rest."""
        stage = next(stage for stage in self.chain if parameter in set(stage.parameters))
        return not isinstance(self.solver, Memory) or not stage.is_trainable

    @torch.no_grad()
    def backward(self, x: Tensor, y: Tensor, *, scale: float = 1.0, diagnostics: bool = False) -> StepResult:
        keep_codes = diagnostics or self.credit.needs_codes or self.solver.needs_codes or self.weight_inputs == "new"
        trace = self.chain.record(x, push=self.credit.pushes, keep_codes=keep_codes)
        share = self.ranks.share(len(x), x)
        if self.teaches_credit:
            self.credit.learn(trace, scale * share)
        output = trace.output
        loss = self.loss.at(output, y)
        factor = -loss.scale * scale * (share if self.loss.is_mean else 1.0)
        kept: list[Assignment] = []
        for assignment in self.credit.assign(trace, loss):
            if diagnostics:
                kept.append(assignment)
            if self.weight_inputs == "new" and assignment.input_delta is not None:
                assignment = _at_moved_input(assignment)
            self.solver.collect(assignment, factor)
            del assignment  # its stage's memory is free for the next
        if not diagnostics:
            return StepResult(loss.value, output)
        stages = {self.chain[a.index].name: _measure(a) for a in reversed(kept)}
        return StepResult(loss.value, output, self.credit.energy(kept), stages)

    def reduce(self) -> None:
        super().reduce()
        self.solver.reduce()

    def prepare(self) -> None:
        self.solver.solve()

    def settle(self) -> None:
        self.credit.update()

    def forget(self) -> None:
        self.solver.discard()
        self.credit.discard()

    def end_epoch(self) -> None:
        self.credit.end_epoch()

    def activations(self, x: Tensor) -> Iterator[tuple[str, Tensor | None]]:
        for stage, pullback in zip(self.chain, self.chain.record(x).pullbacks, strict=True):
            yield stage.name, None if pullback is None else pullback.output
        for name, module in self.credit.modules.items():
            for weight in module.parameters():
                yield from ((name, weight), (name, weight.grad))

    def move(self, device: torch.device | str) -> None:
        for module in self.credit.modules.values():
            module.to(device)

    def own_state(self) -> dict[str, Any]:
        return {"credit": self.credit.state_dict(), "solver": self.solver.state_dict()}

    def load_own_state(self, state: Mapping[str, Any]) -> None:
        self.credit.load_state_dict(state["credit"])
        self.solver.load_state_dict(state["solver"])


def _at_moved_input(assignment: Assignment) -> Assignment:
    pullback = assignment.moved()
    delta = assignment.remaining(pullback.output - assignment.pullback.output)
    loss = assignment.loss
    return Assignment(assignment.index, pullback, delta, None, None if loss is None else loss.again(pullback.output))


def _measure(assignment: Assignment) -> dict[str, Tensor]:
    output, delta = assignment.pullback.output.norm(), assignment.delta.norm()
    return {"output_norm": output, "delta_norm": delta, "relative_delta": delta / output.clamp_min(tiny(output))}
