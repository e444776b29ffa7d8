"""Jacobians of black boxes from calls alone: calls, errors and times, beside what others offer, in one process.

    python benchmarks/sensing.py [--parts calls unknown time planning training] [--rounds 9] > benchmarks/results/sensing.txt

Figures go to the standard output, progress to the standard error. A *call* is the evaluation of one row, counted by the box.
Errors are relative, in the Frobenius norm for J and in the 2-norm for `J^T v`, v random, against the closed form. Peers are
optional, `pip install 'beyondprop[benchmarks]'`; one that is missing is named and left out. Packages that differentiate code
they can see (asdex, sparsejac) sense nothing: only their colouring is here.

Times are CPU seconds of the process on one thread, medians over rounds in which contenders take turns.
"""

from __future__ import annotations

import argparse
import functools
import os
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jacobian_peers as peers
import numpy as np
import torch
from jacobian_peers import Box, Peer, Problem
from scipy import sparse
from scipy.optimize._numdiff import approx_derivative, group_columns
from torch import Tensor, nn

from beyondprop.errors import SensingWarning
from beyondprop.func import sensing
from beyondprop.func.sensing import coloring, designs
from beyondprop.nn import BlackBox

PARTS = ("calls", "unknown", "time", "planning", "training")
NOISE = 1e-4
BATCH = 64


def note(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}, load {os.getloadavg()[0]:.1f}] {text}", file=sys.stderr, flush=True)


