"""No probe leaves the bounds of a box; near them differences are one-sided, outside of them nothing is done."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from boxes import Counted, Noisy, Smooth, arrow, far, points, random_pattern

from beyondprop.func.sensing import detect_pattern, jacobian, verify, vjp
from beyondprop.nn import BlackBox

MASK = random_pattern(9, 9, 3)
SETTINGS: dict[str, dict[str, Any]] = {
    "coloring": {"pattern": MASK, "method": "coloring"},
    "regression": {"pattern": MASK, "method": "regression"},
    "dense": {"method": "dense"},
    "spsa": {"method": "spsa", "probes": 9},
    "discover": {"pattern": "discover"},
    "estimate": {"pattern": MASK, "noise": "estimate"},
    "wide step": {"pattern": MASK, "step": 0.3},
    "noise": {"pattern": MASK, "noise": 0.1},
}
every_setting = pytest.mark.parametrize("options", SETTINGS.values(), ids=SETTINGS.keys())


def _inside(low: float, high: float, dtype: torch.dtype) -> torch.Tensor:
    x = points(6, 9, dtype=dtype).clamp(low, high)
    x[0], x[1] = low, high
    return x


@every_setting
@pytest.mark.parametrize("difference", ["central", "forward"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("form", ["numbers", "tensors", "arrays"])
def test_no_call_is_outside(options: dict[str, Any], difference: str, dtype: torch.dtype, form: str) -> None:
    low, high = -0.7, 0.1  # neither is a float32
    x = _inside(low, high, dtype)
    box = Counted(Smooth(MASK))
    bounds: Any = (low, high)
    if form != "numbers":
        bounds = tuple(torch.full((9,), b, dtype=torch.float64) for b in bounds)
    if form == "arrays":
        bounds = tuple(b.numpy() for b in bounds)
    jacobian(box, x, bounds=bounds, difference=difference, **options)
    assert box.low is not None
    assert box.high is not None
    assert bool((box.low >= x.numpy().dtype.type(low)).all())
    assert bool((box.high <= x.numpy().dtype.type(high)).all())
    assert box.rows > len(x)


@pytest.mark.parametrize("method", ["coloring", "regression", "dense"])
@pytest.mark.parametrize("difference", ["central", "forward"])
def test_at_a_bound_differences_are_one_sided(method: str, difference: str) -> None:
    smooth, x = Smooth(MASK), _inside(-0.7, 0.1, torch.float64)
    found = jacobian(smooth, x, pattern=MASK, method=method, bounds=(-0.7, 0.1), difference=difference)
    assert far(found, smooth.jacobian(x)) <= 1e-5
    linear = smooth.matrix
    found = jacobian(
        lambda a: a @ linear.numpy().T, x, pattern=MASK, method=method, bounds=(-0.7, 0.1), difference=difference
    )
    assert far(found, linear.expand_as(found)) <= (1e-9 if difference == "central" else 1e-7)


@pytest.mark.parametrize("seed", range(3))
def test_the_mean_of_random_directions_is_unbiased_at_bounds(seed: int) -> None:
    """Nine orthogonal directions of nine inputs say all; where half of each is cut off, it is to say no less."""
    matrix = Smooth(MASK).matrix
    x = torch.zeros(4, 9, dtype=torch.float64)
    v = points(4, 9, seed)
    torch.manual_seed(seed)
    found = torch.stack([
        vjp(lambda a: a @ matrix.numpy().T, x, v, method="spsa", probes=9, bounds=(0, 1)) for _ in range(60)
    ]).mean(0)
    right = v @ matrix
    assert abs(float((found * right).sum() / right.square().sum()) - 1) <= 0.1


def test_arrow_symmetric_at_bounds() -> None:
    half = Smooth(arrow(12)).matrix.triu()
    matrix = half + half.triu(1).T
    box = Counted(lambda a: a @ matrix.numpy())
    x = points(3, 12).clamp(-0.2, 0.2)
    found = jacobian(box, x, pattern=arrow(12), structure="symmetric", bounds=(-0.2, 0.2))
    assert far(found, matrix.expand_as(found)) <= 1e-8
    assert box.low is not None
    assert box.high is not None
    assert box.low.min() >= -0.2
    assert box.high.max() <= 0.2


def test_bounds_of_single_inputs_and_on_one_side() -> None:
    smooth, x = Smooth(MASK), points(5, 9)
    low = torch.full((9,), -np.inf)
    low[2] = float(x[:, 2].min())
    box = Counted(smooth)
    assert far(jacobian(box, x, pattern=MASK, bounds=(low, np.inf)), smooth.jacobian(x)) <= 1e-5
    assert box.low is not None
    assert box.low[2] >= float(low[2])
    assert far(jacobian(smooth, x.abs(), pattern=MASK, bounds=(0, None)), smooth.jacobian(x.abs())) <= 1e-5


def test_a_root_of_what_must_not_be_negative() -> None:
    def box(x: np.ndarray) -> np.ndarray:
        assert x.min() >= 0
        return np.sqrt(x + 1e-2)

    x = torch.tensor([[0.0, 0.5, 1.0]], dtype=torch.float64).requires_grad_()
    layer = BlackBox(box, pattern=torch.eye(3), bounds=(0, 1))
    layer(x).sum().backward()
    assert x.grad is not None
    assert far(x.grad, 0.5 / (x.detach() + 1e-2).sqrt()) <= 1e-3


def test_verification_and_discovery_stay_inside() -> None:
    box = Counted(Smooth(MASK))
    x = points(8, 9).clamp(-0.3, 0.3)
    assert verify(box, x, pattern=MASK, bounds=(-0.3, 0.3))
    assert torch.equal(detect_pattern(box, x, bounds=(-0.3, 0.3)).pattern.mask(), MASK)
    assert box.low is not None
    assert box.high is not None
    assert box.low.min() >= -0.3
    assert box.high.max() <= 0.3


def test_a_noisy_box_at_its_bounds() -> None:
    smooth, x = Smooth(MASK), points(8, 9).clamp(0, 1)  # half of all inputs are at a bound
    found = jacobian(Noisy(smooth, 1e-4), x, pattern=MASK, noise=1e-4, bounds=(0, 1))
    assert far(found, smooth.jacobian(x)) <= 0.05


@pytest.mark.parametrize("difference", ["central", "forward"])
@pytest.mark.parametrize("per_row", [1, 2, 4])
@pytest.mark.parametrize("seed", range(4))
def test_wrong_calls_are_told_from_those_that_bounds_hold_back(per_row: int, difference: str, seed: int) -> None:
    """Where all inputs are at a bound, half of the calls do not move: they tell nothing of a slope, and are no majority."""
    mask = random_pattern(23, 9, per_row, seed)
    smooth, x = Smooth(mask, seed), _inside(-0.5, 0.5, torch.float64)
    found = jacobian(smooth, x, pattern=mask, method="robust", bounds=(-0.5, 0.5), difference=difference)
    assert far(found, smooth.jacobian(x)) <= 1e-4


@pytest.mark.parametrize("method", ["coloring", "regression", "dense"])
@pytest.mark.parametrize("noise", [1e-6, "estimate"])
@pytest.mark.parametrize("seed", range(3))
def test_the_step_at_bounds_is_no_longer_than_bends_allow(noise: Any, method: str, seed: int) -> None:
    mask = random_pattern(3, 23, 2, seed)
    smooth, x = Smooth(mask, seed), points(5, 23, seed).clamp(-0.5, 0.5)
    box = Noisy(smooth, 1e-6, seed)
    found = jacobian(box, x, pattern=mask, method=method, bounds=(-0.5, 0.5), noise=noise)
    assert far(found, smooth.jacobian(x)) <= 0.02


# ---- what lies outside, and what is no bound -----------------------------------------------------------------------------


def test_inputs_outside_are_refused_before_a_call() -> None:
    box = Counted(Smooth(MASK))
    x = points(3, 9).clamp(-1, 1)
    x[1, 4] = 1.5
    with pytest.raises(
        ValueError, match=r"Input 4 of sample 1 is 1.5, outside the bounds .* clamp the inputs, or widen"
    ):
        jacobian(box, x, pattern=MASK, bounds=(-1, 1))
    layer = BlackBox(box, pattern=MASK, bounds=(-1, 1))
    with pytest.raises(ValueError, match="outside the bounds"):
        layer(x)
    assert box.rows == 0


@pytest.mark.parametrize(
    ("bounds", "match"),
    [
        ((1, 0), "low < high"),
        ((0, 0), "low < high"),
        ((0, float("nan")), "low < high"),
        (3.0, r"bounds must be \(low, high\)"),
        ((0, 1, 2), r"bounds must be \(low, high\)"),
        ((torch.zeros(4), 1), "bounds must be one number or 9, one for each input, got 4"),
    ],
)
def test_what_is_no_bound(bounds: Any, match: str) -> None:
    with pytest.raises((ValueError, TypeError), match=match):
        jacobian(Smooth(MASK), points(2, 9) * 0, pattern=MASK, bounds=bounds)


@pytest.mark.parametrize("name", ["step", "x_scale"])
@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), torch.zeros(9), torch.ones(4), "large"])
def test_what_is_no_step_or_scale(name: str, value: Any) -> None:
    with pytest.raises((ValueError, TypeError), match=name):
        jacobian(Smooth(MASK), points(2, 9), pattern=MASK, **{name: value})
