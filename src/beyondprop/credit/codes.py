"""Codes of alternating minimization, in delta form.

Choromanska et al., "Beyond Backprop: Online Alternating Minimization with Auxiliary Variables", ICML 2019,
arXiv 1806.09077, Problems (4) and (5), linearised at the forward pass:

| paper | here |
|---|---|
| code c^l, a pre-activation | `output` of stage l |
| c^l - W^l s(c^{l-1}) | `delta` of stage l; the code itself is never formed |
| mu, Problem (4) | `mu`: damping of the top code |
| equal weights, Problem (5) | `damping = 1`; the general weight is r |
| lambda_C | `l1` |

With J the Jacobian of the stage above and g = J^T delta_above (for the top code, g = -J^T dLoss/doutput):

    hidden code   min_d  |delta_above - J d|^2 + damping |d|^2  [+ l1 |c + d|_1]      `damping.py`
    top code      min_d  -<g, d> + d^T J^T H J d / 2 + mu |d|^2 / 2  [+ l1 |c + d|_1]

One sweep from the last code to the first. The published code stores c + d and averages the penalties over features; in
float32 such a delta is gone after three layers. Here deltas stay deltas, and `normalize` keeps their size on the way down.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from beyondprop import _checks
from beyondprop.credit import code_solvers
from beyondprop.credit.base import Assignment, Credit
from beyondprop.credit.code_problem import CodeProblem, CodeSolver, per_sample, square_norm
from beyondprop.credit.damping import BLOCK_DAMPING, LAYER_DAMPING, Damping, RelativeDamping, checked
from beyondprop.credit.fitted import FittedLineSearch, length
from beyondprop.stages import LossPoint, Pullback, Trace
from beyondprop.stages.recurrent import RecurrentPullback

SOLVERS: dict[str, Callable[[], CodeSolver]] = {"fitted": FittedLineSearch, **code_solvers.BY_NAME}
"""Code solvers by the names that `Codes` takes."""


class Codes(Credit):
    """Alternating-minimization codes: one linearised problem per code, last code first.

    Args:
        solver: `"line_search"`, `"fitted"`, `"gradient"`, `"cg"`, `"exact"`, or a function `CodeProblem -> delta`, such as
            `code_solvers.cg(3)` or `code_solvers.momentum(5, lr=0.3)`.
        damping: r, the weight of a hidden code's own penalty: a number >= 0, or a `RelativeDamping` for the codes between
            stages, with 1 for those of a recurrent layer's time steps. None: 1 below a stage with one layer, as published,
            and `RelativeDamping(4)` below a stage of several layers, whose gain may be of any size; 1 below every stage where
            the solver never pushes tangents, as `"gradient"` and `momentum`, which do not look at r.
        mu: > 0, the weight of the top code's penalty: a trust region, large mu = small step.
        mu_growth: >= 1, factor on mu at each `end_epoch`.
        mu_limit: > 0, where the growth ends.
        normalize: divide every delta by the mean step factor of the batch, so that deltas keep their size at any depth;
            only their distribution over samples (and, for cg and exact, over units) differs from the gradient's.
        l1: lambda_C >= 0, sparsity of the codes: the delta is soft-thresholded so that `|output + delta|_1` shrinks.

    Raises:
        ValueError: for a `RelativeDamping` with a solver that never pushes tangents.
    """

    def __init__(
        self,
        solver: str | CodeSolver = "line_search",
        *,
        damping: Damping | None = None,
        mu: float = 1.0,
        mu_growth: float = 1.0,
        mu_limit: float = float("inf"),
        normalize: bool = True,
        l1: float = 0.0,
    ) -> None:
        if isinstance(solver, str):
            solver = SOLVERS[_checks.one_of("solver", solver, SOLVERS)]()
        if not callable(solver):
            raise TypeError(f"solver must be a name or a function CodeProblem -> delta, got {type(solver).__name__}.")
        self.solver: CodeSolver = solver
        self.damping = checked(damping)
        self.mu, self.mu_growth, self.mu_limit = _checks.growing("mu", mu, mu_growth, mu_limit)
        self.normalize = normalize
        self.l1 = _checks.non_negative("l1", l1)
        self.asks_curvature = solver is not code_solvers.gradient
        self.pushes = getattr(solver, "pushes", True)
        self.needs_codes = self.l1 > 0 or getattr(solver, "needs_codes", True)
        self.is_homogeneous = not self.l1 and getattr(solver, "is_homogeneous", False)
        if isinstance(damping, RelativeDamping) and not self.pushes:
            raise ValueError(
                "A RelativeDamping needs a solver that pushes tangents, and this one has pushes = False: use "
                "'line_search', 'cg', 'exact' or a damping that is a number."
            )

    def assign(self, trace: Trace, loss: LossPoint) -> Iterator[Assignment]:
        """Yield what `Credit.assign` does; the codes inside the lowest stage have their deltas, too."""
        top, solver = len(trace.pullbacks) - 1, self.solver
        is_search = solver is code_solvers.line_search or isinstance(solver, FittedLineSearch)
        if is_search and not self.l1 and trace.lowest < top and trace.is_closed_form:
            yield from self._line_search(trace, loss)
        else:
            yield from super().assign(trace, loss)

    def lowest(self, pullback: Pullback, delta: Tensor, loss: LossPoint | None) -> None:
        self._sweep_inside(pullback, delta, is_top=loss is not None)

    def below(self, index: int, pullback: Pullback, delta: Tensor, loss: LossPoint | None) -> Tensor:
        self._sweep_inside(pullback, delta, is_top=loss is not None)
        problem = CodeProblem(
            pullback, delta, pullback(delta), self.mu, loss, self.normalize, self.mu, group=self.group
        )
        if loss is None:
            damping = self._damping(pullback)
            if isinstance(damping, RelativeDamping):
                damping = damping.number(square_norm(problem.gradient), square_norm(problem.pushed()), None, self.group)
            problem.damping = damping
        if isinstance(self.solver, FittedLineSearch):
            top = len(self._chain) - 1
            return self._shrunk(problem, self.solver.solve(problem, top - index, top - self._chain.lowest))
        return self._solve(problem)

    def _solve(self, problem: CodeProblem) -> Tensor:
        return self._shrunk(problem, self.solver(problem))

    def _shrunk(self, problem: CodeProblem, d: Tensor) -> Tensor:
        if not self.l1:
            return d
        # prox of l1 |c + d|_1 around d, as a delta: what is shrunk away is at most l1, so nothing cancels.
        return d - torch.clamp(problem.stage.input + d, -self.l1, self.l1)

    def _damping(self, pullback: Pullback) -> Damping:
        if self.damping is not None:
            return self.damping
        return BLOCK_DAMPING if self.pushes and pullback.stage.is_block else LAYER_DAMPING

    def _sweep_inside(self, pullback: Pullback, delta: Tensor, *, is_top: bool) -> None:
        """Give the codes inside a recurrent stage their deltas, one for each time step."""
        if not isinstance(pullback, RecurrentPullback):
            return
        damping = LAYER_DAMPING if self.damping is None or isinstance(self.damping, RelativeDamping) else self.damping

        def solve(moment: Pullback, delta: Tensor, gradient: Tensor) -> Tensor:
            return self._solve(
                CodeProblem(moment, delta, gradient, damping, None, self.normalize, self.mu, group=self.group)
            )

        # The delta at a hidden layer's output was damped once. A state that is shown is that output: with this factor it
        # minimises |delta_next - J d|^2 + (1 + damping) |delta - d|^2, and the penalty is not paid twice. Plain gradients are
        # not damped at all.
        is_damped = not is_top and not self.normalize and self.solver is not code_solvers.gradient
        pullback.sweep(delta, solve, heard=1 + damping if is_damped else 1.0)

    def _line_search(self, trace: Trace, loss: LossPoint) -> Iterator[Assignment]:
        """Yield what `assign` yields with `code_solvers.line_search`, in fewer operations.

        A step factor multiplies a sample's whole delta, and a stage's pullback is linear in each sample: the factors commute
        with the sweep, and but for a relative damping each depends on the gradient's direction only. So the sweep carries
        plain gradients, the factors are found behind it, and every delta is its gradient times the product of the factors
        above it.
        """
        top = len(trace.pullbacks) - 1
        deltas = [loss.cotangent.neg()]
        lengths, curvature = [], []
        fitted = self.solver if isinstance(self.solver, FittedLineSearch) else None
        if fitted is not None:
            fitted.begin(top - trace.lowest)
        is_exact = fitted is None or fitted.is_exact
        for index in range(top, trace.lowest, -1):
            stage = trace[index]
            deltas.append(stage(deltas[-1]))
            lengths.append(length(deltas[-1]))
            if is_exact or index == top:
                image = stage.push(deltas[-1], gated=True)
                curvature.append(loss.curvature(image) if index == top else square_norm(image))
                del image
            del stage
        if fitted is None or fitted.is_exact:
            damping = [self.mu, *(self._damping(trace[index]) for index in range(top - 1, trace.lowest, -1))]
            found = torch.stack(lengths)
            each, scale = self._factors(found.square(), torch.stack(curvature), damping)
            if fitted is not None:
                fitted.fit(found, each, scale, 0, len(damping), self.group)
            factors = each.cumprod(0).unbind()
        else:
            factors = fitted.products(lengths, curvature[0], self.mu)
        for delta, factor in zip(deltas[1:], factors, strict=True):
            delta.mul_(per_sample(factor, delta))
        deltas.reverse()  # the next one is popped from the end
        for index in range(top, trace.lowest - 1, -1):
            delta = deltas.pop()
            below = deltas[-1] if deltas else None
            yield Assignment(index, trace.take(index), delta, below, loss if index == top else None)

    def _factors(self, squared: Tensor, curvature: Tensor, damping: Sequence[Damping]) -> tuple[Tensor, Tensor | float]:
        """Return what line search multiplies each sample's gradient by, `(codes, N)`, last code first, and 1 over its means.

        `squared` is `|g|^2` of plain gradients and `curvature` `(J g)^T H (J g)`, both `(codes, N)`.
        """
        numbers = [d for d in damping if not isinstance(d, RelativeDamping)]
        if len(numbers) == len(damping):
            each = numbers[0] if len(set(numbers)) == 1 else squared.new_tensor(numbers)[:, None]
            return code_solvers.step_factors(squared, curvature, each, normalize=self.normalize, group=self.group)
        # A relative damping is of deltas that the factors above have weighted already.
        found: list[Tensor] = []
        scales: list[Tensor | float] = []
        weights: Tensor | None = None
        for value, own, bend in zip(damping, squared, curvature, strict=True):
            if isinstance(value, RelativeDamping):
                value = value.number(own, bend, weights, self.group)
            factors, scale = code_solvers.step_factors(
                own[None], bend[None], value, normalize=self.normalize, group=self.group
            )
            found += factors
            scales.append(scale)
            weights = found[-1] if weights is None else weights * found[-1]
        return torch.stack(found), scales[0]

    def energy(self, assignments: Sequence[Assignment]) -> Tensor:
        """Return the relaxed objective at the moved codes: mean over samples of `Loss + mu / 2 * sum |delta - change|^2`.

        `change` is how a stage's output follows its moved input, with the nonlinearity as it is.
        """
        total = assignments[0].delta.new_zeros(())
        scale = assignments[0].loss.scale if assignments[0].loss is not None else 1 / len(assignments[0].delta)
        for a in assignments:
            if isinstance(a.pullback, RecurrentPullback):
                output, far = a.pullback.relax(a.delta, a.input_delta, is_top=a.loss is not None)
            else:
                change = a.moved().output - a.pullback.output
                output = a.pullback.output + change
                far = torch.zeros_like(total) if a.loss is not None else square_norm(a.delta - change)
            if a.loss is not None:
                total = total + a.loss.again(output).value
            total = total + 0.5 * self.mu * scale * far.sum()
        return total

    def update(self) -> None:
        if isinstance(self.solver, FittedLineSearch):
            self.solver.keep()

    def discard(self) -> None:
        if isinstance(self.solver, FittedLineSearch):
            self.solver.take_back()

    def end_epoch(self) -> None:
        self.mu = max(self.mu, min(self.mu * self.mu_growth, self.mu_limit))

    def state_dict(self) -> dict[str, object]:
        fitted = {"fit": self.solver.state()} if isinstance(self.solver, FittedLineSearch) else {}
        return {"mu": self.mu, **fitted}

    def load_state_dict(self, state: dict[str, object]) -> None:
        self.mu = _checks.positive("mu", float(state["mu"]))  # type: ignore[arg-type]
        if isinstance(self.solver, FittedLineSearch) and "fit" in state:
            self.solver.load_state(state["fit"])  # type: ignore[arg-type]

    def tensors(self) -> dict[str, Tensor]:
        return {"mu": torch.tensor(self.mu, dtype=torch.float64)} if self.mu_growth != 1 else {}

    def load_tensors(self, saved: Mapping[str, Tensor]) -> None:
        super().load_tensors({name: value for name, value in saved.items() if name != "mu"})
        if "mu" in saved:
            self.load_state_dict({"mu": float(saved["mu"])})
