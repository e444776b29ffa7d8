"""Supports that many samples share: found exactly, without false columns, and doubted where they should be."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from beyondprop.func.sensing.supports import shared_supports

F64 = torch.float64


def _draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def _pattern(m: int, n: int, sizes: Tensor | int, seed: int) -> Tensor:
    ranks = torch.rand(m, n, generator=torch.Generator().manual_seed(seed)).argsort(1).argsort(1)
    return ranks < (sizes if isinstance(sizes, int) else sizes.unsqueeze(1))


def _problem(
    samples: int, k: int, n: int = 200, m: int = 200, s: int = 5, noise: float = 0.0, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    pattern = _pattern(m, n, s, seed)
    probes = _draw(samples, k, n, seed=seed + 1000)
    values = probes @ (_draw(samples, m, n, seed=seed + 2000) * pattern).mT
    return pattern, probes, values + noise * _draw(*values.shape, seed=seed + 3000)


def _exact(found: Tensor, pattern: Tensor) -> float:
    return float((found == pattern).all(1).double().mean())


@pytest.mark.parametrize("seed", range(5))
def test_every_support_is_exact_with_64_samples_of_8_probes(seed: int) -> None:
    pattern, probes, values = _problem(64, 8, seed=seed)
    found, unexplained = shared_supports(probes, values)
    assert torch.equal(found, pattern)
    assert not bool(unexplained.any())


@pytest.mark.parametrize(
    ("samples", "k", "least"),  # simultaneous OMP: 1.00, 0.20, 0.90, 1.00, 0.57, 0.98, 0.50, 0.97
    [
        (64, 6, 1.0),
        (16, 6, 0.7),
        (16, 8, 0.995),
        (16, 12, 1.0),
        (4, 12, 0.93),
        (4, 20, 1.0),
        (1, 20, 0.65),
        (1, 30, 0.97),
    ],
)
def test_fewer_samples_or_probes_find_most_supports(samples: int, k: int, least: float) -> None:
    found = 0.0
    for seed in range(2):
        pattern, probes, values = _problem(samples, k, seed=seed)
        support, unexplained = shared_supports(probes, values)
        wrong = (support != pattern).any(1)
        assert float((wrong & ~unexplained).double().mean()) < 0.03  # what is wrong is known to be
        found += _exact(support, pattern) / 2
    assert found >= least


@pytest.mark.parametrize("announced", [True, False])
@pytest.mark.parametrize("noise", [0.01, 0.1, 0.3])
@pytest.mark.parametrize(("samples", "k"), [(16, 12), (64, 8)])
def test_noise_adds_no_columns_and_hides_none(samples: int, k: int, noise: float, announced: bool) -> None:
    true = false = doubted = 0
    for seed in range(3):
        pattern, probes, values = _problem(samples, k, noise=noise, seed=seed)
        found, unexplained = shared_supports(probes, values, noise=noise if announced else 0.0)
        true, false = true + int((found & pattern).sum()), false + int((found & ~pattern).sum())
        doubted += int(unexplained.sum())
    assert true >= 0.999 * 3 * 1000
    assert false <= 0.001 * 3 * 1000
    assert doubted == 0


@pytest.mark.parametrize("samples", [1, 4, 16])
def test_noise_alone_has_no_columns(samples: int) -> None:
    probes, values = _draw(samples, 9, 100, seed=0), _draw(samples, 9, 2000, seed=1)
    values *= (2 * _draw(samples, 1, 2000, seed=2)).exp()  # of quite unlike size in one sample and another
    found, unexplained = shared_supports(probes, values, noise=1e-7)
    assert int(found.any(1).sum()) <= 2
    assert bool(unexplained[~found.any(1)].all())
    found, unexplained = shared_supports(probes, _draw(samples, 9, 2000, seed=1), noise=1.0)
    assert int(found.any(1).sum()) <= 2
    assert not bool(unexplained.any())


def test_rows_of_all_sizes_in_one_problem() -> None:
    n, m = 120, 100
    sizes = torch.arange(m) % 6
    sizes[10], sizes[11] = n, 20
    pattern = _pattern(m, n, sizes, 0)
    probes = _draw(32, 9, n, seed=1)
    found, unexplained = shared_supports(probes, probes @ (_draw(32, m, n, seed=2) * pattern).mT)
    assert unexplained.nonzero().squeeze(1).tolist() == [10, 11]
    assert torch.equal(found[~unexplained], pattern[~unexplained])


@pytest.mark.parametrize("forward", [True, False])
@pytest.mark.parametrize(
    "function",
    [
        lambda a, b: a.tanh() + b.square(),
        lambda a, b: a.relu() + 1e3 + 0 * b,  # half of the samples say nothing about a row
        lambda a, b: (2 * a).exp() * b.cos(),  # samples of quite unlike size
    ],
)
def test_differences_of_curved_functions(function: Callable[[Tensor, Tensor], Tensor], forward: bool) -> None:
    n, m, k, samples, step = 150, 120, 8, 64, 1e-6
    for seed in range(2):
        pattern = _pattern(m, n, torch.arange(m) % 6, seed)
        first, second = (_draw(m, n, seed=seed + i) * pattern for i in (1, 2))
        x, probes = _draw(samples, 1, n, seed=seed + 3), _draw(samples, k, n, seed=seed + 4)

        def box(x: Tensor, first: Tensor = first, second: Tensor = second) -> Tensor:
            return function(x @ first.T, x @ second.T)

        low, width = (box(x), step) if forward else (box(x - step * probes), 2 * step)
        found, unexplained = shared_supports(probes, (box(x + step * probes) - low) / width)
        assert torch.equal(found, pattern)
        assert not bool(unexplained.any())


def test_a_sample_of_large_derivatives_does_not_outvote_the_others() -> None:
    pattern, probes, values = _problem(16, 9)
    values = values * (2 * _draw(16, 1, 200, seed=9)).exp()
    assert _exact(shared_supports(probes, values)[0], pattern) > 0.99


def test_units_of_outputs_and_inputs_do_not_matter() -> None:
    pattern, probes, values = _problem(32, 9, 60, 50, 4)
    rows = torch.logspace(-4, 4, 50, dtype=F64)
    columns = torch.logspace(3, -3, 60, dtype=F64)
    found, unexplained = shared_supports(probes * columns, values * rows)
    assert torch.equal(found, pattern)
    assert not bool(unexplained.any())


def test_rounding_is_no_row() -> None:
    pattern, probes, values = _problem(16, 9, 60, 50, 4)
    values[..., 3] = 1e-12 * _draw(16, 9, seed=5)
    values[..., 4] = 0.0
    found, unexplained = shared_supports(probes, values)
    pattern[3:5] = False
    assert torch.equal(found, pattern)
    assert not bool(unexplained.any())
    found, unexplained = shared_supports(probes, torch.zeros_like(values))
    assert not bool(found.any() | unexplained.any())


def test_the_order_of_columns_and_the_size_of_chunks_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    _, probes, values = _problem(16, 7, 60, 50, 4, noise=0.2)
    found, unexplained = shared_supports(probes, values, noise=0.2)
    order = torch.randperm(60)
    turned, _ = shared_supports(probes[..., order], values, noise=0.2)
    assert torch.equal(turned, found[:, order])
    monkeypatch.setattr("beyondprop.func.sensing.supports.CHUNK", 5000)
    for a, b in zip(shared_supports(probes, values, noise=0.2), (found, unexplained), strict=True):
        assert torch.equal(a, b)


def test_a_bound_on_the_columns_holds() -> None:
    pattern, probes, values = _problem(16, 9, 60, 50, 4)
    found, unexplained = shared_supports(probes, values, sparsity=3, noise=1e-6)
    assert int(found.sum(1).max()) <= 3
    assert bool(unexplained.all())
    assert torch.equal(shared_supports(probes, values, sparsity=4)[0], pattern)
    few = shared_supports(probes[..., :3], (probes[..., :3] @ _draw(16, 5, 3, seed=0).mT))
    assert bool(few[0].all())  # three inputs, all used


def test_bad_input_is_refused() -> None:
    _, probes, values = _problem(4, 6, 10, 8, 2)
    with pytest.raises(ValueError, match="of the same B and k"):
        shared_supports(probes, values[:, :5])
    with pytest.raises(ValueError, match="of the same B and k"):
        shared_supports(probes[0], values[0])
    with pytest.raises(ValueError, match=r"2 probes .* k = 1"):
        shared_supports(probes[:, :1], values[:, :1])
    with pytest.raises(ValueError, match="must be finite"):
        shared_supports(probes, values.masked_fill(values > 1, math.inf))
    with pytest.raises(ValueError, match="sparsity must be"):
        shared_supports(probes, values, sparsity=0)
    with pytest.raises(ValueError, match="noise must be"):
        shared_supports(probes, values, noise=math.nan)
