"""The inside of `training.fit`: where it is, one step after the other, and how it goes on from a state."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from beyondprop import _checks
from beyondprop.data import batches
from beyondprop.errors import NonFiniteError
from beyondprop.lab.tasks.evaluation import from_totals, totals, wide
from beyondprop.lab.training import schedules
from beyondprop.lab.training.alignment import alignment as measure_alignment
from beyondprop.lab.training.work import work_per_step
from beyondprop.rules.base import LearningRule

Row = dict[str, Any]
"""One record as `metrics.jsonl` has it, without the names of rule and seed."""

State = dict[str, Any]
"""Everything that training goes on from: nested dicts and lists of tensors, numbers and strings."""

Failed = (NonFiniteError, torch.linalg.LinAlgError, torch.OutOfMemoryError)  # pyright: ignore[reportPrivateImportUsage]
"""What ends the training of one rule without being a mistake in the call."""

_TICK = 0.1  # seconds between two looks at what is due by the clock
_SEEDS = 2**63


class Data(Protocol):
    """What `fit` needs of a data set; `beyondprop.data.Dataset` has it, regression targets are as welcome."""

    @property
    def x_train(self) -> Tensor:
        """Training inputs."""
        ...

    @property
    def y_train(self) -> Tensor:
        """Training targets."""
        ...

    @property
    def x_test(self) -> Tensor:
        """Held-out inputs."""
        ...

    @property
    def y_test(self) -> Tensor:
        """Held-out targets."""
        ...


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
        return [row for row in self.rows if row["kind"] == "eval"]


@dataclass(kw_only=True)
class Loop:
    """One call of `fit`: its arguments, and how far it is."""

    rule: LearningRule
    data: Data
    epochs: float
    stop: float | None
    after: History | None
    batch_size: int
    seed: int
    schedule: str
    evaluate_every: int | None
    alignment: bool
    early_stop: int | None
    log: Callable[[Row], None] | None
    progress: Callable[[int, int], None] | None
    save: Callable[[State], None] | None
    save_every: float
    interrupted: Callable[[], bool] | None
    whole_set: bool = False

    def __post_init__(self) -> None:
        _checks.positive("epochs", self.epochs)
        _checks.at_least("batch_size", self.batch_size, 1)
        _checks.at_least("seed", self.seed, 0)
        _checks.positive("save_every", self.save_every)
        if self.early_stop is not None:
            _checks.at_least("early_stop", self.early_stop, 1)
        _checks.batch(self.data.x_train, self.data.y_train)
        _checks.batch(self.data.x_test, self.data.y_test)
        self.steps_per_epoch, self.rows_per_epoch = epoch_of(self.rule.model, len(self.data.x_train), self.batch_size)
        every = self.steps_per_epoch if self.evaluate_every is None else self.evaluate_every
        self.every = _checks.at_least("evaluate_every", every, 1)
        if self.whole_set:  # what other rules call an epoch is one step here
            self.every = max(1, round(self.every / self.steps_per_epoch))
            self.steps_per_epoch, self.rows_per_epoch = 1, len(self.data.x_train)
        self.steps = max(1, round(self.epochs * self.steps_per_epoch))
        self.first, self.seconds, self.work_before = self._handed_over()
        self.last = self.steps if self.stop is None else stop_step(self.stop, self.steps, self.steps_per_epoch)
        if self.first >= self.last:
            raise ValueError(
                f"The training handed over in after ends at step {self.first}, this one at step {self.last}."
            )
        self.rates = [(group["lr"], "initial_lr" in group) for group in self._groups()]
        self.schedulers = schedules.attach(
            self.rule.optimizers, self.schedule, self.steps, self.steps_per_epoch, self.first
        )
        self.history = History()
        self.device = self.data.x_train.device
        self.step = self.first
        self.work = math.nan  # of one step
        self.loss_sum = torch.zeros((), dtype=wide(self.device), device=self.device)
        self.loss_rows = 0
        self.best: float | None = None
        self.since_best = 0
        self.warned: list[str] = []
        self.saved = time.perf_counter()
        self.resumed = False

    @property
    def epoch(self) -> float:
        """Epochs done, fractions among them."""
        return self.step / self.steps_per_epoch

    @property
    def samples(self) -> int:
        """Rows seen, each as often as it was."""
        done, part = divmod(self.step, self.steps_per_epoch)
        return done * self.rows_per_epoch + min(part * self.batch_size, self.rows_per_epoch)

    def _handed_over(self) -> tuple[int, float, float]:
        """Return the steps, seconds and work of the training that this one goes on from."""
        if self.after is None:
            return 0, 0.0, 0.0
        if not self.after.evaluations:
            raise ValueError("after has no evaluation; it must be what fit returned for the training before this one.")
        row = self.after.evaluations[-1]
        if row["epoch"] != row["step"] / self.steps_per_epoch:
            raise ValueError(
                f"after ends at step {row['step']} and epoch {row['epoch']:.4g}; here an epoch has "
                f"{self.steps_per_epoch} steps. Go on with the same data and batch_size."
            )
        return row["step"], row["seconds"], math.nan if row["work"] is None else row["work"]

    def run(self) -> None:
        """Train to the end."""
        if not self.resumed:
            first = next(self._batches(0, 0))
            # A sweep over a whole set is counted once, its start among it; it stands for all batches of an epoch.
            self.work = work_per_step(self.rule, *first, steps=1 if self.whole_set else 10)
            if self.whole_set:
                self.work *= len(self.data.x_train) / self.batch_size
            self._evaluate()
            self._save()
        while self.step < self.last and not self.history.stopped_early:
            self._run_epoch()
        row: Row = {"kind": "finished", "step": self.step, "epoch": self.epoch}
        self.record(row | {"stopped_early": self.history.stopped_early})

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
        epoch, start = divmod(self.step, self.steps_per_epoch)
        rule_step, loss_sum, schedulers = self.rule.step, self.loss_sum, self.schedulers
        is_mean, interrupted, clock = self.rule.loss.is_mean, self.interrupted, time.perf_counter
        count = min(self.steps_per_epoch - start, self.last - self.step)
        tick = began = self._now()
        if start == 0 or self.step == self.first:  # a training that was handed over may begin in mid-epoch
            self.rule.begin_epoch(islice(self._batches(epoch, start), count))
        for x, y in islice(self._batches(epoch, start), count):
            result = rule_step(x, y)
            loss_sum.add_(result.loss, alpha=len(x) if is_mean else 1)
            self.loss_rows += len(x)
            for scheduler in schedulers:
                scheduler.step()
            self.step += 1
            if self.step % self.steps_per_epoch == 0:
                self.rule.end_epoch()
            if self.step % self.every == 0 or self.step == self.last:
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
                if now - self.saved >= self.save_every:
                    self.seconds += self._now() - began
                    self._save()
                    began = self._now()
            if interrupted is not None and interrupted():
                self.seconds += self._now() - began
                self._save()
                raise KeyboardInterrupt
        self.seconds += self._now() - began

    def _batches(self, epoch: int, start: int) -> Iterator[tuple[Tensor, Tensor]]:
        if self.whole_set:
            return iter([(self.data.x_train, self.data.y_train)])
        # Seeded by both numbers, so that no epoch's order depends on what was drawn before it.
        generator = torch.Generator().manual_seed((self.seed * 0x9E3779B97F4A7C15 + epoch) % _SEEDS)
        return batches(self.data.x_train, self.data.y_train, self.batch_size, generator=generator, start=start)

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def _evaluate(self) -> None:
        self.rule.check_finite()
        found = totals(self.rule.model, self.rule.loss, self.data.x_test, self.data.y_test)
        train, loss, correct = torch.cat([self.loss_sum.view(1), found]).tolist()  # the one read
        result = from_totals(loss, correct)
        row: Row = {
            "kind": "eval",
            "step": self.step,
            "epoch": self.epoch,
            "samples": self.samples,
            "work": _finite(self.work_before + (self.step - self.first) * self.work),
            "seconds": round(self.seconds, 6),
            "train_loss": _finite(train / self.loss_rows) if self.loss_rows else None,
            "test_loss": _finite(result.loss),
        }
        if result.accuracy is not None:
            row["test_accuracy"] = result.accuracy
        self.record(row)
        self.loss_sum.zero_()
        self.loss_rows = 0
        if self.alignment:
            self._align()
        if self.early_stop is not None:
            self._note_improvement(-result.loss if result.accuracy is None else result.accuracy, self.early_stop)
        if self.progress is not None:
            self.progress(self.step - self.first, self.last - self.first)

    def _align(self) -> None:
        x, y = self.data.x_train, self.data.y_train
        if not self.whole_set:
            order = torch.randperm(len(x), generator=torch.Generator().manual_seed(self.seed))
            chosen = order[: self.batch_size].to(self.device)
            x, y = x[chosen], y[chosen]
        found = measure_alignment(self.rule, x, y)
        stages = {
            name: {key: _finite(getattr(a, key)) for key in ("cosine", "angle", "norm_ratio")}
            for name, a in found.items()
        }
        self.record({"kind": "alignment", "step": self.step, "epoch": self.epoch, "stages": stages})

    def _note_improvement(self, value: float, patience: int) -> None:
        if math.isfinite(value) and (self.best is None or value > self.best):
            self.best, self.since_best = value, 0
        else:
            self.since_best += 1
        self.history.stopped_early = self.since_best >= patience

    def record(self, row: Row) -> None:
        """Keep a row and pass it on."""
        self.history.rows.append(row)
        if self.log is not None:
            self.log(row)

    def on_warning(self, message: str) -> None:
        """Record a warning."""
        self.record({"kind": "warning", "step": self.step, "epoch": self.epoch, "message": message})

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
        differing = [
            f"{k} {v!r} then, {self._call()[k]!r} now" for k, v in state["call"].items() if v != self._call()[k]
        ]
        if differing:
            raise ValueError(f"The state is of another training: {'; '.join(differing)}. Resume with equal arguments.")
        self.rule.model.load_state_dict(state["model"])
        self.rule.load_state_dict(state["rule"])
        for scheduler, saved in zip(self.schedulers, state["schedulers"], strict=True):
            scheduler.load_state_dict(saved)
        torch.set_rng_state(state["random"])
        if self.device.type == "cuda" and "random_cuda" in state:
            torch.cuda.set_rng_state(state["random_cuda"], self.device)
        self.loss_sum.copy_(state["loss_sum"])
        for name in _KEPT:
            setattr(self, name, state[name])
        self.history.stopped_early = self.early_stop is not None and self.since_best >= self.early_stop
        self.resumed = True

    def _call(self) -> dict[str, Any]:
        return {
            "seed": self.seed,
            "batch_size": self.batch_size,
            "steps": self.steps,
            "steps_per_epoch": self.steps_per_epoch,
            "schedulers": len(self.schedulers),
            "first": self.first,
            "last": self.last,
        }


_KEPT = ("step", "seconds", "work", "loss_rows", "best", "since_best", "warned")


def stop_step(stop: float, steps: int, steps_per_epoch: int) -> int:
    """Return the step at which a training that stops at epoch `stop` ends: one or more of `steps`, but not all.

    Raises:
        ValueError: if there is no such step.
    """
    _checks.positive("stop", stop)
    step = max(1, round(stop * steps_per_epoch))
    if step >= steps:
        raise ValueError(f"stop={stop:g} epochs is step {step} of {steps}; one or more must be left.")
    return step


def epoch_of(model: nn.Module, rows: int, batch_size: int) -> tuple[int, int]:
    """Return the steps and the rows of an epoch, without a last batch that a BatchNorm could not normalise."""
    steps = -(-rows // batch_size)
    if batch_size > 1 and rows % batch_size == 1 and any(isinstance(m, _BATCH_NORM) for m in model.modules()):
        if rows == 1:
            raise ValueError("There is 1 training row; a model with BatchNorm needs 2 or more in a batch.")
        return steps - 1, rows - 1
    return steps, rows


_BATCH_NORM = nn.modules.batchnorm._BatchNorm


def _finite(value: float) -> float | None:
    # JSON has no nan; null is read as "unknown" by the report.
    return value if math.isfinite(value) else None
