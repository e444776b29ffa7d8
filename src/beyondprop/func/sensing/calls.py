"""Calls of a black box: counted, within a budget, in parallel where asked, with failures retried or named."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten

from beyondprop import _checks
from beyondprop.errors import BlackBoxError, CallBudgetExceededError
from beyondprop.func.sensing.executors import called, evaluated, mapper, parts_of
from beyondprop.func.sensing.returned import as_tensor, given, is_coarse, of_numbers, same, unusable

ARRAYS = ("numpy", "torch")
ON_NAN = ("raise", "drop")
KINDS = ("forward", "backward", "setup", "evaluation")


@dataclass
class Counts:
    """Calls of a black box, that is rows which it evaluated, those that failed among them.

    Attributes:
        forward: for values, in training mode.
        backward: for Jacobians.
        setup: to measure noise and curvature, and to find a pattern.
        evaluation: for values, in evaluation mode, and by `verify`.
        retried: calls, of all of these, that were made again.
        dropped: calls without a result that were done without.
    """

    forward: int = 0
    backward: int = 0
    setup: int = 0
    evaluation: int = 0
    retried: int = 0
    dropped: int = 0

    @property
    def total(self) -> int:
        """All calls."""
        return self.forward + self.backward + self.setup + self.evaluation


class Outcome(NamedTuple):
    """What a black box returned.

    Attributes:
        leaves: its outputs, each `(rows, ...)`; NaN in rows without a result.
        missing: which rows have no result, `(rows,)`; None: all have.
    """

    leaves: list[Tensor]
    missing: Tensor | None


@dataclass(frozen=True)
class CallSettings:
    """How a black box is called.

    Attributes:
        arrays: `"numpy"` or `"torch"`, what it takes.
        vectorized: whether it takes rows `(rows, ...)`; else one row at a time, without that dimension.
        executor: what runs calls side by side: a `concurrent.futures.Executor`, a `joblib.Parallel`, or a pool with `map`
            (`multiprocessing.Pool`, `ray.util.multiprocessing.Pool`). None: the calling thread.
        retries: how often a call that failed, or returned NaN or Inf, is made again.
        max_calls: how many calls there may be.
        on_nan: `"raise"`, or `"drop"`: a call without a result is done without where the other calls suffice.
        seed_kwarg: name of the argument by which a simulator takes its seed.
        debug: whether to check that the box leaves its input as it is.
    """

    arrays: str = "numpy"
    vectorized: bool = True
    executor: Any = None
    retries: int = 0
    max_calls: int | None = None
    on_nan: str = "raise"
    seed_kwarg: str | None = None
    debug: bool = False

    @property
    def is_direct(self) -> bool:
        """Whether all rows go into one call, here and now."""
        return self.vectorized and self.executor is None and self.seed_kwarg is None

    def __post_init__(self) -> None:
        _checks.one_of("arrays", self.arrays, ARRAYS)
        _checks.one_of("on_nan", self.on_nan, ON_NAN)
        _checks.at_least("retries", self.retries, 0)
        if self.max_calls is not None:
            _checks.at_least("max_calls", self.max_calls, 1)
        if self.executor is not None:
            mapper(self.executor)


@dataclass
class Caller:
    """A black box that counts its calls.

    Attributes:
        fn: the box.
        settings: how it is called.
        counts: its calls so far.
        spec, shapes: the structure of what it returns, and the shape of each output without the rows; None before the first
            call.
        precision: of the coarsest numbers that it returned last, relative; 0 before the first call.
        is_coarse: whether it returned float32's numbers as float64.
        lock: held while calls are counted.
    """

    fn: Callable[..., Any]
    settings: CallSettings = field(default_factory=CallSettings)
    counts: Counts = field(default_factory=Counts)
    spec: TreeSpec | None = None
    shapes: tuple[tuple[int, ...], ...] | None = None
    precision: float = 0.0
    is_coarse: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not callable(self.fn):
            raise TypeError(f"fn must be callable, got {type(self.fn).__name__}.")

    def __call__(
        self,
        inputs: Sequence[Tensor],
        kind: str,
        *,
        seed: int | None = None,
        where: Callable[[int], str] = lambda row: f"sample {row}",
        may_drop: bool = False,
    ) -> Outcome:
        """Evaluate rows.

        Args:
            inputs: what the box takes, each `(rows, ...)`.
            kind: which of the counts the calls belong to.
            seed: of the simulator; by itself, row i has seed + i.
            where: names a row in an error.
            may_drop: whether a row may stay without a result, with `on_nan="drop"`.

        Raises:
            CallBudgetExceededError: if there would be more calls than `max_calls`; none of them is made.
            BlackBoxError: if a call failed, or returned NaN or Inf, and was not to be dropped.
            TypeError, ValueError: if the box returned what is no float, or another shape than before.
        """
        total = len(inputs[0])
        self._spend(total, kind, again=False)
        leaves, missing, error = self._once(inputs, seed, None)
        if missing is None:
            return Outcome(leaves, None)
        todo = torch.nonzero(missing).flatten()
        for _ in range(self.settings.retries):
            # A seed is that of all rows of a call: a row by itself would draw other numbers.
            again = torch.arange(total) if self.settings.vectorized and self.settings.seed_kwarg else todo
            try:
                self._spend(len(again), kind, again=True)
            except CallBudgetExceededError as spent:
                raise spent from error
            found, failed, error = self._once([x[again.to(x.device)] for x in inputs], seed, again)
            if found and not leaves:
                leaves = [torch.full((total, *x.shape[1:]), torch.nan, dtype=x.dtype) for x in found]
            for whole, part in zip(leaves, found, strict=False):
                whole[todo] = part[torch.isin(again, todo)]
            if failed is None:
                return Outcome(leaves, None)
            todo = todo[torch.isin(todo, again[failed])]
            if not len(todo):
                return Outcome(leaves, None)
        missing = torch.zeros(total, dtype=torch.bool)
        missing[todo] = True
        drops = may_drop and self.settings.on_nan == "drop"
        if not drops or not leaves:
            tried = f" after {self.settings.retries} retries" if self.settings.retries else ""
            what = f"raised {type(error).__name__}: {error}" if error is not None else "returned NaN or Inf"
            ways = "give retries=" if not may_drop else "give retries=, or on_nan='drop' to do without such calls"
            raise BlackBoxError(
                f"The black box {what}{tried} for {where(int(todo[0]))}"
                + (f" and {len(todo) - 1} more of {total} calls" if len(todo) > 1 else "")
                + f". Mend the box, {ways}."
            ) from error
        self.counts.dropped += len(todo)
        return Outcome(leaves, missing)

    def _spend(self, rows: int, kind: str, *, again: bool) -> None:
        most, counts = self.settings.max_calls, self.counts
        with self.lock:
            if most is not None and counts.total + rows > most:
                raise CallBudgetExceededError(counts.total, rows, most)
            setattr(counts, kind, getattr(counts, kind) + rows)
            counts.retried += rows * again

    def __getstate__(self) -> dict[str, Any]:
        """Leave behind what cannot be stored: threads and processes, and torch's structure of outputs, which comes back."""
        state = {name: value for name, value in self.__dict__.items() if name != "lock"}
        return state | {"settings": replace(self.settings, executor=None), "spec": None, "shapes": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, lock=threading.Lock())

    def _once(
        self, inputs: Sequence[Tensor], seed: int | None, rows: Tensor | None
    ) -> tuple[list[Tensor], Tensor | None, Exception | None]:
        """Evaluate rows once: the outputs, if there are any; which rows have no result, if not all have; an exception."""
        own, total = self.settings, len(inputs[0])
        arguments = [given(x.detach(), own.arrays) for x in inputs]
        before = [np.array(x) if isinstance(x, np.ndarray) else x.clone() for x in arguments] if own.debug else []
        if own.is_direct:
            pieces = [called(self.fn, arguments, {})]
        else:
            seeds = None
            if own.seed_kwarg is not None:
                first = seed or 0
                seeds = (
                    [first] if own.vectorized else [first + int(r) for r in (range(total) if rows is None else rows)]
                )
            pieces = evaluated(own, self.fn, arguments, seeds)
        if any(not same(old, new) for old, new in zip(before, arguments, strict=False)):
            raise BlackBoxError("The black box overwrites its input; let it work on a copy.")
        results, errors = [result for result, _ in pieces], [error for _, error in pieces]
        error = next((error for error in errors if error is not None), None)
        if all(each is not None for each in errors):
            return [], torch.ones(total, dtype=torch.bool), error
        is_first = self.shapes is None
        if len(results) == 1 and own.vectorized:
            found = self._leaves(results[0], total)
            self._look_inside(found, inputs, is_first=is_first)
            return found, unusable(found), error
        found, failed = self._joined([None if e else r for r, e in zip(results, errors, strict=True)], total)
        self._look_inside(found, inputs, is_first=is_first)
        if (infinite := unusable(found)) is not None:
            failed |= infinite
        return found, failed if bool(failed.any()) else None, error

    def _look_inside(self, found: Sequence[Tensor], inputs: Sequence[Tensor], *, is_first: bool) -> None:
        """Notice a box that computes in float32 inside, and takes and returns float64."""
        if is_first and is_coarse(found) and not is_coarse([x for x in inputs if x.is_floating_point()]):
            self.is_coarse, self.precision = True, torch.finfo(torch.float32).eps

    def _joined(self, results: list[Any], total: int) -> tuple[list[Tensor], Tensor]:
        """Return all pieces as one, rows without a result NaN, and which rows these are."""
        sizes = parts_of(len(results), total) if self.settings.vectorized else [1] * total
        parts = [None if r is None else self._leaves(r, size) for r, size in zip(results, sizes, strict=True)]
        like = next(part for part in parts if part is not None)
        failed = torch.cat([torch.full((size,), part is None) for part, size in zip(parts, sizes, strict=True)])
        joined = []
        for index, leaf in enumerate(like):
            pieces = [
                torch.full((size, *leaf.shape[1:]), torch.nan, dtype=leaf.dtype) if part is None else part[index]
                for part, size in zip(parts, sizes, strict=True)
            ]
            joined.append(torch.cat(pieces) if len(pieces) > 1 else pieces[0])
        return joined, failed

    def _leaves(self, result: Any, rows: int) -> list[Tensor]:
        """Return a piece's outputs `(rows, ...)`, checked against those before."""
        leaves, spec = tree_flatten(of_numbers(result))
        if not leaves:
            raise TypeError("The black box returned nothing; it must return floats.")
        found = []
        for leaf in leaves:
            # A copy: a box may return its input, or a buffer that the next call overwrites.
            value = leaf.detach().to("cpu", copy=True) if isinstance(leaf, Tensor) else as_tensor(leaf)
            if not value.is_floating_point():
                raise TypeError(
                    f"The black box returned {str(value.dtype).removeprefix('torch.')}; it must return floats, of which a "
                    "derivative can be taken."
                )
            if self.settings.vectorized and (value.ndim == 0 or len(value) != rows):
                raise ValueError(
                    f"The black box returned the shape {tuple(value.shape)} for {rows} rows; it must return one result a row. "
                    "If it takes one row at a time, give vectorized=False."
                )
            found.append(value if self.settings.vectorized else value[None])
        inside = torch.finfo(torch.float32).eps if self.is_coarse else 0.0
        self.precision = max(inside, *(torch.finfo(x.dtype).eps for x in found))
        shapes = tuple(tuple(x.shape[1:]) for x in found)
        if self.shapes is None:
            self.spec, self.shapes = spec, shapes
        elif shapes != self.shapes or spec != self.spec:
            raise ValueError(
                f"The black box returned outputs of the shapes {shapes} a row, and {self.shapes} before; they must stay as "
                "they are."
            )
        return found
