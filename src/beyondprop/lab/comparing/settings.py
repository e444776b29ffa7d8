"""What a comparison is: all that a run directory needs to be made again. Light: the command line is made of it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import FlagCreatePairsOff, UseAppendAction, arg
from tyro.constructors import PrimitiveConstructorSpec

from beyondprop import _checks

_LARGEST = 10**9  # epochs, rows, steps: nobody lives to see more
_MOST_THREADS, _MOST_SEEDS = 1024, 10_000
_LARGEST_SEED = 2**32 - 1  # what every generator takes
_LARGEST_RATE = 1e38  # what float32 holds

DATA = "digits"
EPOCHS = 20.0
"""Where neither the settings nor the task say how many."""
NETS, RULES = ("mlp:100x2",), ("am-adam", "am-mem", "sgd", "adam")
"""What is compared where nothing is named."""


def _rate(texts: list[str]) -> tuple[str, float]:
    name, equals, number = texts[0].rpartition("=")
    try:
        return (name, float(number)) if name and equals else ("", float("x"))
    except ValueError:
        raise ValueError(f"--lr takes RULE=LR, such as adam=0.001, got {texts[0]!r}.") from None


def _seeds(texts: list[str]) -> tuple[int, ...]:
    count = int(texts[0])
    if count < 1:
        raise ValueError(f"seeds must be >= 1, got {count}.")
    return tuple(range(_at_most("seeds", count, _MOST_SEEDS)))


def _written(metavar: str, read: Callable[[list[str]], Any], write: Callable[[Any], str]) -> Any:
    """Return how tyro reads a tuple from one word."""
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar=metavar,
        instance_from_str=read,
        is_instance=lambda value: isinstance(value, tuple),
        str_from_instance=lambda value: [write(value)],
    )


Repeated = UseAppendAction[tuple[str, ...]]
Rate = Annotated[tuple[str, float], _written("RULE=LR", _rate, lambda value: f"{value[0]}={value[1]:g}")]
Seeds = Annotated[tuple[int, ...], _written("N", _seeds, lambda value: str(len(value)))]
SeedList = Annotated[
    tuple[int, ...],
    _written("SEED,...", lambda texts: tuple(map(int, texts[0].split(","))), lambda value: ",".join(map(str, value))),
]
if TYPE_CHECKING:
    Rates = Mapping[str, float] | tuple[tuple[str, float], ...]
else:
    Rates = Annotated[UseAppendAction[tuple[Rate, ...]], arg(metavar="RULE=LR", help_behavior_hint="(repeatable)")]
Flag = Annotated[FlagCreatePairsOff[bool], arg(help_behavior_hint="")]
Count = Annotated[int | None, arg(metavar="N", help_behavior_hint="")]
Amount = Annotated[float | None, arg(metavar="N", help_behavior_hint="")]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """A comparison's settings: contenders are nets x rules, each trained with every seed.

    Raises:
        ValueError: if a setting is out of its range; the message has the range.
    """

    data: Annotated[str, arg(metavar="NAME")] = DATA
    """Data set (`beyondprop list` shows them), or a file of your own: wine.csv:target=quality, rows.npz."""
    task: Annotated[str | None, arg(metavar="TASK", help_behavior_hint="")] = None
    """What is learned, such as autoencoder:mnist, adding:100 or split:mnist. Default: what the data's targets are for."""
    nets: Annotated[Repeated, arg(name="net", metavar="NET", help_behavior_hint="(repeatable)")] = ()
    """Network, such as mlp:100x2 (the default) or mlp:256x3:tanh:bn, or my_nets.py:build; `beyondprop list` shows the forms."""
    rules: Annotated[Repeated, arg(name="rule", metavar="NAME", help_behavior_hint="(repeatable)")] = ()
    """Learning rule. Default: am-adam, am-mem, sgd and adam."""
    epochs: Annotated[float | None, arg(metavar="N", help_behavior_hint="(default: 20, or the task's)")] = None
    """Passes over the training rows; 0.5 is half a pass."""
    seeds: Annotated[Seeds, arg(metavar="N")] = (0, 1, 2)
    """How many seeds, counted from 0. A seed gives the initial weights and the order of the batches."""
    batch_size: Annotated[int, arg(metavar="N")] = 50
    """Rows in a batch."""
    schedule: Annotated[str, arg(metavar="NAME")] = "linear"
    """Of the learning rates: constant, linear, cosine, halve:N (epochs), tenth:0.5,0.75, warmup:S. A rule may bring its own."""
    warm_start: Annotated[str | None, arg(metavar="RULE:EPOCHS", help_behavior_hint="")] = None
    """Train by RULE first: every rule starts from the weights it has after so many of the epochs."""
    lr: Rates = ()
    """Learning rate of a rule, such as adam=0.001."""
    tune: Flag = False
    """Choose each contender's learning rate from its grid, on rows held out of the training rows."""
    tune_epochs: Amount = None
    """Epochs of a training in tuning. Default: those of the run."""
    tune_seeds: Annotated[SeedList, arg(metavar="SEED,...", help_behavior_hint="")] = ()
    """Seeds of the trainings in tuning. Default: the first seed; 100 where a task's rows are drawn by the seed."""
    validation: Flag = False
    """Evaluate on rows held out of the training rows; the test rows stay unseen."""
    evaluate_every: Count = None
    """Steps between two evaluations. Default: an epoch."""
    early_stop: Count = None
    """Stop a training after so many evaluations without improvement."""
    alignment: bool = True
    """Record how every stage's update agrees with the gradient; models that are dear to run do without."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; auto takes cuda where there is one."""
    threads: Annotated[int, arg(metavar="N")] = 1
    """CPU threads; more pay for wide nets on an idle machine."""
    plugins: Annotated[Repeated, arg(name="plugin", metavar="FILE", help_behavior_hint="(repeatable)")] = ()
    """Python file or module that registers rules, networks or tasks of your own."""

    def __post_init__(self) -> None:
        pairs = list(self.lr.items() if isinstance(self.lr, Mapping) else self.lr)
        if len(dict(pairs)) < len(pairs):
            raise ValueError(f"--lr must name each rule once, got {', '.join(f'{n}={lr:g}' for n, lr in pairs)}.")
        object.__setattr__(self, "lr", tuple(pairs))
        for name, default in (("nets", NETS), ("rules", RULES), ("seeds", ()), ("tune_seeds", ()), ("plugins", ())):
            object.__setattr__(self, name, tuple(getattr(self, name)) or default)
        if self.task is not None and ":" in self.task and self.data != DATA:
            raise ValueError(
                f"task {self.task!r} names its own data; leave out data={self.data!r}, or what follows the colon."
            )
        _checks.one_of("device", self.device, ("auto", "cpu", "cuda"))
        for name in ("epochs", "tune_epochs"):
            if getattr(self, name) is not None:
                _checks.positive(name, _at_most(name, getattr(self, name), _LARGEST))
        for name in ("batch_size", "evaluate_every", "early_stop", "threads"):
            if getattr(self, name) is not None:
                most = _MOST_THREADS if name == "threads" else _LARGEST
                _checks.at_least(name, _at_most(name, getattr(self, name), most), 1)
        for name in ("nets", "rules", "seeds", "tune_seeds"):
            given = getattr(self, name)
            if (not given and name != "tune_seeds") or len(set(given)) < len(given):
                raise ValueError(f"{name} must be one or more, each once, got {', '.join(map(str, given)) or 'none'}.")
        for seed in (*self.seeds, *self.tune_seeds):
            _checks.at_least("seed", _at_most("seed", seed, _LARGEST_SEED), 0)
        if self.tune and self.validation:
            raise ValueError(
                "tune chooses learning rates on the rows that validation reports, so that those numbers flatter; take one of "
                "them."
            )
        self._check_warm_start()
        known = self.rules if self.warm_rule is None else (*self.rules, self.warm_rule)
        for name, lr in self.rates.items():
            if name not in known:
                raise ValueError(f"lr is given for {name!r}, which is none of the rules {', '.join(known)}.")
            _checks.positive(f"lr of {name}", _at_most(f"lr of {name}", lr, _LARGEST_RATE))

    @property
    def rates(self) -> dict[str, float]:
        """The learning rates that are given, by rule."""
        return dict(self.lr)

    @property
    def form(self) -> str:
        """The task's form: `task`, where it lacks its data with `data`, else `data` alone."""
        if self.task is None:
            return self.data
        return self.task if ":" in self.task or self.data == DATA else f"{self.task}:{self.data}"

    @property
    def warm_rule(self) -> str | None:
        """Name of the rule that every training starts with, or None."""
        return None if self.warm_start is None else self.warm_start.rpartition(":")[0]

    @property
    def warm_epochs(self) -> float:
        """Epochs of the warm start; 0 where there is none."""
        return 0.0 if self.warm_start is None else float(self.warm_start.rpartition(":")[2])

    @property
    def code(self) -> tuple[str, ...]:
        """What executes Python code when it is loaded, as flags: plugins, and nets of the form FILE.py:FUNCTION."""
        nets = (f"--net={net}" for net in self.nets if ".py:" in net)
        return (*(f"--plugin={plugin}" for plugin in self.plugins), *nets)

    def _check_warm_start(self) -> None:
        if self.warm_start is None:
            return
        try:
            epochs = self.warm_epochs
        except ValueError:
            epochs = math.nan
        if not self.warm_rule or not 0 < epochs <= _LARGEST:
            raise ValueError(
                f"warm_start is RULE:EPOCHS with EPOCHS a number > 0 and <= {_LARGEST:g}, such as am-adam:0.5, "
                f"got {self.warm_start!r}."
            )
        for name in ("epochs", "tune_epochs"):
            if (whole := getattr(self, name)) is not None and epochs >= whole:
                raise ValueError(f"warm_start takes {epochs:g} of {name}={whole:g}; it must leave some to the rules.")

    def to_config(self) -> dict[str, Any]:
        """Return the settings as `config.toml` has them, without the rules; what is None or empty is left out."""
        values = dataclasses.asdict(self) | {"lr": self.rates}
        return {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in values.items()
            if key != "rules" and value not in (None, (), {})
        }

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Settings:
        """Return the settings of a configuration as `read_config` returns it.

        Raises:
            ValueError: if there is something wrong with them.
        """
        known = {f.name for f in dataclasses.fields(cls)} - {"rules"}
        values: dict[str, Any] = {
            key: tuple(v) if isinstance(v, list) else v for key, v in config.items() if key in known
        }
        try:
            rules = dict.fromkeys(entry["rule"] for entry in config["contenders"])
            return cls(**values, rules=tuple(rules))
        except (KeyError, TypeError) as error:
            raise ValueError(f"The recorded settings are incomplete or of a wrong type: {error}.") from error


def _at_most(name: str, value: Any, most: float) -> Any:
    if isinstance(value, int | float) and value > most:
        raise ValueError(f"{name} must be at most {most:g}, got {value!r}.")
    return value


def check_workers(workers: int | str | None) -> None:
    """Raise `ValueError` unless these are workers that a comparison can have."""
    if workers in (None, "ray"):
        return
    if isinstance(workers, bool) or not isinstance(workers, int) or not 1 <= workers <= _MOST_THREADS:
        raise ValueError(f"workers must be a whole number from 1 to {_MOST_THREADS}, or 'ray', got {workers!r}.")


def untrusted(path: object, code: Sequence[str], remedy: str) -> str:
    """Return why a directory that names code is not gone on with."""
    return f"{str(path)!r} names Python code, which would be executed: {', '.join(map(repr, code))}. {remedy}"
