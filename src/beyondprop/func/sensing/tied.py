"""Jacobians whose entries are tied: one unknown for each set of equal entries, one sparse least-squares problem for all."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from beyondprop.func.sensing.designs import general
from beyondprop.func.sensing.linearised import Sparse
from beyondprop.func.sensing.patterns import Ties

_DRAWS, _MOST_MORE = 8, 6
_WELL = 100.0
_REFINEMENTS, _MOST_STEPS, _SMALL = 3, 200, 1e-26
_CLOSE, _DETERMINED = 0.05, 1e-3


class Tied:
    """The joint least-squares problem of all rows, for probes `(k, n)` that all samples share.

    Args:
        ties: which entries are equal.
        probes: the probes.

    Attributes:
        condition: condition number of the problem; Inf where the probes do not determine all unknowns.
    """

    def __init__(self, ties: Ties, probes: Tensor) -> None:
        from scipy import sparse  # loaded where it is needed: it takes a third of a second
        from scipy.sparse.linalg import splu

        self.ties, self.probes, self.pattern = ties, probes, ties.pattern
        count, (m, _), nnz = len(probes), ties.pattern.shape, ties.pattern.nnz
        entries = probes[:, self.pattern.columns].numpy().ravel()
        equation = (np.arange(count)[:, None] * m + self.pattern.rows.numpy()).ravel()
        unknown = np.tile(ties.unknown.numpy(), count)
        assert len(entries) == count * nnz
        self.system = sparse.csr_array((entries, (equation, unknown)), shape=(count * m, ties.count))
        self.condition = math.inf
        normal = sparse.csc_array(self.system.T @ self.system)
        try:
            self._factors = splu(normal)
        except RuntimeError:  # exactly singular
            return
        self.condition = self._estimate(normal)

    def __reduce__(self) -> tuple[type[Tied], tuple[Ties, Tensor]]:
        """Leave the factors behind, which cannot be stored; they are made again."""
        return type(self), (self.ties, self.probes)

    def _estimate(self, normal: Any) -> float:
        rng = np.random.default_rng(0)
        high = low = rng.standard_normal(self.ties.count)
        top = bottom = 0.0
        for _ in range(20):
            high, low = normal @ (high / np.linalg.norm(high)), self._factors.solve(low / np.linalg.norm(low))
            top, bottom = float(np.linalg.norm(high)), float(np.linalg.norm(low))
        found = math.sqrt(top * bottom) if math.isfinite(top * bottom) else math.inf
        return found if found < 1e7 else math.inf  # beyond it, the squared one is rounding alone

    def _least_squares(self, values: np.ndarray) -> np.ndarray:
        found = self._factors.solve(self.system.T @ values)
        for _ in range(_REFINEMENTS):  # what squaring the condition number cost comes back
            found += self._factors.solve(self.system.T @ (values - self.system @ found))
        return found

    def solve(self, differences: Tensor) -> Sparse:
        """Return the Jacobians for directional derivatives `(B, k, m)` along the shared probes."""
        found = self._least_squares(differences.reshape(len(differences), -1).T.numpy())
        values = torch.from_numpy(np.ascontiguousarray(found.T))
        return Sparse(self.pattern, values[:, self.ties.unknown])

    def fit(self, differences: Tensor, probes: Tensor, missing: Tensor | None = None) -> Sparse:
        """Return the Jacobians for the probes `(B, k, n)` that were used; calls may be missing, `(B, k)`.

        By conjugate gradients on each sample's normal equations, those of the shared probes their preconditioner.

        Raises:
            ValueError: if the calls that are left do not determine the unknowns, or bounds cut the probes too short.
        """
        if missing is not None:
            probes, differences = (
                probes.masked_fill(missing[..., None], 0.0),
                differences.masked_fill(missing[..., None], 0.0),
            )
        found = self._fitted(differences, probes)
        if missing is not None or float((probes - self.probes).abs().max()) * self.condition > _CLOSE:
            self._check_determined(probes)
        return found

    def _check_determined(self, probes: Tensor) -> None:
        """See whether each sample's equations give back unknowns that are known: gradients end at the smallest solution."""
        known = torch.randn(1, self.ties.count, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        known = known.expand(len(probes), -1)
        found = self._fitted(self._entries(known).along(probes), probes)
        wrong = torch.nonzero((found.values - self._entries(known).values).abs().amax(1) > _DETERMINED).flatten()
        if len(wrong):
            raise ValueError(
                f"The calls that are left of sample {int(wrong[0])} do not determine the tied entries: too many are missing, "
                "or bounds cut the probes too short. Allow retries, widen the bounds, or ask for more probes."
            )

    def _fitted(self, differences: Tensor, probes: Tensor) -> Sparse:
        found = self._conditioned(self._adjoint(differences, probes))
        residual = self._adjoint(differences - self._entries(found).along(probes), probes)
        step = self._conditioned(residual)
        direction, size = step, (residual * step).sum(-1, keepdim=True)
        first = (found * self._adjoint(differences, probes)).sum(-1, keepdim=True).abs() + 1e-300
        for _ in range(_MOST_STEPS):
            if bool((size.abs() <= _SMALL * first).all()):
                return self._entries(found)
            image = self._adjoint(self._entries(direction).along(probes), probes)
            length = size / (direction * image).sum(-1, keepdim=True).clamp(min=1e-300)
            found, residual = found + length * direction, residual - length * image
            step = self._conditioned(residual)
            before, size = size, (residual * step).sum(-1, keepdim=True)
            direction = step + size / before.clamp(min=1e-300) * direction
        raise ValueError(
            "The tied entries could not be determined from the probes that were left: bounds cut them too short, or too many "
            "calls are missing. Widen the bounds, allow retries, or ask for more probes."
        )

    def _entries(self, unknowns: Tensor) -> Sparse:
        return Sparse(self.pattern, unknowns[:, self.ties.unknown])

    def _adjoint(self, values: Tensor, probes: Tensor) -> Tensor:
        """Return the transposed system's product with `(B, k, m)`, `(B, unknowns)`."""
        entries = torch.einsum("bke,bke->be", probes[..., self.pattern.columns], values[..., self.pattern.rows])
        return entries.new_zeros(len(values), self.ties.count).index_add_(1, self.ties.unknown, entries)

    def _conditioned(self, unknowns: Tensor) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(self._factors.solve(unknowns.T.numpy()).T))


