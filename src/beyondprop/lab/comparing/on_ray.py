"""Members as tasks of a Ray cluster, which places them; its nodes need no common file system.

pip install 'beyondprop[ray]'; ray start --head; ray start --address=HEAD:6379    # on the others
"""

from __future__ import annotations

import contextlib
import importlib
import os
import socket
import time
from pathlib import Path
from typing import Any

from beyondprop.lab.comparing.handed import Setup
from beyondprop.lab.comparing.plan import Plan
from beyondprop.lab.comparing.worker import Job, Message, do, ready
from beyondprop.lab.comparing.workers import ENDS, Crew, refusal, stillborn

_MANY = 10_000  # tasks that may wait in the cluster: whoever adds nodes sees what there is to do
_ANSWER = 10.0  # seconds
_PAUSE = 0.05  # seconds between two looks at the messages
_plans: dict[str, Plan] = {}  # of this process, in workers


def _ray() -> Any:
    return importlib.import_module("ray")


def _address() -> str:
    """Return where the cluster is; one that does not answer raises at once, where Ray tries for minutes."""
    noted = Path(os.environ.get("RAY_TMPDIR", "/tmp"), "ray", "ray_current_cluster")  # of `ray start` on this machine
    address = os.environ.get("RAY_ADDRESS") or (noted.read_text().strip() if noted.is_file() else "auto")
    host, _, port = address.rpartition(":")
    if host and "/" not in host and port.isdecimal():
        try:
            socket.create_connection((host, int(port)), timeout=_ANSWER).close()
        except OSError as error:
            raise ConnectionError(f"at {address}: {error}") from error
    return address


class _Mailbox:
    """An actor beside the process that writes the run directory: what the tasks send, and whether they are to stop."""

    def __init__(self) -> None:
        self.messages: list[tuple[int, Message]] = []
        self.stopped: set[int] = set()

    def put(self, key: int, message: Message) -> bool:
        self.messages.append((key, message))
        return key in self.stopped

    def take(self) -> list[tuple[int, Message]]:
        found, self.messages = self.messages, []
        return found

    def stop(self, key: int) -> None:
        self.stopped.add(key)


class _Post:
    """A channel to the mailbox; a message has arrived when `send` returns."""

    def __init__(self, key: int, mailbox: Any) -> None:
        self.stopped = False
        self._key, self._mailbox = key, mailbox

    def send(self, *message: Any) -> None:
        self.stopped |= _ray().get(self._mailbox.put.remote(self._key, message))


def _train(key: int, setups: list[Any], job: Job | None, mailbox: Any) -> None:
    """Be a task: prepare the plan, once a process, and train a member."""
    channel, name = _Post(key, mailbox), setups[0].hex()
    if name not in _plans:
        if (plan := ready(_ray().get(setups[0]), channel)) is None:
            return
        _plans[name] = plan
    if job is not None:
        do(job, _plans[name], channel)


class OnRay(Crew):
    """The Ray cluster that this process is connected to, else the one of $RAY_ADDRESS, else the one of this machine.

    Raises:
        ValueError: if Ray is not installed, no cluster is there, or none of its nodes is large enough.
    """

    def __init__(self, setup: Setup) -> None:
        try:
            ray, strategies = _ray(), importlib.import_module("ray.util.scheduling_strategies")
        except ImportError as error:
            raise ValueError(f"workers='ray' needs Ray: pip install 'beyondprop[ray]' ({error}).") from error
        self._ray, self._own = ray, not ray.is_initialized()
        if self._own:
            try:
                ray.init(address=_address(), log_to_driver=False, logging_level="ERROR", configure_logging=False)
            except (OSError, RuntimeError, ValueError) as error:
                raise ValueError(
                    f"workers='ray' needs a Ray cluster; begin one by `ray start --head`, or set RAY_ADDRESS ({error})."
                ) from error
        needs: dict[str, float] = {"CPU": setup.settings.threads}
        if setup.settings.device == "cuda":
            needs["GPU"] = 1
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        if not any(all(node.get(what, 0) >= count for what, count in needs.items()) for node in nodes):
            needed = " and ".join(f"{count} {what}" for what, count in needs.items())
            self.close()
            raise ValueError(f"A worker needs {needed}, which no node of the Ray cluster has; take fewer threads.")
        slots = sum(int(min(node.get(what, 0) // count for what, count in needs.items())) for node in nodes)
        threads = setup.settings.threads
        of = f"{slots} worker{'s' * (slots > 1)} of {threads} thread{'s' * (threads > 1)} each"
        self.description = (
            f"A Ray cluster of {len(nodes)} node{'s' * (len(nodes) > 1)} with room for {of}: {slots * threads} threads"
        )
        here = strategies.NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        self._mailbox = ray.remote(_Mailbox).options(num_cpus=0, scheduling_strategy=here).remote()
        self._task = ray.remote(_train).options(num_cpus=needs["CPU"], num_gpus=needs.get("GPU", 0), max_retries=0)
        self._setups = [ray.put(setup)]
        self._tasks: dict[int, Any] = {}
        self._began: set[int] = set()
        self._kept: list[tuple[int | None, Message]] = []  # of the worker that `open` waited for

    def open(self, jobs: int) -> None:
        del jobs  # the cluster's matter
        self._tasks[-1] = self._task.remote(-1, self._setups, None, self._mailbox)
        while -1 in self._tasks:
            for _, message in self.poll(1.0):
                if message[0] == "refused":
                    raise ValueError(refusal(message[1]))
                if message[0] == "died":
                    raise RuntimeError(stillborn(message[1]))
                self._kept.append((None, message))

    @property
    def room(self) -> int:
        return _MANY - len(self._tasks)

    def submit(self, key: int, job: Job) -> None:
        self._tasks[key] = self._task.remote(key, self._setups, job, self._mailbox)

    def poll(self, timeout: float) -> list[tuple[int | None, Message]]:
        ray, until = self._ray, time.monotonic() + timeout
        if self._kept and -1 not in self._tasks:
            kept, self._kept = self._kept, []
            return kept
        found: list[tuple[int | None, Message]] = []
        while not found:
            # First who has ended: all that it sent is in the mailbox by then.
            by_task = {task: key for key, task in self._tasks.items()}
            ended, _ = ray.wait(list(by_task), num_returns=len(by_task), timeout=0) if by_task else ([], [])
            found = [(key if key >= 0 else None, message) for key, message in ray.get(self._mailbox.take.remote())]
            self._began |= {key for key, message in found if key is not None and message[0] != "refused"}
            told = {key for key, message in found if message[0] in (*ENDS, "refused")}
            for key in (by_task[task] for task in ended):
                task = self._tasks.pop(key)
                try:
                    ray.get(task)
                except Exception as error:  # of Ray, or of its loading this file
                    if key not in told:
                        why = f"ended by {type(error).__name__} ({' '.join(str(error).split())[:200]})"
                        found.append((key if key >= 0 else None, ("died", why, key in self._began)))
            if time.monotonic() >= until:
                break
            if not found:
                time.sleep(_PAUSE)
        return found

    def stop(self, key: int) -> bool:
        self._mailbox.stop.remote(key)
        return key in self._began

    def drop(self, key: int) -> None:
        if (task := self._tasks.pop(key, None)) is not None:
            self._ray.cancel(task, force=True)

    def close(self) -> None:
        for key in list(getattr(self, "_tasks", ())):
            self.drop(key)
        if hasattr(self, "_mailbox"):
            self._ray.kill(self._mailbox)
        if self._own:
            with contextlib.suppress(Exception):  # the cluster may be gone
                self._ray.shutdown()
