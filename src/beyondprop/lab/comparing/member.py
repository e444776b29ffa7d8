"""One training of a comparison, and who watches it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import nn

from beyondprop.data import Dataset
from beyondprop.lab import nets
from beyondprop.lab.comparing.settings import WARM_START, Settings
from beyondprop.lab.registry import RuleSpec
from beyondprop.lab.runs.directory import Row
from beyondprop.lab.training.loop import State
from beyondprop.rules.base import LearningRule


@dataclass(frozen=True, slots=True)
class Member:
    """One training of a comparison.

    Attributes:
        spec: the rule.
        seed: the seed.
        lr: the learning rate.
        epochs: how long it trains.
        tuning: whether it is one of the trainings that a learning rate is chosen by.
        warm_start: whether it is what the other trainings with this seed start with.
    """

    spec: RuleSpec
    seed: int
    lr: float
    epochs: float
    tuning: bool = False
    warm_start: bool = False

    @property
    def name(self) -> str:
        """What its rows and its checkpoint go by; no rule's name has an equals sign."""
        return f"{WARM_START}{self.spec.name}" if self.warm_start else self.spec.name


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


def build(member: Member, dataset: Dataset, settings: Settings, start: State | None = None) -> LearningRule:
    """Build a training's network and rule, from the global random state or from the state that a warm start left."""
    # The weights come first from the seed, on the CPU: the same for every rule and device.
    model = nets.build(settings.net, dataset.input_shape, dataset.num_classes).to(settings.device)
    if start is not None:
        model.load_state_dict(start["model"])
        torch.set_rng_state(start["random"])
        if settings.device == "cuda" and "random_cuda" in start:
            torch.cuda.set_rng_state(start["random_cuda"])
    return member.spec.build(model, nn.CrossEntropyLoss(), member.lr)


@contextmanager
def seeded(seed: int, device: str) -> Iterator[None]:
    """Seed the global random state, and give it back at the end."""
    devices = [torch.cuda.current_device()] if device == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield
