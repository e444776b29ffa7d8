"""AM with memory: each stage keeps the second moments of its inputs and solves its weights against them.

Choromanska et al. 2019 (arXiv 1806.09077), Algorithm 2.3, after Mairal et al., "Online dictionary learning for sparse
coding", ICML 2009:

    A <- A + sum_b a a^T        (in x in)        a: input of the affine map, with a constant 1 where it has a bias
    B <- B + sum_b c a^T        (out x in)       c: code that the stage should produce
    W <- argmin_W  Tr(W^T W A) - 2 Tr(W^T B)     by block coordinate descent over columns, warm started

Both solvers here keep B in delta form: R = B - W A = sum_b delta a^T under the present weights, so that no delta is lost in
the difference of two large sums.
"""

from __future__ import annotations

import math
import warnings
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from beyondprop import _checks
from beyondprop.credit.base import Assignment, serves_one_rule
from beyondprop.errors import NonFiniteError, UnsupportedModelError
from beyondprop.optim._local import sum_over_ranks
from beyondprop.optim.factories import OptimizerFactory, adam
from beyondprop.solvers.base import Solver
from beyondprop.stages import AffineStage, Chain, PipelineStage, Pullback, Stage
from beyondprop.stages.affine import AffinePullback
from beyondprop.stages.pipeline import PipelinePullback

Affine = TypeVar("Affine", AffineStage, AffinePullback)
_CURVATURE = 0.25  # of a loss: at lr 2 half a Newton step a stage, as all stages take theirs at once
REST_LR = 3e-3
"""Adam's, for weights without a memory, where no other optimizer is given."""


