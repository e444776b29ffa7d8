"""Rigid bodies linearised through black-box simulators, and balanced by what was found.

The velocity rows of [A B] = d next state / d (state, control) are sensed by dense differences, by a colouring, by regression,
and for the chain by its symmetry; the position rows follow from kinematics. The rival is a fit to trajectories under random
controls. Errors are those of [A B] less [I 0], the part that is not known beforehand, in the Frobenius norm against complex
steps. What an error means is then seen in the discrete LQR that it gives, on the nonlinear system.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from beyondprop.func.sensing import jacobian
from beyondprop.lab.recipes._base import Context, Recipe, Row
from beyondprop.lab.recipes._control import Cost, Runs, fitted, lqr, simulate, trajectories
from beyondprop.lab.recipes._drawing import panels
from beyondprop.lab.recipes._dynamics import Array, Chain, Counted, Pendulum, System, exact_jacobian
from beyondprop.lab.recipes._kept import Kept

COST = Cost()
SEEDS, STARTS = (0, 1, 2, 3, 4), 10
SCALES = tuple(10.0**power for power in range(-6, 0))
"""Of starts and controls of trajectories; the best one is shown, chosen by the true error."""
HORIZON = 10
METHODS = {
    "dense": ("dense differences", "#222222", "s"),
    "coloring": ("colouring", "#009E73", "^"),
    "regression": ("regression", "#0072B2", "o"),
    "tied": ("symmetry", "#CC79A7", "D"),
}
FITS = {"plain": ("trajectories", "#D55E00"), "on pattern": ("trajectories, pattern known", "#E69F00")}

Error = Callable[[Array], float]
Controlled = Callable[[Array | None], dict[str, Any]]


@dataclass(frozen=True)
class Setting:
    """A system and what is asked of its controller.

    Attributes:
        title: of the system.
        system: that is linearised at its equilibrium 0, upright or at rest.
        spread: standard deviation of the starts' angles in rad, or positions in m.
        seconds: until when it must be balanced.
        bound: on the norm of the state by then.
        noise: standard deviation of what a noisy simulator adds to each velocity.
        whole: whether the table has it in full.
    """

    title: str
    system: System
    spread: float
    seconds: float
    bound: float
    noise: float
    whole: bool = False


SETTINGS = (
    Setting("pendulum of 2 links, a motor between them", Pendulum(2, (1,)), 0.01, 6.0, 0.01, 1e-7),
    Setting("pendulum of 8 links", Pendulum(8, damping=0.05), 0.02, 6.0, 0.01, 1e-7),
    Setting("pendulum of 16 links", Pendulum(16), 0.02, 10.0, 0.01, 1e-9, whole=True),
    Setting("chain of 10 masses, 4 forces", Chain(10, range(0, 10, 3), damping=0.1), 0.1, 20.0, 0.01, 1e-5),
    Setting("chain of 40 masses, 14 forces", Chain(40, range(0, 40, 3), damping=0.1), 0.1, 20.0, 0.01, 1e-5),
    Setting(
        "chain of 120 masses, 40 forces", Chain(120, range(0, 120, 3), damping=0.1), 0.1, 40.0, 0.05, 1e-5, whole=True
    ),
)
QUICK = (
    Setting("pendulum of 4 links", Pendulum(4), 0.02, 3.0, 0.05, 1e-6, whole=True),
    Setting("chain of 10 masses, 4 forces", Chain(10, range(0, 10, 3), damping=0.1), 0.1, 10.0, 0.1, 1e-5, whole=True),
)


def sensed(system: System, method: str, noise: float = 0.0, seed: int = 0) -> tuple[Array, int]:
    """Return [A B] at 0, `(2 n, 2 n + c)`, and the simulator's calls that it took.

    Args:
        system: whose velocity rows are sensed.
        method: a key of `METHODS`.
        noise: standard deviation of the simulator's noise, which the method is told.
        seed: of noise and probes.
    """
    simulator = Counted(system.velocities, noise, seed)
    known: dict[str, Any] = {"noise": noise} if noise else {}
    if method == "tied":
        if not isinstance(system, Chain):
            raise ValueError(f"a symmetry is known of chains alone, got {type(system).__name__}.")
        known["structure"] = torch.from_numpy(system.tie)
        if noise:  # the least that symmetry asks for has nothing over to average
            known["probes"] = int(system.pattern.sum(1).max())
    else:
        known |= {"pattern": torch.from_numpy(system.pattern), "method": method}
        if noise and method == "regression":
            known["probes"] = int(system.pattern.sum(1).max()) + 3
    generator = torch.Generator().manual_seed(seed)
    x = torch.zeros(system.inputs, dtype=torch.float64)
    rows = jacobian(simulator, x, generator=generator, **known).numpy()
    return system.complete(rows), simulator.calls


def from_trajectories(
    system: System, calls: int, fit: str, scale: float, noise: float = 0.0, seed: int = 0
) -> Array | None:
    """Return [A B] at 0 by least squares on rollouts of `HORIZON` steps; None where one ran away.

    Args:
        system: that is rolled out from random states under random controls.
        calls: of the simulator, in all.
        fit: a key of `FITS`.
        scale: standard deviation of states and controls.
        noise: of the simulator.
        seed: of everything.
    """
    rows, states = trajectories(
        Counted(system.step, noise, seed), system, calls, scale=scale, horizon=HORIZON, seed=seed
    )
    if not np.isfinite(states).all():
        return None
    pattern = system.pattern if fit == "on pattern" else None
    return system.complete(fitted(rows, states[:, system.size :], pattern))


def measure(context: Context) -> tuple[Sequence[Row], dict[str, Any]]:
    """Measure all systems, those of the table's whole rows with the rival and every seed."""
    settings = QUICK if context.quick else SETTINGS
    about = {setting.title: [setting.noise, setting.seconds, setting.bound] for setting in settings}
    kept = Kept(context.out / "measured.json", {"seeds": SEEDS, "starts": STARTS, "systems": about})
    rows: list[Row] = []
    found: dict[str, dict[str, Any]] = {}
    for setting in settings:
        one = found[setting.title] = kept.get(setting.title, lambda s=setting: measured(s))
        calls = ", ".join(f"{METHODS[method][0]} {own['calls']}" for method, own in one["sensed"].items())
        context.say(f"{setting.title}: calls by {calls}")
        rows += _rows(setting, one)
    _draw(context, {setting: found[setting.title] for setting in settings if setting.whole})
    return rows, {}


