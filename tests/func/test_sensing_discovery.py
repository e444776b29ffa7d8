"""Patterns that are found: exact where a batch shows them, doubted aloud where it does not."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from boxes import Counted, Noisy, Smooth, band, far, points, random_pattern
from torch import Tensor

from beyondprop.errors import SensingWarning
from beyondprop.func.sensing import Pattern, detect_pattern, jacobian
from beyondprop.nn import BlackBox


@pytest.mark.parametrize("seed", range(3))
def test_the_promise(seed: int) -> None:
    """64 samples, 5 nonzeros in each of 200 rows: every support exact with 8 probes a sample."""
    mask = random_pattern(200, 200, 5, seed)
    box = Counted(Smooth(mask, seed))
    found = detect_pattern(box, points(64, 200, seed), sparsity=5)
    assert found.probes <= 8
    assert box.since() == 64 * (1 + 2 * found.probes)
    assert torch.equal(found.pattern.mask(), mask)
    assert not len(found.unexplained)
    assert float(found.residual.max()) < 1e-5


FORMS = {
    "band": band(60, 60),
    "wide": random_pattern(30, 90, 4),
    "tall": random_pattern(90, 30, 3),
    "unlike rows": torch.rand(60, 60, generator=torch.Generator().manual_seed(0)) < 0.05,
    "nothing": torch.zeros(5, 40, dtype=torch.bool),
    "small": random_pattern(4, 3, 2),
    "one": torch.ones(1, 1, dtype=torch.bool),
    "full": torch.ones(6, 8, dtype=torch.bool),
}


@pytest.mark.parametrize("mask", FORMS.values(), ids=FORMS.keys())
@pytest.mark.parametrize("rows", [1, 16])
def test_forms(mask: Tensor, rows: int) -> None:
    found = detect_pattern(Smooth(mask), points(rows, mask.shape[1]))
    assert torch.equal(found.pattern.mask(), mask)
    assert found.probes <= mask.shape[1]


def test_more_rows_need_fewer_probes() -> None:
    mask = random_pattern(100, 100, 4)
    probes = [detect_pattern(Smooth(mask), points(rows, 100), sparsity=4).probes for rows in (1, 8, 64)]
    assert probes[0] > probes[1] >= probes[2]


def test_a_dense_row_among_sparse_ones() -> None:
    mask = random_pattern(80, 80, 3)
    mask[11] = True
    found = detect_pattern(Smooth(mask), points(32, 80))
    assert torch.equal(found.pattern.mask() | mask, found.pattern.mask()), "an entry is missing"
    assert bool(found.pattern.mask()[11].all())
    others = torch.arange(80) != 11
    assert torch.equal(found.pattern.mask()[others], mask[others])


@pytest.mark.parametrize("sigma", [1e-6, 1e-3])
@pytest.mark.parametrize("seed", range(3))
def test_noise_hides_no_entry_and_adds_few(sigma: float, seed: int) -> None:
    mask = random_pattern(60, 60, 4, seed)
    found = detect_pattern(Noisy(Smooth(mask, seed), sigma), points(32, 60, seed), noise=sigma)
    mine = found.pattern.mask()
    assert not bool((mask & ~mine).any())
    assert int((mine & ~mask).sum()) <= 0.02 * int(mask.sum())


def test_float32_boxes() -> None:
    mask = random_pattern(60, 60, 4)
    found = detect_pattern(Smooth(mask), points(32, 60, dtype=torch.float32))
    assert torch.equal(found.pattern.mask(), mask)


def test_what_is_found_is_used_and_equals_what_was_given() -> None:
    mask = random_pattern(40, 50, 3)
    box, x = Smooth(mask), points(16, 50)
    layer, told = BlackBox(box, pattern="discover", sparsity=3), BlackBox(box, pattern=mask)
    grads = []
    for each in (layer, told):
        leaf = x.clone().requires_grad_()
        each(leaf).square().sum().backward()
        grads.append(leaf.grad)
    assert layer.pattern == Pattern(mask)
    assert layer.plan is not None
    assert told.plan is not None
    assert layer.plan.probes == told.plan.probes
    assert far(grads[0], grads[1]) <= 1e-8
    assert far(jacobian(box, x, pattern="discover"), box.jacobian(x)) <= 1e-8
    reused = detect_pattern(box, x).pattern
    assert far(jacobian(box, x, pattern=reused), box.jacobian(x)) <= 1e-8
    assert "4" in repr(detect_pattern(box, x))
    assert "residual" in repr(detect_pattern(box, x))


@pytest.mark.parametrize("method", ["auto", "coloring", "regression"])
def test_a_pattern_that_a_special_batch_hides_is_widened_by_the_next(method: str) -> None:
    """Products have no derivative at 0: a pattern found there lacks entries, and the next batch tells."""

    def box(x: np.ndarray) -> np.ndarray:
        return x * np.roll(x, 1, 1) + x

    layer = BlackBox(box, pattern="discover", method=method)
    layer(torch.zeros(8, 40, dtype=torch.float64).requires_grad_()).sum().backward()
    assert layer.pattern == Pattern(torch.eye(40))
    for seed in range(3):
        x = points(8, 40, seed).requires_grad_()
        layer(x).sum().backward()
        assert x.grad is not None
        still = x.detach()
        assert far(x.grad, still.roll(1, 1) + 1 + still.roll(-1, 1)) <= 1e-8
    eye = torch.eye(40, dtype=torch.bool)
    assert layer.pattern == Pattern(eye | eye.roll(-1, 1))
    assert layer.verify(points(8, 40, 9))


def test_a_given_number_of_probes_is_kept() -> None:
    mask = random_pattern(50, 50, 3)
    box = Counted(Smooth(mask))
    found = detect_pattern(box, points(32, 50), probes=9)
    assert found.probes == 9
    assert box.since() == 32 * (1 + 2 * 9)
    assert torch.equal(found.pattern.mask(), mask)


def test_too_few_probes_are_said_to_be() -> None:
    """Rows that they do not explain are taken as dense, or there is a warning: nobody is left with zeros in silence."""
    mask = random_pattern(50, 50, 8)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = detect_pattern(Smooth(mask), points(4, 50), probes=5)
    assert len(found.unexplained) > 40
    assert f"{len(found.unexplained)} outputs" in repr(found)
    lacking = (mask & ~found.pattern.mask())[found.unexplained].any()
    assert not bool(lacking) or any(issubclass(each.category, SensingWarning) for each in said)


def test_discovery_is_repeatable_and_leaves_the_global_generator_alone() -> None:
    mask = random_pattern(30, 30, 3)
    state = torch.get_rng_state()
    first, second = (detect_pattern(Smooth(mask), points(8, 30)) for _ in range(2))
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(first.residual, second.residual)
    assert first.pattern == second.pattern
