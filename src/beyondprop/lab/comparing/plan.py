"""From settings to a plan: everything that can be wrong is found before anything is trained or written."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import product
from typing import Any

import torch
from torch import nn

from beyondprop import _checks
from beyondprop.errors import UnsupportedModelError
from beyondprop.lab import registry, tasks
from beyondprop.lab.comparing.member import Contender, Member
from beyondprop.lab.comparing.settings import EPOCHS, Settings
from beyondprop.lab.nets import spec_of
from beyondprop.lab.registry import Progress, RuleSpec, load_plugins
from beyondprop.lab.runs.directory import slug
from beyondprop.lab.tasks import Task, check_net
from beyondprop.lab.training import State, Training, schedules
from beyondprop.lab.training.calendar import Calendar, stop_step
from beyondprop.lab.training.counted import KEPT, counted_anew, counters
from beyondprop.nn.structure import is_costly
from beyondprop.rules.base import LearningRule
from beyondprop.stages.losses import LossFunction

VALIDATION = 1 / 6
"""Share of the training rows that a validation split holds out: as many as MNIST has test rows."""
DRAWN_SEED = 100
_NEVER = 2**62  # steps: in tuning, the evaluation at the end is the only one that counts

Nets = Mapping[str, nn.Module | Callable[[tuple[int, ...], int], nn.Module]]
"""Networks of one's own by name: a module, whose weights all seeds start from, or a function of input shape and outputs."""


@dataclass(frozen=True, slots=True)
class Plan:
    """A comparison whose settings were found good and whose task is loaded.

    Attributes:
        settings: with the device, the threads and the epochs that they come down to.
        contenders: nets x rules, in the settings' order.
        task: with the rows that are evaluated on.
        tuning_task: the same without the test rows; None where nothing is tuned.
        warm_spec: the rule that every training starts with; None where there is no warm start.
        nets: networks that were handed over.
        begun: learning rates by rule that a run which goes on was begun with, and were the rules' own then.
        handed: the task, the networks and the rules that were handed over, as `prepare` takes them.
        kept_bytes: whether a net keeps less for the backward pass than autograd does, so that all are measured.
    """

    settings: Settings
    contenders: tuple[Contender, ...]
    task: Any
    tuning_task: Any
    warm_spec: RuleSpec | None = None
    nets: Nets = field(default_factory=dict)
    begun: Mapping[str, float] = field(default_factory=dict)
    handed: Mapping[str, Any] = field(default_factory=dict)
    kept_bytes: bool = False

    @property
    def epochs(self) -> float:
        """Epochs of a training."""
        assert self.settings.epochs is not None
        return self.settings.epochs

    @property
    def tune_epochs(self) -> float:
        """Epochs of a training in tuning."""
        return self.settings.tune_epochs or self.epochs

    @property
    def tune_seeds(self) -> tuple[int, ...]:
        """Seeds of the trainings in tuning."""
        if self.settings.tune_seeds:
            return self.settings.tune_seeds
        is_drawn = getattr(self.task, "is_fresh", False) or getattr(self.task, "draw", None) is not None
        return (DRAWN_SEED,) if is_drawn else self.settings.seeds[:1]

    def epochs_of(self, spec: RuleSpec, *, tuning: bool = False) -> float:
        """Return how long a rule trains: less than others where its steps cost more."""
        return (self.tune_epochs if tuning else self.epochs) / spec.cost

    def rate(self, spec: RuleSpec) -> float:
        """Return the learning rate of a rule."""
        own = self.begun.get(spec.name, spec.rate(self.settings.batch_size))
        return self.settings.rates.get(spec.name, own)

    def grid(self, spec: RuleSpec) -> tuple[float, ...]:
        """Return the learning rates that tuning tries."""
        return spec.rates(self.settings.batch_size)

    def warm(self, contender: Contender) -> Contender:
        """Return what a contender's trainings start with."""
        assert self.warm_spec is not None
        return replace(contender, rule=self.warm_spec)

    def training(self, member: Member) -> Training:
        """Return how a member is trained."""
        settings, spec = self.settings, member.spec
        watched: dict[str, Any] = {"evaluate_every": _NEVER, "kept_bytes": False}
        if not member.tuning:
            watched = {"evaluate_every": settings.evaluate_every, "alignment": settings.alignment}
            watched["kept_bytes"] = self.kept_bytes
            watched["early_stop"] = None if member.warm_start else settings.early_stop
        return Training(
            epochs=self.epochs_of(spec, tuning=member.tuning),
            stop=settings.warm_epochs if member.warm_start else None,
            batch_size=settings.batch_size,
            seed=member.seed,
            schedule=spec.schedule or settings.schedule,
            whole_set=spec.whole_set or None,
            **watched,
        )

    def config(self, chosen: Mapping[str, float] | None = None) -> dict[str, Any]:
        """Return what `config.toml` has of the comparison, with the learning rates that tuning chose."""
        warm = {}
        if self.warm_spec is not None:
            warm = {"warm_start_rule": self._described(Contender("", self.warm_spec), {})}
        return {
            **self.settings.to_config(),
            "name": self.task.name,
            "sample": self.task.sample,
            **warm,
            "metrics": [asdict(metric) for metric in self.task.metrics],
            "contenders": [self._described(contender, chosen or {}) for contender in self.contenders],
        }

    def _described(self, contender: Contender, chosen: Mapping[str, float]) -> dict[str, Any]:
        spec, lr = contender.rule, chosen.get(contender.name)
        values = {"lr": self.rate(spec) if lr is None else lr, "schedule": spec.schedule or self.settings.schedule}
        if spec.cost != 1.0:
            values["cost"] = spec.cost
        if lr is not None:
            values["lr_tuned_over"] = list(self.grid(spec))
        named = {"name": contender.name, "title": contender.title, "summary": spec.summary}
        return named | {"rule": spec.name, "net": contender.net, "settings": values}

    def build(self, member: Member, task: Task, start: State | None = None) -> LearningRule:
        """Build a training's network and rule, from the global random state or from the state that a warm start left."""
        # The weights come first from the seed, on the CPU: the same for every rule and device.
        model = make_net(task, member.contender.net, self.nets).to(self.settings.device)
        if start is not None:
            model.load_state_dict(start["model"])
            torch.set_rng_state(start["random"])
            if self.settings.device == "cuda" and "random_cuda" in start:
                torch.cuda.set_rng_state(start["random_cuda"])
        return member.spec.build(model, loss_of(task, member.contender.net, self.nets), member.lr)


