"""A line search whose step factors follow from the lengths of deltas, which a sweep has anyway.

The exact factor of a sample is `f = 1 / (damping + |J g|^2 / |g|^2)`, divided by its mean over the batch where deltas are
normalised, and costs one push a code. With n_k the length of a sample's delta k stages below the loss, hidden codes take

    1 / f_k = alpha_k + beta_k n_k / n_{k-1}

as `|J g| >= |g|^2 / |delta|` (Cauchy-Schwarz) ties the two. The top code, whose push goes through the narrow last stage, stays
exact. Every `refit`-th step, and in a few early ones, all are exact, and alpha and beta go half of the way to their
least-squares fit on that batch.
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
        coefficients: alpha, beta and the least value of `1 / f` by hidden code, `(codes, 3)`, last one first; None before the
            first fit.
    """

    needs_codes = False
    is_homogeneous = True

    def __init__(self, refit: int = 20) -> None:
        self.refit = _checks.at_least("refit", refit, 1)
        self.steps = 0
        self.coefficients: Tensor | None = None
        self.is_exact = True
        self._last: float = math.inf  # code of the sweep under way

    def begin(self, codes: int) -> None:
        """Begin a step with so many hidden codes."""
        if self.coefficients is not None and len(self.coefficients) != codes:
            self.coefficients = None  # stages were frozen or thawed
        self.is_exact = self.coefficients is None or self.steps in _EARLY or self.steps % self.refit == 0
        self.steps += 1

    def __call__(self, problem: CodeProblem) -> Tensor:
        """Return the delta of one code by the exact search."""
        return line_search(problem)

    def solve(self, problem: CodeProblem, code: int, codes: int) -> Tensor:
        """Return the delta of a hidden code, one of so many; -1 is the top code, 0 the one below."""
        if code <= self._last:  # a rank of a pipeline has some of the codes only
            self.begin(codes)
        self._last = code
        if code < 0:
            return line_search(problem)
        g = problem.gradient
        features = ratio(length(g), length(problem.delta))[None]
        if self.is_exact:
            squared, curvature = square_norm(g), problem.curvature(problem.pushed())
            normal = {"normalize": problem.normalize, "group": problem.group}
            factors = step_factors(squared[None], curvature[None], problem.damping, **normal)
            self.fit(features, factors, code, codes, problem.group)
        else:
            factors = self.factors(features, code)
        return g.mul_(per_sample(factors[0], g))

    def factors(self, features: Tensor, first: int = 0) -> Tensor:
        """Return the fit's factors of the hidden codes from `first` on, `(codes, N)` like `features`."""
        assert self.coefficients is not None
        alpha, beta, least = self.coefficients[first : first + len(features)].unsqueeze(-1).unbind(1)
        return torch.addcmul(alpha, features, beta).clamp_(min=least).reciprocal_()

    def fit(
        self,
        features: Tensor,
        factors: Tensor,
        first: int = 0,
        codes: int | None = None,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        """Let the coefficients of the hidden codes from `first` on follow a batch.

        Args:
            features: `(codes, N)`.
            factors: the exact ones, likewise.
            first: the code that the first row is of.
            codes: how many there are; default: those of the rows.
            group: process group whose ranks have parts of the batch.
        """
        live = factors > 0  # a sample without gradient has the factor 0
        r = features.to(torch.float64) * live
        inverse = torch.where(live, factors.to(torch.float64), torch.inf).reciprocal()
        sums = torch.stack([live, r, inverse, r * r, r * inverse]).sum(2)
        means = summed(sums, group) / sums[0].clone().clamp_min_(1)
        r, inverse, squares, products = means[1:].unbind()
        beta = (products - r * inverse) / (squares - r * r).clamp_min(tiny(r))
        beta.clamp_(min=0.0)
        found = torch.stack([inverse - beta * r, beta, _LEAST * inverse], 1).to(features.dtype)
        if self.coefficients is None:
            self.coefficients = found.new_full((len(found) if codes is None else codes, 3), float("nan"))
        old = self.coefficients[first : first + len(found)]
        found = torch.where(old.isfinite(), torch.lerp(old, found, 0.5), found)
        self.coefficients[first : first + len(found)] = torch.where(found.isfinite(), found, old)

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
