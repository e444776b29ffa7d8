"""The simulators of rigid bodies: closed forms, energy, patterns, kinematics; and what controls them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from beyondprop.lab.recipes._control import Cost, fitted, lqr, simulate, trajectories
from beyondprop.lab.recipes._dynamics import Chain, Counted, Pendulum, System, exact_jacobian

SYSTEMS: dict[str, System] = {
    "one link": Pendulum(1),
    "acrobot": Pendulum(2, (1,), mass=(1.0, 0.5), length=(0.7, 1.2)),
    "five links": Pendulum(5, (0, 3), mass=(1.0, 2.0, 0.5, 0.7, 1.1), length=(0.5, 1.0, 0.8, 1.3, 0.4)),
    "six links with friction": Pendulum(6, damping=0.3),
    "no gravity": Pendulum(3, (1,), gravity=0.0),
    "chain": Chain(7, (0, 3, 5)),
    "damped chain": Chain(6, damping=0.2, mass=0.5),
    "one mass": Chain(1),
}


@pytest.fixture(params=list(SYSTEMS))
def system(request: pytest.FixtureRequest) -> System:
    return SYSTEMS[request.param]


def _row(system: System, seed: int = 0, scale: float = 1.0) -> Any:
    return scale * np.random.default_rng(seed).standard_normal(system.inputs)


def _differences(function: Any, x: Any, step: float = 1e-5) -> Any:
    probes = step * np.eye(len(x))
    return (function(x + probes) - function(x - probes)).T / (2 * step)


# Physics


def test_one_link_is_the_textbook_s() -> None:
    system = Pendulum(1, mass=0.7, length=1.3, damping=0.2)
    angle, velocity, torque = 0.4, -0.9, 0.3
    expected = 9.81 / 1.3 * np.sin(angle) + (torque - 0.2 * velocity) / (0.7 * 1.3**2)
    found = system.acceleration(np.array([[angle]]), np.array([[velocity]]), np.array([[torque]]))
    np.testing.assert_allclose(found, [[expected]], rtol=1e-14)


def test_two_links_are_the_textbook_s() -> None:
    (m1, m2), (l1, l2), g = (0.7, 0.4), (1.3, 0.8), 9.81
    system = Pendulum(2, (1,), mass=(m1, m2), length=(l1, l2))
    (a, b), (va, vb), torque = (0.5, -1.1), (0.8, 2.0), 0.3
    # Solved for the accelerations by Cramer's rule; angles are from upright, so gravity has the sign of a fall.
    cos, sin = np.cos(a - b), np.sin(a - b)
    first = (m1 + m2) * g * l1 * np.sin(a) - m2 * l1 * l2 * vb**2 * sin - torque
    second = m2 * g * l2 * np.sin(b) + m2 * l1 * l2 * va**2 * sin + torque
    scale = m2 * l1**2 * l2**2 * (m1 + m2 * (1 - cos**2))
    expected = [
        (m2 * l2**2 * first - m2 * l1 * l2 * cos * second) / scale,
        ((m1 + m2) * l1**2 * second - m2 * l1 * l2 * cos * first) / scale,
    ]
    found = system.acceleration(np.array([[a, b]]), np.array([[va, vb]]), np.array([[torque]]))
    np.testing.assert_allclose(found, [expected], rtol=1e-12)


def test_small_motion_of_the_chain_has_its_known_frequencies() -> None:
    system = Chain(9, mass=2.0, stiffness=50.0)
    rows = exact_jacobian(system.velocities, np.zeros(system.inputs))[:, :9] / system.dt
    modes = np.arange(1, 10)
    expected = 4 * 50.0 / 2.0 * np.sin(np.pi * modes / 20) ** 2
    np.testing.assert_allclose(np.linalg.eigvalsh(-rows), expected, rtol=1e-12)


@pytest.mark.parametrize("kind", ["pendulum", "chain"])
def test_energy_is_kept_to_the_order_of_the_integrator(kind: str) -> None:
    drifts = []
    for dt in (1e-3, 5e-4):
        system: System = Pendulum(3, dt=dt) if kind == "pendulum" else Chain(3, dt=dt)
        state = np.array([[2.0, 2.5, 3.0, 0.0, 0.5, 0.0]]) if kind == "pendulum" else 0.3 * np.ones((1, 6))
        energies = []
        for _ in range(round(1.0 / dt)):
            energies.append(system.energy(state))
            state = system.step(np.concatenate([state, np.zeros((1, 3))], axis=1))
        drifts.append(np.ptp(energies) / abs(energies[0][0]))
    assert drifts[0] < 0.02
    assert drifts[1] == pytest.approx(drifts[0] / 2, rel=0.1)


def test_friction_loses_energy_and_motors_give_it() -> None:
    for system in (Pendulum(3, damping=0.5, dt=1e-3), Chain(3, damping=0.5, dt=1e-3)):
        state = np.array([[3.0, 3.1, 3.2, 1.0, -1.0, 0.5]])
        before = system.energy(state)
        for _ in range(500):
            state = system.step(np.concatenate([state, np.zeros((1, 3))], axis=1))
        assert system.energy(state) < before - 0.1
    pushed = Pendulum(1, gravity=0.0, dt=1e-3)
    state = np.zeros((1, 2))
    for _ in range(1000):
        state = pushed.step(np.concatenate([state, np.ones((1, 1))], axis=1))
    np.testing.assert_allclose(pushed.energy(state), state[:, 0], rtol=2e-3)  # torque times angle


def test_zero_is_an_equilibrium(system: System) -> None:
    assert not system.step(np.zeros((1, system.inputs))).any()
    if isinstance(system, Pendulum):
        hanging = np.zeros((1, system.inputs))
        hanging[:, : system.size] = np.pi
        np.testing.assert_allclose(system.velocities(hanging), 0.0, atol=1e-12)


def test_rows_are_independent_of_each_other(system: System) -> None:
    rows = np.random.default_rng(0).standard_normal((5, system.inputs))
    np.testing.assert_allclose(system.step(rows), np.concatenate([system.step(row[None]) for row in rows]), atol=1e-13)


# Jacobians and patterns


def test_complex_steps_are_the_jacobian(system: System) -> None:
    for x in (np.zeros(system.inputs), _row(system)):
        exact = exact_jacobian(system.step, x)
        scale = np.abs(exact).max()
        np.testing.assert_allclose(_differences(system.step, x), exact, rtol=0, atol=1e-7 * scale)


def test_the_pattern_has_every_entry_and_no_other(system: System) -> None:
    places = [np.zeros(system.inputs)]
    if isinstance(system, Pendulum):
        places.append(np.concatenate([np.full(system.size, np.pi), np.zeros(system.inputs - system.size)]))
    else:
        places.append(_row(system))
    for x in places:
        rows = exact_jacobian(system.velocities, x)
        np.testing.assert_array_equal(np.abs(rows) > 1e-13, system.pattern)
        np.testing.assert_array_equal(np.abs(exact_jacobian(system.step, x)) > 1e-15, system.full_pattern)
        brute = np.abs(_differences(system.velocities, x))
        assert brute[~system.pattern].max(initial=0.0) < 1e-8 * np.abs(rows).max()


def test_away_from_the_line_a_pendulum_s_pattern_is_dense() -> None:
    system = Pendulum(5)
    rows = exact_jacobian(system.velocities, _row(system))
    assert (np.abs(rows) > 1e-9).mean() > 0.99
    assert (np.abs(rows) > 1e-9)[~system.pattern].any()
    assert system.dense_pattern.all()


def test_what_a_row_depends_on_does_not_grow_with_the_system() -> None:
    for kind, widest in ((lambda n: Pendulum(n), 8), (lambda n: Chain(n, damping=0.1), 7)):
        assert {int(kind(n).pattern.sum(1).max()) for n in (8, 20, 40)} == {widest}


def test_position_rows_follow_from_velocity_rows(system: System) -> None:
    x = _row(system)
    complete = system.complete(exact_jacobian(system.velocities, x))
    np.testing.assert_allclose(complete, exact_jacobian(system.step, x), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("damping", [0.0, 0.3])
def test_tied_entries_are_equal(damping: float) -> None:
    system = Chain(8, (1, 4), damping=damping)
    rows, tie = exact_jacobian(system.velocities, _row(system)), system.tie
    np.testing.assert_array_equal(tie >= 0, system.pattern)
    numbers = np.unique(tie[tie >= 0])
    np.testing.assert_array_equal(numbers, np.arange(15 + (15 if damping else 8) + 2))
    for number in numbers:
        assert np.ptp(rows[tie == number]) < 1e-15


def test_calls_are_counted_and_noise_is_seeded() -> None:
    system = Chain(3)
    first, second, other = (Counted(system.step, 0.1, seed) for seed in (0, 0, 1))
    rows = np.random.default_rng(0).standard_normal((400, system.inputs))
    np.testing.assert_array_equal(first(rows), second(rows))
    assert not np.array_equal(first(rows), other(rows))
    assert (first.calls, other.calls) == (800, 400)
    assert np.std(other(rows) - system.step(rows)) == pytest.approx(0.1, rel=0.1)
    np.testing.assert_array_equal(Counted(system.step)(rows), system.step(rows))


# Control


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_lqr_balances_what_falls_by_itself(seed: int) -> None:
    system, cost = Pendulum(3, (0, 2)), Cost()
    gain = lqr(system.complete(exact_jacobian(system.velocities, np.zeros(system.inputs))), system, cost)
    starts = np.zeros((4, 6))
    starts[:, :3] = 0.01 * np.random.default_rng(seed).standard_normal((4, 3))
    held, free = (simulate(system, own, starts, 5.0, cost) for own in (gain, None))
    assert held.balanced(1e-3).all()
    assert not free.balanced(0.5).any()
    assert (held.costs < free.costs).all()
    assert held.norms.shape == (501, 4)


def test_the_cost_of_lqr_is_the_least_and_known() -> None:
    system, cost = Chain(2, (0,)), Cost(position=3.0, velocity=0.7, effort=0.2)
    matrix = system.complete(exact_jacobian(system.velocities, np.zeros(system.inputs)))
    gain = lqr(matrix, system, cost)
    starts = np.array([[1e-5, -2e-5, 1e-5, 0.0]])  # where it is linear
    least = simulate(system, gain, starts, 60.0, cost).costs
    for factor in (0.9, 1.1):
        assert simulate(system, factor * gain, starts, 60.0, cost).costs > least
    a, b = matrix[:, :4], matrix[:, 4:]
    closed, weight = a - b @ gain, np.diag([3.0, 3.0, 0.7, 0.7]) + 0.2 * gain.T @ gain
    values, power = weight.copy(), closed
    for _ in range(20):  # doubling: the sum over 2^20 steps
        values, power = values + power.T @ values @ power, power @ power
    np.testing.assert_allclose(least, system.dt * starts @ values @ starts[0], rtol=1e-6)


def test_a_system_that_ran_away_costs_no_more_steps() -> None:
    system = Pendulum(2)
    runs = simulate(system, -1e4 * np.ones((2, 4)), np.full((3, 4), 0.1), 2.0, Cost())
    assert np.isinf(runs.costs).all()
    assert not runs.balanced(1e9).any()


def test_no_gain_is_said_so() -> None:
    system = Pendulum(2)
    matrix = np.concatenate([2.0 * np.eye(4), np.zeros((4, 2))], axis=1)  # grows, and nothing acts on it
    with pytest.raises(ValueError, match=r"no gain was found for \[A B\] of shape \(4, 6\)"):
        lqr(matrix, system, Cost())


def test_trajectories_are_those_of_the_simulator() -> None:
    system = Chain(3, (1,), hardening=0.0)
    step = Counted(system.step)
    rows, followed = trajectories(step, system, 22, scale=0.1, horizon=5, seed=0)
    assert step.calls == len(rows) == len(followed) == 22
    np.testing.assert_array_equal(system.step(rows), followed)
    np.testing.assert_array_equal(rows[5:, :6], followed[:-5])  # 5 rollouts of 5 steps, the last of 2
    exact = exact_jacobian(system.step, np.zeros(7))
    np.testing.assert_allclose(fitted(rows, followed), exact, atol=1e-10)
    np.testing.assert_allclose(fitted(rows[:9], followed[:9], system.full_pattern), exact, atol=1e-10)


# Bad input


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Pendulum(0), r"size must be an integer >= 1, got 0"),
        (lambda: Pendulum(2, (2,)), r"driven must be distinct numbers from 0 to 1, got \(2,\)"),
        (lambda: Chain(3, (1, 1)), r"driven must be distinct numbers from 0 to 2, got \(1, 1\)"),
        (lambda: Pendulum(2, mass=(1.0,)), r"mass must be one finite number > 0 or 2 of them, got \(1.0,\)"),
        (lambda: Pendulum(2, length=-1.0), r"length must be one finite number > 0 or 2"),
        (lambda: Pendulum(2, damping=-1.0), r"damping must be a finite number >= 0"),
        (lambda: Chain(2, dt=0.0), r"dt must be a finite number > 0"),
        (lambda: Chain(2, stiffness=float("nan")), r"stiffness must be a finite number > 0"),
        (lambda: Chain(2).step(np.zeros((3, 5))), r"rows must be \(N, 6\), got shape \(3, 5\)"),
        (lambda: Counted(np.sin, -1.0), r"noise must be a finite number >= 0"),
    ],
)
def test_bad_input_is_named(build: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()
