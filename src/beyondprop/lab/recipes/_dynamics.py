"""Simulators of rigid bodies in NumPy that autograd cannot see: a pendulum of n links, a chain of masses and springs.

A row is a state with a control, `(angles or positions, velocities, controls)`, and the next state is one step of semi-implicit
Euler: the velocities first, and the positions by the new velocities. So the position rows of the Jacobian are known from the
velocity rows, `complete`, and a simulator's velocity rows are all that must be sensed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from beyondprop import _checks

Array = NDArray[Any]
Bool = NDArray[np.bool_]
Function = Callable[[Array], Array]


class System(ABC):
    """A mechanical system with `size` coordinates, as many velocities, and `controls` inputs.

    Args:
        size: n, of coordinates.
        driven: the coordinates or joints that a control acts on, counted from 0; None: all.
        dt: seconds of a step.

    Raises:
        ValueError: if there is no coordinate, or `driven` names one twice or one that there is not.
    """

    def __init__(self, size: int, driven: Sequence[int] | None, dt: float) -> None:
        self.size = _checks.at_least("size", size, 1)
        self.driven = tuple(range(size)) if driven is None else tuple(driven)
        if len(set(self.driven)) != len(self.driven) or not set(self.driven) <= set(range(size)):
            raise ValueError(f"driven must be distinct numbers from 0 to {size - 1}, got {self.driven}.")
        self.dt = _checks.positive("dt", dt)

    @property
    def controls(self) -> int:
        """c, of inputs that are chosen."""
        return len(self.driven)

    @property
    def inputs(self) -> int:
        """Of a row: 2 n + c."""
        return 2 * self.size + self.controls

    @abstractmethod
    def acceleration(self, positions: Array, velocities: Array, controls: Array) -> Array:
        """Return the accelerations, `(N, n)`, of positions and velocities `(N, n)` and controls `(N, c)`."""

    @abstractmethod
    def energy(self, states: Array) -> Array:
        """Return kinetic plus potential energy, `(N,)`, of states `(N, 2 n)`."""

    @property
    @abstractmethod
    def pattern(self) -> Bool:
        """Which entries of the velocity rows may differ from 0 where it is linearised: `(n, 2 n + c)`."""

    def velocities(self, rows: Array) -> Array:
        """Return the next velocities, `(N, n)`, of rows `(N, 2 n + c)`, real or complex.

        Raises:
            ValueError: if the rows have another shape.
        """
        if rows.ndim != 2 or rows.shape[1] != self.inputs:
            raise ValueError(f"rows must be (N, {self.inputs}), got shape {rows.shape}.")
        n = self.size
        positions, velocities, controls = rows[:, :n], rows[:, n : 2 * n], rows[:, 2 * n :]
        return velocities + self.dt * self.acceleration(positions, velocities, controls)

    def step(self, rows: Array) -> Array:
        """Return the next states, `(N, 2 n)`, of rows `(N, 2 n + c)`."""
        velocities = self.velocities(rows)
        return np.concatenate([rows[:, : self.size] + self.dt * velocities, velocities], axis=1)

    def complete(self, rows: Array) -> Array:
        """Return the Jacobian of `step`, `(2 n, 2 n + c)`, of that of `velocities`, `(n, 2 n + c)`: kinematics, no call."""
        return np.concatenate([np.eye(*rows.shape) + self.dt * rows, rows])

    @property
    def full_pattern(self) -> Bool:
        """The pattern of all rows, `(2 n, 2 n + c)`."""
        return np.concatenate([np.eye(*self.pattern.shape, dtype=bool) | self.pattern, self.pattern])


class Pendulum(System):
    """Links without mass one after the other in a plane, each with a point mass at its end; the first hangs on a fixed point.

    Coordinates are each link's angle from upright, so 0 is the equilibrium that falls. A motor at joint k turns link k against
    link k - 1. Where the links are in line and at rest the inverse of the mass matrix is tridiagonal, so that a velocity
    depends on its neighbours alone; anywhere else it depends on all.

    Args:
        size: of links.
        driven: joints with a motor; None: all.
        mass: kg, one number or one a link.
        length: m, one number or one a link.
        damping: N m s, of every joint.
        gravity: m/s^2.
        dt: seconds of a step.
    """

    def __init__(
        self,
        size: int,
        driven: Sequence[int] | None = None,
        *,
        mass: float | Sequence[float] = 1.0,
        length: float | Sequence[float] = 1.0,
        damping: float = 0.0,
        gravity: float = 9.81,
        dt: float = 0.01,
    ) -> None:
        super().__init__(size, driven, dt)
        self.mass, self.length = _each("mass", mass, size), _each("length", length, size)
        self.damping = _checks.non_negative("damping", damping)
        self.gravity = _checks.non_negative("gravity", gravity)
        carried = self.mass[::-1].cumsum()[::-1]  # by each link, its own end among it
        outer = np.maximum.outer(np.arange(size), np.arange(size))
        self._inertia = carried[outer] * np.multiply.outer(self.length, self.length)
        self._weight = self.gravity * carried * self.length
        self._joints = np.eye(size) - np.eye(size, k=1)  # a motor's torque, and its opposite on the link before

    def acceleration(self, positions: Array, velocities: Array, controls: Array) -> Array:
        between = positions[:, :, None] - positions[:, None, :]
        torques = (
            controls @ self._joints[:, self.driven].T - self.damping * (velocities @ self._joints) @ self._joints.T
        )
        centrifugal = (self._inertia * np.sin(between) @ (velocities**2)[:, :, None])[:, :, 0]
        forces = self._weight * np.sin(positions) + torques - centrifugal
        return np.linalg.solve(self._inertia * np.cos(between), forces[:, :, None])[:, :, 0]

    def energy(self, states: Array) -> Array:
        angles, velocities = states[:, : self.size], states[:, self.size :]
        masses = self._inertia * np.cos(angles[:, :, None] - angles[:, None, :])
        kinetic = 0.5 * np.einsum("ni,nij,nj->n", velocities, masses, velocities)
        return kinetic + np.cos(angles) @ self._weight

    @property
    def pattern(self) -> Bool:
        """Of links in line and at rest, upright or hanging: `(n, 2 n + c)`; `dense_pattern` holds anywhere."""
        n = self.size
        inverse = _band(n, 1, 1)
        motors = inverse @ (self._joints != 0)
        friction = np.eye(n, dtype=bool) | ((motors @ (self._joints.T != 0)) & (self.damping > 0))
        return np.concatenate([inverse & (self.gravity > 0), friction, motors[:, list(self.driven)]], axis=1)

    @property
    def dense_pattern(self) -> Bool:
        """Of the velocity rows at any state: all entries."""
        return np.ones((self.size, self.inputs), dtype=bool)


class Chain(System):
    """Equal masses in a line, each tied to its neighbours, and those at the ends to walls, by springs that harden.

    A spring that is stretched by e pulls with `stiffness e + hardening e^3`. Coordinates are displacements from rest. With
    equal masses the velocity rows are symmetric in the positions, and in the velocities: `tie`.

    Args:
        size: of masses.
        driven: masses that a force acts on; None: all.
        mass: kg.
        stiffness: N/m.
        hardening: N/m^3.
        damping: N s/m, of every spring.
        dt: seconds of a step.
    """

    def __init__(
        self,
        size: int,
        driven: Sequence[int] | None = None,
        *,
        mass: float = 1.0,
        stiffness: float = 100.0,
        hardening: float = 1000.0,
        damping: float = 0.0,
        dt: float = 0.01,
    ) -> None:
        super().__init__(size, driven, dt)
        self.mass, self.stiffness = _checks.positive("mass", mass), _checks.positive("stiffness", stiffness)
        self.hardening = _checks.non_negative("hardening", hardening)
        self.damping = _checks.non_negative("damping", damping)

    def acceleration(self, positions: Array, velocities: Array, controls: Array) -> Array:
        stretch, rate = _between(positions), _between(velocities)
        pull = self.stiffness * stretch + self.hardening * stretch**3 + self.damping * rate
        return (np.diff(pull, axis=1) + controls @ np.eye(self.size)[list(self.driven)]) / self.mass

    def energy(self, states: Array) -> Array:
        stretch, velocities = _between(states[:, : self.size]), states[:, self.size :]
        springs = 0.5 * self.stiffness * stretch**2 + 0.25 * self.hardening * stretch**4
        return springs.sum(1) + 0.5 * self.mass * (velocities**2).sum(1)

    @property
    def pattern(self) -> Bool:
        """Banded, at any state: `(n, 2 n + c)`."""
        band, own = _band(self.size, 1, 1), np.eye(self.size, dtype=bool)
        return np.concatenate([band, band if self.damping > 0 else own, own[:, list(self.driven)]], axis=1)

    @property
    def tie(self) -> NDArray[np.int64]:
        """Which entries of the velocity rows are equal, `(n, 2 n + c)`: equal numbers are, -1 is structurally 0."""
        n = self.size
        row, column = np.nonzero(self.pattern)
        block, place = column // n, column % n
        is_pair = block < 2
        low, high = np.where(is_pair, np.minimum(row, place), row), np.where(is_pair, np.maximum(row, place), place)
        _, numbers = np.unique(np.stack([block, low, high]), axis=1, return_inverse=True)
        tie = np.full(self.pattern.shape, -1, dtype=np.int64)
        tie[row, column] = numbers.reshape(-1)
        return tie


class Counted:
    """A function of rows that counts them, with Gaussian noise on what it returns if wanted.

    Args:
        function: `(N, n)` to `(N, m)`.
        noise: standard deviation.
        seed: of the noise.
    """

    def __init__(self, function: Function, noise: float = 0.0, seed: int = 0) -> None:
        self.function, self.noise = function, _checks.non_negative("noise", noise)
        self.calls = 0
        self._generator = np.random.default_rng(seed)

    def __call__(self, rows: Array) -> Array:
        self.calls += len(rows)
        values = self.function(rows)
        return values + self.noise * self._generator.standard_normal(values.shape) if self.noise else values


def exact_jacobian(function: Function, x: Array) -> Array:
    """Return the Jacobian to rounding, `(m, n)` at `x` `(n,)`, by complex steps: for analytic code alone."""
    tiny = 1e-30
    return np.imag(function(x + 1j * tiny * np.eye(len(x)))).T / tiny


def _each(name: str, value: float | Sequence[float], size: int) -> Array:
    values = np.broadcast_to(np.asarray(value, dtype=float), (size,)) if np.ndim(value) == 0 else np.array(value, float)
    if values.shape != (size,) or not (np.isfinite(values) & (values > 0)).all():
        raise ValueError(f"{name} must be one finite number > 0 or {size} of them, got {value!r}.")
    return values


def _band(size: int, below: int, above: int) -> Bool:
    offset = np.subtract.outer(np.arange(size), np.arange(size))
    return (offset <= below) & (-offset <= above)


def _between(values: Array) -> Array:
    """Return the differences of neighbours, walls at 0 among them: `(N, n + 1)`."""
    return np.diff(np.pad(values, ((0, 0), (1, 1))), axis=1)
