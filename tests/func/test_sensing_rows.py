"""Sparse rows from few directional derivatives: how often they are found, and how exactly."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from beyondprop.func.sensing.sparse_rows import default_probes, recover_rows

F64 = torch.float64


def _problem(
    rows: int, n: int, sparsity: int, k: int, noise: float = 0.0, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    where = torch.rand(rows, n, generator=generator).argsort(1) < sparsity
    z = torch.randn(rows, n, generator=generator, dtype=F64) * where
    probes = torch.randn(k, n, generator=generator, dtype=F64)
    return z, probes, z @ probes.T + noise * torch.randn(rows, k, generator=generator, dtype=F64)


def _errors(found: Tensor, z: Tensor) -> Tensor:
    return (found - z).norm(dim=1) / z.norm(dim=1)


def _on_support(z: Tensor, probes: Tensor, values: Tensor) -> Tensor:
    """Least squares by one who knows the supports."""
    found = torch.zeros_like(z)
    for row, (true, y) in enumerate(zip(z, values, strict=True)):
        columns = true.nonzero().squeeze(1)
        found[row, columns] = torch.linalg.lstsq(probes[:, columns], y.unsqueeze(1)).solution.squeeze(1)
    return found


def _lasso(probes: Tensor, values: Tensor, noise: float) -> Tensor:
    """FISTA at `noise sqrt(2 k log n)`."""
    k, n = probes.shape
    step = float(1 / torch.linalg.matrix_norm(probes, 2) ** 2)
    limit = noise * math.sqrt(2 * k * math.log(n)) * step
    z = ahead = values.new_zeros(len(values), n)
    t = 1.0
    for _ in range(500):
        moved = ahead - step * ((ahead @ probes.T - values) @ probes)
        new = moved.sign() * (moved.abs() - limit).clamp_min(0)
        after = (1 + math.sqrt(1 + 4 * t * t)) / 2
        z, ahead, t = new, new + (t - 1) / after * (new - z), after
    return z


@pytest.mark.parametrize(("n", "sparsity"), [(50, 3), (100, 5), (200, 10)])
@pytest.mark.parametrize("seed", range(3))
def test_the_default_number_of_probes_finds_rows_exactly(n: int, sparsity: int, seed: int) -> None:
    z, probes, values = _problem(200, n, sparsity, default_probes(n, sparsity), seed=seed)
    errors = _errors(recover_rows(probes, values), z)
    assert float((errors < 1e-12).double().mean()) > 0.99


@pytest.mark.parametrize(("factor", "least"), [(1.0, 0.55), (1.5, 0.96), (2.0, 0.99)])
@pytest.mark.parametrize(("n", "sparsity"), [(50, 3), (100, 5), (200, 10)])
def test_rows_are_found_where_basis_pursuit_fails(n: int, sparsity: int, factor: float, least: float) -> None:
    k = math.ceil(factor * sparsity * math.log(n / sparsity))  # there basis pursuit finds 3-25 %, 62-88 % and 93-100 %
    found = 0.0
    for seed in range(3):
        z, probes, values = _problem(100, n, sparsity, k, seed=seed)
        found += float((_errors(recover_rows(probes, values), z) < 1e-3).double().mean()) / 3
    assert found > least


@pytest.mark.parametrize("sparsity", [5, None])
@pytest.mark.parametrize(
    ("k", "noise", "published"),
    [(40, 0.01, 0.004), (40, 0.1, 0.037), (40, 0.3, 0.105), (60, 0.01, 0.002), (60, 0.1, 0.024), (60, 0.3, 0.076)],
)
def test_noisy_rows_are_as_exact_as_with_known_supports(
    k: int, noise: float, published: float, sparsity: int | None
) -> None:
    for seed in range(2):
        z, probes, values = _problem(200, 100, 5, k, noise, seed)
        found = recover_rows(probes, values, noise=noise, sparsity=sparsity)
        error = float((found - z).norm() / z.norm())
        best = float((_on_support(z, probes, values) - z).norm() / z.norm())
        lasso = float((_lasso(probes, values, noise) - z).norm() / z.norm())
        assert error < 0.9 * published
        assert error < 1.8 * best
        assert error < 0.5 * lasso


def test_noise_that_is_not_announced_does_little_harm() -> None:
    z, probes, values = _problem(200, 100, 5, 40, 0.01)
    assert float((recover_rows(probes, values) - z).norm() / z.norm()) < 0.004


def test_inputs_and_outputs_may_have_any_units() -> None:
    z, probes, values = _problem(60, 50, 3, 20)
    units = torch.logspace(-6, 6, 50, dtype=F64)
    sizes = torch.logspace(8, -8, 60, dtype=F64).unsqueeze(1)
    found = recover_rows(probes * units, values * sizes)
    torch.testing.assert_close(found * units / sizes, recover_rows(probes, values), rtol=1e-9, atol=1e-12)
    assert float(_errors(found * units / sizes, z).max()) < 1e-12


def test_columns_and_rows_may_come_in_any_order_and_number() -> None:
    _, probes, values = _problem(30, 60, 4, 18, 0.05)
    found = recover_rows(probes, values, noise=0.05)
    columns, rows = torch.randperm(60), torch.randperm(30)
    turned = recover_rows(probes[:, columns], values[rows], noise=0.05)
    torch.testing.assert_close(turned, found[rows][:, columns], rtol=1e-9, atol=1e-12)
    single = torch.cat([recover_rows(probes, row, noise=0.05) for row in values.split(1)])
    torch.testing.assert_close(single, found, rtol=1e-9, atol=1e-12)


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    z, probes, values = _problem(50, 60, 4, 14)
    found = recover_rows(probes, values)
    monkeypatch.setattr("beyondprop.func.sensing.sparse_rows.CHUNK", 1000)
    good = _errors(found, z) < 1e-9
    assert int(good.sum()) > 40
    torch.testing.assert_close(recover_rows(probes, values)[good], found[good], rtol=1e-9, atol=1e-12)


def test_probes_of_random_signs_do_as_well() -> None:
    z, probes, _ = _problem(200, 100, 5, 34)
    probes = probes.sign()
    assert float((_errors(recover_rows(probes, z @ probes.T), z) < 1e-12).double().mean()) > 0.99


def test_what_is_zero_stays_zero() -> None:
    z, probes, values = _problem(10, 40, 3, 16)
    values[4], probes[:, 7] = 0.0, 0.0
    found = recover_rows(probes, values)
    assert float(found[4].abs().max()) == 0
    assert float(found[:, 7].abs().max()) == 0
    assert float(recover_rows(probes[:1], values[:, :1]).abs().max()) == 0  # one probe tells nothing
    clean = z[:, 7] == 0
    clean[4] = False
    assert float(_errors(found, z)[clean].max()) < 1e-12


def test_with_more_probes_than_columns_rows_may_be_full() -> None:
    z, probes, values = _problem(20, 6, 6, 9)
    assert float(_errors(recover_rows(probes, values), z).max()) < 1e-12


@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_rows_that_are_not_sparse_come_back_shrunk(noise: float) -> None:
    z, probes, values = _problem(60, 100, 100, 30, noise)
    found = recover_rows(probes, values, noise=noise)
    assert bool(found.isfinite().all())
    assert float((found - z).norm() / z.norm()) < 1.3
    assert float(((found * z).sum(1) > 0).double().mean()) > 0.9  # and point the right way


def test_the_number_of_probes() -> None:
    assert default_probes(100, 5) == math.ceil(2.2 * 5 * math.log(20))
    assert default_probes(4, 3) == 4
    assert default_probes(10**6, 1) == 31
    assert default_probes(8, 5) == 7  # s + 2
    for sparsity in (0, 9):
        with pytest.raises(ValueError, match="between 1 and n = 8"):
            default_probes(8, sparsity)


def test_bad_input_is_refused() -> None:
    _, probes, values = _problem(5, 20, 2, 8)
    with pytest.raises(ValueError, match="of the same k"):
        recover_rows(probes, values[:, :7])
    with pytest.raises(ValueError, match=r"\(R, k\)"):
        recover_rows(probes, values[0])
    with pytest.raises(ValueError, match="must be finite"):
        recover_rows(probes, values.masked_fill(values > 1, math.nan))
    with pytest.raises(ValueError, match="noise must be"):
        recover_rows(probes, values, noise=-1.0)
    with pytest.raises(ValueError, match="sparsity must be"):
        recover_rows(probes, values, sparsity=0)


@pytest.mark.parametrize("step", [1e-6, 1e-3])
def test_curvature_beyond_the_announced_noise_adds_nothing(step: float) -> None:
    z, probes, _ = _problem(200, 100, 5, 34)
    bent = _problem(200, 100, 100, 1, seed=5)[0] * (z != 0)

    def box(x: Tensor) -> Tensor:
        return (x @ z.T).tanh() + (x @ bent.T).square()

    x = 0.1 * torch.randn(1, 100, dtype=F64)
    values = (box(x + step * probes) - box(x)) / step
    exact = torch.func.vmap(torch.func.jacrev(box))(x).squeeze(0).squeeze(0)
    best = float((_on_support(z, probes, values.T) - exact).norm())
    for noise in (0.0, 1e-9):
        found = recover_rows(probes, values.T, noise=noise)
        assert float((found - exact).norm()) < 1.5 * best