def measured(setting: Setting) -> dict[str, Any]:
    """Return what a figure and a table have of one system."""
    system = setting.system
    truth = system.complete(exact_jacobian(system.velocities, np.zeros(system.inputs)))
    beyond = np.linalg.norm(truth - np.eye(*truth.shape))

    def error(other: Array) -> float:
        return float(np.linalg.norm(other - truth) / beyond)

    def controlled(jacobian: Array | None) -> dict[str, Any]:
        try:
            gain = None if jacobian is None else lqr(jacobian, system, COST)
        except ValueError:  # no gain makes what was found stable
            return {"balanced": 0.0, "cost": None}
        runs = simulate(system, gain, _starts(setting), setting.seconds, COST)
        return _shown(runs, setting)

    out: dict[str, Any] = {"sensed": {}, "fits": {}, "control": {"exact": controlled(truth), "none": controlled(None)}}
    for method in METHODS:
        if method == "tied" and not isinstance(system, Chain):
            continue
        clean, calls = sensed(system, method)
        noisy = [sensed(system, method, setting.noise, seed) for seed in SEEDS]
        out["sensed"][method] = {
            "calls": calls,
            "noisy calls": noisy[0][1],
            "error": error(clean),
            "noisy": [error(one) for one, _ in noisy],
        }
        out["control"][method] = controlled(clean)
        out["control"][f"{method}, noisy"] = [controlled(one) for one, _ in noisy]
    return out | (
        {"fits": _fits(setting, out["sensed"]["regression"]["noisy calls"], error, controlled)} if setting.whole else {}
    )


