"""Schedules that cycle the momentum, too, reach the local steps."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from cases import CE, difference, mlp
from torch import nn
from torch.optim import lr_scheduler

from beyondprop import LocoProp
from beyondprop.optim import RMSProp

D = torch.float64
X, Y = torch.randn(12, 6, dtype=D, generator=torch.Generator().manual_seed(1)), torch.arange(12) % 3
SCHEDULES: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "one cycle": partial(lr_scheduler.OneCycleLR, max_lr=1e-2, total_steps=8),
    "cyclic": partial(lr_scheduler.CyclicLR, base_lr=1e-3, max_lr=1e-2, step_size_up=3),
    "cyclic in a range": partial(
        lr_scheduler.CyclicLR, base_lr=1e-3, max_lr=1e-2, step_size_up=3, base_momentum=0.5, max_momentum=0.99
    ),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_cycled_momentum_is_that_of_the_local_steps(name: str) -> None:
    torch.manual_seed(0)
    model = mlp(6, 5, 3).double()
    twin, copied = copy.deepcopy(model), copy.deepcopy(model)
    optimizer = LocoProp(model, target_lr=1.0, local_steps=1)
    reference = RMSProp(twin.parameters(), lr=1e-5)
    schedules = [SCHEDULES[name](optimizer), SCHEDULES[name](reference)]
    momenta = set()
    for step in range(7):
        for net, own in ((model, optimizer), (twin, reference)):
            own.zero_grad()
            CE(net(X), Y).backward()
            own.step()
        momenta.add(optimizer.param_groups[0]["momentum"])
        assert all(group["momentum"] == reference.param_groups[0]["momentum"] for group in optimizer.param_groups)
        for schedule in schedules:
            schedule.step()
        if step == 3:  # a resumed optimizer reads its groups, too
            saved = copy.deepcopy(optimizer.state_dict())
            optimizer.load_state_dict(saved)
    assert len(momenta) > 3
    assert difference(model.parameters(), twin.parameters()) < 1e-13
    assert difference(model.parameters(), copied.parameters()) > 1e-3


def test_a_base_with_momentum_is_cycled_as_well_and_another_left_alone() -> None:
    for base in (partial(torch.optim.SGD, lr=0.1, momentum=0.9), None):
        model = nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.Linear(5, 3)).double()
        optimizer = LocoProp(model, base=base)
        lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=8)
        assert [group["momentum"] for group in optimizer.param_groups] == [0.95] * 3
        assert optimizer.param_groups[-1].get("betas") == (None if base else (0.9, 0.999))


def test_local_steps_without_momentum_are_not_cycled() -> None:
    optimizer = LocoProp(mlp(6, 5, 3), local_optimizer=torch.optim.Adagrad)
    with pytest.raises(ValueError, match="must support momentum"):
        lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=8)
    assert LocoProp(mlp(6, 5, 3)).defaults["momentum"] == 0.999
