"""The training loop: any rule, on tensors, with the same batches, schedule and clock for all.

>>> rule = AltMin(model, nn.CrossEntropyLoss())
>>> history = fit(rule, load("digits"), epochs=5, batch_size=50, seed=0)
>>> history.evaluations[-1]["test_accuracy"]

There is no trainer object to satisfy: whoever wants another loop calls `rule.step(x, y)` in it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from beyondprop import _checks, schedules
from beyondprop._evaluation import Evaluation, evaluate, from_totals, totals, wide
from beyondprop._warned import recorded_warnings
from beyondprop._work import work_per_step
from beyondprop.data import batches
from beyondprop.diagnostics import alignment as measure_alignment
from beyondprop.errors import NonFiniteError
from beyondprop.rules.base import LearningRule

__all__ = ["Evaluation", "Failed", "History", "Row", "State", "evaluate", "fit", "work_per_step"]

Row = dict[str, Any]
"""One record as `metrics.jsonl` has it, without the names of rule and seed."""

State = dict[str, Any]
"""Everything that training goes on from: nested dicts and lists of tensors, numbers and strings."""

Failed = (NonFiniteError, torch.linalg.LinAlgError, torch.OutOfMemoryError)
"""What ends the training of one rule without being a mistake in the call."""

_TICK = 0.1  # seconds between two looks at what is due by the clock
_SEEDS = 2**63


class Data(Protocol):
    """What `fit` needs of a data set; `beyondprop.data.Dataset` has it, regression targets are as welcome."""

    @property
    def x_train(self) -> Tensor: ...  # noqa: D102
    @property
    def y_train(self) -> Tensor: ...  # noqa: D102
    @property
    def x_test(self) -> Tensor: ...  # noqa: D102
    @property
    def y_test(self) -> Tensor: ...  # noqa: D102


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


def fit(
    rule: LearningRule,
    data: Data,
    *,
    epochs: float,
    batch_size: int,
    seed: int = 0,
    schedule: str = "linear",
    evaluate_every: int | None = None,
    alignment: bool = False,
    early_stop: int | None = None,
    log: Callable[[Row], None] | None = None,
    progress: Callable[[int, int], None] | None = None,
    save: Callable[[State], None] | None = None,
    save_every: float = 30.0,
    resume: State | None = None,
    interrupted: Callable[[], bool] | None = None,
) -> History:
    """Train a rule's model, evaluating it on the test rows as it goes.

    The order of the batches comes from `seed` and the epoch's number alone; dropout and what else the model draws comes
    from torch's global random state, which is yours to seed. The model trains in the mode that it is in: a part that you
    put in evaluation mode stays there. A last batch of a single row is left out where the model has a BatchNorm, which
    could not normalise it.

    Rows have: `step`; `epoch`; `samples` seen; `work`, in gradient-equivalents: what a step of plain backpropagation on the
    same batch costs in floating-point operations is 1; `seconds` of training, without evaluations, alignments and
    checkpoints; `train_loss`, the mean since the row before; `test_loss`; and `test_accuracy` for int64 labels.

    Args:
        rule: the rule; its model and the data are on one device.
        data: inputs and targets, `x_train`, `y_train`, `x_test`, `y_test`.
        epochs: passes over the training rows; fractions are welcome.
        batch_size: rows in a batch.
        seed: of the order of the batches.
        schedule: of the learning rates, see `schedules.FORMS`.
        evaluate_every: steps between two evaluations; default: an epoch. There is one before the first step and one after
            the last in any case.
        alignment: record, at every evaluation, how each stage's update agrees with the gradient on a fixed training batch.
        early_stop: stop after this many evaluations in a row without an improvement in accuracy, or else loss.
        log: called with every row as it comes.
        progress: called with the steps done and all steps, some times a second.
        save: called with the state at every evaluation and every `save_every` seconds; the state's tensors are the live
            ones, to be written or copied before it returns.
        save_every: seconds between two saves.
        resume: a state that `save` got; rule, data and arguments must be as they were then.
        interrupted: asked after every step; where it says true, the state is saved and `KeyboardInterrupt` raised.

    Raises:
        ValueError: if an argument is out of its range; the message has the range.
        NonFiniteError: where the rule does; a row of kind failed is logged before. So it is with a factorisation that
            fails, and a device out of memory.
    """
    loop = _Loop(rule, data, epochs, batch_size, seed, schedule, evaluate_every, alignment, early_stop, save_every)
    loop.log, loop.progress, loop.save, loop.interrupted = log, progress, save, interrupted
    if resume is not None:
        loop.restore(resume)
    with recorded_warnings(loop.warned, loop.on_warning):
        try:
            loop.run()
        except Failed as error:
            loop.record({
                "kind": "failed",
                "step": loop.step,
                "epoch": loop.epoch,
                "message": _one_line(error),
            })
            raise
    return loop.history


class _Loop:
    """The loop's variables; `fit` has their meaning."""

    def __init__(
        self,
        rule: LearningRule,
        data: Data,
        epochs: float,
        batch_size: int,
        seed: int,
        schedule: str,
        evaluate_every: int | None,
        alignment: bool,
        early_stop: int | None,
        save_every: float,
    ) -> None:
        _checks.positive("epochs", epochs)
        _checks.at_least("batch_size", batch_size, 1)
        _checks.at_least("seed", seed, 0)
        _checks.positive("save_every", save_every)
        if early_stop is not None:
            _checks.at_least("early_stop", early_stop, 1)
        _checks.batch(data.x_train, data.y_train)
        _checks.batch(data.x_test, data.y_test)
        self.rule, self.data, self.batch_size, self.seed = rule, data, batch_size, seed
        self.steps_per_epoch, self.rows_per_epoch = _epoch_of(rule.model, len(data.x_train), batch_size)
        self.steps = max(1, round(epochs * self.steps_per_epoch))
        self.evaluate_every = _checks.at_least("evaluate_every", evaluate_every or self.steps_per_epoch, 1)
        self.alignment, self.early_stop, self.save_every = alignment, early_stop, save_every
        self.schedulers: list[LambdaLR] = schedules.attach(rule.optimizers, schedule, self.steps, self.steps_per_epoch)
        self.log: Callable[[Row], None] | None = None
        self.progress: Callable[[int, int], None] | None = None
        self.save: Callable[[State], None] | None = None
        self.interrupted: Callable[[], bool] | None = None
        self.history = History()
        self.device = data.x_train.device
        self.step = 0
        self.seconds = 0.0
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
        return self.step / self.steps_per_epoch

    @property
    def samples(self) -> int:
        done, part = divmod(self.step, self.steps_per_epoch)
        return done * self.rows_per_epoch + min(part * self.batch_size, self.rows_per_epoch)

    def run(self) -> None:
        if not self.resumed:
            first = next(self._batches(0, 0))
            self.work = work_per_step(self.rule, *first)
            self._evaluate()
            self._save()
        while self.step < self.steps and not self.history.stopped_early:
            self._run_epoch()
        row: Row = {"kind": "finished", "step": self.step, "epoch": self.epoch}
        self.record(row | {"stopped_early": self.history.stopped_early})

    def _run_epoch(self) -> None:
        """Train to the end of the epoch, of the run, or of the improvement."""
        epoch, start = divmod(self.step, self.steps_per_epoch)
        rule_step, loss_sum, schedulers = self.rule.step, self.loss_sum, self.schedulers
        is_mean, interrupted, clock = self.rule.loss.is_mean, self.interrupted, time.perf_counter
        count = min(self.steps_per_epoch - start, self.steps - self.step)
        tick = began = self._now()
        for x, y in islice(self._batches(epoch, start), count):
            result = rule_step(x, y)
            loss_sum.add_(result.loss, alpha=len(x) if is_mean else 1)
            self.loss_rows += len(x)
            for scheduler in schedulers:
                scheduler.step()
            self.step += 1
            if self.step % self.steps_per_epoch == 0:
                self.rule.end_epoch()
            if self.step % self.evaluate_every == 0 or self.step == self.steps:
                self.seconds += self._now() - began
                self._evaluate()
                self._save()
                tick = began = self._now()
                if self.history.stopped_early:
                    return
            elif (now := clock()) >= tick:
                tick = now + _TICK
                if self.progress is not None:
                    self.progress(self.step, self.steps)
                if now - self.saved >= self.save_every:
                    self.seconds += self._now() - began
                    self._save()
                    began = self._now()
            if interrupted is not None and interrupted():
                self.seconds += self._now() - began
                self._save()
                raise KeyboardInterrupt
        self.seconds += self._now() - began

    def _batches(self, epoch: int, start: int) -> Any:
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
        result = from_totals(loss, correct, len(self.data.x_test))
        row: Row = {
            "kind": "eval",
            "step": self.step,
            "epoch": self.epoch,
            "samples": self.samples,
            "work": _finite(self.step * self.work),
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
            self.progress(self.step, self.steps)

    def _align(self) -> None:
        rows = len(self.data.x_train)
        order = torch.randperm(rows, generator=torch.Generator().manual_seed(self.seed))
        chosen = order[: self.batch_size].to(self.device)
        found = measure_alignment(self.rule, self.data.x_train[chosen], self.data.y_train[chosen])
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
        self.history.rows.append(row)
        if self.log is not None:
            self.log(row)

    def on_warning(self, message: str) -> None:
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
        }


_KEPT = ("step", "seconds", "work", "loss_rows", "best", "since_best", "warned")


def _epoch_of(model: nn.Module, rows: int, batch_size: int) -> tuple[int, int]:
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


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
