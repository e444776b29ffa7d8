"""Calls of a black box side by side: in threads, processes, or whatever a pool has."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Sequence
from concurrent.futures import BrokenExecutor, Future
from contextlib import ExitStack
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from beyondprop.errors import BlackBoxError


def parts_of(pieces: int, total: int) -> list[int]:
    """Return the sizes of so many pieces of a whole, as equal as they can be."""
    return [total // pieces + (index < total % pieces) for index in range(pieces)]


Piece = tuple[Any, Exception | None]


def evaluated(own: Any, fn: Any, given: list[Any], seeds: list[int] | None) -> list[Piece]:
    """Return results and exceptions: of every row, or of every piece of them where the box takes many."""
    total = len(given[0])
    name = own.seed_kwarg
    if own.vectorized:
        extra = {} if name is None or seeds is None else {name: seeds[0]}
        # A seed is that of one call: split, every piece would draw the same numbers.
        count = 1 if own.executor is None or extra else min(total, _workers(own.executor))
        ends = np.cumsum([0, *parts_of(count, total)]).tolist()
        jobs = [([tuple(x[low:high] for x in given)], [extra]) for low, high in pairwise(ends)]
    else:
        count = total if own.executor is None else min(total, 4 * _workers(own.executor))
        ends = np.cumsum([0, *parts_of(count, total)]).tolist()
        extras = [{} if name is None or seeds is None else {name: seed} for seed in seeds or [0] * total]
        rows = list(zip(*given, strict=True))
        jobs = [(rows[low:high], extras[low:high]) for low, high in pairwise(ends)]
    run = partial(_run, fn)
    if own.executor is None:
        return [piece for job in jobs for piece in run(job)]
    return [piece for part in mapper(own.executor)(run, jobs) for piece in part]


def _run(fn: Any, job: tuple[list[tuple[Any, ...]], list[dict[str, Any]]]) -> list[Piece]:
    """Call the box for each set of arguments; also in another process."""
    found = [called(fn, arguments, extra) for arguments, extra in zip(*job, strict=True)]
    return [(result, None if error is None else _sendable(error)) for result, error in found]


def called(fn: Any, arguments: Sequence[Any], extra: dict[str, Any]) -> Piece:
    """Call the box once: what it returned, or what it raised; without gradients, and outside of autocast."""
    try:
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            for kind in {x.device.type for x in arguments if isinstance(x, Tensor)}:
                if torch.is_autocast_enabled(kind):  # a backward pass has none: both are to compute alike
                    stack.enter_context(torch.autocast(kind, enabled=False))
            return fn(*arguments, **extra), None
    except Exception as error:  # whatever a simulator raises
        return None, error


def _sendable(error: Exception) -> Exception:
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # of any kind, from __reduce__ of any class
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def _workers(executor: Any) -> int:
    for name in ("_max_workers", "_processes", "n_jobs"):
        count = getattr(executor, name, None)
        if isinstance(count, int) and count > 0:
            return count
    return os.cpu_count() or 1


def mapper(executor: Any) -> Callable[[Any, list[Any]], list[Any]]:
    """Return how an executor applies a function to a list."""
    accepted = "executor must be a concurrent.futures.Executor, a joblib.Parallel or a pool with map"
    if isinstance(executor, type):
        raise TypeError(f"{accepted}, got the class {executor.__name__}; give {executor.__name__}().")
    if hasattr(executor, "submit"):
        return partial(_submitted, executor)
    if hasattr(executor, "n_jobs") and callable(executor):
        parallel: Any = executor
        return partial(_guarded, executor, lambda run, jobs: parallel((run, (job,), {}) for job in jobs))
    if hasattr(executor, "map"):
        return partial(_guarded, executor, executor.map)
    raise TypeError(f"{accepted}, got {type(executor).__name__}.")


def _submitted(executor: Any, run: Any, jobs: list[Any]) -> list[Any]:
    futures: list[Future[Any]] = []

    def results(run: Any, jobs: list[Any]) -> list[Any]:
        futures.extend(executor.submit(run, job) for job in jobs)
        return [future.result() for future in futures]

    try:
        return _guarded(executor, results, run, jobs)
    finally:
        for future in futures:
            future.cancel()


def _guarded(executor: Any, apply: Callable[[Any, list[Any]], Any], run: Any, jobs: list[Any]) -> list[Any]:
    """Name what is wrong with an executor, and not with the box."""
    try:
        return list(apply(run, jobs))
    except BrokenExecutor as error:
        raise BlackBoxError(
            f"The {type(executor).__name__} is broken, as a worker died in a call of the black box: {error} Make a new one."
        ) from error
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        if "pickle" not in str(error):
            raise
        raise BlackBoxError(
            f"The black box cannot be sent to another process ({error}): define it at the top level of a module, or take "
            "threads."
        ) from error