def point(n: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(n)


# ---- calls and errors ----------------------------------------------------------------------------------------------------


def compared() -> list[tuple[Problem, list[Peer]]]:
    """Return the problems, each with who is asked."""
    usual = [*peers.DENSE, *peers.PATTERNED, *peers.COLORED, *peers.GRADIENTS]
    few = [peers.DENSE[1], *peers.PATTERNED, *peers.COLORED]
    three = Problem("n = m = 100, 3 random nonzeros a row, float64", peers.random_rows(100, 3), point(100))
    ten = Problem("n = m = 200, 10 random nonzeros a row, float64", peers.random_rows(200, 10), point(200))
    arrow = Problem("n = m = 100, arrow, symmetric, float64", peers.arrow(100), point(100), symmetric=True)
    band = Problem(
        "n = m = 100, band of half width 3, symmetric, float64", peers.banded(100, 3), point(100), symmetric=True
    )
    grid = Problem("n = m = 100, five-point grid, symmetric, float64", peers.grid(10), point(100), symmetric=True)
    found = []
    for problem in (three, ten):
        give = functools.partial(peers.ours_with_pattern, problem=problem)
        chosen = [
            give("auto"),
            give("regression, 2 more probes", method="regression", probes=_widest(problem) + 3),
            give("colouring", method="coloring"),
            give("auto, forward", difference="forward"),
            peers.ours("spsa, its default", method="spsa"),
        ]
        found.append((problem, [*chosen, *(usual if problem is three else few)]))
    for problem in (arrow, band, grid):
        give = functools.partial(peers.ours_with_pattern, problem=problem)
        found.append((
            problem,
            [give("symmetric", structure="symmetric"), give("auto"), give("colouring", method="coloring"), *few],
        ))
    single = peers.halved(Problem("n = m = 100, 3 random nonzeros a row, float32 box", three.weights, three.x))
    found.append((single, [peers.ours_with_pattern("auto", single), *usual]))
    noisy = Problem(
        f"n = m = 100, 3 random nonzeros a row, noise {NOISE:g} on every output", three.weights, three.x, noise=NOISE
    )
    give = functools.partial(peers.ours_with_pattern, problem=noisy)
    chosen = [
        give("not told of noise"),
        give("noise given", noise=NOISE),
        give("noise estimated", noise="estimate"),
        give("noise given, regression, 12 probes", noise=NOISE, method="regression", probes=12),
        give("noise given, colouring", noise=NOISE, method="coloring"),
    ]
    found.append((noisy, [*chosen, *usual, *peers.scipy_at(0.1)]))
    return found


def _widest(problem: Problem) -> int:
    return sensing.Pattern(problem.weights).widest


def calls() -> None:
    for problem, asked in compared():
        note(problem.title)
        print(f"\n{problem.title}\n  {'':45} {'calls':>6} {'error of J':>11} {'of J^T v':>9}")
        exact = problem.jacobian
        v = np.random.default_rng(2).standard_normal(len(exact))
        for peer in peers.available(asked):
            box = Box(problem)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found = np.asarray(peer.run(problem, box, v), dtype=np.float64)
            is_whole = found.ndim == 2
            whole = f"{_error(found, exact):.1e}" if is_whole else "-"
            gradient = found.T @ v if is_whole else found
            print(f"  {peer.name:45} {box.calls:>6} {whole:>11} {_error(gradient, exact.T @ v):>9.1e}", flush=True)


def _error(found: np.ndarray, exact: np.ndarray) -> float:
    return float(np.linalg.norm(found - exact) / np.linalg.norm(exact))


# ---- the pattern is not known --------------------------------------------------------------------------------------------


def unknown() -> None:
    n, count = 200, 5
    weights = peers.random_rows(n, count)
    pattern = sensing.Pattern(weights)
    print(f"\nthe pattern is not known: n = m = {n}, {count} random nonzeros a row; calls until it is found, once")
    print(f"  {'':45} {'calls':>6} {'a sample':>9} {'rows exact':>11}")
    for batch in (1, 4, 16, 64):
        box = Box(Problem("", weights, point(n)))
        x = torch.from_numpy(np.random.default_rng(3).standard_normal((batch, n)))
        found = sensing.detect_pattern(box, x, sparsity=count)
        exact = float((found.pattern.mask() == pattern.mask()).all(1).double().mean())
        name = f"beyondprop detect_pattern, batch of {batch}"
        print(f"  {name:45} {box.calls:>6} {box.calls / batch:>9.1f} {exact:>11.1%}", flush=True)
    if peers.installed("openmdao"):
        problem = Problem("", weights, point(n))
        box = Box(problem)
        found = peers.OpenMDAO(problem, box).pattern
        exact = float((found == pattern.mask().numpy()).all(1).mean())
        print(f"  {'OpenMDAO declare_coloring, its defaults':45} {box.calls:>6} {box.calls:>9.1f} {exact:>11.1%}")


# ---- times ---------------------------------------------------------------------------------------------------------------


def timed(contenders: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Return each one's median CPU milliseconds; they take turns, and the first round warms up."""
    found: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(-1, rounds):
        for name, run in contenders.items():
            start = time.process_time()
            run()
            if turn >= 0:
                found[name].append(1e3 * (time.process_time() - start))
    return {name: statistics.median(times) for name, times in found.items()}


def times(rounds: int) -> None:
    for n in (100, 1_000, 10_000):
        note(f"times, n = {n}")
        title, contenders = _at(n)
        found = timed(contenders, rounds)
        print(f"\n{title}")
        for name in contenders:
            print(f"  {name:50} {found[name]:>10.2f}", flush=True)


def _at(n: int) -> tuple[str, dict[str, Callable[[], Any]]]:
    """Return what takes Jacobians of a band at one point and at many, and a line on how."""
    problem = Problem("", peers.banded(n), point(n))
    box, many = Box(problem), np.random.default_rng(3).standard_normal((BATCH, n))
    pattern, groups = sensing.Pattern(problem.weights), group_columns(problem.weights)
    layer = BlackBox(box, n, pattern=pattern)
    plan = layer.plan
    assert plan is not None
    around = np.repeat(problem.x[None], plan.calls + 1, 0), np.repeat(many, plan.calls + 1, 0)
    differences = functools.partial(approx_derivative, box.one, method="3-point")

    def backward(points: np.ndarray) -> None:
        x = torch.from_numpy(points).requires_grad_()
        layer(x).backward(torch.ones(len(x), n, dtype=x.dtype))

    def each(points: np.ndarray) -> None:
        for row in points:
            differences(row, sparsity=(problem.weights, groups))

    contenders: dict[str, Callable[[], Any]] = {
        "1: the box itself, its calls as one array": lambda: box(around[0]),
        "1: beyondprop jacobian, planning included": lambda: sensing.jacobian(
            box, torch.from_numpy(problem.x), pattern=pattern, layout="coo"
        ),
        "1: BlackBox, forward and backward": lambda: backward(problem.x[None]),
        "1: scipy 3-point, groups given": lambda: each(problem.x[None]),
        "1: scipy 3-point, grouping included": lambda: differences(problem.x, sparsity=problem.weights),
        f"{BATCH}: the box itself, its calls as one array": lambda: box(around[1]),
        f"{BATCH}: BlackBox, forward and backward": lambda: backward(many),
        f"{BATCH}: scipy 3-point, groups given": lambda: each(many),
    }
    if n <= 1_000:
        contenders["1: scipy 3-point, dense"] = lambda: differences(problem.x)
    how = f"{plan.method}, {plan.calls} calls; scipy {2 * (int(groups.max()) + 1) + 1}"
    return f"ms for the Jacobians at 1 and at {BATCH} points, n = m = {n:,}, band of 3 ({how})", contenders


def planning(rounds: int) -> None:
    patterns = {
        "100, 3 random a row": peers.random_rows(100, 3),
        "200, 10 random a row": peers.random_rows(200, 10),
        "1,000, 5 random a row": peers.random_rows(1_000, 5),
        "10,000, 5 random a row": peers.random_rows(10_000, 5),
        "100, arrow": peers.arrow(100),
        "10,000, band of 7": peers.banded(10_000, 3),
        "10,000, five-point grid": peers.grid(100),
    }
    print("\nplanning, nothing kept from before: colours, of the plan probes, and ms")
    for title, weights in patterns.items():
        note(f"planning, {title}")
        pattern = sensing.Pattern(weights)
        print(f"  n = m = {title}: at most {pattern.widest} a row")
        contenders: dict[str, Callable[[], int]] = {
            f"beyondprop color_columns, {order}": functools.partial(_count, weights, order) for order in coloring.ORDERS
        }
        contenders["beyondprop, the whole plan"] = functools.partial(_planned, weights)
        contenders |= peers.colorings(weights)
        for name, run in contenders.items():
            counts: list[int] = []
            took = timed({name: lambda run=run, counts=counts: counts.append(run())}, min(rounds, 3))
            print(f"    {name:44} {counts[-1]:>6} {took[name]:>10.1f}", flush=True)


def _count(weights: sparse.csr_array, order: str) -> int:
    coloring._always.cache_clear()  # what was planned once is kept
    return sensing.color_columns(weights, order).count


def _planned(weights: sparse.csr_array) -> int:
    coloring._always.cache_clear()
    designs._always.cache_clear()
    plan = BlackBox(np.tanh, pattern=weights).plan
    assert plan is not None
    return plan.probes


# ---- training ------------------------------------------------------------------------------------------------------------


def by_hand(f: Callable[[np.ndarray], np.ndarray], colors: np.ndarray, pattern: sparse.csr_array) -> Any:
    """Return what a user writes who knows colouring: central differences in NumPy, at a step of 1/256."""
    rows, columns = pattern.nonzero()
    count = int(colors.max()) + 1
    probes = (colors == np.arange(count)[:, None]).astype(np.float32) / 256

    class Layer(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return torch.from_numpy(f(x.detach().numpy()))

        @staticmethod
        def backward(ctx: Any, *v: Tensor) -> Tensor:
            x = ctx.saved_tensors[0].numpy()
            points = np.concatenate([x + probe for probe in probes] + [x - probe for probe in probes])
            y = f(points).reshape(2, count, *x.shape)
            values = (y[0] - y[1])[colors[columns], :, rows] * 128
            found = np.zeros(x.shape[::-1])
            np.add.at(found, columns, values * v[0].numpy()[:, rows].T)
            return torch.from_numpy(found.T.astype(np.float32))

    return Layer.apply


def training(rounds: int) -> None:
    n, batch = 64, 50
    weights = peers.banded(n)
    dense = weights.toarray().T.astype(np.float32)

    def f(x: np.ndarray) -> np.ndarray:
        return np.tanh(x @ dense)

    class Twin(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(x @ torch.from_numpy(dense))

    class Hand(nn.Module):
        layer = staticmethod(by_hand(f, group_columns(weights), weights))

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x)

    layers: dict[str, nn.Module] = {"autograd, the twin of the box": Twin(), "by hand, coloured in NumPy": Hand()}
    for method in ("auto", "regression", "dense", "spsa"):
        pattern = weights if method in ("auto", "regression") else None
        layers[f"BlackBox, {method}"] = BlackBox(f, n, pattern=pattern, method=method)
    x = torch.randn(batch, n, generator=torch.Generator().manual_seed(0))
    y = torch.arange(batch) % 10
    steps = {}
    for name, layer in layers.items():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(n, n), layer, nn.Linear(n, 10))
        optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)

        def step(net: nn.Module = net, optimizer: torch.optim.Optimizer = optimizer) -> None:
            for _ in range(20):
                optimizer.zero_grad()
                nn.functional.cross_entropy(net(x), y).backward()
                optimizer.step()

        steps[name] = step
    found = timed(steps, rounds)
    print(
        f"\nms of a training step: Linear({n}, {n}), a box with a band of 3, Linear({n}, 10), batch {batch}, float32, Adam"
    )
    print(f"  {'':34} {'calls a sample':>15} {'ms':>8} {'its calls alone':>16}")
    for name, layer in layers.items():
        plan = layer.plan if isinstance(layer, BlackBox) else None
        count = 0 if "twin" in name else 1 + (plan.calls if plan else 2 * (int(group_columns(weights).max()) + 1))
        rows = x.numpy(), np.repeat(x.numpy(), max(count - 1, 1), 0)
        alone = timed({name: lambda rows=rows: [f(part) for part in rows for _ in range(10)]}, rounds)[name] / 10
        shown = f"{alone:.2f}" if count else "-"
        print(f"  {name:34} {count:>15} {found[name] / 20:>8.2f} {shown:>16}", flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--rounds", type=int, default=9)
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)
    load = os.getloadavg()[0]
    state = "idle" if load < 0.5 else "NOT IDLE, so that times are rough"
    print(f"torch {torch.__version__}, numpy {np.__version__}, {platform.machine()}, load {load:.2f} before: {state}")
    found = {package: peers.installed(package) for package in peers.PACKAGES}
    print(", ".join(f"{name} {number or 'NOT INSTALLED, left out'}" for name, number in found.items()))
    warnings.simplefilter("ignore", SensingWarning)
    if "calls" in chosen.parts:
        calls()
    if "unknown" in chosen.parts:
        unknown()
    for part, run in (("time", times), ("planning", planning), ("training", training)):
        if part in chosen.parts:
            note(part)
            run(chosen.rounds)


if __name__ == "__main__":
    main()
