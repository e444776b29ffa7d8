"""Every rule with every seed on the same work: the same initial weights, batches, schedule and clock, in one run directory."""

from __future__ import annotations

import difflib
import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from beyondprop import data, nets, registry, schedules
from beyondprop._environment import environment
from beyondprop._interrupt import deferred_interrupt
from beyondprop._warned import recorded_warnings
from beyondprop.data import Dataset
from beyondprop.errors import UnsupportedModelError
from beyondprop.registry import RuleSpec
from beyondprop.rules.base import LearningRule
from beyondprop.runs import Row, RunDirectory, check_free, default_path, read_config
from beyondprop.settings import Settings
from beyondprop.training import Failed, fit

VALIDATION = 1 / 6
"""Share of the training rows that a validation split holds out: as many as MNIST has test rows."""

_loaded_plugins: set[str] = set()


@dataclass(frozen=True, slots=True)
class Member:
    """One training of a comparison.

    Attributes:
        spec: the rule.
        seed: the seed.
        lr: the learning rate.
        epochs: how long it trains.
        tuning: whether it is one of the trainings that a learning rate is chosen by.
    """

    spec: RuleSpec
    seed: int
    lr: float
    epochs: float
    tuning: bool = False


class Observer(Protocol):
    """Who watches a comparison, such as the command line's progress display."""

    def start(self, path: Path, members: Sequence[Member]) -> None:
        """The run directory is there; these trainings are to be done, first of all the tuning ones."""

    def begin(self, member: Member) -> None:
        """A training begins, or goes on from its checkpoint."""

    def progress(self, member: Member, step: int, steps: int) -> None:
        """So many of its steps are done; some times a second."""

    def row(self, member: Member, row: Row) -> None:
        """It recorded something."""

    def end(self, member: Member) -> None:
        """It finished or failed."""


class Silent:
    """The observer that does nothing."""

    def start(self, path: Path, members: Sequence[Member]) -> None:
        """See `Observer`."""

    def begin(self, member: Member) -> None:
        """See `Observer`."""

    def progress(self, member: Member, step: int, steps: int) -> None:
        """See `Observer`."""

    def row(self, member: Member, row: Row) -> None:
        """See `Observer`."""

    def end(self, member: Member) -> None:
        """See `Observer`."""


@dataclass(frozen=True, slots=True)
class Plan:
    """A comparison whose settings were found good and whose data is loaded.

    Attributes:
        settings: with the device and the threads that they come down to.
        specs: the rules, in the settings' order.
        data: the training rows, and those that are evaluated on.
        tuning_data: the same without the test rows; None where nothing is tuned.
    """

    settings: Settings
    specs: tuple[RuleSpec, ...]
    data: Dataset
    tuning_data: Dataset | None


def compare(settings: Settings | None = None, *, out: str | Path | None = None, observer: Observer | None = None) -> Path:
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


