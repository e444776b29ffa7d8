"""What a rule has besides its model's weights: copied, moved, saved and restored."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn

from beyondprop.rules.guard import FiniteGuard
from beyondprop.rules.ranks import Ranks
from beyondprop.rules.refusals import shapes
from beyondprop.rules.watchdog import Watchdog


class Kept:
    """The part of a rule that lasts from step to step; see `LearningRule` for its attributes."""

    model: nn.Module
    optimizers: tuple[torch.optim.Optimizer, ...]
    ranks: Ranks
    watchdog: Watchdog
    _guard: FiniteGuard
    _parameters: tuple[nn.Parameter, ...]
    _spent: list[Tensor]

    def check_finite(self) -> None:
        """Wait for the device and raise `NonFiniteError` if a step with deferred checking was skipped."""
        self._guard.wait()

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        twin: Self = object.__new__(type(self))
        memo[id(self)] = twin
        memo[id(self.ranks.group)] = self.ranks.group  # the same processes
        self._spent = []
        for key, value in vars(self).items():
            object.__setattr__(twin, key, copy.deepcopy(value, memo))
        for own, copied in zip(self.optimizers, twin.optimizers, strict=True):
            if hasattr(type(own), "__deepcopy__"):
                continue
            for key, value in vars(own).items():  # what `torch.optim.Optimizer.__getstate__` leaves out
                if key not in vars(copied) and key != "step":  # a scheduler's `step` is bound to the original
                    vars(copied)[key] = copy.deepcopy(value, memo)
        return twin

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError(
            f"{type(self).__name__} cannot be pickled; save the model's state_dict() and the rule's, or copy.deepcopy it."
        )

    def to(self, device: torch.device | str) -> Self:
        """Move the model and all of the rule's state to `device`; return the rule."""
        state = self.state_dict()
        self.model.to(device)
        self.move(device)
        self.load_state_dict(state)
        return self

    def move(self, device: torch.device | str) -> None:
        """Move weights that are neither the model's nor in `own_state` alone; a hook."""

    def state_dict(self) -> dict[str, Any]:
        """Return everything that training on needs except the model's own `state_dict`."""
        self.check_finite()
        return {
            "rule": type(self).__name__,
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "watchdog": self.watchdog.state_dict(),
            "steps": self._guard.steps,
            "shapes": shapes(self._parameters),
            **self.own_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned.

        Raises:
            ValueError: if it comes from another kind of rule, or from a model of other shapes; nothing is changed then.
        """
        if state.get("rule") != type(self).__name__:
            raise ValueError(f"This state is of {state.get('rule')!r}, this rule is {type(self).__name__!r}.")
        own = shapes(self._parameters)
        if (saved := state.get("shapes", own)) != own:
            raise ValueError(f"This state is of a model with parameters of shapes {saved}, this one's are {own}.")
        if len(state["optimizers"]) != len(self.optimizers):
            raise ValueError(
                f"This state holds {len(state['optimizers'])} optimizers, this rule has {len(self.optimizers)}."
            )
        self.load_own_state(state)
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.watchdog.load_state_dict(state["watchdog"])
        self._guard.steps = int(state["steps"])

    def own_state(self) -> dict[str, Any]:
        """Return what this kind of rule adds to `state_dict`; a hook."""
        return {}

    def load_own_state(self, state: Mapping[str, Any]) -> None:
        """Restore what `own_state` returned, a part of `state`; a hook."""
