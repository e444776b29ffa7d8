"""Sensed Jacobians are those of the function: linear maps to rounding, smooth ones to 1e-6, whatever the pattern's form."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from boxes import Counted, Linear, Smooth, arrow, band, far, points, random_pattern
from torch import Tensor

from beyondprop.func.sensing import Pattern, jacobian, vjp
from beyondprop.nn import BlackBox


def _with_a_dense_row(n: int) -> Tensor:
    mask = torch.eye(n, dtype=torch.bool)
    mask[n // 2] = True
    return mask


def _with_gaps(m: int, n: int) -> Tensor:
    mask = random_pattern(m, n, 2, seed=3)
    mask[1] = mask[m - 1] = False
    mask[:, 0] = mask[:, n - 1] = False
    return mask


FORMS = {
    "band": band(12, 12),
    "random": random_pattern(12, 12, 3),
    "wide": random_pattern(7, 15, 4),
    "tall": random_pattern(15, 7, 3),
    "gaps": _with_gaps(9, 11),
    "dense row": _with_a_dense_row(9),
    "dense column": _with_a_dense_row(9).T.contiguous(),
    "one input": torch.ones(5, 1, dtype=torch.bool),
    "one output": torch.ones(1, 5, dtype=torch.bool),
    "one": torch.ones(1, 1, dtype=torch.bool),
    "nothing": torch.zeros(4, 6, dtype=torch.bool),
    "dense": torch.ones(4, 5, dtype=torch.bool),
}
METHODS = ("auto", "coloring", "regression", "dense")
every_form = pytest.mark.parametrize("mask", FORMS.values(), ids=FORMS.keys())
every_method = pytest.mark.parametrize("method", METHODS)


@every_form
@every_method
@pytest.mark.parametrize("difference", ["central", "forward"])
def test_linear_maps_come_back_to_rounding(mask: Tensor, method: str, difference: str) -> None:
    box = Linear(Smooth(mask).matrix)
    # Of a linear map any step is right, and a long one rounds least.
    found = jacobian(box, points(3, mask.shape[1]), pattern=mask, method=method, difference=difference, step=1.0)
    assert found.shape == (3, *mask.shape)
    assert float((found - box.matrix).abs().max()) <= 1e-10
    assert not bool(found[:, ~mask].any())


@every_form
@every_method
@pytest.mark.parametrize(("difference", "bound"), [("central", 1e-8), ("forward", 1e-5)])
def test_smooth_maps_at_the_default_step(mask: Tensor, method: str, difference: str, bound: float) -> None:
    box, x = Smooth(mask), points(4, mask.shape[1])
    found = jacobian(box, x, pattern=mask, method=method, difference=difference)
    assert float((found - box.jacobian(x)).abs().max()) <= bound


@every_form
def test_gradients_through_a_layer_are_those_of_the_analytic_twin(mask: Tensor) -> None:
    box, x = Smooth(mask), points(5, mask.shape[1])
    leaf, twin = x.clone().requires_grad_(), x.clone().requires_grad_()
    weights = torch.randn(5, mask.shape[0], dtype=torch.float64)
    (torch.sin(BlackBox(box, pattern=mask)(leaf)) * weights).sum().backward()
    (torch.sin(box.torch(twin)) * weights).sum().backward()
    assert leaf.grad is not None
    assert twin.grad is not None
    assert float((leaf.grad - twin.grad).abs().max()) <= 1e-6


@every_form
def test_gradcheck(mask: Tensor) -> None:
    # A linear box, since gradcheck takes differences of its own.
    layer = BlackBox(Linear(Smooth(mask).matrix), pattern=mask)
    x = points(2, mask.shape[1]).requires_grad_()
    # Where no output moves, gradcheck compares zeros.
    assert torch.autograd.gradcheck(layer, (x,), atol=1e-6, rtol=1e-6, nondet_tol=0.0)
    assert torch.autograd.gradcheck(BlackBox(Smooth(mask), pattern=mask), (x,), atol=1e-6, rtol=1e-6)


@every_method
def test_a_permuted_box_has_the_permuted_jacobian(method: str) -> None:
    mask = random_pattern(11, 14, 3)
    box, x = Smooth(mask), points(3, 14)
    order = torch.Generator().manual_seed(1)
    rows, columns = torch.randperm(11, generator=order), torch.randperm(14, generator=order)
    back = columns.argsort()

    def moved(given: np.ndarray) -> np.ndarray:
        return box(given[:, back.numpy()])[:, rows.numpy()]

    right = jacobian(box, x, pattern=mask, method=method)
    found = jacobian(moved, x[:, columns], pattern=mask[rows][:, columns], method=method)
    assert float((found - right[:, rows][:, :, columns]).abs().max()) <= 1e-8


@every_method
@pytest.mark.parametrize("difference", ["central", "forward"])
def test_a_batch_is_a_loop_over_its_rows(method: str, difference: str) -> None:
    mask = random_pattern(6, 8, 3)
    box, x = Smooth(mask), points(5, 8)
    options: dict[str, Any] = dict(pattern=mask, method=method, difference=difference)
    whole = jacobian(box, x, **options)
    single = torch.stack([jacobian(box, row, **options) for row in x])
    ones = torch.cat([jacobian(box, row[None], **options) for row in x])
    bound = 1e-9 if difference == "central" else 1e-7
    assert far(single, whole) <= bound
    assert far(ones, whole) <= bound
    v = points(5, 6, seed=2)
    pulled = vjp(box, x, v, **options)
    assert far(pulled, torch.einsum("bmn,bm->bn", whole, v)) <= 1e-12
    assert far(torch.stack([vjp(box, *pair, **options) for pair in zip(x, v, strict=True)]), pulled) <= bound


@every_method
@pytest.mark.parametrize("seed", range(3))
def test_float32(method: str, seed: int) -> None:
    mask = random_pattern(30, 30, 3, seed)
    box, x = Smooth(mask, seed), points(4, 30, seed, torch.float32)
    found = jacobian(box, x, pattern=mask, method=method)
    assert found.dtype == torch.float32
    assert far(found, box.jacobian(x)) <= 2e-4


def test_a_float32_box_behind_float64_inputs_is_stepped_as_such() -> None:
    mask = random_pattern(20, 20, 3)
    box, x = Smooth(mask), points(4, 20)
    found = jacobian(lambda a: box(a.astype(np.float32)), x, pattern=mask, difference="forward")
    leaf = x.clone().requires_grad_()
    layer = BlackBox(lambda a: box(a.astype(np.float32)), pattern=mask)
    v = torch.autograd.grad(layer(leaf).sum(), leaf)[0]
    assert far(found, box.jacobian(x)) <= 2e-2
    assert far(v, box.jacobian(x).sum(1)) <= 2e-4


@every_method
@pytest.mark.parametrize("scale", [1e-6, 1e-3, 1e3, 1e6])
def test_large_and_small_inputs(method: str, scale: float) -> None:
    """A box of inputs in other units has the same Jacobian in these: small ones are named by `x_scale`, large ones are seen."""
    mask = random_pattern(8, 8, 3)
    box, x = Smooth(mask), points(3, 8) + torch.tensor(3.0)
    named: dict[str, Any] = {"x_scale": scale} if scale < 1 else {}
    found = jacobian(lambda a: box(a / scale), x * scale, pattern=mask, method=method, **named)
    assert far(found * scale, box.jacobian(x)) <= 1e-7


@every_method
def test_inputs_of_unlike_scales(method: str) -> None:
    mask = random_pattern(8, 8, 3)
    scale = torch.logspace(-6, 6, 8, dtype=torch.float64)
    box, x = Smooth(mask), points(3, 8)
    found = jacobian(lambda a: box(a / scale.numpy()), x * scale, pattern=mask, method=method, x_scale=scale)
    assert far(found * scale, box.jacobian(x)) <= 1e-7


@pytest.mark.parametrize("step", [1e-5, torch.full((8,), 1e-5), np.full(8, 1e-5)], ids=["number", "tensor", "array"])
def test_a_step_of_ones_own(step: Any) -> None:
    mask = random_pattern(8, 8, 3)
    box, x = Smooth(mask), points(3, 8)
    seen = Counted(box)
    assert far(jacobian(seen, x, pattern=mask, method="dense", step=step), box.jacobian(x)) <= 1e-8
    assert seen.high is not None
    assert np.allclose(seen.high - x.numpy().max(0), 1e-5, rtol=1e-4)


@pytest.mark.parametrize("seed", range(3))
def test_the_promises_of_known_patterns(seed: int) -> None:
    """Calls and errors that users are told: SciPy with the pattern takes 11 calls for the first, numdifftools 3001."""
    thin = random_pattern(100, 100, 3, seed)
    smooth, x = Smooth(thin, seed), points(1, 100, seed)
    box = Counted(smooth)
    assert far(jacobian(box, x, pattern=thin), smooth.jacobian(x)) <= 1e-9
    assert box.since() <= 8

    wide = random_pattern(200, 200, 10, seed)
    smooth, x = Smooth(wide, seed), points(1, 200, seed)
    box = Counted(smooth)
    assert far(jacobian(box, x, pattern=wide), smooth.jacobian(x)) <= 1e-8
    assert box.since() <= 24  # 12 probes of two calls


def test_the_promise_of_symmetry() -> None:
    n = 100
    mask = arrow(n)
    half = Smooth(mask).matrix.triu()
    matrix = half + half.triu(1).T
    box = Counted(Linear(matrix))
    found = jacobian(box, points(1, n), pattern=mask, structure="symmetric", difference="forward", step=1.0)
    assert far(found[0], matrix) <= 1e-9
    assert box.since() <= 3 + 1


def test_layouts() -> None:
    mask = random_pattern(7, 9, 2)
    box, x = Smooth(mask), points(3, 9)
    dense = jacobian(box, x, pattern=mask)
    for given, wanted in ((x, dense), (x[0], dense[0])):
        sparse = jacobian(box, given, pattern=mask, layout="coo")
        assert sparse.layout == torch.sparse_coo
        assert sparse.is_coalesced()
        assert sparse.indices().shape[1] == int(mask.sum()) * (len(x) if given.ndim == 2 else 1)
        assert far(sparse.to_dense(), wanted) <= 1e-9
    whole = jacobian(box, x, method="dense", layout="coo")
    assert far(whole.to_dense(), dense) <= 1e-8


def test_a_large_band_stays_sparse() -> None:
    """As a dense batch its Jacobians would take 25 GB."""
    n = 20_000

    def box(x: np.ndarray) -> np.ndarray:
        y = x**2
        y[:, 1:] += 0.5 * x[:, :-1]
        return y

    layer = BlackBox(box, pattern=Pattern.banded(n), out_features=n)
    x = points(8, n).requires_grad_()
    layer(x).sum().backward()
    assert x.grad is not None
    right = 2 * x.detach()
    right[:, :-1] += 0.5
    assert float((x.grad - right).abs().max()) <= 1e-6
    assert layer.plan is not None
    assert layer.plan.probes <= 4
    found = jacobian(box, x.detach(), pattern=Pattern.banded(n), layout="coo")
    assert found.values().numel() == 8 * (3 * n - 2)