def _fits(setting: Setting, same: int, error: Error, controlled: Controlled) -> dict[str, Any]:
    """Return what trajectories give at several numbers of calls, those of a method first, each at the best scale."""
    inputs = setting.system.inputs
    out: dict[str, Any] = {
        "calls": sorted({same, 2 * same, inputs, 2 * inputs, 4 * inputs}),
        "same": [same, 2 * inputs],
    }
    for fit in FITS:
        for name, noise in (("clean", 0.0), ("noisy", setting.noise)):
            out[f"{fit} {name}"] = errors = []
            for calls in out["calls"]:
                seeds = SEEDS if noise else SEEDS[:1]
                best = [_best(setting.system, calls, fit, noise, seed, error) for seed in seeds]
                errors.append([error(one) for one in best])
                if noise and calls in out["same"]:
                    out[f"{fit} {calls}"] = [controlled(one) for one in best]
    return out


def _best(system: System, calls: int, fit: str, noise: float, seed: int, error: Error) -> Array:
    """Return what trajectories give at the scale with the least true error."""
    tries = [from_trajectories(system, calls, fit, scale, noise, seed) for scale in SCALES]
    return min((one for one in tries if one is not None), key=error)


def _starts(setting: Setting) -> Array:
    starts = np.zeros((STARTS, 2 * setting.system.size))
    starts[:, : setting.system.size] = setting.spread * np.random.default_rng(0).standard_normal((
        STARTS,
        setting.system.size,
    ))
    return starts


