"""Every contender with every seed on the same work: initial weights, batches, schedule and clock, in one run directory."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from beyondprop.lab import registry
from beyondprop.lab.comparing import tuning
from beyondprop.lab.comparing.member import Member, Observer
from beyondprop.lab.comparing.plan import Nets, Plan, prepare
from beyondprop.lab.comparing.settings import Settings, check_workers, untrusted
from beyondprop.lab.comparing.train import train
from beyondprop.lab.registry import RuleSpec
from beyondprop.lab.runs.config import naming
from beyondprop.lab.runs.directory import RunDirectory, check_free, default_path
from beyondprop.lab.runs.environment import environment
from beyondprop.lab.runs.recorded import read_config
from beyondprop.lab.tasks import Task

if TYPE_CHECKING:
    from beyondprop.lab.comparing.workers import Crew


def compare(
    settings: Settings | None = None,
    *,
    task: Task | None = None,
    nets: Nets | None = None,
    rules: Sequence[RuleSpec] = (),
    out: str | Path | None = None,
    observer: Observer | None = None,
    workers: int | str | None = None,
) -> Path:
    """Run a comparison and return its run directory.

    A contender that meets a non-finite number fails with that seed alone, which is recorded; the others go on.

    Args:
        settings: what to compare; default: `Settings()`.
        task: a task of one's own, such as `Task.from_arrays(x, y)`, in place of `settings.data`.
        nets: networks of one's own by name, modules or functions `build(input_shape, outputs)`; where `settings` names none of
            them, they are the nets that are compared.
        rules: likewise rules of one's own, beside those that are registered.
        out: the run directory, which must be free; default: one in `runs/` named by time, task and net.
        observer: who is told how it goes.
        workers: train in so many processes of this machine, or in `"ray"`, on the Ray cluster that runs; the recorded numbers
            are the same but for seconds. Default: in this process, one training after the other.

    Raises:
        ValueError: if a setting is wrong, or something cannot be handed to workers; the message says what is accepted.
        UnsupportedModelError: if one of the rules cannot train a net.
        FileExistsError: if there is something at `out` already.
        KeyboardInterrupt: after Ctrl-C, with the state saved.
    """
    path = None if out is None else Path(out)
    if path is not None:
        check_free(path)
    settings = settings or Settings()
    if nets and not set(nets) & set(settings.nets):
        settings = replace(settings, nets=tuple(nets))
    if rules and not {spec.name for spec in rules} & set(settings.rules):
        settings = replace(settings, rules=tuple(spec.name for spec in rules))
    check_workers(workers)
    return run(prepare(settings, task=task, nets=nets, rules=rules), path, observer, workers)


def resume(
    path: str | Path,
    *,
    task: Task | None = None,
    nets: Nets | None = None,
    rules: Sequence[RuleSpec] = (),
    observer: Observer | None = None,
    trust: bool = False,
    workers: int | str | None = None,
) -> Path:
    """Go on with a comparison that was stopped; what is done is not done again.

    Args:
        path: its run directory.
        task: the task that it was begun with, where that was one of one's own.
        nets: likewise the networks.
        rules: likewise the rules.
        observer: who is told how it goes.
        trust: whether Python code that the directory names, and this process has not loaded yet, may be executed: plugins,
            and nets of the form FILE.py:FUNCTION.
        workers: as in `compare`; it may be another number than before.

    Raises:
        FileNotFoundError: if there is no run directory at `path`.
        ValueError: if a file in it is damaged, or it names code without `trust`.
        RuntimeError: if another process is writing it.
    """
    check_workers(workers)
    with naming(Path(path)):
        settings = Settings.from_config(read_config(Path(path)))
    code = [flag for flag in settings.code if flag.removeprefix("--net=") not in (nets or {}) and not is_loaded(flag)]
    if code and not trust:
        raise ValueError(untrusted(path, code, "Load them first if you know them, or pass trust=True."))
    with naming(Path(path)):
        plan = prepare(settings, task=task, nets=nets, rules=rules)
    return go_on(plan, Path(path), observer, workers)


def is_loaded(flag: str) -> bool:
    """Return whether this process has executed the file or module that a flag of `Settings.code` names, as it is now."""
    kind, _, where = flag.partition("=")
    if kind == "--plugin":
        return (str(Path(where).resolve()) if where.endswith(".py") else where) in registry._loaded
    path = Path(where.rpartition(":")[0])
    return path.is_file() and f"{path.resolve()}@{path.stat().st_mtime_ns}" in registry._files


def run(
    plan: Plan, path: Path | None = None, observer: Observer | None = None, workers: int | str | None = None
) -> Path:
    """Run a prepared comparison in a new run directory; see `compare`."""
    with _threads(plan.settings.threads), _crew(plan, workers) as crew:
        if crew is not None:
            # What cannot be handed over is refused before anything is written.
            crew.open(len(plan.contenders) * len(plan.settings.seeds))
        with _created(plan, path) as directory:
            _run(plan, directory, observer or Observer(), crew)
    return directory.path


def _created(plan: Plan, path: Path | None) -> RunDirectory:
    config, env = plan.config(), environment(plan.settings.device)
    while path is None:
        free = default_path(plan.task.name, plan.settings.nets[0] if len(plan.settings.nets) == 1 else "nets")
        try:
            return RunDirectory.create(free, config, env)
        except (FileExistsError, RuntimeError):
            if not free.is_dir():
                raise
            # Another process has just taken the name.
    return RunDirectory.create(path, config, env)


def go_on(plan: Plan, path: Path, observer: Observer | None = None, workers: int | str | None = None) -> Path:
    """Go on with a prepared comparison in its run directory; see `resume`."""
    with _threads(plan.settings.threads), RunDirectory.open(path) as directory:
        _warn_of_other_versions(path, plan.settings.device)
        plan = replace(plan, begun=_begun(directory.config))
        with _crew(plan, workers) as crew:
            _run(plan, directory, observer or Observer(), crew)
    return path


@contextmanager
def _crew(plan: Plan, workers: int | str | None) -> Iterator[Crew | None]:
    """Yield who trains the members beside this process; None: nobody."""
    if workers is None:
        yield None
        return
    from beyondprop.lab.comparing.scheduler import crew_of

    with crew_of(plan, workers) as crew:
        yield crew


def _run(plan: Plan, directory: RunDirectory, observer: Observer, crew: Crew | None) -> None:
    # Tuning done before is read from its rows, so the list of what is left is the same whoever asks.
    done = {(r["contender"], r["lr"], r["seed"]) for r in directory.rows if r.get("kind") == "tuning"}
    candidates = [m for m in tuning.candidates(plan) if (m.name, m.lr, m.seed) not in done]
    left = list(_left(plan, directory))
    observer.start(directory.path, [*candidates, *left])
    if crew is None:
        train_all: Callable[[Sequence[Member]], None] = partial(_one_by_one, plan, directory, observer)
    else:
        from beyondprop.lab.comparing.scheduler import Scheduler

        train_all = Scheduler(plan, directory, observer, crew).train
    train_all(candidates)
    chosen = tuning.chosen(plan, directory)
    directory.config = plan.config(chosen)
    directory.write_config()
    train_all([m if m.warm_start else replace(m, lr=chosen.get(m.name, m.lr)) for m in left])


def _one_by_one(plan: Plan, directory: RunDirectory, observer: Observer, members: Sequence[Member]) -> None:
    warm_start = cache(partial(tuning.warm_start, plan=plan))
    for member in members:
        if member.tuning:
            tuning.tune(member, plan, directory, observer, warm_start(member.contender.net, member.seed))
        else:
            train(member, plan, directory, observer)


def _left(plan: Plan, directory: RunDirectory) -> Iterator[Member]:
    """Yield the trainings that have not ended, each net's and seed's warm start before those that go on from it."""
    for seed in plan.settings.seeds:
        own = [contender for contender in plan.contenders if not directory.ended(contender.name, seed)]
        begun: set[str] = set()
        for contender in own:
            if plan.warm_spec is not None and contender.net not in begun:
                begun.add(contender.net)
                rate, epochs = plan.rate(plan.warm_spec), plan.settings.warm_epochs
                warm = Member(plan.warm(contender), seed, rate, epochs, warm_start=True)
                if not directory.ended(warm.name, seed):
                    yield warm
            yield Member(
                contender, seed, plan.rate(contender.rule), plan.epochs_of(contender.rule) - plan.settings.warm_epochs
            )


def _begun(config: dict[str, Any]) -> dict[str, float]:
    """Return the learning rates that were the rules' own when the run began: another version may have others."""
    entries = [] if config.get("tune") else list(config["contenders"])
    if "warm_start_rule" in config:
        entries.append(config["warm_start_rule"])
    rates = {entry.get("rule"): entry.get("settings", {}).get("lr") for entry in entries}
    return {rule: float(lr) for rule, lr in rates.items() if isinstance(lr, int | float)}


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _warn_of_other_versions(path: Path, device: str) -> None:
    before, after = json.loads((path / "env.json").read_text(encoding="utf-8")), environment(device)
    differing = [
        f"{key} {before.get(key)} then, {after.get(key)} now"
        for key in ("torch", "beyondprop", "commit", "cpu", "device")
        if before.get(key) != after.get(key)
    ]
    if differing:
        warnings.warn(
            f"The run was started elsewhere ({'; '.join(differing)}): its numbers may differ from an undisturbed run's.",
            stacklevel=2,
        )
