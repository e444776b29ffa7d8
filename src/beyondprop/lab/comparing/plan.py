"""From settings to a plan: everything that can be wrong is found before anything is trained or written."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from beyondprop import data
from beyondprop.data import Dataset
from beyondprop.errors import UnsupportedModelError
from beyondprop.lab import nets, registry
from beyondprop.lab.comparing.settings import Settings
from beyondprop.lab.registry import RuleSpec
from beyondprop.lab.training import schedules
from beyondprop.lab.training.loop import epoch_of, stop_step

VALIDATION = 1 / 6
"""Share of the training rows that a validation split holds out: as many as MNIST has test rows."""

_loaded_plugins: set[str] = set()


@dataclass(frozen=True, slots=True)
class Plan:
    """A comparison whose settings were found good and whose data is loaded.

    Attributes:
        settings: with the device and the threads that they come down to.
        specs: the rules, in the settings' order.
        data: the training rows, and those that are evaluated on.
        tuning_data: the same without the test rows; None where nothing is tuned.
        warm_spec: the rule that every training starts with; None where there is no warm start.
    """

    settings: Settings
    specs: tuple[RuleSpec, ...]
    data: Dataset
    tuning_data: Dataset | None
    warm_spec: RuleSpec | None = None


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
    load_plugins(settings.plugins)
    specs = tuple(registry.get(_known("rule", name, registry.names())) for name in settings.rules)
    warm_spec = None
    if settings.warm_rule is not None:
        warm_spec = registry.get(_known("the rule of warm_start", settings.warm_rule, registry.names()))
    info = data.describe(_known("data", settings.data, data.names()))
    trained = specs if warm_spec is None else tuple(dict.fromkeys((*specs, warm_spec)))
    whole = [spec.name for spec in trained if spec.whole_set]
    if warm_spec is not None and whole:
        raise ValueError(
            f"warm_start is for rules that take batches; {', '.join(whole)} takes the whole training set a step, and an "
            "epoch of it is one step."
        )
    for schedule in {settings.schedule, *(spec.schedule for spec in trained)} - {None}:
        schedules.factor(schedule, 1, 1)
    device = settings.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    elif device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device is 'cuda', but torch finds no CUDA device; use 'cpu' or 'auto'.")
    settings = replace(settings, device=device)
    for spec in trained:
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they come again, and are recorded, when the rule trains
            model = nets.build(settings.net, info.input_shape, len(info.classes))
            try:
                spec.build(model, nn.CrossEntropyLoss(), spec.lr)
            except UnsupportedModelError as error:
                raise UnsupportedModelError(f"{spec.name} cannot train {settings.net}: {error}") from error
            if settings.batch_size == 1:
                _check_single_row(settings.net, model, torch.zeros(1, *info.input_shape))
    full = data.load(settings.data, progress=progress)
    split = None
    if settings.validation or settings.tune:
        split = full.split_validation(VALIDATION, generator=torch.Generator().manual_seed(0))
    evaluated = split if settings.validation and split is not None else full
    plan = Plan(settings, specs, evaluated, split if settings.tune else None, warm_spec)
    if warm_spec is not None:
        with torch.random.fork_rng(devices=[]):
            _check_warm_start(plan, nets.build(settings.net, info.input_shape, len(info.classes)))
    return plan


def _check_single_row(net: str, model: nn.Module, x: torch.Tensor) -> None:
    try:
        with torch.no_grad():
            model(x)
    except ValueError as error:  # torch's BatchNorm, of a single value for a channel
        raise ValueError(
            f"batch_size must be 2 or more for {net}, whose BatchNorm cannot normalise one row."
        ) from error


def _check_warm_start(plan: Plan, model: nn.Module) -> None:
    settings = plan.settings
    trainings = [(plan.data, settings.epochs)]
    if plan.tuning_data is not None:
        trainings.append((plan.tuning_data, settings.tune_epochs or settings.epochs))
    for dataset, epochs in trainings:
        per_epoch, _ = epoch_of(model, len(dataset.x_train), settings.batch_size)
        steps = max(1, round(epochs * per_epoch))
        try:
            stop_step(settings.warm_epochs, steps, per_epoch)
        except ValueError:
            raise ValueError(
                f"warm_start {settings.warm_start!r} takes all of {steps} step(s); take a smaller batch_size or more epochs."
            ) from None


def load_plugins(plugins: Sequence[str]) -> None:
    """Load the modules or files that register rules of their own, each once.

    Raises:
        ImportError: if one cannot be loaded; the message names it and says why.
    """
    for where in plugins:
        key = str(Path(where).resolve()) if where.endswith(".py") else where
        if key in _loaded_plugins:
            continue
        try:
            registry.load_plugin(where)
        except Exception as error:
            raise ImportError(f"The plugin {where!r} cannot be loaded: {type(error).__name__}: {error}") from error
        _loaded_plugins.add(key)


def _known(what: str, given: str, accepted: Sequence[str]) -> str:
    """Return `given`, or raise naming what there is."""
    if given not in accepted:
        close = difflib.get_close_matches(given, accepted, n=1)
        hint = f"; perhaps you meant {close[0]!r}" if close else ""
        raise ValueError(f"{what} must be one of {', '.join(accepted)}, got {given!r}{hint}.")
    return given
