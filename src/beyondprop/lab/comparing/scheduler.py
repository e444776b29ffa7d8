"""Members to workers, and what they send to the run directory, which this process alone writes.

So a worker may be killed at any time, and no file is in doubt: its member goes on elsewhere from its last checkpoint. Where
this process is killed, its workers end, and `resume` goes on as ever.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from typing import Any

from beyondprop.lab.comparing.handed import Setup
from beyondprop.lab.comparing.member import Contender, Member, Observer
from beyondprop.lab.comparing.on_ray import OnRay
from beyondprop.lab.comparing.plan import Plan
from beyondprop.lab.comparing.worker import failed_start, job_of
from beyondprop.lab.comparing.workers import Crew, Processes, refusal, stillborn
from beyondprop.lab.runs.checkpoint import dumped, restored
from beyondprop.lab.runs.context import deferred_interrupt
from beyondprop.lab.runs.directory import RunDirectory
from beyondprop.lab.runs.environment import environment
from beyondprop.lab.runs.recorded import WARM_START, Row

ATTEMPTS = 3
"""Workers that a member may lose one after the other without a step that was saved; then it has failed."""
_TICK = 0.2  # seconds between two looks at Ctrl-C


@contextmanager
def crew_of(plan: Plan, workers: int | str) -> Iterator[Crew]:
    """Yield workers for a plan, and end them afterwards.

    Raises:
        ValueError: if something was handed over that cannot be pickled, or Ray or its cluster is not there.
    """
    setup = Setup.of(plan)
    if isinstance(workers, int):
        crew: Crew = Processes(setup, workers)
    else:
        crew = OnRay(setup)
    try:
        yield crew
    finally:
        crew.close()


class Scheduler:
    """Gives members to workers, in the order in which one process trains them, as far as they do not wait for a warm start."""

    def __init__(self, plan: Plan, directory: RunDirectory, observer: Observer, crew: Crew) -> None:
        self._plan, self._directory, self._observer, self._crew = plan, directory, observer, crew
        self._keys = count()
        self._going: dict[int, Member] = {}
        self._waiting: list[Member] = []
        self._starts: dict[tuple[str, int], bytes] = {}  # of tuning, by net and seed
        self._order: dict[tuple[str, float], list[Member]] = {}  # of tuning, by file
        self._tuning_rows: dict[Member, Row] = {}
        self._lost: dict[Member, int] = {}  # workers
        self._steps: dict[Member, int] = {}  # at the last checkpoint
        self._stillborn = 0
        self._told: set[tuple[str, Any]] = set()
        self._stopping = False
        self._error: BaseException | None = None
        observer.said(crew.description)

    def train(self, members: Sequence[Member]) -> None:
        """Return when all members have ended.

        Raises:
            KeyboardInterrupt: after Ctrl-C, when the others have saved their states.
            Exception: what a worker met that fails no member alone; likewise.
        """
        self._waiting = self._with_warm_starts(members)
        for member in members:
            self._order.setdefault((member.name, member.lr), []).append(member)
        with deferred_interrupt() as interrupted:
            while self._going or (self._waiting and not self._stopping):
                if not self._stopping and (interrupted() or self._error is not None):
                    self._stop()
                while not self._stopping and self._crew.room and (member := self._next()) is not None:
                    self._give_out(member)
                for key, message in self._crew.poll(_TICK):
                    if key is None or key in self._going:  # else it was dropped
                        getattr(self, f"_on_{message[0]}")(key, *message[1:])
            if self._error is not None:
                raise self._error
            if self._stopping:
                raise KeyboardInterrupt

    def _with_warm_starts(self, members: Sequence[Member]) -> list[Member]:
        """Return members with the warm starts of those of tuning, which nobody records, each before the first that needs it."""
        plan, found = self._plan, []
        for member in members:
            net, seed = member.contender.net, member.seed
            if member.tuning and plan.warm_spec is not None:
                warm = Contender(net, plan.warm_spec, len(plan.settings.nets) > 1)
                rate, epochs = plan.rate(plan.warm_spec), plan.settings.warm_epochs
                start = Member(warm, seed, rate, epochs, tuning=True, warm_start=True)
                if start not in found:
                    found.append(start)
            found.append(member)
        return found

    def _next(self) -> Member | None:
        """Take the first member that waits for nothing."""

        def of(member: Member) -> tuple[str, int]:
            return member.contender.net, member.seed

        starts = {of(member) for member in (*self._waiting, *self._going.values()) if member.warm_start}
        free = (member for member in self._waiting if member.warm_start or of(member) not in starts)
        member = next(free, None)
        if member is not None:
            self._waiting.remove(member)
        return member

    def _give_out(self, member: Member) -> None:
        plan, directory, states, rows = self._plan, self._directory, {}, []
        names = [] if member.tuning else [member.name]
        if not member.tuning and not member.warm_start and plan.warm_spec is not None:
            before = WARM_START + plan.warm(member.contender).name
            names.append(before)
            rows = [r for r in directory.rows if (r.get("contender"), r.get("seed")) == (before, member.seed)]
        for name in names:
            if (state := directory.load(name, member.seed)) is not None:
                states[name] = dumped(state)
                self._steps[member] = state["step"] if name == member.name else self._steps.get(member, 0)
        start = None if member.warm_start else self._starts.get((member.contender.net, member.seed))
        key = next(self._keys)
        self._going[key] = member
        self._crew.submit(key, job_of(member, directory.path, states=states, rows=rows, start=start))

    def _stop(self) -> None:
        """Have all trainings that have checkpoints save their states; the others end."""
        self._stopping = True
        for key, member in list(self._going.items()):
            if member.tuning or not self._crew.stop(key):
                self._crew.drop(key)
                self._waiting.insert(0, self._going.pop(key))

    # What workers send, by kind.

    def _on_ready(self, key: int | None, there: dict[str, Any]) -> None:
        del key
        self._stillborn = 0
        here = environment(self._plan.settings.device)
        differing = [
            f"{name} {there.get(name)} there, {here.get(name)} here"
            for name in ("torch", "beyondprop", "cpu", "device")
            if there.get(name) != here.get(name)
        ]
        if differing:
            self._on_warning(None, f"A worker differs ({'; '.join(differing)}): numbers may differ, too.", UserWarning)

    def _on_refused(self, key: int | None, text: str) -> None:
        self._error = ValueError(refusal(text))
        if key is not None:
            self._waiting.insert(0, self._going.pop(key))

    def _on_begin(self, key: int) -> None:
        self._observer.begin(self._going[key])

    def _on_progress(self, key: int, step: int, steps: int) -> None:
        self._observer.progress(self._going[key], step, steps)

    def _on_row(self, key: int, row: Row) -> None:
        member = self._going[key]
        if member.tuning:
            self._tuned(member, row)
        else:
            self._directory.append(row)
        self._observer.row(member, row)

    def _on_save(self, key: int, content: bytes) -> None:
        member, state = self._going[key], restored(content)
        self._directory.save(member.name, member.seed, state)
        if state["step"] > self._steps.get(member, 0):
            self._lost.pop(member, None)
        self._steps[member] = state["step"]

    def _on_start(self, key: int, content: bytes) -> None:
        member = self._going[key]
        self._starts[member.contender.net, member.seed] = content

    def _on_warning(self, key: int | None, text: str, category: type[Warning]) -> None:
        del key
        if (text, category) not in self._told:  # every worker has a first time
            self._told.add((text, category))
            warnings.warn(text, category, stacklevel=2)

    def _on_done(self, key: int) -> None:
        member = self._going.pop(key)
        if not (member.tuning and member.warm_start):
            self._observer.end(member)

    def _on_stopped(self, key: int) -> None:
        member = self._going.pop(key)
        if not self._stopping:  # by a signal of somebody else
            if not member.tuning:
                self._directory.rewind(member.name, member.seed)
            self._waiting.insert(0, member)

    def _on_error(self, key: int, error: Exception, text: str) -> None:
        member = self._going.pop(key)
        error.add_note(f"In a worker, training {member.name} with seed {member.seed}:\n{text}")
        self._error = self._error or error

    def _on_died(self, key: int | None, why: str, began: bool) -> None:
        if not began:
            self._stillborn += 1
            if self._stillborn == ATTEMPTS:
                self._error = RuntimeError(stillborn(why))
        if key is None:
            return
        member = self._going.pop(key)
        name = f"{member.name} {f'tune {member.lr:g}' if member.tuning else f'seed {member.seed}'}"
        if not member.tuning:
            self._directory.rewind(member.name, member.seed)
        if not began or self._stopping:
            self._waiting.insert(0, member)
            return
        self._lost[member] = self._lost.get(member, 0) + 1
        if self._lost[member] < ATTEMPTS:
            self._waiting.insert(0, member)
            where = "from its checkpoint" if self._steps.get(member) else "from its beginning"
            self._observer.said(f"{name}: its worker {why}; it goes on in another {where}.")
            return
        message = (
            f"{ATTEMPTS} workers one after the other ended without a step of it that was saved, the last {why}: it may take "
            "more memory than there is. Fewer workers leave more for each."
        )
        self._given_up(member, message)

    def _given_up(self, member: Member, message: str) -> None:
        net, seed = member.contender.net, member.seed
        if member.tuning and member.warm_start:
            self._starts[net, seed] = failed_start(message)
            return
        row: Row
        if member.tuning:
            keys = [metric.key for metric in self._plan.task.metrics]
            row = {"kind": "tuning", "contender": member.name, "seed": seed, "lr": member.lr, "epochs": member.epochs}
            row |= dict.fromkeys(keys) | {"message": message}
            self._tuned(member, row)
        else:
            own = [r for r in self._directory.rows if (r.get("contender"), r.get("seed")) == (member.name, seed)]
            last = next((r for r in reversed(own) if "step" in r), {"step": 0, "epoch": 0.0})
            row = {
                "kind": "failed",
                "contender": member.name,
                "seed": seed,
                "step": last["step"],
                "epoch": last["epoch"],
            }
            row["message"] = message
            self._directory.append(row)
        self._observer.row(member, row)
        self._observer.end(member)

    def _tuned(self, member: Member, row: Row) -> None:
        """Write the rows of tuning, those of a file in the order in which one process does, whichever comes first."""
        self._tuning_rows[member] = row
        order = self._order[member.name, member.lr]
        while order and order[0] in self._tuning_rows:
            self._directory.append(self._tuning_rows.pop(order.pop(0)))
