"""Which modules and parameters a model has, so that a change is noticed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain as one_after_another
from operator import is_

import torch
from torch import nn

from beyondprop.errors import UnsupportedModelError


def is_costly(model: nn.Module) -> bool:
    """Whether a model, or a module of it, is dear to run (`module.costly`): nothing is to be measured on the side then."""
    return any(getattr(module, "costly", False) for module in model.modules())


@contextmanager
def standing_in(model: nn.Module) -> Iterator[None]:
    """Let modules that are dear to run answer without being run, where they can: for checks of structure."""
    able = [module for module in model.modules() if getattr(module, "can_stand_in", False)]
    try:
        for module in able:
            module.stands_in = True  # type: ignore[assignment]
        yield
    finally:
        for module in able:
            module.stands_in = False  # type: ignore[assignment]


class Structure:
    """Which modules and parameters a model has, so that a change is noticed: what was built for it would train a ghost.

    Args:
        model: the model.
        blocks: modules that need not be in it.
    """

    def __init__(self, model: nn.Module, blocks: Iterable[nn.Module] = ()) -> None:
        own = set(model.modules())
        self._roots = {"": model, **{f"cuts[{i}]": m for i, m in enumerate(blocks) if m not in own}}
        self._named = self._names()
        self.modules = list(dict.fromkeys(m for m in self._named.values() if isinstance(m, nn.Module)))
        # What is compiled has no dictionaries of its own, what is sharded swaps its parameters in every pass.
        plain = [m for m in self.modules if not isinstance(m, torch.jit.ScriptModule)]
        whole = [m for m in plain if not any(hasattr(p, "placements") for p in m._parameters.values())]
        self._places = [*(m._modules for m in plain), *(m._parameters for m in whole)]
        self._seen = list(self._now())

    @property
    def is_same(self) -> bool:
        """Whether no module or parameter was exchanged, added or taken out."""
        now = list(self._now())
        return len(now) == len(self._seen) and all(map(is_, now, self._seen))

    def check(self, built: str = "rule") -> None:
        """Raise `UnsupportedModelError` where the model is not the same, naming what is not and what was `built` for it."""
        if self.is_same:
            return
        then, names = self._named, self._names()
        changed = [n for n in (*names, *then) if names.get(n) is not then.get(n)]
        name = min(changed, key=lambda n: isinstance(then.get(n, names.get(n)), nn.Parameter), default="")
        what = "exchanged" if name in names and name in then else "added" if name in names else "taken out"
        kind, how = "Module", f"the {built} would train what the model no longer has"
        if isinstance(then.get(name, names.get(name)), nn.Parameter):
            kind, how = (
                "Parameter",
                "by sharding, pruning, a parametrization, load_state_dict(assign=True) or an assignment",
            )
        raise UnsupportedModelError(
            f"{kind} {name!r} of this {type(self._roots['']).__name__} was {what} after the {built} was built ({how}); "
            f"build the {built} anew."
        )

    def _now(self) -> Iterable[object]:
        return one_after_another.from_iterable(map(dict.values, self._places))  # in C alone: it is asked at every step

    def _names(self) -> dict[str, object]:
        found: dict[str, object] = {}
        for prefix, root in self._roots.items():
            found |= root.named_modules(prefix=prefix, remove_duplicate=False)
            found |= root.named_parameters(prefix=prefix, remove_duplicate=False)
        return found
