"""MuJoCo as a black box: its Jacobian sensed call by call, against its own finite differences, and a controller from it.

    python benchmarks/mujoco_sensing.py [--models hand cart ...] [--workers 2] > benchmarks/results/mujoco_sensing.txt

MuJoCo is optional: `pip install 'beyondprop[mujoco]'`. A call is one `mj_step` from a state and a control; positions are taken
as differences from a reference in the tangent space, so that free joints work, too. For every model:

    discovery   the pattern from central differences along a few random probes at states of a batch, nothing known before
    regression  the Jacobian at one state on that pattern, one probe more than the widest row has entries
    colouring   the same with one probe for each colour
    dense       one probe for each input, and a call that tells how many outputs there are
    mjd         MuJoCo's own `mjd_transitionFD`, centred, which is the reference

Errors are those of [A B] less [I 0] in the Frobenius norm. Seconds are by the wall: for one state; for one of 32 that are
sensed at once, which share the choice of probes; and for one state, row by row through a pool of processes. Where the model has
an upright equilibrium, a discrete LQR from the sensed [A B] is to balance it for 10 s in MuJoCo.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import os
import platform
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from multiprocessing import get_context
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.linalg import solve_discrete_are

from beyondprop.func.sensing import color_columns, detect_pattern, jacobian

Array = NDArray[np.float64]
OPTIONS = '<option timestep="0.01" integrator="Euler" density="{density}" viscosity="{viscosity}"/>'
MANY = 32
DEFAULTS = '<default><geom size="0.03" contype="0" conaffinity="0"/><joint type="hinge" axis="0 1 0" damping="0.05"/></default>'


# ---- models --------------------------------------------------------------------------------------------------------------


def model(
    bodies: str, motors: Iterable[str], *, tendons: str = "", density: float = 0.0, viscosity: float = 0.0
) -> str:
    """Return the XML of a model with a motor at each of the named joints."""
    options = OPTIONS.format(density=density, viscosity=viscosity)
    actuators = "".join(f'<motor joint="{name}" gear="1"/>' for name in motors)
    tendons = f"<tendon>{tendons}</tendon>" if tendons else ""
    world = f"<worldbody>{bodies}</worldbody>"
    return f"<mujoco>{options}{DEFAULTS}{world}{tendons}<actuator>{actuators}</actuator></mujoco>"


def links(names: Sequence[str], length: float, direction: str = "0 0 1", joint: str = "") -> str:
    """Return bodies that hang on each other, the first at its parent's origin, each with one joint."""
    end = " ".join(f"{float(part) * length:g}" for part in direction.split())
    inner, places = "", [f'pos="{end}"'] * (len(names) - 1)
    for name, place in zip(reversed(names), [*places, ""], strict=True):
        inner = f'<body {place}><joint name="{name}" {joint}/><geom type="capsule" fromto="0 0 0 {end}"/>{inner}</body>'
    return inner


def cart(poles: int = 2) -> str:
    """Return poles on each other on a cart, upright; the cart alone is driven."""
    names = [f"pole{i}" for i in range(poles)]
    rail = '<joint name="cart" type="slide" axis="1 0 0"/><geom type="box" size="0.1 0.1 0.05"/>'
    return model(f"<body>{rail}{links(names, 0.5)}</body>", ["cart"])


def row(size: int = 24) -> str:
    """Return inverted pendulums side by side, each with a motor, neighbours tied by springs."""
    names = [f"p{i}" for i in range(size)]
    bodies = "".join(f'<body pos="{0.4 * i:g} 0 0">{links([name], 0.5)}</body>' for i, name in enumerate(names))
    pair = '<joint joint="{}" coef="1"/><joint joint="{}" coef="-1"/>'
    spring = '<fixed stiffness="5" springlength="0">{}</fixed>'
    springs = "".join(spring.format(pair.format(a, b)) for a, b in itertools.pairwise(names))
    return model(bodies, names, tendons=springs)


