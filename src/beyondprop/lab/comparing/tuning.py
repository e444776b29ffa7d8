"""Learning rates chosen on held-out training rows: the same number of tries for every rule, the test rows unseen."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from beyondprop.data import Dataset
from beyondprop.lab.comparing.member import Member, Observer, build, seeded
from beyondprop.lab.comparing.plan import Plan
from beyondprop.lab.runs.context import deferred_interrupt
from beyondprop.lab.runs.directory import Row, RunDirectory
from beyondprop.lab.training.fit import fit
from beyondprop.lab.training.loop import Failed, History, State

_NEVER = 2**62  # steps: the evaluation at the end is the only one that counts


@dataclass(frozen=True, slots=True)
class WarmStart:
    """What the trainings in tuning start from.

    Attributes:
        state: the weights and the random state, as `build` takes them.
        history: of the training that led there.
        failure: what ended it before, or None.
    """

    state: State
    history: History
    failure: str | None = None


def warm_start(held: Dataset, plan: Plan) -> WarmStart | None:
    """Train the comparison's warm start on what the test rows are not in; None where there is none."""
    settings = plan.settings
    if plan.warm_spec is None:
        return None
    lr = settings.lr.get(plan.warm_spec.name, plan.warm_spec.lr)
    member = Member(plan.warm_spec, settings.seeds[0], lr, settings.warm_epochs, tuning=True, warm_start=True)
    with seeded(member.seed, settings.device):
        rule = build(member, held, settings)
        try:
            history = fit(
                rule,
                held,
                epochs=settings.tune_epochs or settings.epochs,
                stop=settings.warm_epochs,
                batch_size=settings.batch_size,
                seed=member.seed,
                schedule=member.spec.schedule or settings.schedule,
                evaluate_every=_NEVER,
            )
        except Failed as error:
            return WarmStart({}, History(), f"The warm start failed: {' '.join(str(error).split())}")
        state: State = {"model": rule.model.state_dict(), "random": torch.get_rng_state()}
        if settings.device == "cuda":
            state["random_cuda"] = torch.cuda.get_rng_state()
    return WarmStart(state, history)


def tune(
    member: Member,
    held: Dataset,
    plan: Plan,
    directory: RunDirectory,
    observer: Observer,
    start: WarmStart | None = None,
) -> None:
    """Train with one learning rate on what the test rows are not in, and record how well it does."""
    settings = plan.settings
    observer.begin(member)
    row: Row = {
        "kind": "tuning",
        "rule": member.spec.name,
        "seed": member.seed,
        "lr": member.lr,
        "epochs": member.epochs,
    }
    if start is not None and start.failure is not None:
        row |= {"validation_loss": None, "validation_accuracy": None, "message": start.failure}
        directory.append(row)
        observer.row(member, row)
        observer.end(member)
        return
    with seeded(member.seed, settings.device), deferred_interrupt() as interrupted:
        try:
            history = fit(
                build(member, held, settings, None if start is None else start.state),
                held,
                epochs=settings.tune_epochs or settings.epochs,
                after=None if start is None else start.history,
                batch_size=settings.batch_size,
                seed=member.seed,
                schedule=member.spec.schedule or settings.schedule,
                evaluate_every=_NEVER,
                progress=lambda step, steps: observer.progress(member, step, steps),
                interrupted=interrupted,
                whole_set=member.spec.whole_set or None,
            )
        except Failed as error:
            row |= {"validation_loss": None, "validation_accuracy": None, "message": " ".join(str(error).split())}
        else:
            last = history.evaluations[-1]
            row |= {"validation_loss": last["test_loss"], "validation_accuracy": last.get("test_accuracy")}
            row |= {"seconds": last["seconds"]}
    directory.append(row)
    observer.row(member, row)
    observer.end(member)


def candidates(plan: Plan) -> Iterator[Member]:
    """Yield the trainings that tuning takes: every rule's grid, with the first seed."""
    settings = plan.settings
    for spec in plan.specs if settings.tune else ():
        if spec.name not in settings.lr:
            for lr in spec.grid:
                epochs = (settings.tune_epochs or settings.epochs) - settings.warm_epochs
                yield Member(spec, settings.seeds[0], lr, epochs, tuning=True)


def chosen(plan: Plan, directory: RunDirectory) -> dict[str, float]:
    """Return the learning rates that tuning chose: highest validation accuracy, then lowest loss."""
    best: dict[str, tuple[float, float, float]] = {}
    for row in directory.rows:
        if row.get("kind") == "tuning" and row["validation_loss"] is not None:
            score = (row["validation_accuracy"] or 0.0, -row["validation_loss"], row["lr"])
            best[row["rule"]] = max(score, best.get(row["rule"], score))
    said = {row["rule"] for row in directory.rows if row.get("kind") == "warning" and "seed" not in row}
    for spec in plan.specs if plan.settings.tune else ():
        if spec.name in plan.settings.lr or spec.name in said:
            continue
        grid, message = ", ".join(f"{lr:g}" for lr in spec.grid), ""
        if spec.name not in best:
            message = f"Tuning failed at every learning rate of {grid}; {spec.lr:g} is used."
        elif best[spec.name][2] in (min(spec.grid), max(spec.grid)):
            message = f"Tuning chose {best[spec.name][2]:g}, at the edge of {grid}; a better one may lie beyond."
        if message:
            directory.append({"kind": "warning", "rule": spec.name, "message": message})
            warnings.warn(f"{spec.name}: {message}", stacklevel=2)
    return {name: lr for name, (_, _, lr) in best.items()}
