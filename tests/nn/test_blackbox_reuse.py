"""Jacobians that serve more than one pass: only where the user asks, only near where they were sensed, only so often."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from boxes import Counted, Smooth, far, points, random_pattern
from torch import Tensor

from beyondprop.nn import BlackBox

MASK = random_pattern(6, 8, 3)
SMOOTH = Smooth(MASK)
X = points(4, 8)


def _gradient(layer: BlackBox, x: Tensor) -> Tensor:
    leaf = x.clone().requires_grad_()
    layer(leaf).sum().backward()
    assert leaf.grad is not None
    return leaf.grad


def _layer(**options: object) -> tuple[BlackBox, Counted]:
    box = Counted(SMOOTH)
    return BlackBox(box, pattern=MASK, **options), box  # type: ignore[arg-type]


def _spent(layer: BlackBox, box: Counted) -> int:
    """Return for how many rows a Jacobian was sensed since this was asked last."""
    assert layer.plan is not None
    rows, rest = divmod(box.since() - 4, layer.plan.calls)
    assert not rest
    return rows


def test_nothing_is_used_twice_by_itself() -> None:
    layer, box = _layer()
    for _ in range(3):
        _gradient(layer, X)
        assert _spent(layer, box) == 4


def test_a_jacobian_serves_so_often() -> None:
    layer, box = _layer(refresh=3, refresh_within=0.0)
    spent = []
    for _ in range(7):
        assert far(_gradient(layer, X), SMOOTH.jacobian(X).sum(1)) <= 1e-7
        spent.append(_spent(layer, box))
    assert spent == [4, 0, 0, 4, 0, 0, 4]
    assert layer.stats.total == box.rows + 7 * 4 + 3 * 4 * layer.plan.calls  # type: ignore[union-attr]


def test_rows_that_move_are_sensed_anew_and_others_are_not() -> None:
    layer, box = _layer(refresh=100, refresh_within=1e-3)
    _gradient(layer, X)
    box.since()
    moved = X.clone()
    moved[1] += 5e-4  # within
    moved[2] += 0.5
    found = _gradient(layer, moved)
    assert _spent(layer, box) == 1
    right = SMOOTH.jacobian(moved).sum(1)
    assert far(found[2], right[2]) <= 1e-7
    assert far(found[0], right[0]) <= 1e-7
    assert far(found[1], right[1]) <= 5e-3
    # Small moves add up: what counts is how far it is from where the Jacobian was sensed.
    for _ in range(3):
        moved[3] += 5e-4
        _gradient(layer, moved)
    assert box.rows == 3 * 4 + layer.plan.calls  # type: ignore[union-attr]


def test_another_number_of_rows_starts_anew() -> None:
    layer, _ = _layer(refresh=100, refresh_within=1.0)
    _gradient(layer, X)
    found = _gradient(layer, X[:3] + 0.5)
    assert far(found, SMOOTH.jacobian(X[:3] + 0.5).sum(1)) <= 1e-7


def test_a_graph_that_is_kept_keeps_its_own_jacobians() -> None:
    layer, _ = _layer(refresh=100, refresh_within=0.0)
    x = X.clone().requires_grad_()
    y = layer(x)
    first = torch.autograd.grad(y.sum(), x, retain_graph=True)[0]
    _gradient(layer, X + 1)
    again = torch.autograd.grad(y.sum(), x)[0]
    assert torch.equal(first, again)


def test_copies_and_pickles_go_on_by_themselves() -> None:
    layer, _ = _layer(refresh=100, refresh_within=0.1)
    _gradient(layer, X)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert far(_gradient(twin, X + 1), SMOOTH.jacobian(X + 1).sum(1)) <= 1e-7
        assert far(_gradient(layer, X), SMOOTH.jacobian(X).sum(1)) <= 1e-7


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"refresh > 1 needs refresh_within"):
        BlackBox(SMOOTH, refresh=2)
    with pytest.raises(ValueError, match="refresh must be an integer >= 1"):
        BlackBox(SMOOTH, refresh=0)
    with pytest.raises(ValueError, match="refresh_within must be a finite number >= 0"):
        BlackBox(SMOOTH, refresh=2, refresh_within=-1.0)