def hand(fingers: int = 5, joints: int = 4) -> str:
    """Return fingers on a fixed palm, a motor at every joint."""
    names = [[f"f{i}j{j}" for j in range(joints)] for i in range(fingers)]
    bodies = "".join(f'<body pos="0 {0.1 * i:g} 0">{links(own, 0.1)}</body>' for i, own in enumerate(names))
    return model(bodies, [name for own in names for name in own])


def swimmer(size: int = 6) -> str:
    """Return links in a viscous plane, the first one free, a motor at every joint between them."""
    names = [f"s{i}" for i in range(1, size)]
    free = (
        '<joint name="x" type="slide" axis="1 0 0" damping="0"/><joint name="y" type="slide" axis="0 1 0" damping="0"/>'
    )
    free += '<joint name="turn" axis="0 0 1" damping="0"/><geom type="capsule" fromto="0 0 0 0.2 0 0"/>'
    tail = links(names, 0.2, "1 0 0", 'axis="0 0 1"')
    return model(f'<body>{free}<body pos="0.2 0 0">{tail}</body></body>', names, density=1000, viscosity=0.1)


def walker() -> str:
    """Return a free torso with two arms and two legs of two joints each, in the air."""
    names = [[f"{limb}{j}" for j in range(2)] for limb in ("arm", "warm", "leg", "wleg")]
    places = ("0 0.2 0.4", "0 -0.2 0.4", "0 0.1 0", "0 -0.1 0")
    limbs = "".join(
        f'<body pos="{place}">{links(own, 0.3, "0 0 -1")}</body>' for place, own in zip(places, names, strict=True)
    )
    torso = '<freejoint/><geom type="capsule" fromto="0 0 0 0 0 0.4" size="0.08"/>'
    return model(f'<body pos="0 0 2">{torso}{limbs}</body>', [name for own in names for name in own])


@dataclass(frozen=True)
class Case:
    """A model, and what is done with it: `spread` is of the states that discovery looks at, `start` of those to be balanced."""

    title: str
    xml: Callable[[], str]
    spread: float = 0.3
    start: float | None = None


CASES = {
    "cart": Case("two poles on a cart, upright", cart, start=0.02),
    "row": Case("24 pendulums tied by springs, upright", row, start=0.1),
    "hand": Case("hand of 5 fingers with 4 joints each", hand),
    "swimmer": Case("swimmer of 6 links", swimmer),
    "walker": Case("torso with four limbs in the air", walker),
}


# ---- the black box -------------------------------------------------------------------------------------------------------


def mujoco() -> Any:
    """Return the package, or end with how to install it."""
    try:
        return importlib.import_module("mujoco")
    except ImportError:
        sys.exit("MuJoCo is missing: pip install 'beyondprop[mujoco]' (or mujoco>=3.2).")


@lru_cache(maxsize=8)
def loaded(xml: str) -> tuple[Any, Any]:
    """Return the model and its data, made once in each process."""
    made = mujoco().MjModel.from_xml_string(xml)
    return made, mujoco().MjData(made)