def prepare(settings: Settings, *, progress: data.Progress | None = None) -> Plan:
    """Check the settings against what there is, and load the data.

    Args:
        settings: what to compare.
        progress: called during downloads, see `data.load`.

    Raises:
        ValueError: if a setting is wrong; the message says what is accepted.
        ImportError: if a plugin cannot be loaded.
        UnsupportedModelError: if one of the rules cannot train the net.
        DataUnavailableError: if the data is not at hand and cannot be downloaded.
    """
    for plugin in settings.plugins:
        _load_plugin(plugin)
    specs = tuple(registry.get(_known("rule", name, registry.names())) for name in settings.rules)
    info = data.describe(_known("data", settings.data, data.names()))
    _known("net", settings.net.partition(":")[0], [form.partition(":")[0] for form in nets.FORMS], nets.FORMS)
    for schedule in {settings.schedule, *(spec.schedule for spec in specs)} - {None}:
        schedules.factor(schedule, 1, 1)
    device = settings.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    elif device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device is 'cuda', but torch finds no CUDA device; use 'cpu' or 'auto'.")
    settings = replace(settings, device=device, threads=settings.threads or torch.get_num_threads())
    for spec in specs:
        with torch.random.fork_rng(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they come again, and are recorded, when the rule trains
            model = nets.build(settings.net, info.input_shape, len(info.classes))
            try:
                spec.build(model, nn.CrossEntropyLoss(), spec.lr)
            except UnsupportedModelError as error:
                raise UnsupportedModelError(f"{spec.name} cannot train {settings.net}: {error}") from error
    full = data.load(settings.data, progress=progress)
    split = None
    if settings.validation or settings.tune:
        split = full.split_validation(VALIDATION, generator=torch.Generator().manual_seed(0))
    evaluated = split if settings.validation and split is not None else full
    return Plan(settings, specs, evaluated, split if settings.tune else None)


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
    candidates = [m for m in _candidates(plan) if (m.spec.name, m.lr) not in done]
    left = [
        Member(spec, seed, settings.lr.get(spec.name, spec.lr), settings.epochs)
        for seed in settings.seeds
        for spec in plan.specs
        if not directory.ended(spec.name, seed)
    ]
    observer.start(directory.path, [*candidates, *left])
    if candidates and plan.tuning_data is not None:
        held = plan.tuning_data.to(settings.device)
        for member in candidates:
            _tune(member, held, plan, directory, observer)
    chosen = _chosen(plan, directory.rows)
    directory.config = _config(plan, chosen)
    directory.write_config()
    dataset = plan.data.to(settings.device)
    for member in left:
        tuned = replace(member, lr=chosen.get(member.spec.name, member.lr))
        _train(tuned, dataset, plan, directory, observer)


def _train(member: Member, dataset: Dataset, plan: Plan, directory: RunDirectory, observer: Observer) -> None:
    settings, name, seed = plan.settings, member.spec.name, member.seed

    def log(row: Row) -> None:
        row = {"kind": row["kind"], "rule": name, "seed": seed, **row}
        directory.append(row)
        observer.row(member, row)

    observer.begin(member)
    state = directory.load(name, seed)
    seen: list[str] = []
    with _seeded(seed, settings.device), deferred_interrupt() as interrupted:
        with recorded_warnings(
            seen, lambda text: None if state else log({"kind": "warning", "step": 0, "epoch": 0.0, "message": text})
        ):
            rule = _build(member, dataset, settings)
        with suppress(*Failed):  # recorded by then
            fit(
                rule,
                dataset,
                epochs=settings.epochs,
                batch_size=settings.batch_size,
                seed=seed,
                schedule=member.spec.schedule or settings.schedule,
                evaluate_every=settings.evaluate_every,
                alignment=settings.alignment,
                early_stop=settings.early_stop,
                log=log,
                progress=lambda step, steps: observer.progress(member, step, steps),
                save=lambda tree: directory.save(name, seed, tree),
                resume=state,
                interrupted=interrupted,
            )
    observer.end(member)


def _tune(member: Member, held: Dataset, plan: Plan, directory: RunDirectory, observer: Observer) -> None:
    settings = plan.settings
    observer.begin(member)
    row: Row = {"kind": "tuning", "rule": member.spec.name, "seed": member.seed, "lr": member.lr, "epochs": member.epochs}
    with _seeded(member.seed, settings.device), deferred_interrupt() as interrupted:
        try:
            history = fit(
                _build(member, held, settings),
                held,
                epochs=member.epochs,
                batch_size=settings.batch_size,
                seed=member.seed,
                schedule=member.spec.schedule or settings.schedule,
                evaluate_every=_NEVER,
                progress=lambda step, steps: observer.progress(member, step, steps),
                interrupted=interrupted,
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


_NEVER = 2**62  # steps: the evaluation at the end is the only one that counts


def _candidates(plan: Plan) -> Iterator[Member]:
    settings = plan.settings
    for spec in plan.specs if settings.tune else ():
        if spec.name not in settings.lr:
            for lr in spec.grid:
                yield Member(spec, settings.seeds[0], lr, settings.tune_epochs or settings.epochs, tuning=True)


def _chosen(plan: Plan, rows: Sequence[Row]) -> dict[str, float]:
    """Return the learning rates that tuning chose: highest validation accuracy, then lowest loss."""
    best: dict[str, tuple[float, float, float]] = {}
    for row in rows:
        if row.get("kind") == "tuning" and row["validation_loss"] is not None:
            score = (row["validation_accuracy"] or 0.0, -row["validation_loss"], row["lr"])
            best[row["rule"]] = max(score, best.get(row["rule"], score))
    for spec in plan.specs:
        if plan.settings.tune and spec.name not in plan.settings.lr and spec.name not in best:
            warnings.warn(
                f"Tuning {spec.name} failed at every learning rate of {spec.grid}; it trains with {spec.lr:g}.",
                stacklevel=2,
            )
    return {name: lr for name, (_, _, lr) in best.items()}


def _config(plan: Plan, chosen: dict[str, float] | None = None) -> dict[str, Any]:
    settings, chosen = plan.settings, chosen or {}
    rules = []
    for spec in plan.specs:
        values: dict[str, Any] = {"lr": chosen.get(spec.name, settings.lr.get(spec.name, spec.lr))}
        values["schedule"] = spec.schedule or settings.schedule
        if spec.name in chosen:
            values["lr_tuned_over"] = list(spec.grid)
        rules.append({"name": spec.name, "title": spec.title, "summary": spec.summary, "settings": values})
    return {**settings.to_config(), "rules": rules}


def _build(member: Member, dataset: Dataset, settings: Settings) -> LearningRule:
    # The weights come first from the seed, on the CPU: the same for every rule and device.
    model = nets.build(settings.net, dataset.input_shape, dataset.num_classes).to(settings.device)
    return member.spec.build(model, nn.CrossEntropyLoss(), member.lr)


@contextmanager
def _seeded(seed: int, device: str) -> Iterator[None]:
    devices = [torch.cuda.current_device()] if device == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _load_plugin(where: str) -> None:
    key = str(Path(where).resolve()) if where.endswith(".py") else where
    if key in _loaded_plugins:  # its rules are registered already
        return
    try:
        registry.load_plugin(where)
    except Exception as error:
        raise ImportError(f"The plugin {where!r} cannot be loaded: {type(error).__name__}: {error}") from error
    _loaded_plugins.add(key)


def _known(what: str, name: str, accepted: Sequence[str], shown: Sequence[str] | Callable[[], Any] | Any = None) -> str:
    if name in accepted:
        return name
    close = difflib.get_close_matches(name, accepted, n=1)
    hint = f"; perhaps you meant {close[0]!r}" if close else ""
    raise ValueError(f"{what} must be one of {', '.join(shown or accepted)}, got {name!r}{hint}.")


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
