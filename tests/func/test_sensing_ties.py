"""Tied entries: as few probes as there are unknowns for, and every entry exact."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from boxes import Counted, Linear, arrow, band, far, points, random_pattern
from torch import Tensor

from beyondprop.func.sensing import color_columns, jacobian, vjp
from beyondprop.nn import BlackBox


def _grid(side: int) -> Tensor:
    """Return the mask of a 5-point stencil."""
    one = band(side, side)
    eye = torch.eye(side, dtype=torch.bool)
    return torch.kron(eye, one) | torch.kron(one, eye)


def _symmetric(mask: Tensor, seed: int) -> Tensor:
    drawn = torch.randn(mask.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    half = (drawn * mask).triu()
    return half + half.triu(1).T


class Energy:
    """The gradient of `sum_ij A_ij t_i t_j / 2`, `t = tanh(x)`: its Jacobian is a Hessian."""

    def __init__(self, matrix: Tensor) -> None:
        self.matrix = matrix

    def torch(self, x: Tensor) -> Tensor:
        t = torch.tanh(x)
        return (1 - t**2) * (t @ self.matrix)

    def __call__(self, x: np.ndarray) -> np.ndarray:
        return self.torch(torch.from_numpy(x)).numpy()

    def jacobian(self, x: Tensor) -> Tensor:
        return torch.stack([torch.func.jacrev(self.torch)(row) for row in x])


SYMMETRIC = {"arrow": (arrow(100), 3), "band": (band(100, 100, 3), 5), "grid": (_grid(10), 4)}


@pytest.mark.parametrize(("mask", "most"), SYMMETRIC.values(), ids=SYMMETRIC.keys())
@pytest.mark.parametrize("seed", range(3))
def test_symmetry_saves_probes(mask: Tensor, most: int, seed: int) -> None:
    matrix = _symmetric(mask, seed)
    box = Counted(Linear(matrix))
    found = jacobian(box, points(2, 100, seed), pattern=mask, structure="symmetric", step=1.0)
    assert far(found[0], matrix) <= 1e-9
    assert far(found[1], matrix) <= 1e-9
    assert box.since() <= 2 * 2 * most
    assert most < color_columns(mask).count
    assert torch.equal(found, found.mT)


@pytest.mark.parametrize("difference", ["central", "forward"])
def test_a_hessian_that_changes_from_point_to_point(difference: str) -> None:
    mask = _grid(5)
    box = Energy(_symmetric(mask, 0))
    x = points(4, 25)
    found = jacobian(box, x, pattern=mask, structure="symmetric", difference=difference)
    assert far(found, box.jacobian(x)) <= (1e-7 if difference == "central" else 1e-4)
    v = points(4, 25, 1)
    pulled = vjp(box, x, v, pattern=mask, structure="symmetric", difference=difference)
    assert far(pulled, torch.einsum("bmn,bm->bn", found, v)) <= 1e-9


def test_symmetry_without_a_pattern() -> None:
    matrix = _symmetric(torch.ones(12, 12, dtype=torch.bool), 0)
    box = Counted(Linear(matrix))
    found = jacobian(box, points(1, 12), structure="symmetric", step=1.0)
    assert far(found[0], matrix) <= 1e-9
    assert box.since() <= 1 + 2 * 12


TOEPLITZ = torch.arange(20) - torch.arange(16)[:, None] + 15
BLOCKS = torch.kron(torch.eye(6, dtype=torch.long), torch.arange(1, 13).reshape(3, 4)) - 1
SHARED = torch.where(random_pattern(15, 18, 5), torch.arange(18) % 7, -1)


@pytest.mark.parametrize("tie", [TOEPLITZ, BLOCKS, SHARED], ids=["toeplitz", "blocks", "shared"])
@pytest.mark.parametrize("form", ["tensor", "array", "lists"])
def test_tied_entries(tie: Tensor, form: str) -> None:
    values = torch.randn(int(tie.max()) + 1, dtype=torch.float64)
    matrix = torch.where(tie >= 0, values[tie.clamp(min=0)], 0.0)
    structure = {"tensor": tie, "array": tie.numpy(), "lists": tie.tolist()}[form]
    layer = BlackBox(Linear(matrix), structure=structure)
    assert layer.plan is not None
    assert layer.plan.method == "structured"
    least = -(-len(torch.unique(tie[tie >= 0])) // tie.shape[0])
    assert least <= layer.plan.probes <= least + 2
    x = points(3, tie.shape[1])
    assert far(jacobian(Linear(matrix), x, structure=structure)[1], matrix) <= 1e-8
    leaf = x.clone().requires_grad_()
    (layer(leaf) * points(3, tie.shape[0], 4)).sum().backward()
    assert leaf.grad is not None
    assert far(leaf.grad, points(3, tie.shape[0], 4) @ matrix) <= 1e-8


def test_ties_at_bounds_and_of_large_inputs() -> None:
    """Tied entries are equal in the inputs' own units only, so that all inputs of a sample are moved alike."""
    values = torch.randn(35, dtype=torch.float64)
    matrix = values[TOEPLITZ]
    x = points(3, 20)
    x[0, 3] = 1e4
    assert far(jacobian(Linear(matrix), x, structure=TOEPLITZ)[0], matrix) <= 1e-6
    x = points(3, 20).clamp(-0.5, 0.5)
    assert far(jacobian(Linear(matrix), x, structure=TOEPLITZ, bounds=(-0.5, 0.5))[1], matrix) <= 1e-8
    floats = jacobian(Linear(matrix), points(3, 20, dtype=torch.float32), structure=TOEPLITZ)
    assert far(floats[2], matrix) <= 1e-3


def test_refusals() -> None:
    def given(**options: Any) -> None:
        jacobian(Linear(torch.eye(4)), points(1, 4), **options)

    with pytest.raises(ValueError, match="symmetr"):
        given(structure="symetric")
    with pytest.raises(ValueError, match=r"needs a symmetric pattern, but it has the entry \(0, 1\) and not \(1, 0\)"):
        given(structure="symmetric", pattern=torch.ones(4, 4).triu())
    with pytest.raises(ValueError, match="as many outputs as inputs, got 3 and 4"):
        jacobian(lambda a: a[:, :3], points(1, 4), structure="symmetric")
    with pytest.raises(ValueError, match=r"structure must have the shape \(outputs, inputs\)"):
        given(structure=torch.zeros(4, 5, dtype=torch.long))
    with pytest.raises(ValueError, match="integers, -1 where an entry is 0"):
        given(structure=torch.zeros(4, 4))
    with pytest.raises(ValueError, match="structure and pattern differ"):
        given(structure=torch.zeros(4, 4, dtype=torch.long), pattern=torch.eye(4))
    with pytest.raises(ValueError, match="goes with method='auto'"):
        given(structure="symmetric", method="coloring")
    with pytest.raises(ValueError, match="do not go together"):
        given(structure="symmetric", pattern="discover")
    with pytest.raises(ValueError, match=r"probes must be at least 3 .* 10 unknowns"):
        given(structure="symmetric", probes=1)