class Simulator:
    """One step of MuJoCo: a row `(2 nv + nu,)` of state and control to the next state, `(2 nv,)`; also rows `(N, ...)`.

    A state is the tangent vector from the model's own `qpos0` to the position, and the velocity; the next position is taken
    from `target`. It is sent to other processes as XML; every process makes its own model.

    Args:
        xml: of the model.
        target: the position that the next one is a difference to; None: `qpos0`.
    """

    def __init__(self, xml: str, target: Array | None = None) -> None:
        self.xml, self.target = xml, target
        own, _ = loaded(xml)
        self.nv, self.nu = int(own.nv), int(own.nu)
        self.inputs, self.outputs = 2 * self.nv + self.nu, 2 * self.nv

    def place(self, row: Array) -> tuple[Any, Any]:
        """Return the model and its data in the state of a row, with its control."""
        package, (own, data) = mujoco(), loaded(self.xml)
        package.mj_resetData(own, data)  # no warm start of an earlier call
        position = own.qpos0.copy()
        package.mj_integratePos(own, position, row[: self.nv], 1.0)
        kind = package.mjtState.mjSTATE_PHYSICS
        package.mj_setState(own, data, np.concatenate([position, row[self.nv : 2 * self.nv], data.act]), int(kind))
        data.ctrl[:] = row[2 * self.nv :]
        return own, data

    def __call__(self, rows: Array) -> Array:
        if rows.ndim == 2:
            return np.stack([self(row) for row in rows])
        own, data = self.place(np.ascontiguousarray(rows))
        mujoco().mj_step(own, data)
        position = np.zeros(self.nv)
        target = own.qpos0 if self.target is None else self.target
        mujoco().mj_differentiatePos(own, position, 1.0, target, data.qpos)
        return np.concatenate([position, data.qvel])

    def about(self, row: Array) -> Simulator:
        """Return the box whose next positions are differences to the one after this row, as MuJoCo's Jacobian has them."""
        own, data = self.place(row)
        mujoco().mj_step(own, data)
        return Simulator(self.xml, data.qpos.copy())

    def own_differences(self, row: Array, step: float = 1e-6) -> Array:
        """Return [A B] by MuJoCo's `mjd_transitionFD`, centred, `(2 nv, 2 nv + nu)`, about a row whose position is `qpos0`."""
        own, data = self.place(row)
        a, b = np.zeros((self.outputs, self.outputs)), np.zeros((self.outputs, self.nu))
        mujoco().mjd_transitionFD(own, data, step, True, a, b, None, None)
        return np.concatenate([a, b], axis=1)


class Counted:
    """A box that counts its rows."""

    def __init__(self, box: Simulator) -> None:
        self.box, self.calls = box, 0

    def __call__(self, rows: Array) -> Array:
        self.calls += len(np.atleast_2d(rows))
        return self.box(rows)


# ---- what is measured ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sensed:
    """A Jacobian `(2 nv, 2 nv + nu)`, or one of several states, what it took, and how far the first is from the reference."""

    jacobian: Array
    calls: int
    seconds: float
    error: float


def state(case: Case, box: Simulator, seed: int, *, moving: bool) -> Array:
    """Return a row: at the reference position, at rest or with random velocities and controls."""
    found = np.zeros(box.inputs)
    if moving:
        found[box.nv :] = case.spread * np.random.default_rng(seed).standard_normal(box.inputs - box.nv)
    return found


def discovered(case: Case, box: Simulator, batch: int = 8, **settings: Any) -> tuple[Any, int]:
    """Return the pattern that states about the reference have, and the calls that it took."""
    generator = torch.Generator().manual_seed(0)
    states = case.spread * torch.randn(batch, box.inputs, generator=generator, dtype=torch.float64)
    counted = Counted(box)
    return detect_pattern(counted, states, generator=generator, **settings).pattern, counted.calls


def sensed(box: Simulator, row: Array, truth: Array, *, executor: Executor | None = None, **settings: Any) -> Sensed:
    """Return the Jacobian at a row; through an executor it goes row by row."""
    fn: Any = Counted(box) if executor is None else box  # what another process counts is not seen here
    generator = torch.Generator().manual_seed(0)
    x = torch.from_numpy(row)
    began = time.perf_counter()
    found = jacobian(fn, x, executor=executor, vectorized=executor is None, generator=generator, **settings)
    seconds = time.perf_counter() - began
    values = found.numpy() if row.ndim == 1 else found[0].numpy()
    error = float(np.linalg.norm(values - truth) / np.linalg.norm(truth - np.eye(*truth.shape)))
    return Sensed(values, getattr(fn, "calls", 0), seconds, error)


