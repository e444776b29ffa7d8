"""A Jacobian for every sample, in the form in which a method finds it: sparse, dense, or as what was seen along probes."""

from __future__ import annotations

import abc

import torch
from torch import Tensor

from beyondprop.func.sensing.patterns import Pattern


class Linearised(abc.ABC):
    """Jacobians `J_b` of a batch, `(m, n)` each; float64, on the CPU."""

    @abc.abstractmethod
    def pull(self, cotangent: Tensor) -> Tensor:
        """Return `J_b^T cotangent_b`: from `(B, m)` to `(B, n)`."""

    @abc.abstractmethod
    def push(self, tangent: Tensor) -> Tensor:
        """Return `J_b tangent_b`: from `(B, n)` to `(B, m)`."""

    @abc.abstractmethod
    def dense(self) -> Tensor:
        """Return the Jacobians as `(B, m, n)`."""

    @abc.abstractmethod
    def of(self, rows: Tensor) -> Linearised:
        """Return the Jacobians of some samples."""

    @abc.abstractmethod
    def replaced(self, rows: Tensor, others: Linearised) -> Linearised:
        """Return these Jacobians with those of some samples in place of their own; both of one kind."""

    def coo(self) -> Tensor:
        """Return the Jacobians as a coalesced sparse tensor `(B, m, n)`."""
        return self.dense().to_sparse_coo().coalesce()


class Sparse(Linearised):
    """Jacobians by the values of their pattern.

    Args:
        pattern: which entries may be nonzero.
        values: of these, `(B, nnz)`.
    """

    def __init__(self, pattern: Pattern, values: Tensor) -> None:
        self.pattern, self.values = pattern, values
        self.rows, self.columns = pattern.rows, pattern.columns

    def pull(self, cotangent: Tensor) -> Tensor:
        found = cotangent.new_zeros(len(cotangent), self.pattern.shape[1])
        return found.index_add_(1, self.columns, self.values * cotangent[:, self.rows])

    def push(self, tangent: Tensor) -> Tensor:
        found = tangent.new_zeros(len(tangent), self.pattern.shape[0])
        return found.index_add_(1, self.rows, self.values * tangent[:, self.columns])

    def along(self, probes: Tensor) -> Tensor:
        """Return `J_b d` for probes `(k, n)` or `(B, k, n)`, as `(B, k, m)`."""
        found = self.values.new_zeros(len(self.values), probes.shape[-2], self.pattern.shape[0])
        for rows, columns, places in self.pattern.supports:
            part = self.values[:, None, places[:, 0]] * probes[..., columns[:, 0]]
            for j in range(1, columns.shape[1]):
                part.addcmul_(self.values[:, None, places[:, j]], probes[..., columns[:, j]])
            found[:, :, rows] = part
        return found

    def dense(self) -> Tensor:
        found = self.values.new_zeros(len(self.values), *self.pattern.shape)
        found[:, self.rows, self.columns] = self.values
        return found

    def of(self, rows: Tensor) -> Sparse:
        return Sparse(self.pattern, self.values[rows])

    def replaced(self, rows: Tensor, others: Linearised) -> Sparse:
        assert isinstance(others, Sparse)
        return Sparse(self.pattern, self.values.index_copy(0, rows, others.values))

    def coo(self) -> Tensor:
        batch, nnz = self.values.shape
        sample = torch.arange(batch).repeat_interleave(nnz)
        where = torch.stack([sample, self.rows.repeat(batch), self.columns.repeat(batch)])
        return torch.sparse_coo_tensor(
            where, self.values.flatten(), (batch, *self.pattern.shape), is_coalesced=True, check_invariants=False
        )


class Dense(Linearised):
    """Jacobians without a pattern, `(B, m, n)`."""

    def __init__(self, matrices: Tensor) -> None:
        self.matrices = matrices

    def pull(self, cotangent: Tensor) -> Tensor:
        return torch.einsum("bmn,bm->bn", self.matrices, cotangent)

    def push(self, tangent: Tensor) -> Tensor:
        return torch.einsum("bmn,bn->bm", self.matrices, tangent)

    def along(self, probes: Tensor) -> Tensor:
        """Return `J_b d` for probes `(k, n)` or `(B, k, n)`, as `(B, k, m)`."""
        return probes @ self.matrices.mT

    def dense(self) -> Tensor:
        return self.matrices

    def of(self, rows: Tensor) -> Dense:
        return Dense(self.matrices[rows])

    def replaced(self, rows: Tensor, others: Linearised) -> Dense:
        return Dense(self.matrices.index_copy(0, rows, others.dense()))


class Probed(Linearised):
    """What directional derivatives say of Jacobians about which nothing is known: their mean against the probes.

    Args:
        probes: `(B, k, n)`, dual to those along which was looked: the sum of their outer products with these is the identity in
            expectation, for `weights` of 1.
        differences: directional derivatives along them, `(B, k, m)`.
        weights: of each probe, `(B, k)`, their sum 1 for a sample.
    """

    def __init__(self, probes: Tensor, differences: Tensor, weights: Tensor) -> None:
        self.probes, self.differences, self.weights = probes, differences, weights

    def pull(self, cotangent: Tensor) -> Tensor:
        seen = torch.einsum("bkm,bm->bk", self.differences, cotangent)
        return torch.einsum("bkn,bk->bn", self.probes, seen * self.weights)

    def push(self, tangent: Tensor) -> Tensor:
        seen = torch.einsum("bkn,bn->bk", self.probes, tangent)
        return torch.einsum("bkm,bk->bm", self.differences, seen * self.weights)

    def dense(self) -> Tensor:
        return torch.einsum("bkm,bkn->bmn", self.differences * self.weights[..., None], self.probes)

    def of(self, rows: Tensor) -> Probed:
        return Probed(self.probes[rows], self.differences[rows], self.weights[rows])

    def replaced(self, rows: Tensor, others: Linearised) -> Probed:
        assert isinstance(others, Probed)
        pairs = ((self.probes, others.probes), (self.differences, others.differences), (self.weights, others.weights))
        return Probed(*(own.index_copy(0, rows, other) for own, other in pairs))
