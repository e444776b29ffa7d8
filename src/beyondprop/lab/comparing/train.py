"""One training of a comparison that counts, in this process or in a worker."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from beyondprop.lab.comparing.member import Member, Observer, seeded
from beyondprop.lab.comparing.plan import Plan, at_seed
from beyondprop.lab.runs.context import deferred_interrupt, recorded_warnings
from beyondprop.lab.runs.recorded import WARM_START, Row
from beyondprop.lab.training import Failed, History, State, fit


class Recorder(Protocol):
    """What a training needs of a run directory; in a worker, something that passes it on."""

    rows: list[Row]

    def append(self, row: Row) -> None:
        """Write a row."""
        ...

    def save(self, contender: str, seed: int, state: Any) -> None:
        """Write a checkpoint."""
        ...

    def load(self, contender: str, seed: int) -> Any | None:
        """Return the state in a checkpoint, or None where there is none."""
        ...

    def checkpoint(self, contender: str, seed: int) -> Path:
        """Return where a checkpoint is, for messages."""
        ...


def train(
    member: Member, plan: Plan, directory: Recorder, observer: Observer, stop: Callable[[], bool] | None = None
) -> None:
    """Train a member to its end, from its checkpoint where there is one, and record it.

    Args:
        member: what is trained.
        plan: of the comparison.
        directory: where it is recorded.
        observer: who is told how it goes.
        stop: asked after every step, in place of Ctrl-C; where it says true, the state is saved and `KeyboardInterrupt` raised.
    """
    device, name, seed = plan.settings.device, member.name, member.seed

    def log(row: Row) -> None:
        row = {"kind": row["kind"], "contender": name, "seed": seed, **row}
        directory.append(row)
        observer.row(member, row)

    observer.begin(member)
    start: State | None = None
    after: History | None = None
    if plan.warm_spec is not None and not member.warm_start:
        before = WARM_START + plan.warm(member.contender).name
        after = History([r for r in directory.rows if (r.get("contender"), r.get("seed")) == (before, seed)])
        failure = next((r for r in after.rows if r["kind"] == "failed"), None)
        if failure is not None:
            log({**failure, "contender": name, "message": f"The warm start failed: {failure['message']}"})
            observer.end(member)
            return
        start = directory.load(before, seed)
        if start is None:
            raise FileNotFoundError(
                f"There is no checkpoint {str(directory.checkpoint(before, seed))!r} to start from."
            )
    state = directory.load(name, seed)
    seen: list[str] = []
    task = at_seed(plan.task, seed, device)
    with seeded(seed, device), deferred_interrupt() as interrupted:
        with recorded_warnings(
            seen, lambda text: None if state else log({"kind": "warning", "step": 0, "epoch": 0.0, "message": text})
        ):
            rule = plan.build(member, task, start)
        with suppress(*Failed):  # recorded by then
            fit(
                rule,
                task,
                plan.training(member),
                after=after,
                log=log,
                progress=lambda step, steps: observer.progress(member, step, steps),
                save=lambda tree: directory.save(name, seed, tree),
                resume=state,
                interrupted=stop or interrupted,
            )
    observer.end(member)