def _shown(runs: Runs, setting: Setting) -> dict[str, Any]:
    every = max(len(runs.norms) // 200, 1)
    norms = [None if math.isinf(v) else float(v) for v in runs.norms[::every].max(1)]
    cost = float(runs.costs.mean())
    return {
        "balanced": 100.0 * float(runs.balanced(setting.bound).mean()),
        "cost": None if math.isinf(cost) else cost,
        "norms": norms,
        "seconds": every * setting.system.dt,
    }


def _rows(setting: Setting, one: Mapping[str, Any]) -> list[Row]:
    def row(text: str, *values: float, **own: Any) -> Row:
        return Row(f"{setting.title}: {text}", values, **own)

    def calls(count: int) -> str:
        return f"{count} calls"

    sensed, control, noise = one["sensed"], one["control"], f"noise {setting.noise:g}"
    dense, exact = sensed["dense"]["calls"], control["exact"]["cost"]
    fewer = {"digits": 0, "at_most": dense}
    rows = [row("calls, dense differences", dense, digits=0)]
    rows += [row(f"calls, {METHODS[method][0]}", sensed[method]["calls"], **fewer) for method in list(sensed)[1:]]
    worst = max(own["error"] for own in sensed.values())
    rows.append(row("relative error, no noise, the most of them", worst, at_most=1e-7, digits=11))
    if setting.whole:
        for method, own in sensed.items():
            text = f"relative error, {noise}, {METHODS[method][0]}, {calls(own['noisy calls'])}"
            rows.append(row(text, *own["noisy"], digits=5))
        fits = one["fits"]
        for fit, (name, _) in FITS.items():
            for count in fits["same"]:
                errors = fits[f"{fit} noisy"][fits["calls"].index(count)]
                rows.append(row(f"relative error, {noise}, {name}, {calls(count)}", *errors, digits=5))
        for fit, (name, _) in FITS.items():
            for count in fits["same"]:
                balanced = [run["balanced"] for run in fits[f"{fit} {count}"]]
                rows.append(row(f"balanced by LQR, {noise}, {name}, {calls(count)}", *balanced, unit="%", digits=0))
    rows += [
        row("balanced without control", control["none"]["balanced"], unit="%", digits=0, at_most=0.0),
        row("balanced by LQR, exact", control["exact"]["balanced"], unit="%", digits=0, at_least=100.0),
    ]
    for text, most, own in (
        ("no noise", 1.000001, [[control[method]] for method in sensed]),
        (noise, 1.05, [control[f"{method}, noisy"] for method in sensed]),
    ):
        seeds = list(zip(*own, strict=True))
        balanced = [min(found["balanced"] for found in seed) for seed in seeds]
        cost = [max(math.inf if found["cost"] is None else found["cost"] / exact for found in seed) for seed in seeds]
        label = f"balanced by LQR, {text}, the least of all methods"
        rows.append(row(label, *balanced, unit="%", digits=0, at_least=100.0))
        rows.append(row(f"cost over the exact LQR's, {text}, the most of them", *cost, digits=6, at_most=most))
    return rows


def _draw(context: Context, found: Mapping[Setting, Mapping[str, Any]]) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter

    titles = []
    for setting in found:
        noise = f"noise {setting.noise:g}"
        titles += [
            f"{setting.title}: error of [A B]\nhollow, dotted: no noise; filled, solid: {noise}",
            f"{setting.title}: LQR\n{noise}, the largest norm of {STARTS} starts",
        ]
    with panels(context, 2, len(found), size=(11.0, 4.2 * len(found)), titles=titles, legend=4) as grid:
        for (errors, norms), one in zip(grid, found.values(), strict=True):
            for method, own in one["sensed"].items():
                name, color, mark = METHODS[method]
                errors.loglog(own["calls"], own["error"], mark, color=color, mfc="none")
                errors.loglog(own["noisy calls"], np.mean(own["noisy"]), mark, color=color, label=name)
            fits = one["fits"]
            for fit, (name, color) in FITS.items():
                for kind, line, label in (("clean", ":", None), ("noisy", "-", name)):
                    values = [np.mean(values) for values in fits[f"{fit} {kind}"]]
                    errors.loglog(fits["calls"], values, line, color=color, label=label)
            errors.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            errors.xaxis.set_major_formatter("{x:g}")
            errors.xaxis.set_minor_formatter(NullFormatter())
            errors.set_xlabel("calls of the simulator")
            errors.set_ylabel("relative error")
            for run, name, color, line in (
                (one["control"]["none"], "no control", "#777777", "-."),
                (one["control"]["exact"], "exact [A B]", "#222222", "-"),
                (one["control"]["regression, noisy"][0], "regression", METHODS["regression"][1], (0, (3, 2))),
                (fits[f"plain {fits['same'][0]}"][0], "trajectories, as many calls", FITS["plain"][1], ":"),
            ):
                values = [math.nan if v is None else v for v in run.get("norms", [])]
                seconds = run.get("seconds", 0.0) * np.arange(len(values))
                norms.semilogy(seconds, values, color=color, linestyle=line, label=f"LQR: {name}")
            norms.set_xlabel("seconds")
            norms.set_ylabel("norm of the state")


RECIPE = Recipe(
    title="Rigid bodies linearised by Jacobian sensing, and balanced",
    source="Choromanski & Sindhwani, NeurIPS 2017, the dynamics of rigid bodies",
    about=(
        "Pendulums of point masses on links without mass, upright, with a motor at every joint unless said, and chains of "
        "equal masses with hardening springs: semi-implicit Euler, 0.01 s a step, NumPy, float64. Velocity rows are sensed, "
        "position rows follow from kinematics. The patterns are those of links in line at rest (a velocity depends on its "
        "neighbours) and of the chain; the error is relative to [A B] less [I 0]. Noise is added to every velocity that the "
        "simulator returns, and the methods are told its size: the largest power of ten with which the controller of dense "
        "differences costs at most half a per cent more than that of the exact [A B]. It costs 36 calls more, once, to find "
        "the step. With noise, symmetry takes as many probes as the widest row has entries, regression three more. "
        "Trajectories are rollouts of 10 steps from random states under random controls, their scale the best of six by the "
        "true error. LQR: weights 100 for positions, 1 for velocities, 1e-4 for controls; ten starts."
    ),
    measure=measure,
    minutes=2,
)
