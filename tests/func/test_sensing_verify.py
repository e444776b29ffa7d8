"""What `verify` says: right Jacobians pass, with noise and without, and every missing entry is found and named."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from boxes import Linear, Noisy, Smooth, arrow, points, random_pattern

from beyondprop.func.sensing import detect_pattern, verify
from beyondprop.nn import BlackBox

MASK = random_pattern(15, 20, 3)
SMOOTH = Smooth(MASK)
METHODS: dict[str, dict[str, Any]] = {
    "auto": {"pattern": MASK},
    "coloring": {"pattern": MASK, "method": "coloring"},
    "regression": {"pattern": MASK, "method": "regression"},
    "dense": {"method": "dense"},
    "discover": {"pattern": "discover"},
}
every_method = pytest.mark.parametrize("options", METHODS.values(), ids=METHODS.keys())
every_difference = pytest.mark.parametrize("difference", ["central", "forward"])


@every_method
@every_difference
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rows", [1, 6])
def test_right_jacobians_pass(options: dict[str, Any], difference: str, dtype: torch.dtype, rows: int) -> None:
    report = verify(SMOOTH, points(rows, 20, dtype=dtype), difference=difference, **options)
    assert report
    assert report.ok
    assert not len(report.wrong)
    assert report.residual.shape == report.expected.shape == (15,)
    assert "ok" in repr(report)


@every_difference
@pytest.mark.parametrize("method", ["coloring", "regression", "dense"])
@pytest.mark.parametrize("sigma", [1e-5, 1e-3, 1e-1])
@pytest.mark.parametrize("seed", range(3))
def test_right_jacobians_of_noisy_boxes_pass(sigma: float, method: str, difference: str, seed: int) -> None:
    for noise in (sigma, "estimate"):
        noisy = Noisy(SMOOTH, sigma, seed)
        assert verify(noisy, points(8, 20, seed), pattern=MASK, method=method, noise=noise, difference=difference)


@pytest.mark.parametrize("method", ["coloring", "regression", "dense"])
@pytest.mark.parametrize("sigma", [0.0, 1e-3])
@pytest.mark.parametrize("rows", [1, 6])
@pytest.mark.filterwarnings("ignore:Directional derivatives")
def test_every_missing_entry_is_found(method: str, sigma: float, rows: int) -> None:
    box = Noisy(SMOOTH, sigma)
    for index in range(0, int(MASK.sum()), 7):
        row, column = torch.nonzero(MASK)[index].tolist()
        lacking = MASK.clone()
        lacking[row, column] = False
        report = verify(box, points(rows, 20), pattern=lacking, method=method, noise=sigma or None)
        assert not report
        assert row in report.wrong.tolist()
        assert sigma or report.wrong.tolist() == [row]
        assert "1 of 15 outputs wrong" in repr(report) or sigma


@pytest.mark.filterwarnings("ignore:Directional derivatives")
def test_the_worst_output_comes_first() -> None:
    lacking = MASK.clone()
    lacking[4] = False
    lacking[9, torch.nonzero(MASK[9]).flatten()[0]] = False
    report = verify(SMOOTH, points(6, 20), pattern=lacking)
    assert report.wrong.tolist() == [4, 9]
    assert float(report.residual[4]) == pytest.approx(1.0)
    assert repr(report).startswith("Verification(2 of 15 outputs wrong: 4 (100%), 9 (")


@pytest.mark.filterwarnings("ignore:Directional derivatives")
def test_a_wrong_tie_is_found() -> None:
    matrix = Smooth(arrow(10)).matrix  # its pattern is symmetric, its entries are not
    assert not verify(Linear(matrix), points(4, 10), pattern=arrow(10), structure="symmetric")
    assert verify(Linear(matrix + matrix.T), points(4, 10), pattern=arrow(10), structure="symmetric")


def test_an_estimate_from_random_directions_has_nothing_to_compare() -> None:
    with pytest.raises(ValueError, match=r"method='spsa' gives an estimate .*take another method"):
        verify(SMOOTH, points(4, 20), method="spsa")


def test_outputs_that_do_not_move_have_no_direction_to_be_wrong_in() -> None:
    box = Linear(torch.zeros(3, 20), shift=1e6)
    assert verify(box, points(4, 20), pattern=torch.zeros(3, 20))
    mixed = Linear(torch.cat([torch.zeros(2, 20), torch.ones(1, 20)]), shift=1e3)
    assert verify(mixed, points(4, 20), method="dense")


def test_tolerance_and_probes() -> None:
    x = points(4, 20)
    loose = torch.tensor(1e-6)
    box = Linear(torch.where(MASK, SMOOTH.matrix, 1e-4))  # thin entries everywhere
    assert verify(box, x, pattern=MASK, tolerance=1e-2)
    assert not verify(box, x, pattern=MASK, tolerance=float(loose))
    with pytest.raises(ValueError, match="n_probes must be an integer >= 1"):
        verify(box, x, pattern=MASK, n_probes=0)


def test_rows_that_look_at_each_other_are_found() -> None:
    """A box that normalises its batch has no Jacobian of single rows."""

    def box(x: np.ndarray) -> np.ndarray:
        return x - x.mean(0)

    report = verify(box, points(5, 6), pattern=torch.eye(6))
    assert not report
    assert "row" in repr(report)
    assert verify(lambda x: x - x.mean(1, keepdims=True), points(5, 6))


@every_method
def test_a_layer_verifies_itself(options: dict[str, Any]) -> None:
    layer = BlackBox(SMOOTH, **options)
    x = points(6, 20).requires_grad_()
    assert layer.verify(x)
    layer(x).sum().backward()
    assert layer.verify(x.detach(), n_probes=1)
    assert x.grad is not None  # and nothing of the graph was touched


@pytest.mark.filterwarnings("ignore::beyondprop.errors.SensingWarning")
def test_what_was_found_can_be_trusted_or_is_said_not_to_be() -> None:
    """The complaint about automatic detection: that one cannot know whether it was right."""
    for seed in range(4):
        mask = random_pattern(30, 30, 3 + seed, seed)
        box, x = Smooth(mask, seed), points(8, 30, seed)
        found = detect_pattern(box, x)
        assert verify(box, points(8, 30, seed + 100), pattern=found.pattern)
        poor = detect_pattern(box, x[:2], probes=3)
        missing = bool((mask & ~poor.pattern.mask()).any())
        assert not missing or not verify(box, x, pattern=poor.pattern)
