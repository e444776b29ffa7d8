"""The numbers of a run, one summary per rule."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from statistics import fmean, median, stdev
from typing import Any

from beyondprop.lab.report._run import Row, RuleInfo, Run, number


@dataclass(frozen=True)
class Spread:
    """One number over the seeds.

    Attributes:
        mean: The mean; NaN where a seed's number is not finite.
        low: The smallest.
        high: The largest.
        std: The sample standard deviation (n − 1), `None` for one seed.
        n: How many seeds.
    """

    mean: float
    low: float
    high: float
    std: float | None
    n: int

    @classmethod
    def over(cls, values: Iterable[float]) -> Spread | None:
        """Return the spread of the values, `None` where there are none."""
        values = list(values)
        if not values:
            return None
        if not all(map(math.isfinite, values)):
            return cls(math.nan, math.nan, math.nan, None, len(values))
        std = stdev(values) if len(values) > 1 else None
        return cls(fmean(values), min(values), max(values), std, len(values))


@dataclass(frozen=True)
class RuleSummary:
    """What one rule reached, over its seeds.

    The spreads are over the seeds that reached the end of training; where there are none, over the last
    evaluations of the unfinished ones; `None` where every seed failed or nothing was recorded.

    Attributes:
        name: The rule's short name.
        title: The rule's name for people.
        metric: `"test_accuracy"` (a fraction, higher is better) or `"test_loss"` (lower is better).
        final: The metric at the last evaluation.
        best: Each seed's best metric after the start, over the seeds.
        first: The metric at the first evaluation after the start of training.
        first_epoch: The epoch of that evaluation.
        final_loss: The held-out loss at the last evaluation.
        final_train_loss: The training loss at the last evaluation.
        epochs: Epochs that every counted seed has reached.
        seconds: Training time in seconds, the median over the seeds.
        work: Gradient-equivalents (1 = one backpropagation step on the same batch), the median over seeds.
        seeds_done: Seeds that reached the end.
        seeds_failed: Seeds that were stopped, for instance by a non-finite loss.
        seeds_unfinished: Seeds that did neither.
    """

    name: str
    title: str
    metric: str
    final: Spread | None
    best: Spread | None
    first: Spread | None
    first_epoch: float | None
    final_loss: Spread | None
    final_train_loss: Spread | None
    epochs: float | None
    seconds: float | None
    work: float | None
    seeds_done: tuple[int, ...]
    seeds_failed: tuple[int, ...]
    seeds_unfinished: tuple[int, ...]

    @property
    def seeds(self) -> int:
        """How many seeds there are, however they ended."""
        return len(self.seeds_done) + len(self.seeds_failed) + len(self.seeds_unfinished)

    @property
    def comparable(self) -> bool:
        """Whether every seed reached the end; only such rules are in the running for the best value."""
        return bool(self.seeds_done) and not self.seeds_failed and not self.seeds_unfinished


def summary(run: Run) -> list[RuleSummary]:
    """Return the summary of every rule, in the configuration's order."""
    return [_summary_of(run, rule) for rule in run.rules]


def best_of(summaries: Iterable[RuleSummary], value: Callable[[RuleSummary], float | None]) -> float | None:
    """Return the best value of the summaries' metric over the comparable rules, or `None`."""
    summaries = list(summaries)
    found = [v for s in summaries if s.comparable and (v := value(s)) is not None and math.isfinite(v)]
    higher = any(s.metric == "test_accuracy" for s in summaries)
    # With one rule there is nothing to be better than.
    return (max if higher else min)(found) if found and len(summaries) > 1 else None


def warm_start(run: Run) -> RuleSummary | None:
    """Return the summary of what every rule started with, or None."""
    return None if run.warm_start is None else _summary_of(run, run.warm_start)


def to_json(run: Run) -> dict[str, Any]:
    """Return the run's configuration, environment, summaries, warnings and failures as plain JSON values.

    Non-finite numbers become `None`, so that every JSON reader takes the result.
    """
    content = {
        "name": run.name,
        "config": run.config,
        "env": run.env,
        "metric": run.metric,
        "split": run.split,
        "rules": [asdict(s) for s in summary(run)],
        "warm_start": None if (warm := warm_start(run)) is None else asdict(warm),
        "warnings": run.warnings,
        "failures": run.failures,
        "notes": run.notes,
    }
    return _plain(content)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    # TOML has dates and times of its own; JSON does not.
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def _summary_of(run: Run, rule: RuleInfo) -> RuleSummary:
    metric, seeds = run.metric, run.seeds(rule.name)
    rows = [run.of("eval", rule.name, seed) for seed in run.counted(rule.name)]
    last = [r[-1] for r in rows]
    # After a warm start the first row is what was handed over, not what the rule has done.
    starts = [0 if run.warm_start is None else r[0]["step"] for r in rows]
    trained = [[row for row in r if row["step"] > start] for r, start in zip(rows, starts, strict=True)]
    trained = [r for r in trained if r]
    pick = max if metric == "test_accuracy" else min

    def peak(rows: list[Row]) -> float:
        return pick((v for row in rows if math.isfinite(v := number(row, metric))), default=math.nan)

    return RuleSummary(
        name=rule.name,
        title=rule.title,
        metric=metric,
        final=Spread.over(number(row, metric) for row in last),
        best=Spread.over(map(peak, trained)),
        first=Spread.over(number(r[0], metric) for r in trained),
        first_epoch=min((r[0]["epoch"] for r in trained), default=None),
        final_loss=Spread.over(number(row, "test_loss") for row in last),
        final_train_loss=Spread.over(number(row, "train_loss") for row in last),
        epochs=min((row["epoch"] for row in last), default=None),
        seconds=_median(number(row, "seconds") for row in last),
        work=_median(number(row, "work") for row in last),
        seeds_done=seeds["done"],
        seeds_failed=seeds["failed"],
        seeds_unfinished=seeds["unfinished"],
    )


def _median(values: Iterable[float]) -> float | None:
    values = [v for v in values if math.isfinite(v)]
    return median(values) if values else None