def make_net(task: Task, form: str, nets: Nets) -> nn.Module:
    """Return a net that was handed over, or the task's of that form."""
    if form not in nets:
        return task.net(form)
    given = nets[form]
    if isinstance(given, nn.Module):
        return counted_anew(copy.deepcopy(given))
    model = given(tuple(task.x_train.shape[1:]), getattr(task, "outputs", 0))
    if not isinstance(model, nn.Module):
        raise ValueError(f"net {form!r} must return a torch.nn.Module, got {type(model).__name__}.")
    return counted_anew(model)


def loss_of(task: Task, form: str, nets: Nets) -> LossFunction:
    """Return the loss that a net brings along, else the task's."""
    own = None if form in nets or ".py:" in form else spec_of(form).loss
    return task.loss if own is None else own(form)


def at_seed(task: Any, seed: int, device: str) -> Any:
    """Return the task as a seed draws it, on the device."""
    return (task.drawn(seed) if hasattr(task, "drawn") else task).to(device)


def prepare(
    settings: Settings,
    *,
    task: Task | None = None,
    nets: Nets | None = None,
    rules: Sequence[RuleSpec] = (),
    progress: Progress | None = None,
) -> Plan:
    """Check the settings against what there is, and load the task.

    Args:
        settings: what to compare.
        task: a task of one's own, in place of the one that the settings name.
        nets: networks of one's own by the names that the settings have for them.
        rules: rules of one's own, which are not registered; they come before registered ones of the same name.
        progress: called during downloads, see `data.load`.

    Raises:
        ValueError: if a setting is wrong; the message says what is accepted.
        ImportError: if a plugin cannot be loaded.
        UnsupportedModelError: if one of the rules cannot train a net.
        DataUnavailableError: if the data is not at hand and cannot be downloaded.
    """
    nets = dict(nets or {})
    load_plugins(settings.plugins)
    known = {spec.name: spec for spec in (*registry.rules, *rules)}
    specs = tuple(known[_checks.one_of("rule", name, known)] for name in settings.rules)
    warm_spec = None
    if settings.warm_rule is not None:
        warm_spec = known[_checks.one_of("the rule of warm_start", settings.warm_rule, known)]
    trained = specs if warm_spec is None else tuple(dict.fromkeys((*specs, warm_spec)))
    whole = [spec.name for spec in trained if spec.whole_set]
    if warm_spec is not None and any(spec.cost != 1.0 for spec in trained):
        raise ValueError("warm_start is for rules that train equally long; leave it out, or their cost.")
    if warm_spec is not None and whole:
        raise ValueError(
            f"warm_start is for rules that take batches; {', '.join(whole)} takes the whole training set a step, and an "
            "epoch of it is one step."
        )
    for schedule in {settings.schedule, *(spec.schedule for spec in trained)} - {None}:
        schedules.factor(schedule, 1, 1)
    for form in settings.nets:
        if form not in nets and ".py:" not in form:
            spec_of(form)
    device = settings.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    elif device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device is 'cuda', but torch finds no CUDA device; use 'cpu' or 'auto'.")
    found: Any = tasks.load(settings.form, progress) if task is None else task
    fixed = getattr(found, "epochs", None)
    for name in ("epochs", "tune_epochs"):
        given = getattr(settings, name)
        if fixed is not None and given is not None and given > fixed:
            raise ValueError(f"{name} must be at most {fixed}, the tasks of {found.name}, got {given:g}.")
    settings = replace(settings, device=device, epochs=float(settings.epochs or fixed or EPOCHS))
    evaluated = found
    if settings.validation:
        if getattr(found, "is_fresh", False):
            raise ValueError(
                f"validation holds rows out; {found.name} draws fresh ones, and tunes with a seed of its own."
            )
        evaluated = found.held_out(VALIDATION)
    if not evaluated.metrics:
        raise ValueError(
            f"{found.name!r} has no test rows to compare on; use validation, or hold some out with test=0.2."
        )
    tuning_task = found.held_out(VALIDATION) if settings.tune else None
    several = len(settings.nets) > 1
    contenders = tuple(Contender(net, spec, several) for net, spec in product(settings.nets, specs))
    files = [slug(contender.name) for contender in contenders]
    if len(set(files)) < len(files):
        twice = ", ".join(c.name for c, file in zip(contenders, files, strict=True) if files.count(file) > 1)
        raise ValueError(f"nets must have names that differ in a file's name, too; {twice} do not.")
    if hasattr(evaluated, "batches") and whole:
        raise ValueError(
            f"{found.name} shows its rows in batches of its own; {', '.join(whole)} takes the whole set a step."
        )
    handed = {"task": task, "nets": nets, "rules": tuple(rules)}
    plan = Plan(settings, contenders, evaluated, tuning_task, warm_spec, nets, handed=handed)
    return replace(plan, kept_bytes=_check_contenders(plan, trained))


