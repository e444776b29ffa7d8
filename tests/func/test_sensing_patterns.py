"""Patterns in every form, and colourings: valid, never below what is possible, rarely above what others find."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from boxes import Smooth, arrow, band, points, random_pattern
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse
from scipy.optimize._numdiff import group_columns
from torch import Tensor

from beyondprop.func.sensing import Pattern, color_columns, jacobian
from beyondprop.func.sensing.coloring import ORDERS

MASK = random_pattern(6, 9, 2)
FORMS: dict[str, Any] = {
    "bool tensor": MASK,
    "numbers": MASK.double() * -3,
    "integers": MASK.int(),
    "bool array": MASK.numpy(),
    "lists": MASK.tolist(),
    "csr matrix": sparse.csr_matrix(MASK.numpy()),
    "csc array": sparse.csc_array(MASK.numpy().astype(float)),
    "coo array": sparse.coo_array(MASK.numpy()),
    "lil": sparse.lil_matrix(MASK.numpy()),
    "dok": sparse.dok_array(MASK.numpy()),
    "torch coo": MASK.float().to_sparse_coo(),
    "transposed view": MASK.T.contiguous().T,
    "pattern": Pattern(MASK),
}


@pytest.mark.parametrize("value", FORMS.values(), ids=FORMS.keys())
def test_all_forms_are_one_pattern(value: Any) -> None:
    pattern = Pattern(value)
    assert pattern == Pattern(MASK)
    assert hash(pattern) == hash(Pattern(MASK))
    assert torch.equal(pattern.mask(), MASK)
    assert pattern.shape == (6, 9)
    assert (pattern.nnz, pattern.widest) == (12, 2)
    assert np.array_equal(pattern.to_scipy().toarray() != 0, MASK.numpy())
    box, x = Smooth(MASK), points(2, 9)
    assert float((jacobian(box, x, pattern=value) - box.jacobian(x)).abs().max()) <= 1e-8


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support")
def test_a_torch_csr_tensor_is_one_too() -> None:
    assert Pattern(MASK.float().to_sparse_csr()) == Pattern(MASK)


def test_stored_zeros_and_repeated_entries_of_sparse_matrices() -> None:
    stored = sparse.coo_matrix(([1.0, 0.0, 2.0, 3.0], ([0, 1, 2, 2], [0, 1, 2, 2])), shape=(3, 3))
    assert Pattern(stored).mask().tolist() == [[True, False, False], [False, False, False], [False, False, True]]
    again = torch.sparse_coo_tensor(
        torch.tensor([[0, 0, 1], [1, 1, 0]]), torch.tensor([1.0, 1.0, 0.0]), (2, 2), check_invariants=False
    )
    assert Pattern(again).mask().tolist() == [[False, True], [False, False]]


def test_patterns_are_compared_copied_and_shown() -> None:
    pattern = Pattern(MASK)
    assert pattern != Pattern(MASK.T)
    assert pattern != Pattern(~MASK)
    assert pattern != "dense"
    assert copy.deepcopy(pattern) == pickle.loads(pickle.dumps(pattern)) == pattern
    assert "6x9, 12 nonzeros, at most 2 a row" in repr(pattern)
    assert Pattern(torch.eye(2, dtype=torch.bool)).picture() == "x·\n·x"
    assert max(map(len, Pattern.banded(1000).picture().splitlines())) <= 50
    assert Pattern.dense(2, 3).is_dense
    assert not pattern.is_dense
    assert torch.equal(
        Pattern.banded(5, 1, 0).mask(), torch.eye(5, dtype=torch.bool) | (torch.ones(5, 5).tril(-1).triu(-1) > 0)
    )
    assert Pattern.banded(2, 5, 5).is_dense


@pytest.mark.parametrize(
    ("value", "match"),
    [
        (torch.ones(3, dtype=torch.bool), r"\(outputs, inputs\)"),
        (torch.ones(2, 3, 4), r"\(outputs, inputs\)"),
        (torch.ones(0, 3), ">= 1"),
        (torch.tensor(1.0), r"\(outputs, inputs\)"),
        (torch.tensor([[float("nan"), 1.0]]), "NaN"),
        ("banded", "'dense', 'discover'"),
        ("discovr", "perhaps you meant 'discover'"),
    ],
)
def test_what_is_no_pattern(value: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        jacobian(lambda a: a, points(1, 3), pattern=value)


@pytest.mark.parametrize("value", [3, 1.5, {"a": 1}, {1, 2}, lambda: None])
def test_what_is_no_pattern_at_all(value: Any) -> None:
    with pytest.raises(TypeError, match="pattern must be a bool tensor"):
        jacobian(lambda a: a, points(1, 3), pattern=value)


# ---- colouring -----------------------------------------------------------------------------------------------------------

every_order = pytest.mark.parametrize("order", ORDERS)


def _is_valid(mask: Tensor, colors: Tensor) -> bool:
    """Say whether no row has two columns of one colour."""
    count = int(colors.max()) + 1
    members = torch.nn.functional.one_hot(colors, count)
    return int((mask.long() @ members).max()) <= 1


@st.composite
def _masks(draw: Any) -> Tensor:
    m, n = draw(st.integers(1, 14)), draw(st.integers(1, 14))
    share = draw(st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.9, 1.0]))
    seed = draw(st.integers(0, 10_000))
    return torch.rand(m, n, generator=torch.Generator().manual_seed(seed)) < share


@every_order
@settings(max_examples=30, deadline=None)
@given(mask=_masks())
def test_colourings_are_valid(order: str, mask: Tensor) -> None:
    found = color_columns(mask, order)
    assert found.colors.shape == (mask.shape[1],)
    assert found.colors.dtype == torch.int64
    assert sorted(set(found.colors.tolist())) == list(range(found.count))
    assert _is_valid(mask, found.colors)
    assert found.count >= max(1, int(mask.sum(1).max()))
    assert found.count <= mask.shape[1]
    seeds = found.seeds()
    assert torch.equal(seeds.sum(0), torch.ones(mask.shape[1], dtype=torch.float64))
    assert torch.equal(seeds.argmax(0), found.colors)


@every_order
def test_a_diagonal_has_one_colour_and_a_full_row_all(order: str) -> None:
    assert color_columns(torch.eye(20, dtype=torch.bool), order).count == 1
    assert color_columns(torch.zeros(3, 20, dtype=torch.bool), order).count == 1
    assert color_columns(arrow(20), order).count == 20


@pytest.mark.parametrize("seed", range(4))
def test_auto_is_the_best_of_all_orders_and_no_worse_than_scipy(seed: int) -> None:
    for mask in (random_pattern(60, 60, 5, seed), random_pattern(30, 80, 6, seed), band(50, 50, 3)):
        best = color_columns(mask)
        counts = [color_columns(mask, order).count for order in ORDERS]
        groups = group_columns(sparse.csr_matrix(mask.numpy()))
        assert _is_valid(mask, torch.as_tensor(groups).long())
        assert best.count == min(counts) <= int(groups.max()) + 1
        assert best.order in ORDERS
        assert best.pattern == Pattern(mask)


def test_known_counts() -> None:
    assert color_columns(band(30, 30)).count == 3
    assert color_columns(Pattern.banded(40, 3, 3)).count == 7
    ring = torch.zeros(64, 64, dtype=torch.bool)
    for offset in (-1, 0, 1):
        ring[torch.arange(64), (torch.arange(64) + offset) % 64] = True
    assert color_columns(ring).count == 4  # three do not close the ring, as 64 is no multiple of 3
    assert color_columns(ring[:63, :63]).count == 3


def test_colouring_is_the_same_every_time_but_for_a_generator() -> None:
    mask = random_pattern(40, 40, 4)
    assert torch.equal(color_columns(mask).colors, color_columns(mask).colors)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = color_columns(mask, "random")
    assert torch.equal(state, torch.get_rng_state())
    own = [color_columns(mask, "random", generator=torch.Generator().manual_seed(s)).colors for s in (1, 1, 2)]
    assert torch.equal(own[0], own[1])
    assert not torch.equal(own[0], own[2])
    assert _is_valid(mask, first.colors)


def test_a_colouring_is_shown_and_refuses_unknown_orders() -> None:
    assert repr(color_columns(torch.eye(3), "natural")) == "Coloring(3 columns in 1 colours, order 'natural')"
    with pytest.raises(ValueError, match=r"order must be one of .* perhaps you meant 'largest_first'"):
        color_columns(torch.eye(3), "largst_first")


@pytest.mark.parametrize("form", ["random", "half full", "full row"])
def test_a_large_pattern_is_coloured_in_reasonable_work(form: str) -> None:
    """By the number of steps, not by a clock: a quadratic order would take minutes here."""
    if form == "random":
        mask = random_pattern(4000, 4000, 4)
    elif form == "half full":
        mask = torch.rand(400, 400, generator=torch.Generator().manual_seed(0)) < 0.5
    else:
        mask = torch.eye(4000, dtype=torch.bool)
        mask[7] = True
    found = color_columns(mask)
    assert _is_valid(mask.float().long() if form != "full row" else mask[:8].long(), found.colors)
    assert found.count >= int(mask.sum(1).max())
