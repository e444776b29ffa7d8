"""What a linearised system is used for: a discrete LQR on the nonlinear one, and the fit to trajectories as a rival."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import LinAlgError, solve_discrete_are

from beyondprop.lab.recipes._dynamics import Array, Bool, Function, System

FALLEN = 1e3
"""Norm of a state that nobody simulates further."""


@dataclass(frozen=True)
class Cost:
    """What a controller is to keep small: the sum over the steps of `position |q|^2 + velocity |v|^2 + effort |u|^2`."""

    position: float = 100.0
    velocity: float = 1.0
    effort: float = 1e-4

    def of_states(self, states: Array) -> Array:
        """Return the states' part, `(N,)`, of states `(N, 2 n)`."""
        n = states.shape[1] // 2
        return self.position * (states[:, :n] ** 2).sum(1) + self.velocity * (states[:, n:] ** 2).sum(1)


@dataclass(frozen=True)
class Runs:
    """Closed loops from several starts.

    Attributes:
        norms: of the states, `(steps + 1, starts)`; inf once one has fallen.
        costs: see `Cost`, times dt, `(starts,)`; inf once one has fallen.
    """

    norms: Array
    costs: Array

    def balanced(self, bound: float) -> NDArray[np.bool_]:
        """Return for every start whether its last state's norm is at most `bound`."""
        return self.norms[-1] <= bound


def lqr(jacobian: Array, system: System, cost: Cost) -> Array:
    """Return the gain K of `u = -K x`, `(c, 2 n)`, of least cost.

    Args:
        jacobian: [A B], `(2 n, 2 n + c)`.
        system: that it is of.
        cost: that is to be small.

    Raises:
        ValueError: if no gain makes that [A B] stable.
    """
    states = 2 * system.size
    a, b = np.ascontiguousarray(jacobian[:, :states]), np.ascontiguousarray(jacobian[:, states:])
    q, r = np.repeat([cost.position, cost.velocity], system.size), cost.effort * np.eye(system.controls)
    try:
        p = solve_discrete_are(a, b, np.diag(q), r)
    except (LinAlgError, ValueError) as error:
        raise ValueError(f"no gain was found for [A B] of shape {jacobian.shape}: {error}") from error
    return np.linalg.solve(r + b.T @ p @ b, b.T @ p @ a)


def simulate(system: System, gain: Array | None, starts: Array, seconds: float, cost: Cost) -> Runs:
    """Run the nonlinear system from several starts.

    Args:
        system: that is run, about the equilibrium 0.
        gain: K of `u = -K x`; None: no control.
        starts: `(starts, 2 n)`.
        seconds: that it runs.
        cost: that is added up.
    """
    states, alive = starts.copy(), np.ones(len(starts), dtype=bool)
    norms, costs = [np.linalg.norm(states, axis=1)], np.zeros(len(starts))
    for _ in range(round(seconds / system.dt)):
        controls = np.zeros((len(states), system.controls)) if gain is None else -states @ gain.T
        costs += system.dt * (cost.of_states(states) + cost.effort * (controls**2).sum(1))
        if alive.any():
            states[alive] = system.step(np.concatenate([states, controls], axis=1)[alive])
        alive &= np.linalg.norm(states, axis=1) < FALLEN
        norms.append(np.where(alive, np.linalg.norm(states, axis=1), np.inf))
    return Runs(np.array(norms), np.where(alive, costs, np.inf))


def trajectories(
    step: Function, system: System, calls: int, *, scale: float, horizon: int, seed: int
) -> tuple[Array, Array]:
    """Return rows and what followed, `(calls, 2 n + c)` and `(calls, 2 n)`, of rollouts under random controls.

    A rollout starts at random states of that scale and goes on from what the simulator returned, noise included.

    Args:
        step: the simulator.
        system: whose sizes are taken.
        calls: rows in all.
        scale: standard deviation of starts and controls.
        horizon: steps of a rollout.
        seed: of both.
    """
    generator, states = np.random.default_rng(seed), 2 * system.size
    rollouts = -(-calls // horizon)
    state = scale * generator.standard_normal((rollouts, states))
    rows, followed = [], []
    for left in range(calls, 0, -rollouts):
        row = np.concatenate([state, scale * generator.standard_normal((rollouts, system.controls))], axis=1)[:left]
        rows.append(row)
        followed.append(step(row))
        state = followed[-1]
    return np.concatenate(rows), np.concatenate(followed)


def fitted(rows: Array, values: Array, pattern: Bool | None = None) -> Array:
    """Return the matrix J, `(m, n)`, of least squares `values = rows J'`, on a known pattern `(m, n)` if there is one."""
    if pattern is None:
        return np.linalg.lstsq(rows, values)[0].T
    found = np.zeros(pattern.shape)
    for i, support in enumerate(pattern):
        found[i, support] = np.linalg.lstsq(rows[:, support], values[:, i])[0]
    return found
