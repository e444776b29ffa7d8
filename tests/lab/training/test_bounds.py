"""Numbers without bounds and optimizers of others: refused before anything is trained, or made to work."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from beyondprop import Backprop
from beyondprop.lab.training import fit, schedules
from beyondprop.lab.training.alignment import alignment


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


def make_data() -> Any:
    g = torch.Generator().manual_seed(1)
    x = torch.randn(90, 6, generator=g)
    y = x[:, :3].argmax(1)
    return SimpleNamespace(x_train=x[:60], y_train=y[:60], x_test=x[60:], y_test=y[60:])


def make_net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))


def sgd(model: nn.Module) -> Backprop:
    return Backprop(model, nn.CrossEntropyLoss(), torch.optim.SGD(model.parameters(), lr=0.1))


@pytest.mark.parametrize(
    "settings",
    [
        {"epochs": 1e308},
        {"epochs": 1, "batch_size": 10**30},
        {"epochs": 1, "seed": 10**30},
        {"epochs": 2, "stop": 1e300},
    ],
)
def test_settings_are_bounded_before_anything_is_made(settings: dict[str, Any]) -> None:
    name = list(settings)[-1]
    with pytest.raises(ValueError, match=rf"^{name} must be at most .*, got 1e\+"):
        fit(sgd(make_net()), make_data(), **settings)


@pytest.mark.parametrize("schedule", ["halve:1" + "0" * 10, "halve:" + "9" * 5000, "halve:0", "warmup:" + "9" * 5000])
def test_huge_numbers_in_schedules_are_refused(schedule: str) -> None:
    with pytest.raises(ValueError, match=r"schedule must be one of .* from 1 to 1,000,000,000, .*got '") as caught:
        schedules.factor(schedule, 10, 5)
    assert len(str(caught.value)) < 300
    assert schedules.factor("halve:1000000000", 10, 5)(9) == 1.0


class WithState(torch.optim.SGD):
    """Keeps something odd for every parameter from its first step on."""

    def __init__(self, parameters: Any, kept: Any) -> None:
        super().__init__(parameters, lr=0.1)
        self.kept = kept

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["odd"] = self.kept()
        return super().step(closure)


@pytest.mark.parametrize(
    ("kept", "what"),
    [({1}, "odd is a set"), (b"x", "odd is a bytes"), ([1j], "odd/0 is a complex"), ({"a": object}, "odd/a is a type")],
)
def test_a_state_that_cannot_be_saved_is_refused_before_training(kept: Any, what: str) -> None:
    model = make_net()
    before = [p.clone() for p in model.parameters()]
    rule = Backprop(model, nn.CrossEntropyLoss(), WithState(model.parameters(), lambda: kept))
    with pytest.raises(ValueError, match=rf"^The state of WithState cannot be saved: .*/state/0/{what}\.$"):
        fit(rule, make_data(), epochs=1, save=lambda state: None)
    assert all(map(torch.equal, before, model.parameters()))
    fit(rule, make_data(), epochs=1)  # nothing to save


@pytest.mark.parametrize("where", ["attribute", "state"])
def test_an_optimizer_that_cannot_be_copied_is_refused_before_training(where: str) -> None:
    model = make_net()
    before = [p.clone() for p in model.parameters()]
    optimizer = WithState(model.parameters(), threading.Lock if where == "state" else dict)
    if where == "attribute":
        optimizer.lock = threading.Lock()  # type: ignore[attr-defined]
    rule, data = Backprop(model, nn.CrossEntropyLoss(), optimizer), make_data()
    said = "^WithState cannot be copied .*: cannot pickle '_thread.lock' object.*give it a __deepcopy__"
    with pytest.raises(ValueError, match=said):
        fit(rule, data, epochs=1)
    assert all(map(torch.equal, before, model.parameters()))
    if where == "attribute":
        with pytest.raises(ValueError, match=said):
            alignment(rule, data.x_train, data.y_train)
