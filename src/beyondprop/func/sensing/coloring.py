"""Groups of inputs that one probe can move together, because no output depends on two of them."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from beyondprop import _checks
from beyondprop.func.sensing.patterns import Pattern

ORDERS = ("auto", "natural", "largest_first", "smallest_last", "saturation", "random")
"""Vertex orders of the greedy colouring; `auto` takes the best of all."""

_MOST_EDGES = 2_000_000
_RANDOM_ORDERS = 20


@dataclass(frozen=True, eq=False)
class Coloring:
    """Colours of a Jacobian's columns: two that share a row have different ones.

    Attributes:
        colors: colour of each input, `(n,)`, from 0.
        count: number of colours, that is of probes.
        order: vertex order that gave it.
        pattern: what was coloured.
    """

    colors: Tensor
    count: int
    order: str
    pattern: Pattern

    def __post_init__(self) -> None:
        pattern = self.pattern
        if len(self.colors) != pattern.shape[1]:
            raise ValueError(f"colors must be one for each of {pattern.shape[1]} columns, got {len(self.colors)}.")
        seen = pattern.rows * max(self.count, 1) + self.colors[pattern.columns]
        if len(torch.unique(seen)) < pattern.nnz:
            raise ValueError("colors must be such that no row has two columns of one colour.")

    def seeds(self) -> Tensor:
        """Return the probes, `(count, n)`, float64: 1 where an input has the colour."""
        found = torch.zeros(self.count, self.pattern.shape[1], dtype=torch.float64)
        found[self.colors, torch.arange(len(self.colors))] = 1.0
        return found

    def __repr__(self) -> str:
        return f"Coloring({len(self.colors)} columns in {self.count} colours, order {self.order!r})"


def color_columns(pattern: Any, order: str = "auto", *, generator: torch.Generator | None = None) -> Coloring:
    """Colour the columns of a pattern greedily, such that columns of one colour share no row.

    Args:
        pattern: what `Pattern` takes.
        order: one of `ORDERS`. `auto` takes the fewest colours of all, 20 random ones among them, and ends where there are as
            few as the largest number of nonzeros in a row, below which no colouring goes.
        generator: for random orders; None: always the same ones.

    Raises:
        ValueError: if `order` is none of these.

    Source: Curtis, Powell & Reid, J. Inst. Math. Appl. 13 (1974); Coleman & Moré, SIAM J. Numer. Anal. 20 (1983); Gebremedhin,
    Manne & Pothen, SIAM Review 47 (2005); `saturation`: Brélaz, Commun. ACM 22 (1979).
    """
    _checks.one_of("order", order, ORDERS)
    pattern = Pattern(pattern)
    return _always(pattern, order) if generator is None else _colored(pattern, order, generator)


@lru_cache(maxsize=32)
def _always(pattern: Pattern, order: str) -> Coloring:
    return _colored(pattern, order, torch.Generator().manual_seed(0))


def _colored(pattern: Pattern, order: str, generator: torch.Generator) -> Coloring:
    least, best = max(pattern.widest, 1), None
    for name, colors in _colorings(pattern, order, generator):
        count = max(colors) + 1
        if best is None or count < best.count:
            best = Coloring(torch.tensor(colors), count, name, pattern)
        if count <= least:
            break
    assert best is not None
    return best


def _colorings(pattern: Pattern, order: str, generator: torch.Generator) -> Iterator[tuple[str, list[int]]]:
    rows_of, rows = _by_column(pattern), pattern.shape[0]
    columns = range(pattern.shape[1])
    if order in ("auto", "natural"):
        yield "natural", _first_fit(columns, rows_of, rows)
    edges = int((pattern.row_counts * (pattern.row_counts - 1)).sum())
    if order in ("largest_first", "smallest_last", "saturation") or (order == "auto" and edges <= _MOST_EDGES):
        near = _neighbours(pattern, rows_of)
        if order in ("auto", "saturation"):
            yield "saturation", _saturated(near)
        if order in ("auto", "smallest_last"):
            yield "smallest_last", _first_fit(_smallest_last(near), rows_of, rows)
        if order in ("auto", "largest_first"):
            yield "largest_first", _first_fit(sorted(columns, key=lambda j: -len(near[j])), rows_of, rows)
    if order in ("auto", "random"):
        for _ in range(_RANDOM_ORDERS):
            yield "random", _first_fit(torch.randperm(len(columns), generator=generator).tolist(), rows_of, rows)


def _by_column(pattern: Pattern) -> list[list[int]]:
    found: list[list[int]] = [[] for _ in range(pattern.shape[1])]
    for row, column in zip(pattern.rows.tolist(), pattern.columns.tolist(), strict=True):
        found[column].append(row)
    return found


def _neighbours(pattern: Pattern, rows_of: list[list[int]]) -> list[set[int]]:
    """Return the columns that share a row with each one, itself among them."""
    columns_of: list[list[int]] = [[] for _ in range(pattern.shape[0])]
    for row, column in zip(pattern.rows.tolist(), pattern.columns.tolist(), strict=True):
        columns_of[row].append(column)
    return [set().union(*(columns_of[row] for row in rows)) for rows in rows_of]


def _first_fit(order: Iterable[int], rows_of: list[list[int]], rows: int) -> list[int]:
    """Give each column the first colour that none of its rows has; a row's colours are the bits of one integer."""
    taken, colors = [0] * rows, [0] * len(rows_of)
    for column in order:
        used = 0
        for row in rows_of[column]:
            used |= taken[row]
        free = ~used & (used + 1)
        colors[column] = free.bit_length() - 1
        for row in rows_of[column]:
            taken[row] |= free
    return colors


def _saturated(near: list[set[int]]) -> list[int]:
    """Colour the column next that sees most colours around it, of several the one with most neighbours."""
    seen, colors = [0] * len(near), [-1] * len(near)
    heap = [(0, -len(others), column) for column, others in enumerate(near)]
    heapq.heapify(heap)
    while heap:
        count, _, column = heapq.heappop(heap)
        if colors[column] >= 0 or -count != seen[column].bit_count():
            continue  # coloured by now, or it sees more colours and has a later entry
        free = ~seen[column] & (seen[column] + 1)
        colors[column] = free.bit_length() - 1
        for other in near[column]:
            if colors[other] < 0 and not seen[other] & free:
                seen[other] |= free
                heapq.heappush(heap, (-seen[other].bit_count(), -len(near[other]), other))
    return colors


def _smallest_last(near: list[set[int]]) -> list[int]:
    """Return the columns such that each has as few neighbours as possible among those before it."""
    degree = [len(others) for others in near]
    heap = [(d, column) for column, d in enumerate(degree)]
    heapq.heapify(heap)
    order: list[int] = []
    done = [False] * len(near)
    while heap:
        d, column = heapq.heappop(heap)
        if done[column] or d != degree[column]:
            continue
        done[column] = True
        order.append(column)
        for other in near[column]:
            if not done[other]:
                degree[other] -= 1
                heapq.heappush(heap, (degree[other], other))
    return order[::-1]
