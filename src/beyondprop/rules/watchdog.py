"""Warns when a stage with trainable weights stands still while others move."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from beyondprop.errors import FrozenStageWarning


class Watchdog:
    """Compares a sample of every stage's weights once in `interval` steps.

    A stage is frozen if its weights' relative change over the interval is below `threshold` and a thousandth of the most
    mobile stage's. Deltas that vanish on their way down a deep network show up here whatever rule made them: the
    published alternating-minimization code leaves all but its top three layers bit-identical to their initialisation.
    The one host read happens once an interval.

    Attributes:
        interval: steps between two looks.
        threshold: relative change, root mean square, below which a stage counts as frozen.
        sample: weights looked at per parameter, evenly spread.
    """

    interval: int = 50
    threshold: float = 1e-6
    sample: int = 4096

    def __init__(self) -> None:
        self.steps = 0
        self.frozen: set[str] = set()
        self._before: dict[str, Tensor] = {}

    @torch.no_grad()
    def tick(self, stages: Callable[[], Mapping[str, Iterable[Tensor]]], why: Callable[[str], str]) -> None:
        """Count a step; look where an interval is over.

        Args:
            stages: returns the stages' weights by name; asked at a look, never held.
            why: returns what may be the reason, by the stage's name.
        """
        if self.steps % self.interval == 0:
            now = self._look(stages())
            self._compare(now, why)
            self._before = now
        self.steps += 1

    def restart(self) -> None:
        """Forget the weights seen: what is trained has changed since."""
        self._before = {}

    def _look(self, stages: Mapping[str, Iterable[Tensor]]) -> dict[str, Tensor]:
        seen = {}
        for name, parameters in stages.items():
            parts = [p.detach().flatten() for p in parameters if p.requires_grad]
            if parts:
                seen[name] = torch.cat([q[:: max(1, q.numel() // self.sample)] for q in parts]).clone()
        return seen

    def _compare(self, now: dict[str, Tensor], why: Callable[[str], str]) -> None:
        names = [n for n in now if n in self._before and now[n].shape == self._before[n].shape]
        if not names:
            return
        moved = torch.stack([
            (now[n] - self._before[n].to(now[n])).norm() / now[n].norm().clamp_min(1e-30) for n in names
        ]).tolist()
        if max(moved) < self.threshold:
            return  # nothing moves: a learning rate at the end of its schedule
        limit = min(self.threshold, max(moved) / 1000)
        frozen = {n: m for n, m in zip(names, moved, strict=True) if m < limit}
        for name, change in frozen.items():
            if name not in self.frozen:
                warnings.warn(
                    f"Stage {name!r} stands still: its weights changed by {change:.1e} of their size in {self.interval} "
                    f"steps, the most mobile stage by {max(moved):.1e}. {why(name)}",
                    FrozenStageWarning,
                    stacklevel=4,
                )
        self.frozen = set(frozen)

    def state_dict(self) -> dict[str, Any]:
        """Return the step count and the sample that the next look compares with."""
        return {"steps": self.steps, "before": dict(self._before), "frozen": sorted(self.frozen)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.steps = int(state["steps"])
        self._before = dict(state["before"])
        self.frozen = set(state["frozen"])
