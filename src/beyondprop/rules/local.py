"""Any credit with any solver: the rule that all stage-wise methods are made of."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from beyondprop import _checks
from beyondprop.credit.base import Assignment, Credit
from beyondprop.credit.code_solvers import tiny
from beyondprop.rules.base import LearningRule, StepResult
from beyondprop.solvers.base import Solver
from beyondprop.stages.chain import Chain, Cuts
from beyondprop.stages.losses import LossFunction


class LocalRule(LearningRule):
    """One forward pass, one sweep of credit from the last stage to the first, then every stage solves for itself.

    Args:
        model: `nn.Sequential`, or any module with `cuts` naming its blocks; see `Chain`.
        loss: `loss(output, y)`, mean or sum over the batch.
        credit: gives every stage its delta.
        solver: moves every stage's weights toward it.
        cuts: where stages end; see `Chain`.
        weight_inputs: `"old"`: a stage solves for its wish at the input that it saw (all stages in parallel);
            `"new"`: at the input that the stage below wishes to send (the published order; one more forward pass).
        nonfinite: see `LearningRule`.

    Attributes:
        teaches_credit: whether `backward` also gathers the gradients of weights that the credit learns itself, for the
            next `update`; the targets of a batch come from those weights as they are before it.

    Raises:
        UnsupportedModelError: if the model cannot be cut; the message names the module and the way out.
    """

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
    ) -> None:
        super().__init__(model, loss, nonfinite=nonfinite)
        _checks.one_of("weight_inputs", weight_inputs, ("old", "new"))
        self.chain = Chain(model, cuts)
        if not any(stage.is_trainable for stage in self.chain):
            raise ValueError("No parameter of the model requires a gradient; there is nothing to train.")
        self.credit = credit
        self.solver = solver
        self.weight_inputs = weight_inputs
        credit.bind(self.chain)
        solver.bind(self.chain)
        self.optimizers = (*solver.optimizers, *credit.optimizers)
        self.teaches_credit = bool(credit.optimizers)
        self._parameters += tuple(p for o in credit.optimizers for group in o.param_groups for p in group["params"])
        self.defers_update = solver.defers_update

    @torch.no_grad()
    def backward(self, x: Tensor, y: Tensor, *, scale: float = 1.0, diagnostics: bool = False) -> StepResult:
        """See `LearningRule.backward`."""
        keep_codes = diagnostics or self.credit.needs_codes or self.solver.needs_codes or self.weight_inputs == "new"
        trace = self.chain.record(x, push=self.credit.pushes, keep_codes=keep_codes)
        if self.teaches_credit:
            self.credit.learn(trace, scale)
        output = trace.output
        loss = self.loss.at(output, y)
        factor = -loss.scale * scale
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

    def update(self) -> None:
        """See `LearningRule.update`."""
        self.solver.update()
        self.credit.update()

    def discard(self) -> None:
        """See `LearningRule.discard`."""
        super().discard()
        self.solver.discard()
        self.credit.discard()

    def end_epoch(self) -> None:
        """See `LearningRule.end_epoch`."""
        self.credit.end_epoch()

    def stage_parameters(self) -> dict[str, list[nn.Parameter]]:
        """See `LearningRule.stage_parameters`."""
        return {stage.name: stage.parameters for stage in self.chain}

    @torch.no_grad()
    def locate_nonfinite(self, x: Tensor, y: Tensor) -> str | None:
        """See `LearningRule.locate_nonfinite`; looks at the codes, too, first stage first."""
        for name, value in (("x", x), ("y", y)):
            if value.is_floating_point() and not bool(value.isfinite().all()):
                return name
        for stage in self.chain:
            if not all(bool(p.isfinite().all()) for p in stage.parameters):
                return stage.name
        for stage, pullback in zip(self.chain, self.chain.record(x).pullbacks, strict=True):
            if pullback is not None and not bool(pullback.output.isfinite().all()):
                return stage.name
        return self.credit.locate_nonfinite() or super().locate_nonfinite(x, y)

    def to(self, device: torch.device | str) -> LearningRule:
        """See `LearningRule.to`."""
        self.check_finite()
        self.credit.to(device)
        return super().to(device)

    def state_dict(self) -> dict[str, Any]:
        """See `LearningRule.state_dict`; holds the credit's and the solver's own state."""
        return {
            **super().state_dict(),
            "credit": self.credit.state_dict(),
            "solver": self.solver.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `LearningRule.load_state_dict`."""
        super().load_state_dict(state)
        self.credit.load_state_dict(state["credit"])
        self.solver.load_state_dict(state["solver"])


def _at_moved_input(assignment: Assignment) -> Assignment:
    pullback = assignment.moved()
    delta = assignment.remaining(pullback.output - assignment.pullback.output)
    loss = assignment.loss
    return Assignment(assignment.index, pullback, delta, None, None if loss is None else loss.again(pullback.output))


def _measure(assignment: Assignment) -> dict[str, Tensor]:
    output, delta = assignment.pullback.output, assignment.delta
    floor = tiny(output)
    return {
        "output_norm": output.norm(),
        "delta_norm": delta.norm(),
        "relative_delta": delta.norm() / output.norm().clamp_min(floor),
    }
