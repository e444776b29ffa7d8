"""A line search whose step factors follow from the lengths of deltas, which a sweep has anyway.

The exact factor of a sample is `f = 1 / (damping + |J g|^2 / |g|^2)`, divided by its mean over the batch where deltas are
normalised, and costs one push a code. With n_k the length of a sample's delta k stages below the loss, hidden codes take

    1 / f_k = alpha_k + beta_k n_k / n_{k-1}

as `|J g| >= |g|^2 / |delta|` (Cauchy-Schwarz) ties the two. The top code, whose push goes through the narrow last stage, stays
exact but for the mean. Every `refit`-th step, and in a few early ones, all are exact, and the mean, alpha and beta go half of
the way to those of that batch: alpha and beta to their least-squares fit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from beyondprop import _checks
from beyondprop.credit.code_problem import CodeProblem, flat, per_sample, square_norm, summed, tiny
from beyondprop.credit.code_solvers import line_search, step_factors

_EARLY = (0, 1, 2, 5, 10)
_LEAST = 0.05
"""Share of the mean of `1 / f` that an estimate of it is at least."""


class FittedLineSearch:
    """A code solver: `line_search` in one step of `refit`, by its fit in between; one instance serves one rule.

    Args:
        refit: steps between two exact searches, >= 1.

    Attributes:
        steps: how many were begun.
        coefficients: by code, last code first, `(codes, 3)`: of the top code 1 over its mean factor, of the others alpha, beta
            and the least value of `1 / f`; None before the first fit.
    """

    needs_codes = False
    is_homogeneous = True

    def __init__(self, refit: int = 20) -> None:
        self.refit = _checks.at_least("refit", refit, 1)
        self.steps = 0
        self.coefficients: Tensor | None = None
        self.is_exact = True
        self._last: float = math.inf  # code of the sweep under way
        self._before: tuple[int, Tensor | None] | None = None  # what `take_back` returns to

    def begin(self, codes: int) -> None:
        """Begin a step with so many codes."""
        if self._before is None:
            self._before = self.steps, None if self.coefficients is None else self.coefficients.clone()
        if self.coefficients is not None and len(self.coefficients) != codes:
            self.coefficients = None  # stages were frozen or thawed
        self.is_exact = self.coefficients is None or self.steps in _EARLY or self.steps % self.refit == 0
        self.steps += 1

    def __call__(self, problem: CodeProblem) -> Tensor:
        """Return the delta of one code by the exact search."""
        return line_search(problem)

    def solve(self, problem: CodeProblem, code: int, codes: int) -> Tensor:
        """Return the delta of one of so many codes; 0 is the top code."""
        if code <= self._last:  # a rank of a pipeline has some of the codes only
            self.begin(codes)
        self._last = code
        g = problem.gradient
        if not self.is_exact and code:
            factors = self.factors(ratio(length(g), length(problem.delta))[None], code)
            return g.mul_(per_sample(factors[0], g))
        squared, curvature = square_norm(g)[None], problem.curvature(problem.pushed())[None]
        if self.is_exact:
            normal = {"normalize": problem.normalize, "group": problem.group}
            factors, scale = step_factors(squared, curvature, problem.damping, **normal)
            features = ratio(length(g), length(problem.delta))[None] if code else None
            self.fit(features, factors, scale, code, codes, problem.group)
        else:
            factors = self.top(squared, curvature, problem.damping)
        return g.mul_(per_sample(factors[0], g))

    def top(self, squared: Tensor, curvature: Tensor, damping: float | Tensor) -> Tensor:
        """Return the top code's factors, over their mean at the last fit, `(1, N)` like `|g|^2` and `(J g)^T H (J g)`."""
        assert self.coefficients is not None
        found, _ = step_factors(squared, curvature, damping, normalize=False)
        return found.mul_(self.coefficients[0, 0])

    def factors(self, features: Tensor, first: int) -> Tensor:
        """Return the fit's factors of the hidden codes from `first` on, `(codes, N)` like `features`."""
        assert self.coefficients is not None
        alpha, beta, least = self.coefficients[first : first + len(features)].unsqueeze(-1).unbind(1)
        return torch.addcmul(alpha, features, beta).clamp_(min=least).reciprocal_()

    def fit(
        self,
        features: Tensor | None,
        factors: Tensor,
        scale: Tensor | float,
        first: int,
        codes: int,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        """Let the coefficients of the codes from `first` on follow a batch.

        Args:
            features: of the hidden codes among them, `(hidden, N)`; None: there is none.
            factors: the exact ones of all of them, `(codes, N)`.
            scale: 1 over their means, `(codes, 1)` or one number.
            first: the code that the first row is of; 0 is the top code.
            codes: how many there are in all.
            group: process group whose ranks have parts of the batch.
        """
        found = factors.new_zeros(len(factors), 3)
        is_top = int(first == 0)
        found[:is_top, 0] = scale[:is_top, 0] if isinstance(scale, Tensor) else scale
        if features is not None and len(features):
            exact = factors[is_top:]
            live = exact > 0  # a sample without gradient has the factor 0
            r = features.to(torch.float64) * live
            inverse = torch.where(live, exact.to(torch.float64), torch.inf).reciprocal()
            sums = torch.stack([live, r, inverse, r * r, r * inverse]).sum(2)
            averages = summed(sums, group) / sums[0].clone().clamp_min_(1)
            r, inverse, squares, products = averages[1:].unbind()
            beta = ((products - r * inverse) / (squares - r * r).clamp_min(tiny(r))).clamp_(min=0.0)
            found[is_top:] = torch.stack([inverse - beta * r, beta, _LEAST * inverse], 1).to(found.dtype)
        if self.coefficients is None:
            self.coefficients = found.new_full((codes, 3), float("nan"))
        old = self.coefficients[first : first + len(found)]
        found = torch.where(old.isfinite(), torch.lerp(old, found, 0.5), found)
        self.coefficients[first : first + len(found)] = torch.where(found.isfinite(), found, old)

    def keep(self) -> None:
        """Know that the steps begun were made."""
        self._before = None

    def take_back(self) -> None:
        """Return to what was before the steps begun, which were not made: somebody looked, or they were refused."""
        if self._before is not None:
            self.steps, self.coefficients = self._before
            self._before, self._last = None, math.inf

    def state(self) -> dict[str, Any]:
        """Return the count of steps and the coefficients."""
        return {"steps": self.steps, "coefficients": self.coefficients}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Restore what `state` returned."""
        self.steps = int(state["steps"])
        found = state["coefficients"]
        self.coefficients = None if found is None else found.detach().clone()


def length(values: Tensor) -> Tensor:
    """Return every sample's length, `(N,)`; in float32 at least."""
    return torch.linalg.vector_norm(flat(values), dim=1, dtype=torch.promote_types(values.dtype, torch.float32))


def ratio(lengths: Tensor, above: Tensor) -> Tensor:
    """Return lengths over those of the stage above; 0 where there is no delta."""
    return lengths / above.clamp_min(tiny(above))