def balanced(box: Simulator, matrix: Array, start: float, seconds: float = 10.0, seed: int = 0) -> tuple[float, float]:
    """Return the norm of the state after that time, with a discrete LQR from [A B] and without; 5 starts, the largest."""
    a, b = np.ascontiguousarray(matrix[:, : box.outputs]), np.ascontiguousarray(matrix[:, box.outputs :])
    q, r = np.diag(np.repeat([100.0, 1.0], box.nv)), 1e-2 * np.eye(box.nu)
    p = solve_discrete_are(a, b, q, r)
    gain = np.linalg.solve(r + b.T @ p @ b, b.T @ p @ a)
    ends = []
    for own in (gain, np.zeros_like(gain)):
        states = np.zeros((5, box.outputs))
        states[:, : box.nv] = start * np.random.default_rng(seed).standard_normal((5, box.nv))
        for _ in range(round(seconds / 0.01)):
            states = box(np.concatenate([states, -states @ own.T], axis=1))
        ends.append(float(np.linalg.norm(states, axis=1).max()))
    return ends[0], ends[1]


def measured(case: Case, pool: Executor) -> None:
    """Print one model's table."""
    box = Simulator(case.xml())
    row = state(case, box, 1, moving=case.start is None)
    box = box if case.start is not None else box.about(row)
    began = time.perf_counter()
    truth = box.own_differences(row)
    own_seconds = time.perf_counter() - began
    pattern, calls = discovered(case, box)
    widest, colors = int(pattern.row_counts.max()), color_columns(pattern).count
    print(f"\n{case.title}: {box.nv} degrees of freedom, {box.nu} motors, {box.inputs} inputs")
    print(f"  pattern: {pattern.nnz} of {box.outputs * box.inputs} entries, row {widest} at most, {colors} colours")
    outside = np.abs(np.where(pattern.mask().numpy(), 0.0, truth)).max()
    print(f"  largest entry of the reference outside of it: {outside:.1e}; discovered by {calls} calls, once")
    print(f"  {'':12} {'calls':>6} {'error':>9} {'seconds':>9} {'of many':>9} {'by a pool':>9}")
    ways: dict[str, dict[str, Any]] = {
        "regression": {"pattern": pattern, "method": "regression"},
        "colouring": {"pattern": pattern, "method": "coloring"},
        "dense": {"method": "dense"},
    }
    found = {}
    for name, settings in ways.items():
        one = found[name] = sensed(box, row, truth, **settings)
        other = sensed(box, row, truth, executor=pool, **settings)
        many = sensed(box, np.tile(row, (MANY, 1)), truth, **settings)
        if not np.array_equal(other.jacobian, one.jacobian):
            print(f"  {name}: the pool's Jacobian differs by {np.abs(other.jacobian - one.jacobian).max():.1e}")
        print(
            f"  {name:12} {one.calls:6} {one.error:9.1e} {one.seconds:9.4f} {many.seconds / MANY:9.4f} {other.seconds:9.4f}"
        )
    print(f"  {'mjd':12} {2 * box.inputs:6} {'':>9} {own_seconds:9.4f}")
    if case.start is not None:
        controlled, free = balanced(box, found["regression"].jacobian, case.start)
        print(f"  LQR from regression: norm of the state after 10 s {controlled:.1e}, without control {free:.1e}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure the models that are asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--workers", type=int, default=2, help="processes of the pool")
    options = parser.parse_args(arguments)
    version = mujoco().__version__
    machine = f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.2f} before"
    print(f"MuJoCo {version}, torch {torch.__version__}, {machine}")
    with ProcessPoolExecutor(options.workers, mp_context=get_context("spawn")) as pool:
        list(pool.map(abs, range(options.workers)))  # started before anything is timed
        jacobian(np.sin, torch.ones(8, dtype=torch.float64), pattern=torch.eye(8).bool(), method="regression")
        for name in options.models:
            measured(CASES[name], pool)


if __name__ == "__main__":
    main()
