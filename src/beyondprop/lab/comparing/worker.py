"""The inside of a worker: it trains what it is given, and sends all that it finds to the process that writes the run directory.

A message is a tuple of its kind and what belongs to it:

    hello                    the process is there
    ready ENVIRONMENT        the plan is prepared
    refused TEXT             it cannot be
    begin | progress STEP STEPS | row ROW | save STATE | start STATE    as in the calls of the same names
    warning TEXT CATEGORY
    done | stopped | error EXCEPTION TRACEBACK    a job ended; after `stopped` its state is saved
"""

from __future__ import annotations

import os
import pickle
import queue
import signal
import threading
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

import torch

from beyondprop.lab.comparing import tuning
from beyondprop.lab.comparing.handed import Setup
from beyondprop.lab.comparing.member import Contender, Member, Observer
from beyondprop.lab.comparing.plan import Plan
from beyondprop.lab.comparing.train import train
from beyondprop.lab.runs.checkpoint import dumped, restored
from beyondprop.lab.runs.environment import environment
from beyondprop.lab.runs.recorded import Row
from beyondprop.lab.training import History

Message = tuple[Any, ...]


class Channel(Protocol):
    """The way back from a worker.

    Attributes:
        stopped: whether its training is to save its state and stop.
    """

    stopped: bool

    def send(self, *message: Any) -> None:
        """Send a message; they arrive in their order."""


@dataclass(frozen=True, slots=True)
class Job:
    """A member as a worker gets it: all by name, and what it goes on from.

    Attributes:
        net, rule, seed, lr, epochs, tuning, warm_start: of the member.
        path: the run directory, for messages; a worker does not write there.
        states: checkpoints by the names that rows go by: its own, and that of its warm start.
        rows: of its warm start.
        start: of a member of tuning, what its warm start sent.
    """

    net: str
    rule: str
    seed: int
    lr: float
    epochs: float
    tuning: bool
    warm_start: bool
    path: Path
    states: Mapping[str, bytes] = field(default_factory=dict)
    rows: Sequence[Row] = ()
    start: bytes | None = None

    def member(self, plan: Plan) -> Member:
        """Return the member that it is in a plan."""
        if self.warm_start:
            assert plan.warm_spec is not None
            contender = Contender(self.net, plan.warm_spec, len(plan.settings.nets) > 1)
        else:
            contender = next(c for c in plan.contenders if (c.net, c.rule.name) == (self.net, self.rule))
        return Member(contender, self.seed, self.lr, self.epochs, self.tuning, self.warm_start)


class _Recorder:
    """In place of the run directory: what is read was sent along, what is written is sent."""

    def __init__(self, job: Job, channel: Channel) -> None:
        self._job, self._channel = job, channel
        self.rows = list(job.rows)

    def append(self, row: Row) -> None:
        self._channel.send("row", row)

    def save(self, contender: str, seed: int, state: Any) -> None:
        del contender, seed
        self._channel.send("save", dumped(state))

    def load(self, contender: str, seed: int) -> Any | None:
        del seed
        return restored(self._job.states[contender]) if contender in self._job.states else None

    def checkpoint(self, contender: str, seed: int) -> Path:
        return self._job.path / f"checkpoint of {contender} with seed {seed}"


class _Told(Observer):
    def __init__(self, channel: Channel) -> None:
        self._channel = channel

    def begin(self, member: Member) -> None:
        self._channel.send("begin")

    def progress(self, member: Member, step: int, steps: int) -> None:
        self._channel.send("progress", step, steps)


def ready(setup: Setup, channel: Channel) -> Plan | None:
    """Prepare the plan and say so, or why it cannot be."""
    try:
        plan = setup.prepared()
    except Exception as error:
        text = (
            str(error) if isinstance(error, ValueError | ImportError | OSError) else f"{type(error).__name__}: {error}"
        )
        channel.send("refused", text)
        return None
    torch.set_num_threads(plan.settings.threads)
    channel.send("ready", environment(plan.settings.device))
    return plan


def do(job: Job, plan: Plan, channel: Channel) -> None:
    """Train a member; whatever happens is sent."""

    def tell(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
        del where, more
        channel.send("warning", str(message), _sendable(category, UserWarning))

    with warnings.catch_warnings():
        warnings.showwarning = tell
        try:
            _do(job, plan, channel)
        except KeyboardInterrupt:
            channel.send("stopped")
        except Exception as error:
            text = RuntimeError(f"{type(error).__name__}: {error}")
            channel.send("error", _sendable(error, text), traceback.format_exc())
        else:
            channel.send("done")


def _do(job: Job, plan: Plan, channel: Channel) -> None:
    member, recorder, observer = job.member(plan), _Recorder(job, channel), _Told(channel)
    if not member.tuning:
        train(member, plan, recorder, observer, stop=lambda: channel.stopped)
    elif member.warm_start:
        found = tuning.warm_start(job.net, job.seed, plan)
        rows = None if found.history is None else found.history.rows
        channel.send("start", dumped({"state": found.state, "rows": rows, "failure": found.failure}))
    else:
        start = tuning.WarmStart()
        if job.start is not None:
            sent = restored(job.start)
            history = None if sent["rows"] is None else History(sent["rows"])
            start = tuning.WarmStart(sent["state"], history, sent["failure"])
        tuning.tune(member, plan, recorder, observer, start)


def failed_start(message: str) -> bytes:
    """Return what the warm start of members of tuning sends where it failed."""
    return dumped({"state": None, "rows": None, "failure": f"The warm start failed: {message}"})


def _sendable(value: Any, otherwise: Any) -> Any:
    try:
        pickle.loads(pickle.dumps(value))
    except Exception:
        return otherwise
    return value


class _Pipe:
    """A channel through a pipe, and the jobs that come by it; where the other end is gone, so is this process."""

    def __init__(self, connection: Connection) -> None:
        self.stopped = False
        self._connection = connection
        self.given: queue.SimpleQueue[Any] = queue.SimpleQueue()
        threading.Thread(target=self._receive, daemon=True).start()

    def send(self, *message: Any) -> None:
        self._connection.send(message)

    def _receive(self) -> None:
        while True:
            try:
                given = self._connection.recv()
            except (EOFError, OSError):
                os._exit(0)  # at once: nobody reads what is still being trained
            self.stopped = given is None
            if not self.stopped:
                self.given.put(given)


def serve(connection: Connection) -> None:
    """Be a worker process: get the setup, then jobs, until the other end is gone."""
    # Ctrl-C in a terminal goes to all processes; who has the run directory says when to stop.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    channel = _Pipe(connection)
    channel.send("hello")
    plan = ready(channel.given.get(), channel)
    take: Callable[[], Job] = channel.given.get
    while plan is not None:
        do(take(), plan, channel)
    take()  # refused: until the other end is gone


def job_of(member: Member, path: Path, **own: Any) -> Job:
    """Return a member as a worker gets it."""
    contender = member.contender
    values = (
        contender.net,
        contender.rule.name,
        member.seed,
        member.lr,
        member.epochs,
        member.tuning,
        member.warm_start,
    )
    return Job(*values, path, **own)
