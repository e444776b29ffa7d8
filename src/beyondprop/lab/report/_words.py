"""Numbers and sentences as the table, the figures and the page write them."""

from __future__ import annotations

import math
from collections.abc import Iterable

from beyondprop.lab.report._summary import RuleSummary, Spread

DASH = "\N{EN DASH}"
TIMES = "\N{MULTIPLICATION SIGN}"


def value(metric: str, number: float | None) -> str:
    """Write a value of a metric: accuracies in percent without the sign, losses with four digits."""
    if number is None:
        return DASH
    if not math.isfinite(number):
        return "not finite"
    if metric == "test_accuracy":
        return f"{100 * number:.2f}"
    # "#" keeps trailing zeros, so that a column of losses lines up.
    return f"{number:#.4g}".rstrip(".") if 1e-4 <= abs(number) < 1e5 else f"{number:.3g}"


def mean(metric: str, spread: Spread | None) -> str:
    """Write the mean of a spread."""
    return value(metric, None if spread is None else spread.mean)


def interval(metric: str, spread: Spread | None) -> str:
    """Write the range of a spread, a dash where one seed has none."""
    if spread is None or spread.n < 2 or not math.isfinite(spread.mean):
        return DASH
    # A dash before a minus sign cannot be read.
    between = DASH if spread.low >= 0 else " to "
    return value(metric, spread.low) + between + value(metric, spread.high)


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
    """Say what lines and bands show, given how many seeds each rule's mean is over."""
    found = sorted({count for count in counts if count > 0})
    if not found:
        return "no seed reached an end to average over"
    if found == [1]:
        return "one seed, so no spread is known"
    if len(found) == 1:
        return f"mean and range over {found[0]} seeds"
    return f"mean and range over the seeds that finished ({found[0]} to {found[-1]} per rule)"


def seeds(summary: RuleSummary) -> str:
    """Say how the seeds of one rule ended."""
    parts = [f"{len(summary.seeds_done)} of {summary.seeds}"]
    if summary.seeds_failed:
        parts.append(f"{len(summary.seeds_failed)} failed")
    if summary.seeds_unfinished:
        parts.append(f"{len(summary.seeds_unfinished)} unfinished")
    return ", ".join(parts)


def warm_start(summary: RuleSummary | None) -> str:
    """Say what every rule started with; nothing where there was no warm start."""
    if summary is None:
        return ""
    found = ""
    if summary.final is not None:
        unit = " %" if summary.metric == "test_accuracy" else ""
        found = f", {'accuracy' if unit else 'loss'} {mean(summary.metric, summary.final)}{unit}"
    epochs = "" if summary.epochs is None else f" after {summary.epochs:.3g} epochs{found}"
    title = summary.title.removesuffix(", warm start")
    return f"All rules start from the weights of {title}{epochs}; its samples, work and seconds are counted in."


def metric_name(metric: str, split: str) -> str:
    """Name a metric on the split it was measured on, with its unit."""
    return f"{split} accuracy (%)" if metric == "test_accuracy" else f"{split} loss"


def title(data: Iterable[str], net: Iterable[str], rules: int, seeds: Iterable[int]) -> str:
    """Write a page title: `digits · mlp:100x2 · 4 rules × 3 seeds`."""
    counts = sorted(set(seeds))
    of_seeds = plural(counts[0], "seed") if len(counts) == 1 else f"{counts[0]} to {counts[-1]} seeds"
    unique = [" and ".join(dict.fromkeys(map(str, part))) for part in (data, net)]
    return " · ".join([*unique, f"{plural(rules, 'rule')} {TIMES} {of_seeds}"])