def _check_contenders(plan: Plan, trained: Sequence[RuleSpec]) -> bool:
    """Raise where a rule cannot train a net; return whether a net counts what it keeps for the backward pass."""
    settings, task = plan.settings, plan.task
    counts = False
    for form in settings.nets:
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they come again, and are recorded, when the rule trains
            model = make_net(task, form, plan.nets)
            check_net(task, model, form)
            counts |= KEPT in counters(model)
            for spec in trained:
                try:
                    spec.build(copy.deepcopy(model), loss_of(task, form, plan.nets), plan.rate(spec))
                except UnsupportedModelError as error:
                    raise UnsupportedModelError(f"{spec.name} cannot train {form}: {error}") from error
            if settings.batch_size == 1 and not is_costly(model):
                _check_single_row(form, model, task.x_train[:1])
            if plan.warm_spec is not None:
                _check_warm_start(plan, model)
    return counts


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
    trainings = [(plan.task, plan.epochs)]
    if plan.tuning_task is not None:
        trainings.append((plan.tuning_task, plan.tune_epochs))
    for task, epochs in trainings:
        calendar = Calendar.of(model, task, settings.batch_size)
        steps = max(1, calendar.step_at(epochs))
        try:
            stop_step(settings.warm_epochs, steps, calendar)
        except ValueError:
            raise ValueError(
                f"warm_start {settings.warm_start!r} takes all of {steps} step(s); take a smaller batch_size or more epochs."
            ) from None
