"""Which entries of a Jacobian may be nonzero, and which of them are equal."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

_MOST_DRAWN = 48


class Support(NamedTuple):
    """The rows of a pattern that have one number of nonzeros.

    Attributes:
        rows: their indices, `(r,)`.
        columns: the columns of each one's nonzeros, `(r, s)`.
        places: where these lie among all nonzeros, `(r, s)`.
    """

    rows: Tensor
    columns: Tensor
    places: Tensor


class Pattern:
    """Which entries of an `(m, n)` Jacobian may be nonzero; row by row, columns ascending.

    Args:
        value: a bool tensor or array `(m, n)`, one of numbers, whose nonzeros count, a `scipy.sparse` matrix or array, a sparse
            torch tensor, or another pattern.

    Attributes:
        shape: `(m, n)`.
        rows, columns: of the nonzeros, `(nnz,)`, int64.

    Raises:
        TypeError: if `value` is nothing of these.
        ValueError: if it has no two dimensions, no entries, or holds NaN.
    """

    shape: tuple[int, int]
    rows: Tensor
    columns: Tensor

    def __init__(self, value: Any) -> None:
        if isinstance(value, Pattern):
            self.shape, self.rows, self.columns = value.shape, value.rows, value.columns
            return
        rows, columns, shape = _entries(value)
        if len(shape) != 2 or 0 in shape:
            raise ValueError(f"pattern must have the shape (outputs, inputs), both >= 1, got {tuple(shape)}.")
        made = self.of_entries(rows, columns, (shape[0], shape[1]))
        self.shape, self.rows, self.columns = made.shape, made.rows, made.columns

    @classmethod
    def dense(cls, outputs: int, inputs: int) -> Pattern:
        """Return the pattern without a zero."""
        return cls(torch.ones(outputs, inputs, dtype=torch.bool))

    @classmethod
    def banded(cls, size: int, below: int = 1, above: int = 1) -> Pattern:
        """Return a square band: output i depends on inputs `i - below` to `i + above`."""
        rows = torch.arange(size)[:, None].expand(-1, below + above + 1)
        columns = rows + torch.arange(-below, above + 1)
        inside = (columns >= 0) & (columns < size)
        return cls.of_entries(rows[inside], columns[inside], (size, size))

    @classmethod
    def of_entries(cls, rows: Tensor, columns: Tensor, shape: tuple[int, int]) -> Pattern:
        """Return the pattern of the entries at `rows` and `columns`, `(nnz,)` each, in any order."""
        found = cls.__new__(cls)
        found.shape = (int(shape[0]), int(shape[1]))
        key = torch.unique(rows.to(torch.int64) * found.shape[1] + columns.to(torch.int64))
        found.rows, found.columns = key // found.shape[1], key % found.shape[1]
        return found

    @property
    def nnz(self) -> int:
        """Number of entries that may be nonzero."""
        return len(self.rows)

    @property
    def row_counts(self) -> Tensor:
        """Nonzeros of each row, `(m,)`."""
        return torch.bincount(self.rows, minlength=self.shape[0])

    @property
    def widest(self) -> int:
        """The largest number of nonzeros in a row: rho, the fewest probes that determine every row."""
        return int(self.row_counts.max())

    @property
    def is_dense(self) -> bool:
        """Whether no entry is known to be zero."""
        return self.nnz == self.shape[0] * self.shape[1]

    @cached_property
    def supports(self) -> tuple[Support, ...]:
        """The rows by their number of nonzeros; those without any are left out."""
        return tuple(self._supports())

    def _supports(self) -> Iterator[Support]:
        counts = self.row_counts
        starts = counts.cumsum(0) - counts
        for size in torch.unique(counts[counts > 0]).tolist():
            rows = torch.nonzero(counts == size).flatten()
            places = starts[rows, None] + torch.arange(size)
            yield Support(rows, self.columns[places], places)

    def mask(self) -> Tensor:
        """Return the pattern as a bool tensor `(m, n)`."""
        found = torch.zeros(self.shape, dtype=torch.bool)
        found[self.rows, self.columns] = True
        return found

    def to_scipy(self) -> Any:
        """Return the pattern as a `scipy.sparse.csr_array` of ones."""
        from scipy import sparse  # loaded where it is needed: it takes a third of a second

        ones = np.ones(self.nnz, dtype=np.int8)
        return sparse.csr_array((ones, (self.rows.numpy(), self.columns.numpy())), shape=self.shape)

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Pattern)
            and self.shape == other.shape
            and torch.equal(self.rows, other.rows)
            and torch.equal(self.columns, other.columns)
        )

    def __hash__(self) -> int:
        return hash((self.shape, self.nnz))

    def __repr__(self) -> str:
        return f"Pattern({self.shape[0]}x{self.shape[1]}, {self.nnz} nonzeros, at most {self.widest} a row)"

    def picture(self) -> str:
        """Return the pattern as text, one character an entry, or a block of entries where it is larger than a screen."""
        (m, n), most = self.shape, _MOST_DRAWN
        height, breadth = -(-m // most), -(-n // most)
        drawn = np.full((-(-m // height), -(-n // breadth)), "·")
        drawn[self.rows.numpy() // height, self.columns.numpy() // breadth] = "x"
        return "\n".join("".join(line) for line in drawn)


def _entries(value: Any) -> tuple[Tensor, Tensor, tuple[int, ...]]:
    if hasattr(value, "tocoo") and not isinstance(value, Tensor):  # of scipy.sparse, which is not loaded for it
        found = value.tocoo(copy=True)
        found.sum_duplicates()
        if len(found.shape) != 2:
            return torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64), found.shape
        kept = found.data != 0
        rows, columns = (torch.from_numpy(np.asarray(axis[kept], dtype=np.int64)) for axis in found.coords)
        return rows, columns, found.shape
    if isinstance(value, Tensor) and value.layout != torch.strided:
        found = value.detach().to_sparse_coo().coalesce().cpu()
        rows, columns = found.indices()[:2]
        kept = found.values() != 0
        return rows[kept], columns[kept], tuple(found.shape)
    if not isinstance(value, Tensor | np.ndarray | list):
        raise TypeError(
            "pattern must be a bool tensor (outputs, inputs), a scipy.sparse matrix, 'dense' or 'discover', got "
            f"{type(value).__name__}."
        )
    if isinstance(value, np.ndarray) and value.dtype.kind not in "fc":
        value = value.astype(bool)
    mask = torch.as_tensor(value.copy() if isinstance(value, np.ndarray) else value).detach().cpu()
    if mask.is_floating_point() and mask.isnan().any():
        raise ValueError("pattern holds NaN; its entries must be True or False.")
    if mask.ndim != 2:
        return torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64), tuple(mask.shape)
    rows, columns = torch.nonzero(mask, as_tuple=True)
    return rows, columns, tuple(mask.shape)


class Ties:
    """Which entries of a Jacobian are equal: one unknown for each set of them.

    Args:
        structure: `"symmetric"`, or an integer tensor `(m, n)`: -1 where an entry is 0, equal numbers where entries are equal.
        pattern: which entries may be nonzero; None: those that the structure has.
        shape: `(m, n)`.

    Attributes:
        pattern: which entries may be nonzero.
        unknown: which unknown each nonzero of the pattern is, `(nnz,)`.
        count: number of unknowns, the degrees of freedom.

    Raises:
        ValueError: if structure and pattern contradict each other, or the structure has another shape.
    """

    def __init__(self, structure: Any, pattern: Pattern | None, shape: tuple[int, int]) -> None:
        if isinstance(structure, str):
            if structure != "symmetric":
                raise ValueError(f"structure must be 'symmetric' or an index tensor (m, n), got {structure!r}.")
            self.pattern, label = self._symmetric(pattern, shape)
        else:
            self.pattern, label = self._tied(torch.as_tensor(structure).detach().cpu(), pattern, shape)
        found, self.unknown = torch.unique(label, return_inverse=True)
        self.count = len(found)

    @staticmethod
    def _symmetric(pattern: Pattern | None, shape: tuple[int, int]) -> tuple[Pattern, Tensor]:
        if shape[0] != shape[1]:
            raise ValueError(f"structure='symmetric' needs as many outputs as inputs, got {shape[0]} and {shape[1]}.")
        pattern = pattern or Pattern.dense(*shape)
        keys = pattern.rows * shape[1] + pattern.columns
        mirrored = pattern.columns * shape[1] + pattern.rows
        alone = torch.nonzero(~torch.isin(keys, mirrored)).flatten()
        if len(alone):
            i, j = int(pattern.rows[alone[0]]), int(pattern.columns[alone[0]])
            raise ValueError(
                f"structure='symmetric' needs a symmetric pattern, but it has the entry ({i}, {j}) and not ({j}, {i})."
            )
        low, high = torch.minimum(pattern.rows, pattern.columns), torch.maximum(pattern.rows, pattern.columns)
        return pattern, low * shape[1] + high

    @staticmethod
    def _tied(tie: Tensor, pattern: Pattern | None, shape: tuple[int, int]) -> tuple[Pattern, Tensor]:
        if tie.is_floating_point() or tie.is_complex() or tie.dtype == torch.bool:
            raise ValueError(f"structure must hold integers, -1 where an entry is 0, got {tie.dtype}.")
        if tuple(tie.shape) != tuple(shape):
            raise ValueError(f"structure must have the shape (outputs, inputs) = {shape}, got {tuple(tie.shape)}.")
        if pattern is None:
            pattern = Pattern(tie >= 0)
        label = tie[pattern.rows, pattern.columns].to(torch.int64)
        if bool((label < 0).any()) or int((tie >= 0).sum()) != pattern.nnz:
            raise ValueError(
                "structure and pattern differ: the structure must be -1 exactly where the pattern is False; leave pattern out."
            )
        return pattern, label
