"""Learning rates chosen on held-out training rows: the same number of tries for every contender, the test rows unseen."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from statistics import fmean

import torch

from beyondprop.lab.comparing.member import Contender, Member, Observer, seeded
from beyondprop.lab.comparing.plan import Plan, at_seed
from beyondprop.lab.comparing.train import Recorder
from beyondprop.lab.runs.context import deferred_interrupt
from beyondprop.lab.runs.directory import RunDirectory
from beyondprop.lab.runs.recorded import Row, number
from beyondprop.lab.tasks import Metric
from beyondprop.lab.training import Failed, History, State, fit


@dataclass(frozen=True, slots=True)
class WarmStart:
    """What the trainings in tuning start from; all None where the comparison has no warm start.

    Attributes:
        state: the weights and the random state, as `Plan.build` takes them.
        history: of the training that led there.
        failure: what ended it before.
    """

    state: State | None = None
    history: History | None = None
    failure: str | None = None


def warm_start(net: str, seed: int, plan: Plan) -> WarmStart:
    """Train the comparison's warm start, where it has one, on what the test rows are not in."""
    if plan.warm_spec is None:
        return WarmStart()
    settings, warm = plan.settings, Contender(net, plan.warm_spec)
    member = Member(warm, seed, plan.rate(warm.rule), settings.warm_epochs, tuning=True, warm_start=True)
    held = at_seed(plan.tuning_task, seed, settings.device)
    with seeded(seed, settings.device):
        rule = plan.build(member, held)
        try:
            history = fit(rule, held, plan.training(member))
        except Failed as error:
            return WarmStart(failure=f"The warm start failed: {' '.join(str(error).split())}")
        state: State = {"model": rule.model.state_dict(), "random": torch.get_rng_state()}
        if settings.device == "cuda":
            state["random_cuda"] = torch.cuda.get_rng_state()
    return WarmStart(state, history)


def tune(member: Member, plan: Plan, directory: Recorder, observer: Observer, start: WarmStart) -> None:
    """Train with one learning rate on what the test rows are not in, and record how well it does."""
    device, seed, failure = plan.settings.device, member.seed, start.failure
    observer.begin(member)
    row: Row = {"kind": "tuning", "contender": member.name, "seed": seed, "lr": member.lr, "epochs": member.epochs}
    keys = [metric.key for metric in plan.task.metrics]
    if failure is None:
        held = at_seed(plan.tuning_task, seed, device)
        with seeded(seed, device), deferred_interrupt() as interrupted:
            try:
                history = fit(
                    plan.build(member, held, start.state),
                    held,
                    plan.training(member),
                    after=start.history,
                    progress=lambda step, steps: observer.progress(member, step, steps),
                    interrupted=interrupted,
                )
            except Failed as error:
                failure = " ".join(str(error).split())
            else:
                last = history.evaluations[-1]
                row |= {key: last[key] for key in (*keys, "seconds", "counters") if key in last}
    if failure is not None:
        row |= dict.fromkeys(keys) | {"message": failure}
    directory.append(row)
    observer.row(member, row)
    observer.end(member)


def candidates(plan: Plan) -> Iterator[Member]:
    """Yield the trainings that tuning takes: every contender's grid, with every seed of tuning."""
    settings = plan.settings
    for contender in plan.contenders if settings.tune else ():
        epochs = plan.epochs_of(contender.rule, tuning=True) - settings.warm_epochs
        if contender.rule.name not in settings.rates:
            for lr, seed in product(plan.grid(contender.rule), plan.tune_seeds):
                yield Member(contender, seed, lr, epochs, tuning=True)


def chosen(plan: Plan, directory: RunDirectory) -> dict[str, float]:
    """Return the learning rates that tuning chose: best in the first metric, the mean over seeds, then in the others."""
    found: dict[tuple[str, float], list[Row]] = {}
    for row in directory.rows:
        if row.get("kind") == "tuning":
            found.setdefault((row["contender"], row["lr"]), []).append(row)
    best: dict[str, tuple[float, ...]] = {}
    for (name, lr), rows in found.items():
        score = *(_mean(rows, metric) for metric in plan.task.metrics), lr
        if math.isfinite(score[-2]):
            best[name] = max(score, best.get(name, score))
    said = {row["contender"] for row in directory.rows if row.get("kind") == "warning" and "seed" not in row}
    for contender in plan.contenders if plan.settings.tune else ():
        name, spec = contender.name, contender.rule
        if spec.name in plan.settings.rates or name in said:
            continue
        rates, message = plan.grid(spec), ""
        grid = ", ".join(f"{lr:g}" for lr in rates)
        if name not in best:
            message = f"Tuning failed at every learning rate of {grid}; {plan.rate(spec):g} is used."
        elif best[name][-1] in (min(rates), max(rates)):
            message = f"Tuning chose {best[name][-1]:g}, at the edge of {grid}; a better one may lie beyond."
        if message:
            directory.append({"kind": "warning", "contender": name, "message": message})
            warnings.warn(f"{name}: {message}", stacklevel=2)
    return {name: score[-1] for name, score in best.items()}


def _mean(rows: list[Row], metric: Metric) -> float:
    """Return the mean over seeds, larger where it is better; minus infinity where a seed failed."""
    values = [number(row, metric.key) for row in rows]
    if not all(map(math.isfinite, values)):
        return -math.inf
    return fmean(values) if metric.higher_is_better else -fmean(values)
