"""The recipe that linearises rigid bodies: promised calls, errors, and controllers that balance."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from beyondprop.lab.recipes import get, sensing_dynamics
from beyondprop.lab.recipes._base import Context
from beyondprop.lab.recipes._control import lqr, simulate
from beyondprop.lab.recipes._dynamics import Chain, Pendulum, System, exact_jacobian
from beyondprop.lab.recipes.sensing_dynamics import COST, METHODS, Setting, from_trajectories, measured, sensed

SYSTEMS = (Pendulum(6, damping=0.1), Pendulum(12), Chain(15, range(0, 15, 3), damping=0.1), Chain(30))


def _truth(system: System) -> Any:
    return exact_jacobian(system.step, np.zeros(system.inputs))


def _error(found: Any, truth: Any) -> float:
    return float(np.linalg.norm(found - truth) / np.linalg.norm(truth - np.eye(*truth.shape)))


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("method", list(METHODS))
@pytest.mark.parametrize("system", SYSTEMS, ids=lambda s: f"{type(s).__name__} {s.size}")
def test_every_method_finds_a_and_b(system: System, method: str, seed: int) -> None:
    if method == "tied" and not isinstance(system, Chain):
        with pytest.raises(ValueError, match="a symmetry is known of chains alone, got Pendulum"):
            sensed(system, method)
        return
    found, calls = sensed(system, method, seed=seed)
    assert _error(found, _truth(system)) < 1e-7
    widest = int(system.pattern.sum(1).max())
    most = {"dense": 2 * system.inputs, "regression": 2 * (widest + 2), "tied": 2 * widest}
    assert calls <= most.get(method, 4 * widest)
    assert calls < 2 * system.inputs or method == "dense"


def test_calls_do_not_grow_with_the_system() -> None:
    for method in ("coloring", "regression"):
        pendulums = {sensed(Pendulum(n), method)[1] for n in (10, 20)}
        chains = {sensed(Chain(n, damping=0.1), method)[1] for n in (20, 40)}
        assert max(pendulums) <= 2 * 11
        assert max(chains) <= 2 * 9
    assert sensed(Pendulum(20), "dense")[1] == 2 * 60


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("method", ["dense", "coloring", "regression"])
def test_a_noisy_simulator_gives_a_controller_that_balances(method: str, seed: int) -> None:
    system = Pendulum(4)
    found, _ = sensed(system, method, 1e-7, seed)
    truth = _truth(system)
    assert 1e-9 < _error(found, truth) < 3e-3
    starts = np.zeros((5, 8))
    starts[:, :4] = 0.02 * np.random.default_rng(seed).standard_normal((5, 4))
    ours, theirs = (simulate(system, lqr(one, system, COST), starts, 6.0, COST) for one in (found, truth))
    assert ours.balanced(0.01).all()
    assert ours.costs.mean() < 1.01 * theirs.costs.mean()
    assert not simulate(system, None, starts, 6.0, COST).balanced(1.0).any()


def test_trajectories_without_a_pattern_need_as_many_calls_as_inputs() -> None:
    system = Chain(10, range(0, 10, 3), damping=0.1)
    truth = _truth(system)
    few, enough = (from_trajectories(system, calls, "plain", 1e-6) for calls in (system.inputs - 2, 2 * system.inputs))
    on_pattern = from_trajectories(system, 18, "on pattern", 1e-6)
    assert _error(few, truth) > 0.1
    assert _error(enough, truth) < 1e-4
    assert _error(on_pattern, truth) < 1e-4


def test_rollouts_that_run_away_are_no_measurement() -> None:
    class Runaway(Chain):
        def acceleration(self, positions: Any, velocities: Any, controls: Any) -> Any:
            return np.full_like(positions, np.inf)

    assert from_trajectories(Runaway(3), 9, "plain", 0.1) is None


def test_what_falls_is_judged_as_missed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    setting = Setting("two links", Pendulum(2), 0.02, 1.0, 0.5, 1e-7)
    monkeypatch.setattr(
        sensing_dynamics, "SETTINGS", (setting, Setting("whole", Chain(4), 0.1, 2.0, 10.0, 1e-5, whole=True))
    )

    def fake(one: Setting) -> Any:
        found = measured(one)
        for method in METHODS:
            for run in found["control"].get(f"{method}, noisy", []):
                run |= {"balanced": 90.0, "cost": None}
        return found

    monkeypatch.setattr(sensing_dynamics, "measured", fake)
    rows, _ = sensing_dynamics.measure(Context(tmp_path, False, lambda line: None))
    verdicts = {row.label: row.verdict for row in rows if row.label.startswith("two links")}
    assert verdicts["two links: calls, regression"] == "reached"
    assert verdicts["two links: balanced by LQR, no noise, the least of all methods"] == "reached"
    assert verdicts["two links: balanced by LQR, noise 1e-07, the least of all methods"] == "missed"
    assert verdicts["two links: cost over the exact LQR's, noise 1e-07, the most of them"] == "missed"
    assert (tmp_path / "figure.png").stat().st_size > 10_000


def test_the_recipe_says_what_it_is() -> None:
    recipe = get("sensing-dynamics")
    assert "NeurIPS 2017" in recipe.source
    assert recipe.about
    assert 0 < recipe.minutes <= 3
