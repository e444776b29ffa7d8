"""The inside of `training.fit`: where it is, one step after the other, and how it goes on from a state."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from beyondprop import _checks
from beyondprop.errors import BlackBoxError, CallBudgetExceededError, NonFiniteError
from beyondprop.lab.runs.checkpoint import check_savable
from beyondprop.lab.runs.recorded import Row
from beyondprop.lab.tasks.evaluation import wide
from beyondprop.lab.tasks.loader import device_of, moved
from beyondprop.lab.tasks.rows import shuffled
from beyondprop.lab.training import schedules
from beyondprop.lab.training.alignment import alignment as measure_alignment
from beyondprop.lab.training.calendar import Calendar, stop_step
from beyondprop.lab.training.counted import KEPT, counters, measured
from beyondprop.lab.training.work import is_plain, work_per_step
from beyondprop.nn.structure import is_costly
from beyondprop.rules.base import LearningRule

State = dict[str, Any]
"""Everything that training goes on from: nested dicts and lists of tensors, numbers and strings."""

_OF_TORCH = torch.linalg.LinAlgError, torch.OutOfMemoryError  # pyright: ignore[reportPrivateImportUsage]
Failed = (NonFiniteError, BlackBoxError, CallBudgetExceededError, *_OF_TORCH)
"""What ends the training of one rule without being a mistake in the call."""

_MOST = {"epochs": 10**9, "stop": 10**9, "batch_size": 10**9, "seed": 2**63 - 1}  # nobody lives to see more
_TICK = 0.1  # seconds between two looks at what is due by the clock


@dataclass(frozen=True, kw_only=True)
class Training:
    """How a rule is trained.

    Attributes:
        epochs: passes over the training rows; fractions are welcome.
        batch_size: rows in a batch; a DataLoader has its own.
        seed: of the order of the batches.
        schedule: of the learning rates, see `schedules.FORMS`; afterwards the optimizers have those that they came with.
        evaluate_every: steps between two evaluations; default: an epoch. There is one after the last step in any case, and
            one before the first; of a costly model only where others follow it.
        alignment: record, at every evaluation, how each stage's update agrees with the gradient on a fixed training batch.
        early_stop: stop after this many evaluations in a row without an improvement of the task's first metric.
        stop: epoch at which to leave off, before all `epochs` are done; another rule may go on from there.
        save_every: seconds between two saves.
        whole_set: whether a step takes all training rows, not shuffled; default: what the rule itself says.
        kept_bytes: whether to measure what is held for the backward pass, as the counter `kept_bytes`, in place of what modules
            count by that name; default: where one does. Only of rules that train by `loss.backward()`.

    Raises:
        ValueError: if one is out of its range; the message has the range.
    """

    epochs: float
    batch_size: int = 50
    seed: int = 0
    schedule: str = "linear"
    evaluate_every: int | None = None
    alignment: bool = False
    early_stop: int | None = None
    stop: float | None = None
    save_every: float = 30.0
    whole_set: bool | None = None
    kept_bytes: bool | None = None

    def __post_init__(self) -> None:
        _checks.positive("epochs", self.epochs)
        _checks.at_least("batch_size", self.batch_size, 1)
        _checks.at_least("seed", self.seed, 0)
        _checks.positive("save_every", self.save_every)
        for name in ("early_stop", "evaluate_every"):
            if getattr(self, name) is not None:
                _checks.at_least(name, getattr(self, name), 1)
        if self.stop is not None:
            _checks.positive("stop", self.stop)
        for name, most in _MOST.items():
            if (value := getattr(self, name)) is not None and value > most:
                raise ValueError(f"{name} must be at most {most:.10g}, got {value:g}.")


@dataclass(slots=True)
class History:
    """What `fit` recorded.

    Attributes:
        rows: all records in their order; each has a `kind`: eval, alignment, warning, failed or finished.
        stopped_early: whether the rule stopped improving before the last epoch.
    """

    rows: list[Row] = field(default_factory=list)
    stopped_early: bool = False

    @property
    def evaluations(self) -> list[Row]:
        """The evaluations alone."""
        return [Evaluation(row) for row in self.rows if row["kind"] == "eval"]


class Evaluation(dict[str, Any]):
    """A row of one evaluation; what older versions called `test_accuracy` or `validation_loss` is `accuracy` and `loss`."""

    def __missing__(self, key: str) -> Any:
        name = key.removeprefix("test_").removeprefix("validation_")
        if name == key or name not in self:
            raise KeyError(key)
        return self[name]


@dataclass
class Loop:
    """One call of `fit`: its arguments, and how far it is."""

    rule: LearningRule
    task: Any
    training: Training
    after: History | None = None
    log: Callable[[Row], None] | None = None
    progress: Callable[[int, int], None] | None = None
    save: Callable[[State], None] | None = None
    interrupted: Callable[[], bool] | None = None

    def __post_init__(self) -> None:
        training, model = self.training, self.rule.model
        self.whole_set = self.rule.whole_set if training.whole_set is None else training.whole_set
        self._check()
        self.costly = is_costly(model)
        self.calendar = Calendar.of(model, self.task, training.batch_size, whole_set=self.whole_set)
        self.every = training.evaluate_every
        if self.whole_set and self.every is not None:  # what other rules call an epoch is one step here
            self.every = max(1, round(self.every / Calendar.of(model, self.task, training.batch_size).longest))
        self.steps = max(1, self.calendar.step_at(training.epochs))
        self.first, self.samples, self.seconds, self.work_before = self._handed_over()
        self.last = self.steps if training.stop is None else stop_step(training.stop, self.steps, self.calendar)
        if self.first >= self.last:
            raise ValueError(
                f"The training handed over in after ends at step {self.first}, this one at step {self.last}."
            )
        self.rates = [(group["lr"], "initial_lr" in group) for group in self._groups()]
        self.schedulers = schedules.attach(
            self.rule.optimizers, training.schedule, self.steps, self.calendar.longest, self.first
        )
        self.history = History()
        self.device = device_of(model)
        self.step = self.first
        self.work = math.nan  # of one step
        self.loss_sum = torch.zeros((), dtype=wide(self.device), device=self.device)
        self.loss_rows = 0
        self.best: float | None = None
        self.since_best = 0
        self.found: list[dict[str, float]] = []  # evaluations at the ends of epochs, where the task looks back
        self.warned: list[str] = []
        self.saved = time.perf_counter()
        self.resumed = False
        self.kept: dict[str, float] = {}

    def _check(self) -> None:
        training, name = self.training, getattr(self.task, "name", type(self.task).__name__)
        if self.whole_set and hasattr(self.task, "batches"):
            raise ValueError(
                f"{type(self.rule).__name__} takes the whole training set at every step; {name} shows its rows in batches of "
                "its own. Use a rule that takes batches."
            )
        fixed = getattr(self.task, "epochs", None)
        if fixed is not None and training.epochs > fixed:
            raise ValueError(f"epochs must be at most {fixed}, the tasks of {name}, got {training.epochs:g}.")
        if training.early_stop is not None and not self.task.metrics:
            raise ValueError(f"early_stop needs rows to evaluate on; {name} has none: give test rows.")

    def _handed_over(self) -> tuple[int, int, float, float]:
        """Return the steps, samples, seconds and work of the training that this one goes on from."""
        if self.after is None:
            return 0, 0, 0.0, 0.0
        if not self.after.evaluations:
            raise ValueError("after has no evaluation; it must be what fit returned for the training before this one.")
        row = self.after.evaluations[-1]
        if row["epoch"] != self.calendar.epochs(row["step"]):
            raise ValueError(
                f"after ends at step {row['step']} and epoch {row['epoch']:.4g}; here an epoch has "
                f"{self.calendar.longest} steps. Go on with the same data and batch_size."
            )
        return row["step"], row["samples"], row["seconds"], math.nan if row["work"] is None else row["work"]

    def run(self) -> None:
        """Train to the end."""
        self.kept = measured(self.rule, self.training.kept_bytes, lambda: next(iter(self._batches(0, 0))))
        if not self.resumed:
            self.work = self._measure_work()
            if not self.costly or self.every is None or self.every < self.last:
                self._evaluate()
            self._save()
        while self.step < self.last and not self.history.stopped_early:
            self._run_epoch()
        self.record("finished", {"stopped_early": self.history.stopped_early})

    def _measure_work(self) -> float:
        if self.costly:
            # Nothing is run on the side: plain backpropagation is what work is counted in, of all others it stays unknown.
            return 1.0 if is_plain(self.rule) else math.nan
        first = next(iter(self._batches(0, 0)))
        self.rule.check_batch(*first)
        # A sweep over a whole set is counted once, its start among it; it stands for all batches of an epoch.
        work = work_per_step(self.rule, *first, steps=1 if self.whole_set else 10, look=self._check_state)
        return work * len(self.task.x_train) / self.training.batch_size if self.whole_set else work

    def _check_state(self, twin: LearningRule) -> None:
        """Raise `ValueError` where the state of optimizers after some steps cannot be saved, before anything is trained."""
        for optimizer in twin.optimizers if self.save is not None else ():
            try:
                check_savable(optimizer.state_dict())
            except TypeError as error:
                raise ValueError(f"The state of {type(optimizer).__name__} cannot be saved: {error}") from error

    def give_back(self) -> None:
        """Give the optimizers the learning rates that they came with."""
        for group, (lr, was_scheduled) in zip(self._groups(), self.rates, strict=True):
            group["lr"] = lr
            if not was_scheduled:
                group.pop("initial_lr", None)  # a later schedule would start from it

    def _groups(self) -> list[dict[str, Any]]:
        return [group for optimizer in self.rule.optimizers for group in optimizer.param_groups]

    def _run_epoch(self) -> None:
        """Train to the end of the epoch, of the run, or of the improvement."""
        epoch, start = self.calendar.where(self.step)
        rule_step, loss_sum, schedulers = self.rule.step, self.loss_sum, self.schedulers
        is_mean, interrupted, clock = self.rule.loss.is_mean, self.interrupted, time.perf_counter
        end = self.calendar.end(epoch)
        count = min(end, self.last) - self.step
        tick = began = self._now()
        if start == 0 or self.step == self.first:  # a training that was handed over may begin in mid-epoch
            self.rule.begin_epoch(islice(self._batches(epoch, start), count))
        for x, y in islice(self._batches(epoch, start), count):
            result = rule_step(x, y)
            loss_sum.add_(result.loss, alpha=len(y) if is_mean else 1)
            self.loss_rows += len(y)
            self.samples += len(y)
            for scheduler in schedulers:
                scheduler.step()
            self.step += 1
            if self.step == end:
                self.rule.end_epoch()
                if getattr(self.task, "epochs_are_tasks", False):
                    self.rule.end_task()
            if (self.step == end if self.every is None else self.step % self.every == 0) or self.step == self.last:
                self.seconds += self._now() - began
                self._evaluate()
                self._save()
                tick = began = self._now()
                if self.history.stopped_early:
                    return
            elif (now := clock()) >= tick:
                tick = now + _TICK
                if self.progress is not None:
                    self.progress(self.step - self.first, self.last - self.first)
                if now - self.saved >= self.training.save_every:
                    self.seconds += self._now() - began
                    self._save()
                    began = self._now()
            if interrupted is not None and interrupted():
                self.seconds += self._now() - began
                self._save()
                raise KeyboardInterrupt
        self.seconds += self._now() - began

    def _batches(self, epoch: int, start: int) -> Iterator[tuple[Any, Tensor]]:
        if self.whole_set:
            return iter([(self.task.x_train, self.task.y_train)])
        size, seed = self.training.batch_size, self.training.seed
        if hasattr(self.task, "batches"):
            pairs = self.task.batches(epoch, size, seed, start)
            return ((moved(x, self.device), moved(y, self.device)) for x, y in pairs)
        return shuffled(self.task.x_train, self.task.y_train, epoch, size, seed, start)

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def _evaluate(self) -> None:
        self.rule.check_finite()
        found = self.task.evaluate(self.rule.model)
        if hasattr(self.task, "over"):
            if self.calendar.where(self.step)[1] == 0:
                self.found.append(found)
            found = found | self.task.over(self.found)
        row: Row = {
            "samples": self.samples,
            "work": _finite(self.work_before + (self.step - self.first) * self.work),
            "seconds": round(self.seconds, 6),
            "train_loss": _finite(self.loss_sum.item() / self.loss_rows) if self.loss_rows else None,
            **{key: _finite(value) for key, value in found.items()},
        }
        counted = counters(self.rule.model)
        if not self.rule.is_autograd:
            counted.pop(KEPT, None)  # modules count what their own passes keep, and such a rule makes others
        if counted := counted | self.kept:
            row["counters"] = {key: _finite(value) for key, value in counted.items()}
        self.record("eval", row)
        self.loss_sum.zero_()
        self.loss_rows = 0
        if self.training.alignment and not self.costly:
            self._align()
        if self.training.early_stop is not None and self.task.metrics:
            metric = self.task.metrics[0]
            value = found[metric.key] if metric.higher_is_better else -found[metric.key]
            if math.isfinite(value) and (self.best is None or value > self.best):
                self.best, self.since_best = value, 0
            else:
                self.since_best += 1
            self.history.stopped_early = self.since_best >= self.training.early_stop
        if self.progress is not None:
            self.progress(self.step - self.first, self.last - self.first)

    def _align(self) -> None:
        if self.whole_set or not hasattr(self.task, "x_train"):  # a loader has none
            x, y = next(iter(self._batches(0, 0)))
        else:
            order = torch.randperm(len(self.task.x_train), generator=torch.Generator().manual_seed(self.training.seed))
            chosen = order[: self.training.batch_size].to(self.task.x_train.device)
            x, y = self.task.x_train[chosen], self.task.y_train[chosen]
        found = {name: asdict(stage) for name, stage in measure_alignment(self.rule, x, y).items()}
        self.record("alignment", {"stages": {n: {k: _finite(v) for k, v in s.items()} for n, s in found.items()}})

    def record(self, kind: str, fields: Row) -> None:
        """Keep a row of what is found at this step, and pass it on."""
        row: Row = {"kind": kind, "step": self.step, "epoch": self.calendar.epochs(self.step), **fields}
        self.history.rows.append(row)
        if self.log is not None:
            self.log(row)

    def _save(self) -> None:
        if self.save is not None:
            self.save(self._state())
        self.saved = time.perf_counter()

    def _state(self) -> State:
        state: State = {
            "model": dict(self.rule.model.state_dict()),
            "rule": self.rule.state_dict(),
            "schedulers": [scheduler.state_dict() for scheduler in self.schedulers],
            "random": torch.get_rng_state(),
            "loss_sum": self.loss_sum,
            "call": self._call(),
            **{name: getattr(self, name) for name in _KEPT},
        }
        if self.device.type == "cuda":
            state["random_cuda"] = torch.cuda.get_rng_state(self.device)
        return state

    def restore(self, state: State) -> None:
        """Go on from a state; the global random state is the one that was saved."""
        if missing := [name for name in _KEPT if name not in state]:
            raise ValueError(
                f"The state is of an older version and lacks {', '.join(missing)}; begin the training anew."
            )
        now = self._call()
        if differing := [f"{k} {v!r} then, {now[k]!r} now" for k, v in state["call"].items() if v != now[k]]:
            raise ValueError(f"The state is of another training: {'; '.join(differing)}. Resume with equal arguments.")
        self.rule.model.load_state_dict(state["model"])
        self.rule.load_state_dict(state["rule"])
        for scheduler, saved in zip(self.schedulers, state["schedulers"], strict=True):
            scheduler.load_state_dict(saved)
        torch.set_rng_state(state["random"])
        if self.device.type == "cuda" and "random_cuda" in state:
            torch.cuda.set_rng_state(state["random_cuda"], self.device)
        self.loss_sum.copy_(state["loss_sum"])
        vars(self).update({name: state[name] for name in _KEPT})
        patience = self.training.early_stop
        self.history.stopped_early = patience is not None and self.since_best >= patience
        self.resumed = True

    def _call(self) -> dict[str, Any]:
        return {
            "seed": self.training.seed,
            "batch_size": self.training.batch_size,
            "steps": self.steps,
            "steps_per_epoch": self.calendar.longest,
            "schedulers": len(self.schedulers),
            "first": self.first,
            "last": self.last,
        }


_KEPT = ("step", "seconds", "work", "samples", "loss_rows", "best", "since_best", "warned", "found")


def _finite(value: float) -> float | None:
    # JSON has no nan; null is read as "unknown" by the report.
    return value if math.isfinite(value) else None
