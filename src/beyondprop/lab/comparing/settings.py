"""What a comparison is: everything that a run directory needs to be made again. Light to import: the command line reads it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

DEVICES = ("auto", "cpu", "cuda")
WARM_START = "warm-start="
"""What comes before the rule's name in the rows of a warm start."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """A comparison's settings.

    Attributes:
        data: data set, see `data.names()`.
        net: network, see `nets.FORMS`.
        rules: learning rules, see `registry.names()`.
        epochs: passes over the training rows.
        batch_size: rows in a batch.
        seeds: every rule is trained with each; a seed gives the initial weights and the order of the batches.
        schedule: of the learning rates, see `schedules.FORMS`; a rule may bring its own.
        lr: learning rates by rule; the others have their own default.
        tune: choose the learning rates of the rules that are not in `lr` on a validation split.
        tune_epochs: epochs of a training in tuning; default: `epochs`.
        validation: evaluate on a validation split; the test rows are not looked at.
        evaluate_every: steps between two evaluations; default: an epoch.
        alignment: record how the stages' updates agree with the gradient.
        early_stop: evaluations without improvement after which a training ends.
        device: `"cpu"`, `"cuda"`, or `"auto"`: cuda where there is one.
        threads: CPU threads. More than 1 pays for wide nets on an idle machine; steps of small nets are over sooner than
            threads can be woken, and take many times longer where another program has the cores.
        plugins: modules or files that register rules of their own.
        warm_start: `"RULE:EPOCHS"`: every rule starts from the weights that RULE has reached after EPOCHS, with the same
            seed. They are the first of all `epochs`: the batches, the schedule and the counts of samples, work and seconds
            go on where RULE left off; a rule's own state (moments, memories) starts anew.

    Raises:
        ValueError: if a setting is out of its range; the message has the range.
    """

    data: str = "digits"
    net: str = "mlp:100x2"
    rules: tuple[str, ...] = ("am-adam", "am-mem", "sgd", "adam")
    epochs: float = 20.0
    batch_size: int = 50
    seeds: tuple[int, ...] = (0, 1, 2)
    schedule: str = "linear"
    lr: Mapping[str, float] = field(default_factory=dict)
    tune: bool = False
    tune_epochs: float | None = None
    validation: bool = False
    evaluate_every: int | None = None
    alignment: bool = True
    early_stop: int | None = None
    device: str = "auto"
    threads: int = 1
    plugins: tuple[str, ...] = ()
    warm_start: str | None = None

    def __post_init__(self) -> None:
        from beyondprop import _checks

        _checks.positive("epochs", self.epochs)
        _checks.at_least("batch_size", self.batch_size, 1)
        _checks.one_of("device", self.device, DEVICES)
        if self.tune_epochs is not None:
            _checks.positive("tune_epochs", self.tune_epochs)
        for name in ("evaluate_every", "early_stop", "threads"):
            if getattr(self, name) is not None:
                _checks.at_least(name, getattr(self, name), 1)
        for name in ("rules", "seeds"):
            given = getattr(self, name)
            if not given or len(set(given)) < len(given):
                raise ValueError(f"{name} must be one or more, each once, got {', '.join(map(str, given)) or 'none'}.")
        for seed in self.seeds:
            _checks.at_least("seed", seed, 0)
        if self.tune and self.validation:
            raise ValueError(
                "tune chooses learning rates on the rows that validation reports, so that those numbers flatter; take one of "
                "them."
            )
        self._check_warm_start()
        known = self.rules if self.warm_rule is None else (*self.rules, self.warm_rule)
        for name, lr in self.lr.items():
            if name not in known:
                raise ValueError(f"lr is given for {name!r}, which is none of the rules {', '.join(known)}.")
            _checks.positive(f"lr of {name}", lr)

    @property
    def warm_rule(self) -> str | None:
        """Name of the rule that every training starts with, or None."""
        return None if self.warm_start is None else self.warm_start.rpartition(":")[0]

    @property
    def warm_epochs(self) -> float:
        """Epochs of the warm start; 0 where there is none."""
        return 0.0 if self.warm_start is None else float(self.warm_start.rpartition(":")[2])

    def _check_warm_start(self) -> None:
        if self.warm_start is None:
            return
        try:
            epochs = self.warm_epochs
        except ValueError:
            epochs = math.nan
        if not self.warm_rule or not 0 < epochs < math.inf:
            raise ValueError(
                f"warm_start is RULE:EPOCHS with EPOCHS a number > 0, such as am-adam:0.5, got {self.warm_start!r}."
            )
        for name in ("epochs", "tune_epochs"):
            if (whole := getattr(self, name)) is not None and epochs >= whole:
                raise ValueError(f"warm_start takes {epochs:g} of {name}={whole:g}; it must leave some to the rules.")

    def to_config(self) -> dict[str, Any]:
        """Return the settings as `config.toml` has them, without the rules; what is None is left out."""
        values = dataclasses.asdict(self) | {"epochs": float(self.epochs)}
        del values["rules"]
        values = {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}
        return {
            key: value for key, value in values.items() if value is not None and (value or key not in ("lr", "plugins"))
        }

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Settings:
        """Return the settings of a `config.toml`.

        Raises:
            ValueError: if there is something wrong with them.
        """
        known = {f.name for f in dataclasses.fields(cls)} - {"rules"}
        values: dict[str, Any] = {
            key: tuple(v) if isinstance(v, list) else v for key, v in config.items() if key in known
        }
        try:
            return cls(**values, rules=tuple(rule["name"] for rule in config["rules"]))
        except (KeyError, TypeError) as error:
            raise ValueError(f"The recorded settings are incomplete or of a wrong type: {error}.") from error
