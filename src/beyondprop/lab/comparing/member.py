"""Contenders, one training of a comparison, and who watches it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from beyondprop.lab.registry import RuleSpec
from beyondprop.lab.runs.recorded import WARM_START, Row


@dataclass(frozen=True, slots=True)
class Contender:
    """What is compared: a net with a rule.

    Attributes:
        net: the net's form.
        rule: the rule.
        several: whether there are several nets, so that the name has the net, too.
    """

    net: str
    rule: RuleSpec
    several: bool = False

    @property
    def name(self) -> str:
        """What its rows go by."""
        return f"{self.rule.name} {self.net}" if self.several else self.rule.name

    @property
    def title(self) -> str:
        """What people call it."""
        return f"{self.rule.title}, {self.net}" if self.several else self.rule.title


@dataclass(frozen=True, slots=True)
class Member:
    """One training of a comparison.

    Attributes:
        contender: the net and the rule.
        seed: the seed.
        lr: the learning rate.
        epochs: how long it trains.
        tuning: whether it is one of the trainings that a learning rate is chosen by.
        warm_start: whether it is what the other trainings of its net with this seed start with.
    """

    contender: Contender
    seed: int
    lr: float
    epochs: float
    tuning: bool = False
    warm_start: bool = False

    @property
    def spec(self) -> RuleSpec:
        """The rule."""
        return self.contender.rule

    @property
    def name(self) -> str:
        """What its rows and its checkpoint go by; no rule's name has an equals sign."""
        return f"{WARM_START}{self.contender.name}" if self.warm_start else self.contender.name


class Observer:
    """Who watches a comparison; this one does nothing of what it is told."""

    def start(self, path: Path, members: Sequence[Member]) -> None:
        """The run directory is there; these trainings are to be done, first of all the tuning ones."""

    def said(self, text: str) -> None:
        """Who trains, and what became of a worker, in a line."""

    def begin(self, member: Member) -> None:
        """A training begins, or goes on from its checkpoint; with workers, beside others that go on."""

    def progress(self, member: Member, step: int, steps: int) -> None:
        """So many of its steps are done; some times a second."""

    def row(self, member: Member, row: Row) -> None:
        """It recorded something."""

    def end(self, member: Member) -> None:
        """It finished or failed."""


@contextmanager
def seeded(seed: int, device: str) -> Iterator[None]:
    """Seed the global random state, and give it back at the end."""
    devices = [torch.cuda.current_device()] if device == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield
