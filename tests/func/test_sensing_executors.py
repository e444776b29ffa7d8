"""Threads, processes and pools: bit for bit what one thread computes, and named errors where something breaks."""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from multiprocessing.pool import ThreadPool
from typing import Any

import numpy as np
import pytest
import torch
from boxes import Noisy, Smooth, points, random_pattern

from beyondprop.errors import BlackBoxError
from beyondprop.func.sensing import jacobian
from beyondprop.nn import BlackBox

MASK = random_pattern(8, 8, 2)
SMOOTH = Smooth(MASK)


def row_box(row: np.ndarray) -> np.ndarray:
    """One row; a function that other processes can import."""
    return SMOOTH(row[None])[0]


def rows_box(x: np.ndarray) -> np.ndarray:
    """Rows one by one, as a simulator has them: the same numbers however they are split."""
    return np.stack([row_box(row) for row in x])


def seeded_box(row: np.ndarray, seed: int) -> np.ndarray:
    """One row with noise."""
    return Noisy(SMOOTH, 0.1).seeded(row[None], seed)[0]


def failing_box(row: np.ndarray) -> np.ndarray:
    """A box that fails beyond a bound."""
    if row[0] > 2:
        raise ArithmeticError("no convergence")
    return row_box(row)


def deadly_box(row: np.ndarray) -> np.ndarray:
    """A box whose process dies."""
    if multiprocessing.parent_process() is not None:
        os._exit(3)
    return row_box(row)


class Unsendable(Exception):
    """An exception that cannot be pickled back."""

    def __init__(self, first: int, second: int) -> None:
        super().__init__(f"{first} and {second}")


def unsendable_box(row: np.ndarray) -> np.ndarray:
    """A box with an exception of its own."""
    raise Unsendable(1, 2)


CONTEXT = multiprocessing.get_context("fork")


@contextmanager
def _joblib(**options: Any) -> Iterator[Any]:
    joblib = pytest.importorskip("joblib", reason="joblib is not installed")
    with joblib.Parallel(**options) as parallel:
        yield parallel


@contextmanager
def _ray() -> Iterator[Any]:
    if importlib.util.find_spec("ray") is None:
        pytest.skip("Ray is not installed")
    from ray.util.multiprocessing import Pool  # pyright: ignore[reportMissingImports]

    with Pool(2) as pool:
        yield pool


EXECUTORS: dict[str, Callable[[], Any]] = {
    "threads": lambda: ThreadPoolExecutor(3),
    "one thread": lambda: ThreadPoolExecutor(1),
    "many threads": lambda: ThreadPoolExecutor(100),
    "processes": lambda: ProcessPoolExecutor(2, mp_context=CONTEXT),
    "pool": lambda: CONTEXT.Pool(2),
    "thread pool": lambda: ThreadPool(2),
    "joblib threads": lambda: _joblib(n_jobs=2, backend="threading"),
    "joblib": lambda: _joblib(n_jobs=1),
    "joblib generator": lambda: _joblib(n_jobs=2, backend="threading", return_as="generator"),
    "ray": _ray,
}
every_executor = pytest.mark.parametrize("make", EXECUTORS.values(), ids=EXECUTORS.keys())
# A child that is forked while autograd's threads live is warned of; these children compute with NumPy alone.
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")


@every_executor
def test_every_executor_finds_the_same_bits(make: Callable[[], Any]) -> None:
    x = points(5, 8)
    with make() as executor:
        for box, vectorized in ((row_box, False), (rows_box, True)):
            settings: tuple[dict[str, Any], ...] = (
                {"pattern": MASK},
                {"method": "dense"},
                {"pattern": MASK, "method": "regression"},
            )
            for options in settings:
                alone = jacobian(box, x, vectorized=vectorized, **options)
                assert torch.equal(jacobian(box, x, vectorized=vectorized, executor=executor, **options), alone)
        seeds = [torch.Generator().manual_seed(1) for _ in range(2)]
        alone = jacobian(seeded_box, x, pattern=MASK, vectorized=False, seed_kwarg="seed", generator=seeds[0])
        shared = jacobian(
            seeded_box, x, pattern=MASK, vectorized=False, seed_kwarg="seed", generator=seeds[1], executor=executor
        )
        assert torch.equal(shared, alone)


