"""A line search whose step factors follow from the lengths of deltas, which a sweep has anyway.

The exact factor of a sample is `f = 1 / (damping + |J g|^2 / |g|^2)`, divided by its mean over the batch where deltas are
normalised, and costs one push a code. With n_k the length of the gradient of a sample's code k, last code first, hidden codes
take

    1 / f_k = alpha_k + beta_k n_k / n_{k-1}

as `|J g| >= |g|^2 / |delta|` (Cauchy-Schwarz) ties the two. The top code, whose push goes through the narrow last stage, stays
exact but for the mean. Every `refit`-th step, and in a few early ones, all are exact, and the mean, alpha and beta go half of
the way to those of that batch: alpha and beta to their least-squares fit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from beyondprop import _checks
from beyondprop.credit.code_problem import CodeProblem, flat, per_sample, summed, tiny
from beyondprop.credit.code_solvers import line_search, step_factors

_EARLY = (0, 1, 2, 5, 10)
_LEAST = 0.05
"""Share of the mean of `1 / f` that alpha, and so every estimate, is at least."""
_SHALLOW = 4
"""Codes up to which a few small operations each cost less than those for all together."""


class FittedLineSearch:
    """A code solver: `line_search` in one step of `refit`, by its fit in between; one instance serves one rule.

    Args:
        refit: steps between two exact searches, >= 1.

    Attributes:
        steps: how many were begun.
        coefficients: by code, last code first, `(codes, 2)`: of the top code 1 over its mean factor, of the others alpha and
            beta; None before the first fit.
    """

    needs_codes = False
    is_homogeneous = True

    def __init__(self, refit: int = 20) -> None:
        self.refit = _checks.at_least("refit", refit, 1)
        self.steps = 0
        self.coefficients: Tensor | None = None
        self.is_exact = True
        self._is_known = False  # whether the last exact sweep left every code with coefficients
        self._read: Any = None  # the coefficients as numbers
        self._last: float = math.inf  # code of the sweep under way
        self._before: tuple[int, Tensor | None, bool] | None = None  # what `take_back` returns to

    def begin(self, codes: int) -> None:
        """Begin a step with so many codes."""
        if self._before is None:
            self._before = self.steps, self.coefficients, self._is_known
        if self.coefficients is not None and len(self.coefficients) != codes:
            self.coefficients = None  # stages were frozen or thawed
        unknown = self.coefficients is None or not self._is_known
        self.is_exact = unknown or self.steps in _EARLY or self.steps % self.refit == 0
        self._is_known = True  # until `fit` finds a code of which no sample had a gradient
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
            lengths = length(g)
            return g.mul_(per_sample(self.below(torch.ones_like(lengths), lengths, length(problem.delta), code), g))
        lengths, curvature = length(g), problem.curvature(problem.pushed())
        if not self.is_exact:
            return g.mul_(per_sample(self.top(lengths, curvature, problem.damping), g))
        normal = {"normalize": problem.normalize, "group": problem.group}
        factors, scale = step_factors(lengths.square()[None], curvature[None], problem.damping, **normal)
        above = length(problem.delta) if code else lengths
        self.fit(torch.stack([above, lengths])[1 - bool(code) :], factors, scale, code, codes, problem.group)
        return g.mul_(per_sample(factors[0], g))

    def top(self, lengths: Tensor, curvature: Tensor, damping: float | Tensor) -> Tensor:
        """Return the top code's factors, over their mean at the last fit, `(N,)` like `|g|` and `(J g)^T H (J g)`."""
        self._follow(lengths)
        squared = lengths * lengths
        system = torch.add(curvature, squared, alpha=damping).add_(tiny(squared))  # type: ignore[arg-type]
        return squared.div_(system).mul_(self._numbers()[0][0])  # 0 for a sample without gradient

    def below(self, product: Tensor, lengths: Tensor, above: Tensor, code: int) -> Tensor:
        """Return `product` times the fit's factors of one hidden code, `(N,)` like the lengths of its gradient and above."""
        self._follow(lengths)
        alpha, beta = self._numbers()[code]
        line = (above * alpha).add_(lengths * beta).add_(tiny(above))
        return (product * above).div_(line)

    def products(self, lengths: Sequence[Tensor], curvature: Tensor, damping: float | Tensor) -> Sequence[Tensor]:
        """Return for every code the product of the factors down to it, each `(N,)`, last code first.

        Args:
            lengths: of the codes' gradients, each `(N,)`.
            curvature: of the top code, `(N,)`.
            damping: of the top code.
        """
        top = self.top(lengths[0], curvature, damping)
        if len(lengths) <= _SHALLOW and top.device.type == "cpu":
            found = [top]
            for code in range(1, len(lengths)):
                found.append(self.below(found[-1], lengths[code], lengths[code - 1], code))
            return found
        assert self.coefficients is not None
        alpha, beta = self.coefficients[1:, :, None].unbind(1)
        every = torch.stack([*lengths])
        above = every[:-1]
        line = (above * alpha).addcmul_(every[1:], beta).add_(tiny(above))
        return top, *(above / line).cumprod(0).mul_(top).unbind()

    def _follow(self, like: Tensor) -> None:
        """Have the coefficients where a tensor is: the model may have been moved."""
        if self.coefficients is not None and self.coefficients.device != like.device:
            self.coefficients, self._read = self.coefficients.to(like.device), None

    def _numbers(self) -> Any:
        """Return the coefficients by code; as Python's numbers, which cost less, where reading them waits for nobody."""
        if self._read is None:
            assert self.coefficients is not None
            found = self.coefficients
            self._read = found.tolist() if found.device.type == "cpu" else [row.unbind() for row in found.unbind()]
        return self._read

    def fit(
        self,
        lengths: Tensor,
        factors: Tensor,
        scale: Tensor | float,
        first: int,
        codes: int,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        """Let the coefficients of the codes from `first` on follow a batch.

        Args:
            lengths: of their gradients, `(codes, N)`; where the first is a hidden one, that of the delta above before it.
            factors: the exact ones of all of them, `(codes, N)`.
            scale: 1 over their means, `(codes, 1)` or one number.
            first: the code that the first row is of; 0 is the top code.
            codes: how many there are in all.
            group: process group whose ranks have parts of the batch.
        """
        found = factors.new_zeros(len(factors), 2)
        is_top = int(first == 0)
        if isinstance(scale, Tensor):
            found[:is_top, 0] = torch.where(scale > 0, scale, torch.nan)[:is_top, 0]
        else:
            found[:is_top, 0] = scale
        if len(lengths) > 1:
            exact = factors[is_top:]
            live = exact > 0  # a sample without gradient has the factor 0
            r = (lengths[1:] / lengths[:-1].clamp_min(tiny(lengths))).to(torch.float64) * live
            inverse = torch.where(live, exact.to(torch.float64), torch.inf).reciprocal()
            sums = torch.stack([live, r, inverse, r * r, r * inverse]).sum(2)
            averages = summed(sums, group) / sums[0].clone()  # NaN without samples: the old ones stay
            r, inverse, squares, products = averages[1:].unbind()
            least = _LEAST * inverse
            beta = ((products - r * inverse) / (squares - r * r).clamp_min(tiny(r))).clamp_(min=0.0)
            alpha = inverse - beta * r
            # A line through the least intercept, where the free one would fall below it: no estimate falls below it then.
            steep = ((products - least * r) / squares.clamp_min(tiny(r))).clamp_(min=0.0)
            beta = torch.where(alpha < least, steep, beta)
            found[is_top:] = torch.stack([torch.maximum(alpha, least), beta], 1).to(found.dtype)
        # A new tensor: there may be a way back to the old one.
        before = found.new_full((codes, 2), float("nan")) if self.coefficients is None else self.coefficients
        self.coefficients = before.to(found, copy=True)  # the model may have been converted
        old = self.coefficients[first : first + len(found)]
        found = torch.where(old.isfinite(), torch.lerp(old, found, 0.5), found)
        self.coefficients[first : first + len(found)] = torch.where(found.isfinite(), found, old)
        self._is_known &= bool(self.coefficients[first : first + len(found)].isfinite().all())
        self._read = None

    def keep(self) -> None:
        """Know that the steps begun were made."""
        self._before = None

    def take_back(self) -> None:
        """Return to what was before the steps begun, which were not made: somebody looked, or they were refused."""
        if self._before is not None:
            self.steps, self.coefficients, self._is_known = self._before
            self._before, self._read, self._last = None, None, math.inf

    def state(self) -> dict[str, Any]:
        """Return the count of steps, the coefficients, and whether all are known."""
        return {"steps": self.steps, "coefficients": self.coefficients, "is_known": self._is_known}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Restore what `state` returned."""
        self.steps = int(state["steps"])
        found = state["coefficients"]
        if found is not None and found.shape[1:] != (2,):  # of a version that had another fit
            found = None
        self.coefficients = None if found is None else found.detach().clone()
        self._is_known = bool(state.get("is_known", True))
        self._read, self._last = None, math.inf


def length(values: Tensor) -> Tensor:
    """Return every sample's length, `(N,)`; in float32 at least."""
    if values.ndim == 2 and values.dtype in (torch.float32, torch.float64):
        return torch.linalg.vector_norm(values, 2, 1)
    return torch.linalg.vector_norm(flat(values), dim=1, dtype=torch.promote_types(values.dtype, torch.float32))
