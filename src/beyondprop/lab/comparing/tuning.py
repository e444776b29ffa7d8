"""Learning rates chosen on held-out training rows: the same number of tries for every contender, the test rows unseen."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from beyondprop.lab.comparing.member import Contender, Member, Observer, seeded
from beyondprop.lab.comparing.plan import Plan, at_seed
from beyondprop.lab.runs.context import deferred_interrupt
from beyondprop.lab.runs.directory import RunDirectory
from beyondprop.lab.runs.recorded import Row
from beyondprop.lab.training import Failed, History, State, Training, fit

_NEVER = 2**62  # steps: the evaluation at the end is the only one that counts


@dataclass(frozen=True, slots=True)
class WarmStart:
    """What the trainings in tuning start from.

    Attributes:
        state: the weights and the random state, as `Plan.build` takes them.
        history: of the training that led there.
        failure: what ended it before, or None.
    """

    state: State
    history: History
    failure: str | None = None


def warm_start(contender: Contender, plan: Plan) -> WarmStart | None:
    """Train the comparison's warm start on what the test rows are not in; None where there is none."""
    if plan.warm_spec is None:
        return None
    warm, settings = plan.warm(contender), plan.settings
    member = Member(warm, plan.tune_seed, plan.rate(warm.rule), settings.warm_epochs, tuning=True, warm_start=True)
    held = at_seed(plan.tuning_task, member.seed, settings.device)
    with seeded(member.seed, settings.device):
        rule = plan.build(member, held)
        try:
            history = fit(rule, held, training(member, plan, stop=settings.warm_epochs))
        except Failed as error:
            return WarmStart({}, History(), f"The warm start failed: {' '.join(str(error).split())}")
        state: State = {"model": rule.model.state_dict(), "random": torch.get_rng_state()}
        if settings.device == "cuda":
            state["random_cuda"] = torch.cuda.get_rng_state()
    return WarmStart(state, history)


def training(member: Member, plan: Plan, stop: float | None = None) -> Training:
    """Return how a member is trained in tuning."""
    settings = plan.settings
    return Training(
        epochs=plan.tune_epochs,
        stop=stop,
        batch_size=settings.batch_size,
        seed=member.seed,
        schedule=member.spec.schedule or settings.schedule,
        evaluate_every=_NEVER,
        whole_set=member.spec.whole_set or None,
    )


def tune(
    member: Member, plan: Plan, directory: RunDirectory, observer: Observer, start: WarmStart | None = None
) -> None:
    """Train with one learning rate on what the test rows are not in, and record how well it does."""
    settings = plan.settings
    observer.begin(member)
    row: Row = {
        "kind": "tuning",
        "contender": member.name,
        "seed": member.seed,
        "lr": member.lr,
        "epochs": member.epochs,
    }
    keys = [metric.key for metric in plan.task.metrics]
    failure = None if start is None else start.failure
    if failure is None:
        held = at_seed(plan.tuning_task, member.seed, settings.device)
        with seeded(member.seed, settings.device), deferred_interrupt() as interrupted:
            try:
                history = fit(
                    plan.build(member, held, None if start is None else start.state),
                    held,
                    training(member, plan),
                    after=None if start is None else start.history,
                    progress=lambda step, steps: observer.progress(member, step, steps),
                    interrupted=interrupted,
                )
            except Failed as error:
                failure = " ".join(str(error).split())
            else:
                last = history.evaluations[-1]
                row |= {key: last[key] for key in keys} | {"seconds": last["seconds"]}
    if failure is not None:
        row |= dict.fromkeys(keys) | {"message": failure}
    directory.append(row)
    observer.row(member, row)
    observer.end(member)


def candidates(plan: Plan) -> Iterator[Member]:
    """Yield the trainings that tuning takes: every contender's grid, with one seed."""
    settings = plan.settings
    for contender in plan.contenders if settings.tune else ():
        if contender.rule.name not in settings.rates:
            for lr in contender.rule.grid:
                yield Member(contender, plan.tune_seed, lr, plan.tune_epochs - settings.warm_epochs, tuning=True)


def chosen(plan: Plan, directory: RunDirectory) -> dict[str, float]:
    """Return the learning rates that tuning chose: best in the first metric, then in the others."""
    best: dict[str, tuple[float, ...]] = {}
    for row in directory.rows:
        values = [row.get(metric.key) for metric in plan.task.metrics]
        if row.get("kind") == "tuning" and values[-1] is not None:
            signs = [1.0 if metric.higher_is_better else -1.0 for metric in plan.task.metrics]
            score = *(-math.inf if v is None else s * v for s, v in zip(signs, values, strict=True)), row["lr"]
            best[row["contender"]] = max(score, best.get(row["contender"], score))
    said = {row["contender"] for row in directory.rows if row.get("kind") == "warning" and "seed" not in row}
    for contender in plan.contenders if plan.settings.tune else ():
        name, spec = contender.name, contender.rule
        if spec.name in plan.settings.rates or name in said:
            continue
        grid, message = ", ".join(f"{lr:g}" for lr in spec.grid), ""
        if name not in best:
            message = f"Tuning failed at every learning rate of {grid}; {spec.lr:g} is used."
        elif best[name][-1] in (min(spec.grid), max(spec.grid)):
            message = f"Tuning chose {best[name][-1]:g}, at the edge of {grid}; a better one may lie beyond."
        if message:
            directory.append({"kind": "warning", "contender": name, "message": message})
            warnings.warn(f"{name}: {message}", stacklevel=2)
    return {name: score[-1] for name, score in best.items()}
