"""Rules, networks and tasks by name: three tables, into which plugins register their own as what is built in does."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar, Generic, TypeVar

from torch import nn

from beyondprop import _checks
from beyondprop.data import Progress
from beyondprop.rules.base import LearningRule
from beyondprop.stages.losses import LossFunction

Build = Callable[[nn.Module, LossFunction, float], LearningRule]


@dataclass(frozen=True, slots=True)
class _Named:
    kind: ClassVar[str]
    name: str

    def __post_init__(self) -> None:
        if not self.name or any(c.isspace() or c in "/=:," for c in self.name):
            raise ValueError(f"name must be a word without spaces, '/', '=', ':' and ',', got {self.name!r}.")


@dataclass(frozen=True, slots=True)
class RuleSpec(_Named):
    """A learning rule as the command line knows it.

    Attributes:
        name: what follows `--rule`.
        title: name in tables and figures.
        summary: one line for `beyondprop list`.
        source: paper, with what part of it.
        build: `build(model, loss, lr)` returns the rule.
        lr: learning rate where none is given; for a rule without one, 1 over the weight of its penalties.
        grid: learning rates that `--tune` tries, the same number for every rule.
        schedule: learning-rate schedule where none is given; None: the run's own.
        whole_set: whether a step takes the whole training set: one step an epoch, its rows in one order.
        cost: time of a step in units of the run's own: it trains for 1 / cost of the run's epochs.
        home: public name of what it builds, such as `"AltMin"`.
        page: the page of the documentation that explains it.
        least_batch: the smallest batch that `lr` and `grid` are for; with smaller ones they shrink in proportion.
    """

    kind: ClassVar[str] = "rule"
    title: str
    summary: str
    source: str
    build: Build
    lr: float
    grid: tuple[float, ...]
    schedule: str | None = None
    whole_set: bool = False
    home: str = ""
    page: str = ""
    cost: float = 1.0
    least_batch: int = 1

    def __post_init__(self) -> None:
        _Named.__post_init__(self)
        _checks.positive("lr", self.lr)
        _checks.positive("cost", self.cost)
        _checks.at_least("least_batch", self.least_batch, 1)

    def rate(self, batch_size: int) -> float:
        """Return the learning rate where none is given."""
        return self.lr * min(1.0, batch_size / self.least_batch)

    def rates(self, batch_size: int) -> tuple[float, ...]:
        """Return the learning rates that `--tune` tries."""
        return tuple(lr * min(1.0, batch_size / self.least_batch) for lr in self.grid)


@dataclass(frozen=True, slots=True)
class NetSpec(_Named):
    """A family of networks as the command line knows it.

    Attributes:
        name: what `--net` starts with: `"mlp"` of `mlp:100x2`; `"resnet"` of `resnet20`.
        form: how it is written, with its options.
        summary: one line for `beyondprop list`.
        build: `build(form, input_shape, outputs)` returns the network; weights come from torch's global random state.
        loss: `loss(form)` returns what it is trained on in place of the task's loss, where it brings its own.
    """

    kind: ClassVar[str] = "net"
    form: str
    summary: str
    build: Callable[[str, Sequence[int], int], nn.Module]
    loss: Callable[[str], LossFunction] | None = None


@dataclass(frozen=True, slots=True)
class TaskSpec(_Named):
    """A kind of task as the command line knows it.

    Attributes:
        name: what `--task` starts with: `"autoencoder"` of `autoencoder:mnist`.
        form: how it is written, with its options.
        summary: one line for `beyondprop list`.
        load: `load(rest, progress)` returns the `lab.tasks.Task` for what follows the name's colon, `""` where nothing does;
            `progress` is called during downloads.
    """

    kind: ClassVar[str] = "task"
    form: str
    summary: str
    load: Callable[[str, Progress | None], Any]


Spec = TypeVar("Spec", bound=_Named)


class Table(Generic[Spec]):
    """Specifications by name, in the order of registration; what is built in comes first."""

    def __init__(self, kind: type[Spec], built_in: str) -> None:
        self.kind = kind.kind
        self._built_in = built_in
        self.rows: dict[str, Spec] = {}

    def _load(self) -> dict[str, Spec]:
        importlib.import_module(self._built_in)  # when somebody looks, and once
        return self.rows

    def get(self, name: str) -> Spec:
        """Return the specification of that name, or raise `ValueError` naming those that there are."""
        return self._load()[_checks.one_of(self.kind, name, self._load())]

    def names(self) -> list[str]:
        """Return the names in the order of registration."""
        return list(self._load())

    def __iter__(self) -> Iterator[Spec]:
        return iter(self._load().values())

    def __contains__(self, name: object) -> bool:
        return name in self._load()


rules: Table[RuleSpec] = Table(RuleSpec, "beyondprop.lab.built_in")
nets: Table[NetSpec] = Table(NetSpec, "beyondprop.lab.nets")
tasks: Table[TaskSpec] = Table(TaskSpec, "beyondprop.lab.tasks")
TABLES: dict[str, Table[Any]] = {table.kind: table for table in (rules, nets, tasks)}
_loaded: set[str] = set()
_files: dict[str, ModuleType] = {}


def register(spec: Spec, *, replace: bool = False) -> Spec:
    """Add a rule, a network or a task to its table and return it.

    Raises:
        ValueError: if the name is taken and `replace` is false.
    """
    table = TABLES[spec.kind]
    if spec.name in table and not replace:
        raise ValueError(
            f"A {spec.kind} named {spec.name!r} is registered already; choose another name or pass replace=True."
        )
    table.rows[spec.name] = spec
    return spec


def load_plugins(plugins: Sequence[str]) -> None:
    """Load modules (dotted names) or `.py` files that register rules, networks or tasks of their own, each once.

    Raises:
        ImportError: if one cannot be loaded; the message names it and says why, and nothing of it stays registered.
    """
    for where in plugins:
        key = str(Path(where).resolve()) if where.endswith(".py") else where
        if key in _loaded:
            continue
        before = {table: dict(table._load()) for table in TABLES.values()}
        try:
            load_file(where) if where.endswith(".py") else importlib.import_module(where)
        except Exception as error:
            for table, rows in before.items():
                table.rows = rows
            raise ImportError(f"The plugin {where!r} cannot be loaded: {type(error).__name__}: {error}") from error
        _loaded.add(key)


def load_file(where: str) -> ModuleType:
    """Import a `.py` file and return its module.

    Raises:
        ImportError: if there is none.
    """
    path = Path(where)
    key = f"{path.resolve()}@{path.stat().st_mtime_ns}" if path.is_file() else where
    if key in _files:
        return _files[key]
    spec = importlib.util.spec_from_file_location(f"beyondprop_plugin_{path.stem}", path)
    if not path.is_file() or spec is None or spec.loader is None:
        raise ImportError(f"There is no file {where}: a .py file or the dotted name of an installed module is needed.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    _files[key] = module
    return module
