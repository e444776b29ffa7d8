"""Whether weights are used besides their layers' own calls, as a graph counts them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from torch import nn

from beyondprop.optim._graph import RESHAPES, consumers, kind
from beyondprop.optim._maps import LayerMap

_READ = 8  # backward passes that are looked at, which takes microseconds a node


class Uses:
    """Counts how often the graphs of the first backward passes use parameters, and how many captured calls explain that.

    Every call of a layer uses each of its parameters once. What is more has a gradient of another kind in `.grad`: a penalty,
    a product with the transposed weight, `F.linear` with the weight of an embedding.
    """

    def __init__(self) -> None:
        self._left = _READ
        self.reset()

    def reset(self) -> None:
        """Forget the passes since the last step."""
        self._tasks: set[int] = set()
        self._found: dict[nn.Parameter, list[str]] = {}
        self._explained: Counter[nn.Parameter] = Counter()

    @property
    def is_over(self) -> bool:
        """Whether no pass is looked at any more."""
        return not self._left

    def is_new(self, task: int) -> bool:
        """Whether a backward pass is yet to be looked at."""
        return self._left > 0 and task not in self._tasks

    def read(self, task: int, accumulators: Mapping[nn.Parameter, Any]) -> None:
        """Note what uses parameters in the pass under way, by the nodes that add to their `.grad`."""
        self._left -= 1
        self._tasks.add(task)
        users = consumers()
        for p, node in accumulators.items():
            pending, found = [node], {}
            for below in pending:
                for user in users.get(below, ()):
                    if kind(user) in RESHAPES:  # casts are shared by calls under autocast
                        pending.append(user)
                    else:
                        found[user] = user.name()
            self._found.setdefault(p, []).extend(found.values())

    def explain(self, task: int, layer: LayerMap) -> None:
        """Note a call, also one that has no part in the loss."""
        if task in self._tasks:
            self._explained.update(layer.parameters)

    def others(self, p: nn.Parameter) -> list[str]:
        """Return the nodes that use a parameter where they are more than its calls; none where they are not."""
        found = self._found.get(p, [])
        return sorted(set(found)) if len(found) > self._explained[p] else []
