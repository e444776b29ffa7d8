"""Noisy boxes: the noise is found, the step fits it, common random numbers take it away."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from boxes import Counted, Noisy, Smooth, far, points, random_pattern
from torch import Tensor

from beyondprop.errors import SensingWarning
from beyondprop.func.sensing import jacobian, verify
from beyondprop.nn import BlackBox

MASK = random_pattern(20, 20, 3)


def _found(box: Any, dtype: torch.dtype = torch.float64, rows: int = 8, **options: Any) -> BlackBox:
    layer = BlackBox(box, pattern=MASK, noise="estimate", **options)
    layer(points(rows, 20, dtype=dtype).requires_grad_()).sum().backward()
    return layer


@pytest.mark.parametrize("difference", ["central", "forward"])
@pytest.mark.parametrize("sigma", [1e-8, 1e-4, 1e-2, 1.0])
@pytest.mark.parametrize("seed", range(3))
def test_the_noise_is_found_within_a_factor_of_two(sigma: float, difference: str, seed: int) -> None:
    layer = _found(Noisy(Smooth(MASK), sigma, seed), difference=difference)
    assert layer.info.noise is not None
    assert sigma / 2 <= layer.info.noise <= 2 * sigma


def test_rounding_inside_a_float64_box_is_found_as_noise() -> None:
    smooth = Smooth(MASK)
    layer = _found(lambda a: smooth(a.astype(np.float32)).astype(np.float64))
    wanted = smooth(points(8, 20).numpy())
    inside = smooth(points(8, 20).numpy().astype(np.float32)) - wanted
    rounding = float(np.sqrt(np.square(inside).mean()))
    assert layer.info.noise is not None
    assert rounding / 3 <= layer.info.noise <= 3 * rounding


@pytest.mark.parametrize("method", ["coloring", "regression", "dense"])
@pytest.mark.parametrize("difference", ["central", "forward"])
@pytest.mark.parametrize("digits", [3, 6])
def test_rounded_outputs_are_found_as_noise(digits: int, difference: str, method: str) -> None:
    """What a simulator prints with a few digits: small steps see nothing, or a jump."""
    smooth, x = Smooth(MASK), points(8, 20)
    found = jacobian(
        lambda a: np.round(smooth(a), digits), x, pattern=MASK, method=method, noise="estimate", difference=difference
    )
    best = 10.0**-digits
    assert far(found, smooth.jacobian(x)) <= (5 * best ** (2 / 3) if difference == "central" else 5 * best**0.5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_box_without_noise_is_not_said_to_have_any(dtype: torch.dtype) -> None:
    layer = _found(Smooth(MASK), dtype)
    assert layer.info.noise is not None
    assert layer.info.noise <= 100 * torch.finfo(dtype).eps
    box, x = Smooth(MASK), points(8, 20, dtype=dtype)
    bound = 1e-6 if dtype == torch.float64 else 1e-3
    assert far(jacobian(box, x, pattern=MASK, noise="estimate"), box.jacobian(x)) <= bound


@pytest.mark.parametrize("difference", ["central", "forward"])
@pytest.mark.parametrize("method", ["coloring", "regression", "dense"])
@pytest.mark.parametrize("sigma", [1e-6, 1e-4, 1e-2])
def test_the_automatic_step_is_near_the_best(sigma: float, method: str, difference: str) -> None:
    smooth, x = Smooth(MASK), points(16, 20)
    right = smooth.jacobian(x)
    options: dict[str, Any] = dict(pattern=MASK, method=method, difference=difference)

    def error(**more: Any) -> float:
        each = [
            far(jacobian(Noisy(smooth, sigma, seed), x, noise=sigma, **options, **more), right) for seed in range(3)
        ]
        return sorted(each)[1]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SensingWarning)  # the longest bend
        fixed = [error(step=float(step)) for step in np.logspace(-5, 0.5, 12)]
    assert error() <= 2.0 * min(fixed)
    assert error() < 0.1 * fixed[0]


def test_the_estimate_leads_to_the_step_that_knowledge_does() -> None:
    smooth, x = Smooth(MASK), points(16, 20)
    told = jacobian(Noisy(smooth, 1e-3), x, pattern=MASK, noise=1e-3)
    found = jacobian(Noisy(smooth, 1e-3), x, pattern=MASK, noise="estimate")
    right = smooth.jacobian(x)
    assert far(found, right) <= 2 * far(told, right) + 1e-3


@pytest.mark.parametrize("seed", range(3))
def test_more_probes_average_noise(seed: int) -> None:
    smooth, x = Smooth(MASK), points(16, 20)
    errors = [
        far(
            jacobian(Noisy(smooth, 1e-2, seed), x, pattern=MASK, method="regression", probes=count, noise=1e-2),
            smooth.jacobian(x),
        )
        for count in (5, 40)
    ]
    assert errors[1] < 0.8 * errors[0]


def test_noise_that_nobody_mentioned_is_noticed() -> None:
    layer = BlackBox(Noisy(Smooth(MASK), 1e-4), pattern=MASK, method="regression")
    x = points(8, 20).requires_grad_()
    with pytest.warns(SensingWarning, match="noisier than it was said to be .*noise='estimate'"):
        layer(x).sum().backward()
    layer(x).sum().backward()  # said once
    told = BlackBox(Noisy(Smooth(MASK), 1e-4), pattern=MASK, method="regression", noise=1e-4)
    told(x).sum().backward()


def test_the_step_is_measured_once_and_reported() -> None:
    box = Counted(Noisy(Smooth(MASK), 1e-3))
    layer = _found(box)
    first = (layer.info.step, layer.info.noise, layer.stats.setup)
    layer(points(8, 20, seed=5).requires_grad_()).sum().backward()
    assert (layer.info.step, layer.info.noise, layer.stats.setup) == first
    assert first[0] is not None
    assert first[0] > 1e-3
    assert layer.info.curvature is not None
    fixed = BlackBox(Noisy(Smooth(MASK), 1e-3), pattern=MASK, noise=1e-3, step=0.1)
    fixed(points(8, 20).requires_grad_()).sum().backward()
    assert fixed.stats.setup == 0  # both are known


# ---- common random numbers -----------------------------------------------------------------------------------------------


def _one_row(box: Noisy) -> Any:
    def run(row: np.ndarray, seed: int) -> np.ndarray:
        return box.seeded(row[None], seed)[0]

    return run


@pytest.mark.parametrize("difference", ["central", "forward"])
@pytest.mark.parametrize("method", ["coloring", "regression", "dense"])
@pytest.mark.parametrize("vectorized", [True, False])
def test_a_shared_seed_takes_the_noise_away(vectorized: bool, method: str, difference: str) -> None:
    noisy = Noisy(Smooth(MASK), 0.1)
    x, right = points(4, 20), noisy.fn.jacobian(points(4, 20))  # type: ignore[attr-defined]
    options: dict[str, Any] = dict(pattern=MASK, method=method, difference=difference)
    box = noisy.seeded if vectorized else _one_row(noisy)
    shared = jacobian(box, x, seed_kwarg="seed", vectorized=vectorized, **options)
    alone = jacobian(noisy, x, noise=0.1, **options)
    assert far(shared, right) <= 1e-4
    assert far(shared, right) < 1e-3 * far(alone, right)


@pytest.mark.parametrize("difference", ["central", "forward"])
def test_the_layer_shares_its_seed_from_forward_to_backward(difference: str) -> None:
    noisy, seeds = Noisy(Smooth(MASK), 0.1), []

    def box(x: np.ndarray, seed: int) -> np.ndarray:
        seeds.append(seed)
        return noisy.seeded(x, seed)

    layer = BlackBox(box, pattern=MASK, seed_kwarg="seed", difference=difference)
    x = points(4, 20).requires_grad_()
    layer(x).sum().backward()
    assert len(set(seeds)) == 1
    assert x.grad is not None
    assert far(x.grad, noisy.fn.jacobian(x.detach()).sum(1)) <= 1e-4  # type: ignore[attr-defined]
    first = seeds[0]
    layer(x)
    assert seeds[-1] != first  # each pass has noise of its own
    torch.manual_seed(3)
    layer(x)
    torch.manual_seed(3)
    layer(x)
    assert seeds[-1] == seeds[-2]


def test_a_masked_loss_keeps_rows_at_their_numbers() -> None:
    noisy = Noisy(Smooth(MASK), 0.1)
    layer = BlackBox(noisy.seeded, pattern=MASK, seed_kwarg="seed", difference="forward")
    x = points(4, 20).requires_grad_()
    layer(x)[2:].sum().backward()
    assert x.grad is not None
    assert not bool(x.grad[:2].any())
    assert far(x.grad[2:], noisy.fn.jacobian(x.detach()).sum(1)[2:]) <= 1e-4  # type: ignore[attr-defined]


@pytest.mark.parametrize("vectorized", [True, False])
def test_a_call_that_is_made_again_keeps_its_random_numbers(vectorized: bool) -> None:
    noisy, times = Noisy(Smooth(MASK), 0.1), [0]
    inner = noisy.seeded if vectorized else _one_row(noisy)

    def box(x: np.ndarray, seed: int) -> np.ndarray:
        y = inner(x, seed)
        times[0] += 1
        if times[0] in (2, 7):
            y[..., 1, :] = np.nan if vectorized else y[..., 1, :]
            y = y if vectorized else y * np.nan
        return y

    def row_box(x: np.ndarray, seed: int) -> np.ndarray:
        y = inner(x, seed)
        times[0] += 1
        return y * np.nan if times[0] in (2, 7) else y

    x = points(4, 20)
    found = jacobian(
        box if vectorized else row_box, x, pattern=MASK, seed_kwarg="seed", retries=1, vectorized=vectorized
    )
    assert far(found, noisy.fn.jacobian(x)) <= 1e-4  # type: ignore[attr-defined]


# ---- outputs of unlike units ---------------------------------------------------------------------------------------------

UNITS = np.where(np.arange(20) < 10, 1e6, 1e-6)


def _errors(found: Tensor, x: Tensor) -> Tensor:
    right = Smooth(MASK).jacobian(x) * torch.from_numpy(UNITS)[:, None]
    return (found - right).norm(dim=(0, 2)) / right.norm(dim=(0, 2))


@pytest.mark.parametrize("which", ["all", "small", "large"])
@pytest.mark.parametrize("method", ["coloring", "regression"])
def test_outputs_of_unlike_units_are_noisy_each_by_itself(which: str, method: str) -> None:
    smooth, rng, x = Smooth(MASK), np.random.default_rng(0), points(8, 20)
    noisy = {"all": UNITS > 0, "small": UNITS < 1, "large": UNITS > 1}[which]

    def box(a: np.ndarray) -> np.ndarray:
        return (smooth(a) + 1e-4 * noisy * rng.standard_normal((len(a), 20))) * UNITS

    options: dict[str, Any] = dict(pattern=MASK, method=method, noise="estimate")
    assert float(_errors(jacobian(box, x, **options), x).max()) <= 0.02
    assert verify(box, x, **options)


def test_a_missing_entry_of_a_small_output_is_noticed() -> None:
    smooth, lacking = Smooth(MASK), MASK.clone()
    lacking[15, torch.nonzero(MASK[15])[0, 0]] = False
    with pytest.warns(SensingWarning, match="at output 15"):
        jacobian(lambda a: smooth(a) * UNITS, points(8, 20), pattern=lacking, method="regression")


@pytest.mark.parametrize("method", ["coloring", "dense"])
def test_outputs_that_are_large_beside_their_changes_are_noticed(method: str) -> None:
    """A pressure in pascals, in float32: its changes drown in rounding."""
    smooth, x = Smooth(MASK), points(8, 20, dtype=torch.float32)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        found = jacobian(lambda a: smooth(a) + np.float32(1e5), x, pattern=MASK, method=method)
    assert far(found, smooth.jacobian(x)) <= 0.05 or any(issubclass(w.category, SensingWarning) for w in seen)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("method", ["coloring", "regression", "dense"])
def test_outputs_that_stand_still_are_not_said_to_drown(method: str, dtype: torch.dtype) -> None:
    """A reading of 1000 that depends on nothing has an exact derivative, 0."""
    mask = MASK.clone()
    mask[4] = False
    smooth = Smooth(mask)
    offset = np.where(np.arange(20) == 4, 1000.0, 0.0)
    x = points(8, 20, dtype=dtype)
    found = jacobian(lambda a: smooth(a) + offset.astype(a.dtype), x, pattern=mask, method=method)
    assert not bool(found[:, 4].any())
    assert far(found, smooth.jacobian(x)) <= 1e-3
