"""Numbers and sentences as the table, the figures and the page write them."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import TYPE_CHECKING

from beyondprop.lab.report._summary import ContenderSummary, Spread
from beyondprop.lab.runs.recorded import Run
from beyondprop.lab.runs.text import clipped

if TYPE_CHECKING:
    from beyondprop.lab.tasks.base import Metric

DASH = "\N{EN DASH}"
TIMES = "\N{MULTIPLICATION SIGN}"


def value(number: float | None, scale: float = 1.0) -> str:
    """Write a metric's number: per cent, whose scale is 100, with two decimals, others with four digits."""
    if number is None:
        return DASH
    if not math.isfinite(number):
        return "not finite"
    number *= scale
    if scale == 100:
        return f"{number:.2f}"
    # "#" keeps trailing zeros, so that a column of losses lines up.
    return f"{number:#.4g}".rstrip(".") if number == 0 or 1e-4 <= abs(number) < 1e5 else f"{number:.3g}"


def mean(spread: Spread | None, scale: float = 1.0) -> str:
    """Write the mean of a spread."""
    return value(None if spread is None else spread.mean, scale)


def interval(spread: Spread | None, write: Callable[[float], str]) -> str:
    """Write the range of a spread, a dash where one seed has none; `write` writes its numbers."""
    if spread is None or spread.n < 2 or not math.isfinite(spread.mean):
        return DASH
    # A dash before a minus sign cannot be read.
    between = DASH if spread.low >= 0 else " to "
    return write(spread.low) + between + write(spread.high)


def amount(number: float | None) -> str:
    """Write seconds or work: thousands set apart, millions as such."""
    if number is None or not math.isfinite(number):
        return DASH
    if abs(number) >= 1e6:
        return f"{number / 1e6:,.2f} M"
    if abs(number) >= 100:
        return f"{number:,.0f}"
    return f"{number:.1f}" if abs(number) >= 10 else f"{number:.2f}" if abs(number) >= 0.1 else f"{number:.2g}"


def plural(count: int, noun: str) -> str:
    """Write a count with its noun: `1 seed`, `3 seeds`."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def over_seeds(counts: Iterable[int]) -> str:
    """Say what lines and bands show, given how many seeds each contender's mean is over."""
    found = sorted({count for count in counts if count > 0})
    if not found:
        return "no seed reached an end to average over"
    if found == [1]:
        return "one seed, so no spread is known"
    if len(found) == 1:
        return f"mean and range over {found[0]} seeds"
    return f"mean and range over the seeds that finished ({found[0]} to {found[-1]} per contender)"


def seeds(summary: ContenderSummary) -> str:
    """Say how the seeds of one contender ended."""
    counts = {"failed": len(summary.seeds_failed), "unfinished": len(summary.seeds_unfinished)}
    ends = [f", {count} {how}" for how, count in counts.items() if count]
    return "".join([f"{len(summary.seeds_done)} of {summary.seeds}", *ends])


def warm_start(summary: ContenderSummary, metric: Metric) -> str:
    """Say what contenders started with."""
    what, unit = name_and_unit(metric)
    found = f", {what} {mean(summary.final, metric.scale)} {unit}".rstrip() if summary.final else ""
    epochs = "" if summary.epochs is None else f" after {summary.epochs:.3g} epochs{found}"
    title = summary.title.replace(", warm start", "")
    return f"Contenders start from the weights of {title}{epochs}; its samples, work and seconds are counted in."


def after_first(summaries: Iterable[ContenderSummary]) -> str:
    """Name the column of first evaluations: by their epoch where it is one."""
    found = {s.first_epoch for s in summaries if s.first_epoch is not None}
    if len(found) != 1:
        return "first"
    epoch = f"{found.pop():.3g}"
    return f"after {epoch} epoch" + ("" if epoch == "1" else "s")


def columns(
    summaries: Collection[ContenderSummary], metrics: Sequence[Metric], counters: Iterable[str], split: str
) -> dict[str, list[str]]:
    """Return the table of results by its headers: the deciding metric with its spread, the other ones, what it took."""
    (metric, *others), scale = metrics, metrics[0].scale
    found = {
        f"{split} {metric.label}": [mean(s.final, scale) for s in summaries],
        "range": [interval(s.final, lambda v: value(v, scale)) for s in summaries],
        "std": [value(s.final and s.final.std, scale) for s in summaries],
        "best seen": [mean(s.best, scale) for s in summaries],
        after_first(summaries): [mean(s.first, scale) for s in summaries],
    }
    found |= {f"{split} {m.label}": [mean(s.others.get(m.key), m.scale) for s in summaries] for m in others}
    found |= {"train loss": [mean(s.final_train_loss) for s in summaries]}
    found |= {"seconds": [amount(s.seconds) for s in summaries], "work": [amount(s.work) for s in summaries]}
    found |= {
        clipped(name.replace("_", " "), 60): [amount(s.counters.get(name)) for s in summaries] for name in counters
    }
    return found | {"seeds": [seeds(s) for s in summaries]}


def name_and_unit(metric: Metric) -> tuple[str, str]:
    """Split a label: `"accuracy (%)"` is accuracy in %."""
    name, _, unit = metric.label.partition(" (")
    return name, unit.removesuffix(")")


def capital(text: str) -> str:
    """Return the text with a capital first letter, the others as they are."""
    return text[:1].upper() + text[1:]


def title(runs: Iterable[Run], summaries: Collection[ContenderSummary]) -> str:
    """Write a page title: `digits · mlp:100x2 · 4 contenders × 3 seeds`."""
    runs, counts = list(runs), sorted({s.seeds for s in summaries})
    of_seeds = plural(counts[0], "seed") if len(counts) == 1 else f"{counts[0]} to {counts[-1]} seeds"
    names = ([run.task for run in runs], [net for run in runs for net in run.config["nets"]])
    unique = [clipped(" and ".join(dict.fromkeys(part)), 300) for part in names]
    return " · ".join([*unique, f"{plural(len(summaries), 'contender')} {TIMES} {of_seeds}"])
