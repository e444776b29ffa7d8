"""Every rule with every seed on the same work: the same initial weights, batches, schedule and clock, in one run directory."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from beyondprop.data import Dataset
from beyondprop.lab.comparing import tuning
from beyondprop.lab.comparing.member import Member, Observer, Silent, build, seeded
from beyondprop.lab.comparing.plan import Plan, load_plugins, prepare
from beyondprop.lab.comparing.settings import WARM_START, Settings
from beyondprop.lab.registry import RuleSpec
from beyondprop.lab.runs.context import deferred_interrupt, recorded_warnings
from beyondprop.lab.runs.directory import Row, RunDirectory, check_free, default_path, read_config
from beyondprop.lab.runs.environment import environment
from beyondprop.lab.training.fit import fit
from beyondprop.lab.training.loop import Failed, History, State

__all__ = [
    "Member",
    "Observer",
    "Plan",
    "Settings",
    "Silent",
    "compare",
    "go_on",
    "load_plugins",
    "prepare",
    "resume",
    "run",
]


def compare(
    settings: Settings | None = None, *, out: str | Path | None = None, observer: Observer | None = None
) -> Path:
    """Run a comparison and return its run directory.

    A rule that meets a non-finite number fails with that seed alone, which is recorded; the others go on.

    Args:
        settings: what to compare; default: `Settings()`.
        out: the run directory, which must be free; default: one in `runs/` named by time, data and net.
        observer: who is told how it goes.

    Raises:
        ValueError: if a setting is wrong; the message says what is accepted.
        UnsupportedModelError: if one of the rules cannot train the net.
        FileExistsError: if there is something at `out` already.
        KeyboardInterrupt: after Ctrl-C, with the state saved.
    """
    path = None if out is None else Path(out)
    if path is not None:
        check_free(path)
    return run(prepare(settings or Settings()), path, observer)


def resume(path: str | Path, *, observer: Observer | None = None) -> Path:
    """Go on with a comparison that was stopped; what is done is not done again.

    Raises:
        FileNotFoundError: if there is no run directory at `path`.
        ValueError: if a file in it is damaged.
        RuntimeError: if another process is writing it.
    """
    return go_on(prepare(Settings.from_config(read_config(Path(path)))), Path(path), observer)


def run(plan: Plan, path: Path | None = None, observer: Observer | None = None) -> Path:
    """Run a prepared comparison in a new run directory; see `compare`."""
    settings = plan.settings
    with _threads(settings.threads):
        path = path or default_path(settings.data, settings.net)
        with RunDirectory.create(path, _config(plan), environment(settings.device)) as directory:
            _run(plan, directory, observer or Silent())
    return path


def go_on(plan: Plan, path: Path, observer: Observer | None = None) -> Path:
    """Go on with a prepared comparison in its run directory; see `resume`."""
    with _threads(plan.settings.threads), RunDirectory.open(path) as directory:
        _warn_of_other_versions(path, plan.settings.device)
        _run(plan, directory, observer or Silent())
    return path


def _run(plan: Plan, directory: RunDirectory, observer: Observer) -> None:
    settings = plan.settings
    # Tuning done before is read from its rows, so the list of what is left is the same whoever asks.
    done = {(r["rule"], r["lr"]) for r in directory.rows if r.get("kind") == "tuning"}
    candidates = [m for m in tuning.candidates(plan) if (m.spec.name, m.lr) not in done]
    left = list(_left(plan, directory))
    observer.start(directory.path, [*candidates, *left])
    if candidates and plan.tuning_data is not None:
        held = plan.tuning_data.to(settings.device)
        start = tuning.warm_start(held, plan)
        for member in candidates:
            tuning.tune(member, held, plan, directory, observer, start)
    chosen = tuning.chosen(plan, directory)
    directory.config = _config(plan, chosen)
    directory.write_config()
    dataset = plan.data.to(settings.device)
    for member in left:
        tuned = member if member.warm_start else replace(member, lr=chosen.get(member.spec.name, member.lr))
        _train(tuned, dataset, plan, directory, observer)


def _left(plan: Plan, directory: RunDirectory) -> Iterator[Member]:
    """Yield the trainings that have not ended, each seed's warm start before the rules that go on from it."""
    settings = plan.settings
    for seed in settings.seeds:
        own = [spec for spec in plan.specs if not directory.ended(spec.name, seed)]
        if own and plan.warm_spec is not None:
            warm = Member(plan.warm_spec, seed, _rate(plan, plan.warm_spec), settings.warm_epochs, warm_start=True)
            if not directory.ended(warm.name, seed):
                yield warm
        for spec in own:
            yield Member(spec, seed, _rate(plan, spec), settings.epochs - settings.warm_epochs)


