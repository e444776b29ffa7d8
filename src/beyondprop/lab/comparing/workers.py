"""Who trains members beside the process that writes the run directory: processes of this machine, or a Ray cluster."""

from __future__ import annotations

import abc
import os
import signal
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from multiprocessing import connection, get_context
from types import ModuleType
from typing import Any

import torch

from beyondprop.lab.comparing.handed import Setup
from beyondprop.lab.comparing.worker import Job, Message, serve

ENDS = ("done", "stopped", "error")
"""Messages that end a job."""
_WAIT = 5.0  # seconds for a process to end by itself


class Crew(abc.ABC):
    """Workers that take jobs and send messages, each by the job's key; see `worker` for their kinds.

    A worker that is gone, for whatever reason, sends `died WHY BEGAN`: whether it had prepared its plan.

    Attributes:
        description: who they are, in a few words.
    """

    description: str

    @abc.abstractmethod
    def open(self, jobs: int) -> None:
        """Begin as many workers as have something to do with so many jobs, and return when one is ready.

        Raises:
            ValueError: if it cannot prepare the plan; the message says why.
            RuntimeError: if it ends before.
        """

    @property
    @abc.abstractmethod
    def room(self) -> int:
        """How many jobs are taken now."""

    @abc.abstractmethod
    def submit(self, key: int, job: Job) -> None:
        """Train a member."""

    @abc.abstractmethod
    def poll(self, timeout: float) -> list[tuple[int | None, Message]]:
        """Return what has come, waiting so many seconds where nothing has; those of no job have no key."""

    @abc.abstractmethod
    def stop(self, key: int) -> bool:
        """Ask for the state to be saved, and the training to stop; return False where it has not begun."""

    @abc.abstractmethod
    def drop(self, key: int) -> None:
        """End a job at once; nothing more comes of it."""

    @abc.abstractmethod
    def close(self) -> None:
        """End all that still goes on."""


class _Process:
    """One process, and what it does."""

    def __init__(self, place: int, environment: Mapping[str, str]) -> None:
        context = get_context("spawn")  # a fork of threads that compute may hang
        self.place, self.key = place, -1
        self.waiting: Job | None = None  # until the plan is prepared
        self.ready = False
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs,), name=f"beyondprop-worker-{place}")
        with _inherited(environment):
            self.process.start()
        theirs.close()

    def send(self, what: Any) -> None:
        with suppress(OSError):  # it is dead, which `poll` notices
            self.pipe.send(what)

    def end(self) -> str:
        """End it, where it has not ended, and return how it did."""
        self.pipe.close()
        self.process.join(_WAIT)
        self.process.kill()
        self.process.join()
        code = self.process.exitcode or 0
        with suppress(ValueError):
            return f"was ended by {signal.Signals(-code).name}"
        return f"ended with exit code {code}"


@contextmanager
def _inherited(environment: Mapping[str, str]) -> Iterator[None]:
    """What is started inside has these variables, and does not get Ctrl-C before it can say what to do with it.

    Nor does it import the caller's script, which may compare at its top, or be a notebook.
    """
    before, main = dict(os.environ), sys.modules["__main__"]
    masked = hasattr(signal, "pthread_sigmask")
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT}) if masked else set()
    try:
        os.environ.update(environment)
        sys.modules["__main__"] = ModuleType("__main__")
        yield
    finally:
        sys.modules["__main__"] = main
        for name in environment:
            os.environ.pop(name)
            if name in before:
                os.environ[name] = before[name]
        if masked:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)


class Processes(Crew):
    """So many processes of this machine, started when there is a job for them; CUDA devices are taken in turn."""

    def __init__(self, setup: Setup, count: int) -> None:
        self._setup, self._count = setup, count
        self._workers: list[_Process] = []
        self._devices: list[str] = []
        if setup.settings.device == "cuda":
            visible = os.environ.get("CUDA_VISIBLE_DEVICES")
            self._devices = visible.split(",") if visible else list(map(str, range(torch.cuda.device_count())))
        threads, cores = setup.settings.threads, os.cpu_count() or 1
        of = f"{count} worker{'s' * (count > 1)} of {threads} thread{'s' * (threads > 1)} each"
        self.description = f"{of}: {count * threads} threads on {cores} cores"

    def open(self, jobs: int) -> None:
        for _ in range(min(jobs, self._count)):
            self._start()
        while not any(worker.ready for worker in self._workers):
            for _, message in self.poll(1.0):
                if message[0] == "refused":
                    raise ValueError(refusal(message[1]))
                if message[0] == "died":
                    raise RuntimeError(stillborn(message[1]))

    @property
    def room(self) -> int:
        return self._count - sum(worker.key >= 0 for worker in self._workers)

    def submit(self, key: int, job: Job) -> None:
        worker = next((worker for worker in self._workers if worker.key < 0), None) or self._start()
        worker.key = key
        if worker.ready:
            worker.send(job)
        else:
            worker.waiting = job

    def poll(self, timeout: float) -> list[tuple[int | None, Message]]:
        by_pipe = {worker.pipe: worker for worker in self._workers}
        found: list[tuple[int | None, Message]] = []
        for pipe in connection.wait(list(by_pipe), timeout):
            worker = by_pipe[pipe]  # pyright: ignore[reportArgumentType]
            key = worker.key if worker.key >= 0 else None
            try:
                message = worker.pipe.recv()
            except (EOFError, OSError):
                self._workers.remove(worker)
                message = ("died", worker.end(), worker.ready)
            if message[0] == "hello":
                worker.send(self._setup)
            elif message[0] == "ready":
                worker.ready = True
                if worker.waiting is not None:
                    worker.send(worker.waiting)
                    worker.waiting = None
            if message[0] in ENDS:
                worker.key = -1
            if message[0] != "hello":
                found.append((key, message))
        return found

    def stop(self, key: int) -> bool:
        begun = [worker for worker in self._of(key) if worker.waiting is None]
        for worker in begun:
            worker.send(None)
        return bool(begun)

    def drop(self, key: int) -> None:
        for worker in self._of(key):
            self._workers.remove(worker)
            worker.process.kill()
            worker.end()

    def close(self) -> None:
        for worker in self._workers:
            worker.process.kill()
        while self._workers:
            self._workers.pop().end()

    def _of(self, key: int) -> list[_Process]:
        return [worker for worker in self._workers if worker.key == key]

    def _start(self) -> _Process:
        used = {worker.place for worker in self._workers}
        place = next(place for place in range(self._count) if place not in used)
        device = {"CUDA_VISIBLE_DEVICES": self._devices[place % len(self._devices)]} if self._devices else {}
        self._workers.append(_Process(place, device))
        return self._workers[-1]


def refusal(text: str) -> str:
    """Return why workers cannot train a comparison."""
    return f"A worker cannot prepare the comparison: {text}"


def stillborn(why: str) -> str:
    """Return what is said of workers that end before they have begun."""
    return f"A worker {why} before it had prepared the comparison; see what it wrote to the error stream, or to memory."