class Memory(Solver):
    """Solves every Linear and Conv against the accumulated second moments of its inputs, whatever its stage does before it.

    `"rls"`, damped recursive least squares in delta form (the default):

        W <- W + lr * min(1, max_gain / gain) * (1/N) delta^T a P,   P = (A + damping I)^-1
        gain = mean over samples of a^T P a / N                      A a moving average of a^T a / N

    `lr * gain` is what a sample's wish moves its own output by, on average. Small batches of inputs that A has hardly seen make
    it large; the bound keeps such steps stable and leaves all others as they are. A loss of constant curvature h, such as
    squared error (2 over the outputs), multiplies the step by min(1, 1 / (4 h)), too; any other is asked for its curvature
    along the wishes, but for cross-entropy, whose own falls as targets are met.

    `"bcd"`, block coordinate descent as published: `sweeps` over the columns (in blocks of `block`) of the accumulated
    least-squares problem, with the unit-step replacement of W by its minimiser.

    Stages of other kinds (blocks, stages with a normalisation, grouped convolutions) have no single weight matrix: their
    weights take gradient steps of the `rest` optimizer.

    Args:
        method: `"rls"` or `"bcd"`.
        lr: step size of `"rls"`; 1 is the full least-squares step. A `torch.optim.SGD` holds it: schedulers attach there.
        max_gain: bound on the gain of a step of `"rls"`, > 0; with `lr * max_gain` <= 1 it trains at any batch size. A
            convolution's gain counts all positions of a sample, an upper bound. None: no bound, and no look at the curvature.
        damping: lambda > 0, added to the diagonal of A (for `"bcd"`, of its average over batches).
        forgetting: e in [0, 1): weight of the newest batch in A (and R); 0 averages over all batches seen.
        refresh: steps between two Cholesky factorisations of `A + damping I` (`"rls"`).
        sweeps: sweeps of block coordinate descent a batch (`"bcd"`).
        block: columns that are solved together (`"bcd"`); 1 as published.
        limit: input size of a stage above which its n x n memory is announced with a warning.
        output_lr: step size of the last stage in `"bcd"`, which follows the gradient of the task loss, as published.
        rest: optimizer factory for weights without a memory; default Adam, lr 3e-3, with a warning where these are most.
    """

    defers_update = False  # A, R and the weights change outside any torch optimizer
    needs_codes = False

    def __init__(
        self,
        method: str = "rls",
        *,
        lr: float = 2.0,
        max_gain: float | None = 0.5,
        damping: float = 0.5,
        forgetting: float = 0.0,
        refresh: int = 10,
        sweeps: int = 1,
        block: int = 1,
        limit: int = 4096,
        output_lr: float = 0.1,
        rest: OptimizerFactory | None = None,
    ) -> None:
        self.method = _checks.one_of("method", method, ("rls", "bcd"))
        self.lr = _checks.positive("lr", lr)
        self.max_gain = None if max_gain is None else _checks.positive("max_gain", max_gain)
        self.damping = _checks.positive("damping", damping)
        if not 0 <= forgetting < 1:
            raise ValueError(f"forgetting must be in [0, 1), got {forgetting!r}.")
        self.forgetting = forgetting
        self.refresh = _checks.at_least("refresh", refresh, 1)
        self.sweeps = _checks.at_least("sweeps", sweeps, 1)
        self.block = _checks.at_least("block", block, 1)
        self.limit = _checks.at_least("limit", limit, 1)
        self.output_lr = _checks.positive("output_lr", output_lr)
        self._rest = rest
        self._bounded = method == "rls" and max_gain is not None
        self._curvatures: list[Tensor | float] = []
        self._stages: dict[int, StageMemory] = {}

    def bind(self, chain: Chain) -> None:
        serves_one_rule(self, chain)
        remembered, output, rest = [], [], []
        others: list[str] = []
        for index, stage in enumerate(chain):
            trainable = [p for p in stage.parameters if p.requires_grad]
            if self.method == "bcd" and index == len(chain) - 1:
                output = trainable
            elif (top := _top(stage, AffineStage)) and getattr(top.affine, "groups", 1) == 1 and trainable:
                memory = StageMemory(stage.name, top, self)
                if memory.size > self.limit:
                    warnings.warn(
                        f"Stage {stage.name!r} has {memory.size} inputs: its memory takes "
                        f"{memory.size**2 * 8 / 2**20:.0f} MiB. Raise Memory(limit={self.limit}) to accept it, or use Descent.",
                        stacklevel=4,
                    )
                self._stages[index] = memory
                remembered += trainable
            else:
                rest += trainable
                others += [stage.name] * bool(trainable)
        halves = {p.dtype for p in remembered} & {torch.float16, torch.bfloat16}
        if halves:
            raise UnsupportedModelError(
                f"Memory factorises matrices, which takes float32 or float64; the model has {halves.pop()}."
            )
        if not remembered:
            raise UnsupportedModelError(
                "Memory needs a stage that ends in a plain Linear or Conv (groups=1) and is differentiated in closed form, "
                "with no normalisation in it; this chain has none:\n"
                f"{chain!r}"
            )
        self.optimizers = (torch.optim.SGD(remembered, lr=self.lr if self.method == "rls" else 1.0),)
        if output:
            self.optimizers += (torch.optim.SGD(output, lr=self.output_lr, momentum=0.9, nesterov=True),)
        if rest:
            self.optimizers += ((self._rest or adam(REST_LR))(rest),)
            share = sum(p.numel() for p in rest) / sum(p.numel() for p in (*remembered, *output, *rest))
            if share > 0.5 and self._rest is None:
                shown = ", ".join(map(repr, others[:3])) + ", ..." * (len(others) > 3)
                warnings.warn(
                    f"{share:.0%} of the weights have no memory and take Adam's steps with lr {REST_LR:g}: those of the stages "
                    f"{shown}. A memory is kept where a plain Linear or Conv is all that has weights in its stage. Give "
                    "Memory(rest=...) to choose their optimizer, or use Descent.",
                    stacklevel=4,
                )

    def collect(self, assignment: Assignment, factor: float) -> None:
        assignment.pullback.add_gradients(assignment.delta, factor)
        if assignment.loss is not None and self._bounded:
            self._curvatures.append(assignment.loss.steepness(assignment.delta))
        memory = self._stages.get(assignment.index)
        if memory is not None and (top := _top(assignment.pullback, AffinePullback)) is not None:
            memory.collect(top, -factor)

    @torch.no_grad()
    def reduce(self) -> None:
        if self.group is None:
            return
        for memory in self._stages.values():
            memory.reduce(self.group)
        if self._curvatures:  # the largest decides
            largest = torch.tensor(max(map(float, self._curvatures)), dtype=torch.float64)
            largest = largest.to(next(iter(self._stages.values())).weight.device)
            dist.all_reduce(largest, dist.ReduceOp.MAX, group=self.group)
            self._curvatures = [largest]

    @torch.no_grad()
    def solve(self) -> None:
        lr = self.optimizers[0].param_groups[0]["lr"]
        largest = max((float(h) for h in self._curvatures), default=0.0)
        shrink = min(1.0, _CURVATURE / largest) if largest > 0 else 1.0
        self._curvatures = []
        for memory in self._stages.values():
            memory.prepare(shrink)  # what can fail comes before what is changed
        for memory in self._stages.values():
            memory.solve(lr)

    def discard(self) -> None:
        self._curvatures = []
        for memory in self._stages.values():
            memory.pending = None

    def state_dict(self) -> dict[str, Any]:
        return {str(index): memory.state_dict() for index, memory in self._stages.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if set(state) != {str(i) for i in self._stages}:
            raise ValueError(f"This state has memories of stages {sorted(state)}, this rule of {sorted(self._stages)}.")
        for index, memory in self._stages.items():
            memory.load_state_dict(state[str(index)])


def _top(whole: Stage | Pullback, kind: type[Affine]) -> Affine | None:
    """Return the Linear or Conv that a stage ends in, where it has no other weights; likewise at an input."""
    top = whole.top if isinstance(whole, PipelineStage | PipelinePullback) else whole
    return top if isinstance(top, kind) else None


class StageMemory:
    """One stage's A and what it is solved with.

    Attributes:
        size: n, the inputs of the weight matrix, with the constant where there is a bias.
        kept: `"moments"`, A `(n, n)`, averaged so that its scale does not grow; `"inverse"`, of the damped A (`"rls"`);
            `"residual"`, R `(out, n)`, averaged as A is (`"bcd"`).
        steps: batches seen.
    """

    def __init__(self, name: str, stage: AffineStage, settings: Memory) -> None:
        weight, bias = self.weight, self.bias = stage.weight, stage.bias
        self.name = name
        self.settings = settings
        self.inputs = weight[0].numel()
        # A frozen part has no column: the other's problem is its own.
        self.columns = slice(
            0 if weight.requires_grad else self.inputs,
            self.inputs + 1 if bias is not None and bias.requires_grad else self.inputs,
        )
        self.size = self.columns.stop - self.columns.start
        own, rows = ("residual", len(weight)) if settings.method == "bcd" else ("inverse", self.size)
        self.kept = {"moments": weight.new_zeros(self.size, self.size), own: weight.new_zeros(rows, self.size)}
        self.steps = 0
        self.pending: Tensor | None = None
        self._samples = 0
        self._fresh: Tensor | None = None
        self._bound = 1.0

    def collect(self, pullback: AffinePullback, weight: float) -> None:
        """Add `weight * a^T a` of a batch to what the next `solve` takes in."""
        rows, dtype = pullback.feature_rows()[:, self.columns], self.kept["moments"].dtype
        if rows.dtype != dtype:
            raise ValueError(
                f"Stage {self.name!r} has inputs of dtype {rows.dtype}, its memory has {dtype}: convert the model before the "
                "rule is built."
            )
        if self.pending is None or self.pending.device != rows.device:
            self.kept = {name: tensor.to(rows.device) for name, tensor in self.kept.items()}
            self.pending, self._samples = torch.zeros_like(self.kept["moments"]), 0
        self._samples += len(pullback.features)
        self.pending.addmm_(rows.t(), rows, alpha=weight)

    def reduce(self, group: dist.ProcessGroup) -> None:
        """Sum over the ranks what the next `solve` takes in."""
        if self.pending is not None:
            samples = torch.tensor(float(self._samples), dtype=torch.float64, device=self.pending.device)
            sum_over_ranks([self.pending, samples], group)
            self._samples = int(samples)

    def prepare(self, shrink: float) -> None:
        """Where it is time to, factorise what the memory will be with the batch, and bound the step; the memory itself stays.

        Raises:
            NonFiniteError: if the batch's moments are not finite, or what comes of them has no factorisation.
        """
        self._fresh, self._bound = None, 1.0
        if self.pending is None:
            return
        is_due = "inverse" in self.kept and self.steps % self.settings.refresh == 0
        bound = self.settings.max_gain if "inverse" in self.kept else None
        if (is_due or bound is None) and not bool(self.pending.sum().isfinite()):
            raise self._refused("are not finite", "Check the inputs.")
        if is_due:
            self._fresh = self._factorised()
        if bound is not None:
            inverse = self.kept["inverse"] if self._fresh is None else self._fresh
            # Rounding may leave the trace of an ill-conditioned product below 0. Moments that are not finite show in it.
            gain = abs(float(torch.dot(inverse.mT.reshape(-1), self.pending.view(-1)))) / self._samples
            if not math.isfinite(gain):
                is_finite = bool(self.pending.sum().isfinite())
                raise self._refused("are too large" if is_finite else "are not finite", "Check the inputs.")
            self._bound = shrink * min(1.0, bound / gain if gain > 0 else 1.0)

    def _factorised(self) -> Tensor:
        assert self.pending is not None
        damped = torch.lerp(self.kept["moments"], self.pending, self._share)
        damped.diagonal().add_(self.settings.damping)
        factor, failed = torch.linalg.cholesky_ex(damped)
        if bool(failed):  # by rounding, unless the moments are not finite: as much more damping as rounding takes
            damped.diagonal().add_(torch.finfo(damped.dtype).eps * damped.diagonal().sum())
            factor, failed = torch.linalg.cholesky_ex(damped)
        if bool(failed):
            raise self._refused("have no factorisation", "Lower the learning rate, or raise damping.")
        return torch.cholesky_inverse(factor)

    def _refused(self, what: str, advice: str) -> NonFiniteError:
        message = f"Stage {self.name!r}: the second moments of its inputs {what}. No weight was changed. {advice}"
        return NonFiniteError(message, where=self.name)

    def solve(self, lr: float) -> None:
        """Take the batch into the memory and turn the weights' `.grad` into the step to be made."""
        if self.pending is None:
            return
        share = self._share
        self.steps += 1
        self.kept["moments"].lerp_(self.pending, share)
        self.pending = None
        if "residual" in self.kept:
            self.kept["residual"].lerp_(-self._gradient(), share)
            self._descend_blocks(self.kept["moments"], self.kept["residual"], lr)
            return
        if self._fresh is not None:
            self.kept["inverse"], self._fresh = self._fresh, None
        step = self._gradient() @ self.kept["inverse"]
        self._write(step if self._bound == 1 else step.mul_(self._bound))

    @property
    def _share(self) -> float:
        """The share of a batch in the memory after it."""
        return max(self.settings.forgetting, 1.0 / (self.steps + 1))

    def _descend_blocks(self, moments: Tensor, residual: Tensor, lr: float) -> None:
        """Minimise `Tr(dW A dW^T) / 2 - Tr(dW R^T) + damping |dW|^2 / 2` over the step dW, block by block."""
        step, left = torch.zeros_like(residual), residual.clone()
        for _ in range(self.settings.sweeps):
            for start in range(0, self.size, self.settings.block):
                columns = slice(start, min(start + self.settings.block, self.size))
                own = moments[columns, columns].clone()
                own.diagonal().add_(self.settings.damping)
                right = left[:, columns] - self.settings.damping * step[:, columns]
                change = torch.linalg.solve(own, right, left=False)
                step[:, columns] += change
                left.addmm_(change, moments[columns], alpha=-1.0)
        residual.lerp_(left, lr)  # the optimizer makes lr of the step
        self._write(-step)

    def _gradient(self) -> Tensor:
        """Return the gradient `(out, n)`, bias folded in, zero where a part is frozen."""
        parts = [
            p.grad if p.grad is not None else torch.zeros_like(p) for p in (self.weight, self.bias) if p is not None
        ]
        return torch.cat([part.reshape(self.weight.shape[0], -1) for part in parts], 1)[:, self.columns]

    def _write(self, gradient: Tensor) -> None:
        if self.weight.grad is not None and self.columns.start == 0:
            self.weight.grad.copy_(gradient[:, : self.inputs].view_as(self.weight))
        if self.bias is not None and self.bias.grad is not None:
            self.bias.grad.copy_(gradient[:, -1])

    def state_dict(self) -> dict[str, Any]:
        """Return what is kept, and how many batches it has seen."""
        return {"steps": self.steps, **{name: tensor.clone() for name, tensor in self.kept.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        saved, own = tuple(state["moments"].shape), tuple(self.kept["moments"].shape)
        if saved != own:
            raise ValueError(f"This state has moments {saved}; stage {self.name!r} has {own}.")
        self.steps = int(state["steps"])
        self.kept = {name: state[name].to(self.weight.device, copy=True) for name in self.kept}
