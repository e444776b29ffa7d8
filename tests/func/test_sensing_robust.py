"""Decoding from calls of which some returned garbage."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from beyondprop.func.sensing.robust import decode, least_absolute

F64 = torch.float64


class _Problem:
    """Outcomes of a sparse linear map at `batch` samples, of which a share, drawn or `exactly`, is garbage."""

    def __init__(
        self,
        share: float,
        q: int,
        *,
        entries: bool = False,
        exactly: bool = False,
        noise: float = 0.0,
        batch: int = 16,
        m: int = 100,
        n: int = 100,
        s: int = 5,
        centre: float = 0.0,
        seed: int = 0,
    ) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.columns = torch.rand(m, n, generator=self.generator).argsort(1)[:, :s]
        self.supports = [(torch.arange(m), self.columns)]
        self.values = self.draw(batch, m, s)
        self.probes = self.draw(batch, q, n)
        self.centres = centre * self.draw(batch, m)
        clean = (self.probes[:, :, self.columns] * self.values.unsqueeze(1)).sum(-1) + self.centres.unsqueeze(1)
        self.clean = clean + noise * self.draw(*clean.shape)
        chance = torch.rand(batch, q, m if entries else 1, generator=self.generator)
        bad = chance.argsort(1).argsort(1) < share * q if exactly else chance < share
        self.bad = bad.expand_as(clean)
        self.outcomes = torch.where(self.bad, 50 * self.draw(*clean.shape), self.clean)

    def draw(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator, dtype=F64)

    def error(self, found: Tensor) -> Tensor:
        return (found - self.values).norm(dim=-1) / self.values.norm(dim=-1)


# Absolute values


@pytest.mark.parametrize(("q", "s"), [(6, 1), (10, 3), (20, 5), (40, 5)])
def test_the_l1_solution_is_that_of_the_linear_program(q: int, s: int) -> None:
    optimize = pytest.importorskip("scipy.optimize")
    problem = _Problem(0.2, q, entries=True, noise=0.1, batch=1, m=30, s=s)
    systems = problem.probes[0][:, problem.columns].transpose(0, 1)
    values = problem.outcomes[0].T
    found = least_absolute(systems, values)
    for a, y, z in zip(systems.numpy(), values.numpy(), found.numpy(), strict=True):
        slack = -np.eye(q)
        best = optimize.linprog(
            np.r_[np.zeros(s), np.ones(q)],
            np.block([[a, slack], [-a, slack]]),
            np.r_[y, -y],
            bounds=[(None, None)] * s + [(0, None)] * q,
        )
        assert np.abs(y - a @ z).sum() < best.fun * (1 + 1e-10)
        assert np.abs(z - best.x[:s]).max() < 1e-8


@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e8])
def test_exact_values_come_back_exactly(scale: float) -> None:
    problem = _Problem(0.1, 40, entries=True, exactly=True, batch=3)
    systems = problem.probes[:, :, problem.columns].transpose(1, 2)
    found = least_absolute(systems, problem.outcomes.mT * scale)
    assert float(problem.error(found / scale).max()) < 1e-12


def test_missing_values_and_repeated_measurements() -> None:
    problem = _Problem(0.06, 30, entries=True, exactly=True, batch=2, m=10)
    problem.probes[:, 10:15] = problem.probes[:, :5]  # the same five calls twice
    problem.outcomes[:, 10:15] = problem.outcomes[:, :5]
    systems = problem.probes[:, :, problem.columns].transpose(1, 2)
    values = problem.outcomes.mT.clone()
    values[0, :, 20], values[1, :, 21] = math.nan, -math.inf
    assert float(problem.error(least_absolute(systems, values)).max()) < 1e-11


def test_shapes_of_all_kinds() -> None:
    systems, z = torch.randn(9, 3, dtype=F64), torch.randn(3, dtype=F64)
    torch.testing.assert_close(least_absolute(systems, systems @ z), z)
    assert least_absolute(torch.zeros(4, 2, 5, 0), torch.ones(4, 2, 5)).shape == (4, 2, 0)
    assert float(least_absolute(systems, torch.zeros(9, dtype=F64)).abs().max()) == 0
    square = torch.randn(3, 3, dtype=F64)
    torch.testing.assert_close(least_absolute(square, square @ z), z, rtol=1e-9, atol=1e-9)
    with pytest.raises(ValueError, match=r"values \(\.\.\., q\)"):
        least_absolute(systems, z)
    with pytest.raises(ValueError, match=r"2 of 9 values are finite, 3 unknowns"):
        least_absolute(systems, torch.full((9,), math.nan, dtype=F64).index_fill(0, torch.tensor([0, 4]), 1.0))


# Calls


@pytest.mark.parametrize("intercept", [False, True])
@pytest.mark.parametrize("entries", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_exact_data_come_back_exactly(seed: int, entries: bool, intercept: bool) -> None:
    problem = _Problem(0.19, 40, entries=entries, exactly=True, centre=1e3 * intercept, seed=seed)
    (found,), centres, used = decode(problem.probes, problem.outcomes, problem.supports, intercept=intercept)
    assert float(problem.error(found).max()) < 1e-12
    assert torch.equal(used, ~problem.bad)
    if centres is None:
        assert not intercept
    else:
        torch.testing.assert_close(centres[0], problem.centres, rtol=1e-12, atol=1e-10)


@pytest.mark.parametrize(
    ("share", "q", "least"),  # row by row: 0.97, 0.98, 0.64, 0.24, 0.98, 0.91, 1.00
    [
        (0.05, 10, 0.995),
        (0.1, 10, 0.99),
        (0.2, 10, 0.92),
        (0.3, 10, 0.72),
        (0.2, 20, 0.999),
        (0.3, 20, 0.98),
        (0.3, 40, 0.999),
    ],
)
def test_garbage_calls_are_told_by_all_outputs_together(share: float, q: int, least: float) -> None:
    right = 0.0
    for seed in range(2):
        problem = _Problem(share, q, noise=1e-3, batch=48, seed=seed)
        (found,), _, _ = decode(problem.probes, problem.outcomes, problem.supports, intercept=False)
        right += float((problem.error(found) < 0.01).double().mean()) / 2
    assert right >= least


@pytest.mark.parametrize(
    ("share", "q", "least"), [(0.05, 10, 0.9), (0.1, 20, 0.99), (0.2, 20, 0.95), (0.2, 40, 0.998), (0.3, 40, 0.99)]
)
def test_garbage_entries_are_told_one_by_one(share: float, q: int, least: float) -> None:
    problem = _Problem(share, q, noise=1e-3, entries=True, batch=32)
    (found,), _, _ = decode(problem.probes, problem.outcomes, problem.supports, intercept=False)
    assert float((problem.error(found) < 0.01).double().mean()) >= least


@pytest.mark.parametrize("entries", [False, True])
def test_the_error_is_that_of_least_squares_on_the_good_calls(entries: bool) -> None:
    problem = _Problem(0.2, 40, entries=entries, noise=1e-2, centre=1.0)
    (found,), _, used = decode(problem.probes, problem.outcomes, problem.supports, intercept=True)
    systems = problem.probes[:, :, problem.columns].transpose(1, 2)
    systems = torch.cat([systems, torch.ones_like(systems[..., :1])], -1)
    good = (~problem.bad).mT.unsqueeze(-1)
    best = torch.linalg.lstsq(systems * good, (problem.clean.mT.unsqueeze(-1) * good)).solution[..., :-1, 0]
    # The few garbage entries that happen to be near the right value stay.
    assert float(problem.error(found).square().mean().sqrt()) < 1.1 * float(problem.error(best).square().mean().sqrt())
    assert float(used[~problem.bad].double().mean()) > 0.998
    assert float(used[problem.bad].double().mean()) < 0.01
    assert float(problem.error(found).max()) < 0.05


@pytest.mark.parametrize("kind", ["nan", "inf", "zero", "stuck", "huge", "sign"])
def test_garbage_of_all_kinds(kind: str) -> None:
    problem = _Problem(0.15, 30, centre=2.0)
    garbage = {
        "nan": torch.full_like(problem.clean, math.nan),
        "inf": problem.clean / 0.0,
        "zero": torch.zeros_like(problem.clean),
        "stuck": problem.clean[:, :1].expand_as(problem.clean),  # the answer to another call
        "huge": problem.clean * 1e60,
        "sign": -problem.clean,
    }[kind]
    outcomes = torch.where(problem.bad, garbage, problem.clean)
    (found,), _, used = decode(problem.probes, outcomes, problem.supports, intercept=True)
    assert float(problem.error(found).max()) < 1e-12
    assert bool((used == ~problem.bad)[:, 1:].all())  # of the first call, "stuck" is right


def test_outputs_of_unlike_size_and_support_in_one_problem() -> None:
    generator = torch.Generator().manual_seed(0)
    sizes, units = [0, 1, 3, 5, 0, 3], torch.logspace(-8, 8, 6, dtype=F64)
    jacobian = torch.zeros(4, 6, 12, dtype=F64)
    columns = [torch.randperm(12, generator=generator)[:s] for s in sizes]
    for i, some in enumerate(columns):
        jacobian[:, i, some] = units[i] * torch.randn(4, len(some), generator=generator, dtype=F64)
    probes = torch.randn(1, 24, 12, generator=generator, dtype=F64)  # the same for all samples
    outcomes = (probes @ jacobian.mT) + 7.0 * units
    bad = torch.rand(4, 24, generator=generator) < 0.15
    outcomes[bad] = 100 * units * torch.randn(int(bad.sum()), 6, generator=generator, dtype=F64)
    supports = []
    for size in sorted(set(sizes)):
        rows = [i for i, s in enumerate(sizes) if s == size]
        supports.append((torch.tensor(rows), torch.stack([columns[i] for i in rows])))
    found, centres, used = decode(probes, outcomes, supports, intercept=True)
    assert centres is not None
    for (rows, places), values, centre in zip(supports, found, centres, strict=True):
        expected = jacobian[:, rows].gather(2, places.expand(4, -1, -1))
        assert values.shape == expected.shape
        torch.testing.assert_close(values / units[rows, None], expected / units[rows, None], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(centre, 7.0 * units[rows].expand(4, -1), rtol=1e-12, atol=0)
    assert torch.equal(used, ~bad.unsqueeze(-1).expand_as(used))


def test_an_output_without_unknowns_has_a_say_too() -> None:
    problem = _Problem(0.2, 12, m=3, s=2)
    supports = [(torch.tensor([0]), problem.columns[:1, :0]), (torch.tensor([2]), problem.columns[2:])]
    problem.outcomes[..., 0] = torch.where(problem.bad[..., 0], 50.0, 0.0)
    (none, some), _, used = decode(problem.probes, problem.outcomes, supports, intercept=False)
    assert none.shape == (16, 1, 0)
    assert float((some - problem.values[:, 2:]).abs().median()) < 1e-12
    assert not bool(used[..., 1].any())
    assert bool((used[..., 0] == ~problem.bad[..., 0]).all())


def test_good_calls_are_kept() -> None:
    problem = _Problem(0.0, 12, noise=0.1)
    (found,), _, used = decode(problem.probes, problem.outcomes, problem.supports, intercept=False)
    systems = problem.probes[:, :, problem.columns].transpose(1, 2)
    plain = torch.linalg.lstsq(systems, problem.outcomes.mT.unsqueeze(-1)).solution.squeeze(-1)
    assert float(used.double().mean()) > 0.99
    assert int(used.sum(1).min()) >= 6  # one more than there are unknowns
    assert float(problem.error(found).mean()) < 1.05 * float(problem.error(plain).mean())
    _, _, used = decode(problem.probes, problem.outcomes, problem.supports, intercept=False, known_noise=0.1)
    assert float(used.double().mean()) > 0.999


def test_samples_may_come_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = _Problem(0.15, 30, centre=1.0, batch=5)
    whole = decode(problem.probes, problem.outcomes, problem.supports, intercept=True)
    monkeypatch.setattr("beyondprop.func.sensing.robust._CHUNK", 1)
    single = decode(problem.probes, problem.outcomes, problem.supports, intercept=True)
    torch.testing.assert_close(single[0][0], whole[0][0], rtol=1e-11, atol=1e-11)
    assert torch.equal(single[2], whole[2])


def test_bad_input_is_refused() -> None:
    problem = _Problem(0.0, 8, m=4, batch=2)
    with pytest.raises(ValueError, match="of the same B and q"):
        decode(problem.probes, problem.outcomes[:, :5], problem.supports, intercept=False)
    with pytest.raises(ValueError, match="of the same B and q"):
        decode(problem.probes[0], problem.outcomes, problem.supports, intercept=False)
    with pytest.raises(ValueError, match="known_noise must be"):
        decode(problem.probes, problem.outcomes, problem.supports, intercept=False, known_noise=-1.0)
    problem.outcomes[1, :4, 2] = math.nan
    with pytest.raises(ValueError, match=r"Output 2 of sample 1 has 4 finite outcomes of 8 calls, and 5 unknowns"):
        decode(problem.probes, problem.outcomes, problem.supports, intercept=False)