def design(ties: Ties, count: int | None, unit: Tensor, generator: torch.Generator | None, *, more: int = 0) -> Tied:
    """Return the problem for the fewest probes that determine all unknowns well and some more, or for `count` of them.

    Args:
        ties: which entries are equal.
        count: of probes; None: as many as it takes.
        unit: scale of every input, `(n,)`: entries are equal in the inputs' own units, so the probes are in these.
        generator: for probes.
        more: probes beyond those that it takes.

    Raises:
        ValueError: if `count` probes do not determine all unknowns.
    """
    m, n = ties.pattern.shape
    least = max(1, -(-ties.count // m))
    generator = generator or torch.Generator().manual_seed(0)

    def best_of(number: int) -> Tied:
        return min(
            (Tied(ties, general(number, n, generator) * unit) for _ in range(_DRAWS)), key=lambda one: one.condition
        )

    well = _WELL * math.sqrt(ties.count)
    found: Tied | None = None
    for number in [count] if count else range(least, min(least + _MOST_MORE, n) + 1):
        found = best_of(number)
        if found.condition <= well:
            return best_of(min(number + more, n)) if more and not count else found
    if found is not None and math.isfinite(found.condition):
        return found
    if count is None:
        identity = Tied(ties, torch.eye(n, dtype=torch.float64) * unit)
        if math.isfinite(identity.condition):
            return identity
    raise ValueError(
        f"probes must be at least {least} and enough to determine the {ties.count} unknowns of the structure, got {count}."
    )