def _rate(plan: Plan, spec: RuleSpec) -> float:
    return plan.settings.lr.get(spec.name, spec.lr)


def _train(member: Member, dataset: Dataset, plan: Plan, directory: RunDirectory, observer: Observer) -> None:
    settings, name, seed = plan.settings, member.name, member.seed

    def log(row: Row) -> None:
        row = {"kind": row["kind"], "rule": name, "seed": seed, **row}
        directory.append(row)
        observer.row(member, row)

    observer.begin(member)
    start: State | None = None
    after: History | None = None
    if plan.warm_spec is not None and not member.warm_start:
        before = WARM_START + plan.warm_spec.name
        after = History([r for r in directory.rows if (r.get("rule"), r.get("seed")) == (before, seed)])
        failure = next((r for r in after.rows if r["kind"] == "failed"), None)
        if failure is not None:
            log({**failure, "rule": name, "message": f"The warm start failed: {failure['message']}"})
            observer.end(member)
            return
        start = directory.load(before, seed)
        if start is None:
            raise FileNotFoundError(
                f"There is no checkpoint {str(directory.checkpoint(before, seed))!r} to start from."
            )
    state = directory.load(name, seed)
    seen: list[str] = []
    with seeded(seed, settings.device), deferred_interrupt() as interrupted:
        with recorded_warnings(
            seen, lambda text: None if state else log({"kind": "warning", "step": 0, "epoch": 0.0, "message": text})
        ):
            rule = build(member, dataset, settings, start)
        with suppress(*Failed):  # recorded by then
            fit(
                rule,
                dataset,
                epochs=settings.epochs,
                stop=settings.warm_epochs if member.warm_start else None,
                after=after,
                batch_size=settings.batch_size,
                seed=seed,
                schedule=member.spec.schedule or settings.schedule,
                evaluate_every=settings.evaluate_every,
                alignment=settings.alignment,
                early_stop=None if member.warm_start else settings.early_stop,
                log=log,
                progress=lambda step, steps: observer.progress(member, step, steps),
                save=lambda tree: directory.save(name, seed, tree),
                resume=state,
                interrupted=interrupted,
                whole_set=member.spec.whole_set or None,
            )
    observer.end(member)


def _config(plan: Plan, chosen: dict[str, float] | None = None) -> dict[str, Any]:
    settings, chosen = plan.settings, chosen or {}
    rules: list[dict[str, Any]] = []
    for spec in plan.specs:
        described = _described(plan, spec, chosen.get(spec.name))
        if spec.name in chosen:
            described["settings"]["lr_tuned_over"] = list(spec.grid)
        rules.append(described)
    warm = {} if plan.warm_spec is None else {"warm_start_rule": _described(plan, plan.warm_spec)}
    return {**settings.to_config(), **warm, "rules": rules}


def _described(plan: Plan, spec: RuleSpec, lr: float | None = None) -> dict[str, Any]:
    values = {
        "lr": _rate(plan, spec) if lr is None else lr,
        "schedule": spec.schedule or plan.settings.schedule,
    }
    return {"name": spec.name, "title": spec.title, "summary": spec.summary, "settings": values}


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