@every_executor
def test_training_steps_are_the_same(make: Callable[[], Any]) -> None:
    found = []
    with make() as executor:
        for each in (None, executor):
            torch.manual_seed(0)
            layer = BlackBox(row_box, pattern=MASK, vectorized=False, executor=each)
            model = torch.nn.Sequential(torch.nn.Linear(3, 8), layer, torch.nn.Linear(8, 1)).double()
            optimizer = torch.optim.SGD(model.parameters(), 0.1)
            for step in range(3):
                optimizer.zero_grad()
                model(points(4, 3, step)).square().mean().backward()
                optimizer.step()
            found.append([p.detach().clone() for p in model.parameters()] + [torch.tensor(layer.stats.total)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@every_executor
def test_failures_are_named_and_the_executor_lives_on(make: Callable[[], Any]) -> None:
    x = points(5, 8).clamp(-1, 1)
    bad = x.clone()
    bad[2, 0] = 2.5
    with make() as executor:
        with pytest.raises(BlackBoxError, match="ArithmeticError: no convergence for sample 2"):
            jacobian(failing_box, bad, method="dense", vectorized=False, executor=executor)
        with pytest.raises(BlackBoxError, match="Unsendable: 1 and 2"):
            jacobian(unsendable_box, x, method="dense", vectorized=False, executor=executor)
        again = jacobian(failing_box, x, pattern=MASK, vectorized=False, executor=executor)
    assert torch.equal(again, jacobian(failing_box, x, pattern=MASK, vectorized=False))


@pytest.mark.parametrize("make", [EXECUTORS["processes"], EXECUTORS["pool"]], ids=["processes", "pool"])
def test_a_function_that_cannot_be_sent(make: Callable[[], Any]) -> None:
    with make() as executor:
        with pytest.raises(
            BlackBoxError, match=r"cannot be sent to another process .*top level of a module, or take threads"
        ):
            jacobian(lambda row: row, points(2, 8), method="dense", vectorized=False, executor=executor)
        lock = threading.Lock()

        class Locked:
            def __init__(self) -> None:
                self.lock = lock

            def __call__(self, row: np.ndarray) -> np.ndarray:
                return row

        with pytest.raises(BlackBoxError, match="cannot be sent to another process"):
            jacobian(Locked(), points(2, 8), method="dense", vectorized=False, executor=executor)


def test_a_dead_worker() -> None:
    with ProcessPoolExecutor(2, mp_context=CONTEXT) as executor:
        layer = BlackBox(deadly_box, pattern=MASK, vectorized=False, executor=executor)
        with pytest.raises(BlackBoxError, match=r"ProcessPoolExecutor is broken, as a worker died .*Make a new one"):
            layer(points(4, 8))
        with pytest.raises(BlackBoxError, match="broken"):
            layer(points(4, 8))


def test_an_executor_that_was_shut_down() -> None:
    executor = ThreadPoolExecutor(1)
    executor.shutdown()
    with pytest.raises((BlackBoxError, RuntimeError), match="shutdown"):
        jacobian(row_box, points(2, 8), method="dense", vectorized=False, executor=executor)


@pytest.mark.parametrize("executor", [4, "threads", Executor, object(), [1]])
def test_what_is_no_executor(executor: Any) -> None:
    with pytest.raises(TypeError, match=r"executor must be a concurrent.futures.Executor, a joblib.Parallel or a pool"):
        BlackBox(row_box, executor=executor)


def test_calls_are_made_side_by_side() -> None:
    """Three calls wait for each other, which they cannot do one after the other."""
    barrier = threading.Barrier(3, timeout=20)

    def box(row: np.ndarray) -> np.ndarray:
        barrier.wait()
        return row * 2

    with ThreadPoolExecutor(3) as executor:
        found = BlackBox(box, vectorized=False, executor=executor)(points(3, 8))
    assert torch.equal(found, points(3, 8) * 2)


def test_one_layer_in_several_threads() -> None:
    layer = BlackBox(rows_box, pattern=MASK)
    x = [points(3, 8, seed) for seed in range(6)]
    right = [SMOOTH.jacobian(each).sum(1) for each in x]
    wrong: list[int] = []

    def work(index: int) -> None:
        for _ in range(10):
            leaf = x[index].clone().requires_grad_()
            layer(leaf).sum().backward()
            if leaf.grad is None or not torch.allclose(leaf.grad, right[index], atol=1e-6):
                wrong.append(index)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert layer.plan is not None
    assert (layer.stats.forward, layer.stats.backward) == (180, 180 * layer.plan.calls)
