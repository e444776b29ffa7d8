"""Learning rates that drop to a tenth at shares of the run."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from beyondprop import Backprop, fit
from beyondprop.lab.training.schedules import FORMS, factor


def test_a_tenth_from_each_share_on() -> None:
    at = factor("tenth:0.5,0.75", 80_000, 500)
    assert [at(step) for step in (0, 39_999, 40_000, 59_999, 60_000, 79_999)] == [1.0, 1.0, 0.1, 0.1, 0.01, 0.01]
    assert [factor("tenth:0.3", 10, 1)(step) for step in (2, 3, 9, 10)] == [1.0, 0.1, 0.1, 0.1]
    assert "tenth:S[,S]" in FORMS


MANY = ",".join(f"0.{i:03d}" for i in range(1, 40))
BAD = ("", ":", ":0", ":1", ":0.75,0.5", ":0.5,0.5", ":0.5,", ":nan", ":0.5;0.7", f":{MANY}")


@pytest.mark.parametrize("bad", [f"tenth{shares}" for shares in BAD])
def test_what_is_no_share_is_refused(bad: str) -> None:
    with pytest.raises(ValueError, match=rf"tenth:S\[,S\].*several of them rising.*got '{re.escape(bad[:20])}"):
        factor(bad, 10, 1)


def test_training_has_these_rates_and_those_of_its_own_afterwards() -> None:
    rows = SimpleNamespace(x_train=torch.randn(40, 3), y_train=torch.arange(40) % 2)
    rule = Backprop(nn.Linear(3, 2), nn.CrossEntropyLoss(), lambda p: torch.optim.SGD([*p], lr=0.5))
    seen: list[float] = []
    rule.optimizers[0].register_step_pre_hook(lambda optimizer, *_: seen.append(optimizer.param_groups[0]["lr"]))
    fit(rule, rows, epochs=2, batch_size=10, schedule="tenth:0.5,0.75")
    assert seen[-8:] == pytest.approx([0.5] * 4 + [0.05] * 2 + [0.005] * 2)
    assert rule.optimizers[0].param_groups[0]["lr"] == 0.5
