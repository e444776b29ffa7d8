"""Methods for wrong calls (`robust`, `rainbow`) and for sparse rows of unknown pattern (`l1`), by the public functions."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from boxes import Counted, Linear, Noisy, Smooth, far, points, random_pattern

from beyondprop.errors import BlackBoxError, SensingWarning
from beyondprop.func.sensing import jacobian, verify, vjp
from beyondprop.nn import BlackBox

MASK = random_pattern(40, 40, 3)
SMOOTH = Smooth(MASK)


class Corrupted:
    """A box that returns garbage in a share of its calls, or in single numbers, or NaN; never in the first `spared` calls."""

    def __init__(self, fn: Any, share: float, how: str = "calls", seed: int = 0, spared: int = 0) -> None:
        self.fn, self.share, self.how, self.spared = fn, share, how, spared
        self.rng = np.random.default_rng(seed)

    def __call__(self, x: np.ndarray) -> np.ndarray:
        y = self.fn(x)
        wrong = self.rng.random(y.shape if self.how == "numbers" else (len(y), 1)) < self.share
        wrong = np.broadcast_to(wrong, y.shape).copy()
        left = max(0, self.spared)
        self.spared -= len(y)
        wrong[:left] = False
        garbage = (
            np.full_like(y, np.nan) if self.how == "nan" else 50 * self.rng.standard_normal(y.shape).astype(y.dtype)
        )
        return np.where(wrong, garbage, y)


@pytest.mark.parametrize("how", ["calls", "numbers"])
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.filterwarnings("ignore:Directional derivatives")  # of the rival
def test_the_promise_of_robustness(how: str, seed: int) -> None:
    """20 % of the calls are garbage of scale 50 and 40 probes are taken: the error is below 1e-3."""
    mask = random_pattern(100, 100, 5, seed)
    smooth, x = Smooth(mask, seed), points(4, 100, seed)
    box = Corrupted(smooth, 0.2, how, seed)
    found = jacobian(box, x, pattern=mask, method="robust", probes=40)
    assert far(found, smooth.jacobian(x)) < 1e-3
    least_squares = jacobian(Corrupted(smooth, 0.2, how, seed), x, pattern=mask, method="dense")
    assert far(least_squares, smooth.jacobian(x)) > 1e3


@pytest.mark.parametrize("difference", ["central", "forward"])
@pytest.mark.parametrize("share", [0.0, 0.05, 0.15])
def test_the_default_number_of_probes_withstands(share: float, difference: str) -> None:
    box, x = Corrupted(SMOOTH, share), points(6, 40)
    found = jacobian(box, x, pattern=MASK, method="robust", difference=difference)
    assert far(found, SMOOTH.jacobian(x)) <= (1e-6 if difference == "central" else 1e-3)


@pytest.mark.parametrize("seed", range(3))
def test_noise_and_garbage(seed: int) -> None:
    x = points(6, 40, seed)
    box = Corrupted(Noisy(SMOOTH, 1e-3, seed), 0.15, seed=seed)
    found = jacobian(box, x, pattern=MASK, method="robust", probes=40, step=0.1, noise=1e-3)
    assert far(found, SMOOTH.jacobian(x)) <= 0.05


def test_calls_without_a_result_are_wrong_ones_too() -> None:
    x = points(6, 40)
    found = jacobian(Corrupted(SMOOTH, 0.15, "nan"), x, pattern=MASK, method="robust", on_nan="drop")
    assert far(found, SMOOTH.jacobian(x)) <= 1e-6
    with pytest.raises(BlackBoxError, match=r"NaN or Inf.* on_nan='drop'"):
        jacobian(Corrupted(SMOOTH, 0.15, "nan"), x, pattern=MASK, method="robust")


def test_a_net_trains_through_wrong_calls() -> None:
    """Only the values are spared: those no method can mend."""
    found = []
    for share in (0.0, 0.15):
        torch.manual_seed(0)
        box = Corrupted(SMOOTH, share)
        layer = BlackBox(box, pattern=MASK, method="robust")
        model = torch.nn.Sequential(torch.nn.Linear(5, 40), layer, torch.nn.Linear(40, 1)).double()
        optimizer = torch.optim.SGD(model.parameters(), 1e-3)
        for step in range(5):
            optimizer.zero_grad()
            box.spared = 8
            model(points(8, 5, step)).square().mean().backward()
            optimizer.step()
        found.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert far(found[1], found[0]) <= 1e-6


# ---- rainbow -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("per_row", [1, 2, 5, 8])
@pytest.mark.parametrize("seed", range(2))
def test_rainbow(per_row: int, seed: int) -> None:
    mask = random_pattern(30, 25, per_row, seed)
    smooth, x = Smooth(mask, seed), points(4, 25, seed)
    found = jacobian(smooth, x, pattern=mask, method="rainbow")
    assert far(found, smooth.jacobian(x)) <= 1e-7
    linear = Linear(smooth.matrix)
    assert far(jacobian(linear, x, pattern=mask, method="rainbow", step=1.0)[0], smooth.matrix) <= 1e-9


# ---- l1 ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sparsity", [2, 4])
@pytest.mark.parametrize("difference", ["central", "forward"])
def test_rows_of_unknown_pattern(sparsity: int, difference: str) -> None:
    mask = random_pattern(60, 120, sparsity)
    smooth, x = Smooth(mask), points(3, 120)
    box = Counted(smooth)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = jacobian(box, x, sparsity=sparsity, difference=difference)
    right = smooth.jacobian(x)
    bad = (found - right).norm(dim=2) > (1e-6 if difference == "central" else 1e-3) * right.norm(dim=2)
    # One row in a thousand takes more probes: then it is said.
    assert int(bad.sum()) <= 1
    assert not bool(bad.any()) or any(issubclass(each.category, SensingWarning) for each in said)
    assert box.rows < 3 * 120


def test_noisy_rows_of_unknown_pattern() -> None:
    mask = random_pattern(60, 120, 3)
    smooth, x = Smooth(mask), points(8, 120)
    found = jacobian(Noisy(smooth, 1e-4), x, method="l1", sparsity=3, noise=1e-4)
    assert far(found, smooth.jacobian(x)) <= 0.05


def test_many_probes_for_few_inputs_become_dense_ones() -> None:
    mask = random_pattern(10, 12, 4)
    layer = BlackBox(Smooth(mask), sparsity=4)
    layer(points(2, 12).requires_grad_()).sum().backward()
    assert layer.plan is not None
    assert layer.plan.method == "dense"
    assert "more than half" in layer.plan.reason


# ---- all of them ---------------------------------------------------------------------------------------------------------

SETTINGS: dict[str, dict[str, Any]] = {
    "robust": {"pattern": MASK, "method": "robust"},
    "robust, 20": {"pattern": MASK, "method": "robust", "probes": 20},
    "rainbow": {"pattern": MASK, "method": "rainbow"},
    "l1": {"method": "l1", "sparsity": 3},
    "l1, 25": {"method": "l1", "probes": 25},
}
every_setting = pytest.mark.parametrize("options", SETTINGS.values(), ids=SETTINGS.keys())
both = pytest.mark.parametrize("difference", ["central", "forward"])


@every_setting
@both
@pytest.mark.parametrize("rows", [1, 5])
def test_calls_are_those_of_the_plan(options: dict[str, Any], difference: str, rows: int) -> None:
    box = Counted(SMOOTH)
    layer = BlackBox(box, difference=difference, **options)
    x = points(rows, 40).requires_grad_()
    for _ in range(3):
        layer(x).square().sum().backward()
        assert layer.plan is not None
        assert layer.plan.calls == layer.plan.probes * (2 if difference == "central" else 1)
        assert box.since() == rows * (1 + layer.plan.calls)
    assert layer.stats.setup == 0


@every_setting
@both
def test_gradients_are_those_of_the_twin(options: dict[str, Any], difference: str) -> None:
    x = points(5, 40)
    leaf, twin = x.clone().requires_grad_(), x.clone().requires_grad_()
    BlackBox(SMOOTH, difference=difference, **options)(leaf).square().sum().backward()
    SMOOTH.torch(twin).square().sum().backward()
    assert leaf.grad is not None
    assert twin.grad is not None
    assert far(leaf.grad, twin.grad) <= (1e-6 if difference == "central" else 1e-3)


@every_setting
def test_batches_floats_and_bounds(options: dict[str, Any]) -> None:
    x = points(4, 40)
    whole = jacobian(SMOOTH, x, **options)
    assert far(torch.stack([jacobian(SMOOTH, row, **options) for row in x]), whole) <= 1e-7
    v = points(4, 40, 3)
    assert far(vjp(SMOOTH, x, v, **options), torch.einsum("bmn,bm->bn", whole, v)) <= 1e-9
    floats = jacobian(SMOOTH, x.float(), **options)
    assert far(floats, SMOOTH.jacobian(x)) <= 1e-3
    box = Counted(SMOOTH)
    inside = x.clamp(-0.5, 0.5)
    near = jacobian(box, inside, bounds=(-0.5, 0.5), **options)
    assert far(near, SMOOTH.jacobian(inside)) <= 1e-3
    assert box.low is not None
    assert box.high is not None
    assert (box.low.min(), box.high.max()) == (-0.5, 0.5)
    assert verify(SMOOTH, x, **options)


@pytest.mark.parametrize("method", ["robust", "rainbow"])
def test_patterns_with_gaps_and_of_other_shapes(method: str) -> None:
    gaps = random_pattern(9, 12, 2)
    gaps[3] = False
    gaps[:, 5] = False
    full_row = torch.eye(8, dtype=torch.bool)
    full_row[2] = True
    for mask in (
        gaps,
        full_row,
        torch.zeros(3, 4, dtype=torch.bool),
        torch.ones(1, 1, dtype=torch.bool),
        torch.ones(4, 2) > 0,
    ):
        smooth, x = Smooth(mask), points(3, mask.shape[1])
        found = jacobian(smooth, x, pattern=mask, method=method)
        assert float((found - smooth.jacobian(x)).abs().max()) <= 1e-6


@pytest.mark.parametrize("method", ["robust", "rainbow"])
def test_too_few_probes_are_named(method: str) -> None:
    with pytest.raises(ValueError, match="probes"):
        jacobian(SMOOTH, points(2, 40), pattern=MASK, method=method, probes=2)
