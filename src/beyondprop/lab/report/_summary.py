"""The numbers of a run, one summary per contender."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean, median, stdev
from typing import TYPE_CHECKING, Any

from beyondprop.lab.runs.recorded import ContenderInfo, Row, Run, number

if TYPE_CHECKING:
    from beyondprop.lab.tasks.base import Metric


@dataclass(frozen=True)
class Spread:
    """One number over the seeds.

    Attributes:
        mean: The mean; NaN where a seed's number is not finite.
        low, high: The smallest and the largest.
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
class ContenderSummary:
    """What one contender reached, over its seeds.

    The spreads are over the seeds that reached the end of training; where there are none, over the last
    evaluations of the unfinished ones; `None` where every seed failed or nothing was recorded.

    Attributes:
        name, title, rule, net: See `ContenderInfo`.
        metric: The key of the metric that decides.
        final: That metric at the last evaluation.
        best: Each seed's best of it after the start, over the seeds.
        first: It at the first evaluation after the start of training.
        first_epoch: The epoch of that evaluation.
        others: Every further metric at the last evaluation, by its key.
        final_train_loss: The training loss at the last evaluation.
        epochs: Epochs that every counted seed has reached.
        seconds, work, counters: Training time in seconds, gradient-equivalents (1 = one backpropagation step on the same
            batch), and what the model counted, by name; each the median over the seeds.
        seeds_done, seeds_failed, seeds_unfinished: Seeds that reached the end, that were stopped, for instance by a
            non-finite loss, and that did neither.
    """

    name: str
    title: str
    rule: str
    net: str
    metric: str
    final: Spread | None
    best: Spread | None
    first: Spread | None
    first_epoch: float | None
    others: dict[str, Spread | None]
    final_train_loss: Spread | None
    epochs: float | None
    seconds: float | None
    work: float | None
    counters: dict[str, float | None]
    seeds_done: tuple[int, ...]
    seeds_failed: tuple[int, ...]
    seeds_unfinished: tuple[int, ...]

    @property
    def seeds(self) -> int:
        """How many seeds there are, however they ended."""
        return len(self.seeds_done) + len(self.seeds_failed) + len(self.seeds_unfinished)

    @property
    def comparable(self) -> bool:
        """Whether every seed reached the end; only such contenders are in the running for the best value."""
        return bool(self.seeds_done) and not self.seeds_failed and not self.seeds_unfinished


def summary(run: Run, metric: Metric | None = None) -> list[ContenderSummary]:
    """Return the summary of every contender, in the configuration's order, by the run's first metric or another one."""
    return [_summary_of(run, info, metric or run.metric) for info in run.contenders]


def best_of(summaries: Sequence[ContenderSummary], metric: Metric, of: str = "final") -> float | None:
    """Return the best mean of the spreads `of` (`final` or `first`) over the comparable contenders, or `None`."""
    found = [v.mean for s in summaries if s.comparable and (v := getattr(s, of)) and math.isfinite(v.mean)]
    # With one contender there is nothing to be better than.
    return (max if metric.higher_is_better else min)(found) if found and len(summaries) > 1 else None


def warm_starts(run: Run) -> list[ContenderSummary]:
    """Return the summaries of what the contenders started with."""
    return [_summary_of(run, info, run.metric) for info in run.warm_starts]


def to_json(run: Run) -> dict[str, Any]:
    """Return the run's configuration, environment, summaries, warnings and failures as plain JSON values.

    Non-finite numbers become `None`, so that every JSON reader takes the result.
    """
    content = {
        "name": run.name,
        "config": run.config,
        "env": run.env,
        "metric": run.metric.key,
        "metrics": [asdict(metric) for metric in run.metrics],
        "split": run.split,
        "contenders": [asdict(s) for s in summary(run)],
        "warm_starts": [asdict(s) for s in warm_starts(run)],
        "warnings": run.warnings,
        "failures": run.failures,
        "notes": run.notes,
    }
    # TOML has dates and times of its own; JSON does not.
    return json.loads(json.dumps(content, default=str), parse_constant=lambda _: None)


def _summary_of(run: Run, info: ContenderInfo, metric: Metric) -> ContenderSummary:
    key, seeds = metric.key, run.seeds(info.name)
    rows = [run.of("eval", info.name, seed) for seed in run.counted(info.name)]
    last = [r[-1] for r in rows]
    # After a warm start the first row is what was handed over, not what the contender has done.
    starts = [r[0]["step"] if run.warm_starts else 0 for r in rows]
    trained = [[row for row in r if row["step"] > start] for r, start in zip(rows, starts, strict=True)]
    trained = [r for r in trained if r]
    pick = max if metric.higher_is_better else min

    def peak(rows: list[Row]) -> float:
        return pick((v for row in rows if math.isfinite(v := number(row, key))), default=math.nan)

    def finals(key: str) -> Spread | None:
        # A number that is never recorded is none; one that is null now and then was not finite.
        known = any(key in row for r in rows for row in r)
        return Spread.over(number(row, key) for row in last) if known else None

    def middle(key: str) -> float | None:
        values = [v for row in last if math.isfinite(v := number(row, key))]
        return median(values) if values else None

    return ContenderSummary(
        name=info.name,
        title=info.title,
        rule=info.rule,
        net=info.net,
        metric=key,
        final=(final := finals(key)),
        best=final and Spread.over(map(peak, trained)),
        first=final and Spread.over(number(r[0], key) for r in trained),
        first_epoch=min((r[0]["epoch"] for r in trained), default=None),
        others={m.key: finals(m.key) for m in run.metrics if m.key != key},
        final_train_loss=finals("train_loss"),
        epochs=min((row["epoch"] for row in last), default=None),
        seconds=middle("seconds"),
        work=middle("work"),
        counters={name: middle(name) for name in run.counters},
        seeds_done=seeds["done"],
        seeds_failed=seeds["failed"],
        seeds_unfinished=seeds["unfinished"],
    )
