"""LocoProp and AffineProjection in every form, and one update by each."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
from torch import nn
from torch.optim import SGD

from beyondprop import AffineProjection, LocoProp

Run = LocoProp | AffineProjection
RUNS: dict[str, Callable[..., Run]] = {
    "matching": partial(LocoProp, lr=1e-3, local_optimizer=SGD),
    "quadratic": partial(LocoProp, lr=1e-3, local_optimizer=SGD, loss="quadratic"),
    "direct": partial(LocoProp, lr=1e-3, local_optimizer=SGD, loss="squared", gram=False),
    "gram": partial(LocoProp, lr=1e-3, local_optimizer=SGD, loss="squared", gram=True),
    "smaller": AffineProjection,
    "inputs": partial(AffineProjection, side="inputs"),
    "samples": partial(AffineProjection, side="samples"),
}
every_run = pytest.mark.parametrize("kind", list(RUNS))


def update(model: nn.Module, run: Run) -> None:
    """One update, by plain SGD behind a projection."""
    run.step()
    if isinstance(run, AffineProjection):
        SGD(model.parameters(), lr=0.1).step()
