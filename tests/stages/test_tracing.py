"""Models with a forward pass of their own: the chain that they are, or what keeps them from being one."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from cases import CE, SGD
from torch import Tensor, nn
from torch.nn import functional as F

from beyondprop import AltMin, Credited, DifferenceTargetProp
from beyondprop.errors import UnsupportedModelError
from beyondprop.rules.targetprop import activation_cuts
from beyondprop.stages.chain import Chain, flatten


class Quickstart(nn.Module):
    """PyTorch's quickstart."""

    def __init__(self) -> None:
        super().__init__()
        self.flatten = nn.Flatten()
        self.stack = nn.Sequential(nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.flatten(x)
        return self.stack(x)


class Functional(nn.Module):
    """As nets for MNIST are written: functions between layers, the batch's size asked for early, dropout in training."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.drop, self.fc1, self.fc2 = nn.Dropout(0.25), nn.Linear(16, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        batch = x.size(0)
        x = F.relu(self.conv1(x), inplace=True)
        x = F.max_pool2d(torch.tanh(self.conv2(x)), 2)
        x = self.drop(x).view(batch, -1)
        x = F.dropout(self.fc1(x).relu(), 0.5, self.training)
        return F.log_softmax(self.fc2(x) * scale, dim=1)


class Branched(nn.Module):
    """A residual connection and a free parameter between chained layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.branch, self.last = nn.Linear(16, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.gain = nn.Parameter(torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x.reshape(x.shape[0], -1)))
        x = x + self.gain * torch.tanh(self.branch(x))
        return self.last(x)


STAGES: dict[type[nn.Module], list[list[str]]] = {
    Quickstart: [["Flatten", "Linear"], ["ReLU", "Linear"], ["ReLU", "Linear"]],
    Functional: [
        ["Conv2d"],
        ["ReLU", "Conv2d"],
        ["Tanh", "MaxPool2d", "Dropout", "Flatten", "Linear"],
        ["ReLU", "Dropout", "Linear", "Functional", "LogSoftmax"],
    ],
    Branched: [["Flatten", "Linear"], ["ReLU", "Branched"], ["Linear"]],
}


@pytest.mark.parametrize("kind", STAGES, ids=lambda kind: kind.__name__)
def test_a_forward_pass_is_a_chain_of_its_modules(kind: type[nn.Module]) -> None:
    model = kind()
    chain, x = Chain(model), torch.randn(5, 1, 4, 4)
    assert [[type(m).__name__ for m in stage.modules] for stage in chain] == STAGES[kind]
    assert {p for stage in chain for p in stage.parameters} == set(model.parameters())
    for mode in (True, False, True):
        model.train(mode)
        torch.manual_seed(0)
        expected = model(x)
        torch.manual_seed(0)
        assert torch.equal(chain.record(x).output, expected), mode
    for size in (1, 7):
        assert chain.record(torch.randn(size, 1, 4, 4)).output.shape == (size, 3)


def _as_sequential(model: Any) -> nn.Sequential:
    if isinstance(model, Quickstart):
        return nn.Sequential(model.flatten, *model.stack)
    dense = nn.Sequential(nn.Flatten(), model.fc1, nn.ReLU(), nn.Dropout(0.5), model.fc2, nn.LogSoftmax(1))
    return nn.Sequential(model.conv1, nn.ReLU(), model.conv2, nn.Tanh(), nn.MaxPool2d(2), model.drop, *dense)


@pytest.mark.parametrize("kind", [Quickstart, Functional])
def test_a_rule_trains_it_as_the_same_layers_in_a_sequential(kind: type[nn.Module]) -> None:
    one = kind().double()
    two = _as_sequential(copy.deepcopy(one))
    loss = nn.NLLLoss() if kind is Functional else CE
    rules = [AltMin(one, loss, SGD), AltMin(two, loss, SGD)]
    x, y = torch.randn(9, 1, 4, 4, dtype=torch.float64), torch.arange(9) % 3
    for seed in range(3):
        for rule in rules:
            torch.manual_seed(seed)
            rule.step(x, y)
    for (name, p), q in zip(one.named_parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-12, msg=name)


def test_names_are_those_of_the_modules_and_functions() -> None:
    assert [name for name, _ in flatten(Functional(), deep=True)] == [
        "conv1", "relu", "conv2", "tanh", "max_pool2d", "drop", "view", "fc1", "relu_1", "dropout", "fc2", "mul", "log_softmax"
    ]  # fmt: skip
    assert activation_cuts(Quickstart()) == ["stack.1", "stack.3", "stack.4"]
    rule = DifferenceTargetProp(Quickstart(), CE)
    assert rule.step(torch.randn(6, 1, 4, 4), torch.arange(6) % 3).output.shape == (6, 3)


class _Altered(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Any) -> Any:
        raise NotImplementedError


class _Chooses(_Altered):
    def forward(self, x: Any) -> Any:
        return self.b(self.a(x) if x.sum() > 0 else x)


class _ByMode(_Altered):
    def forward(self, x: Any) -> Any:
        return self.b(torch.relu(self.a(x)) if self.training else self.a(x))


class _DropsInBranch(_Altered):
    def forward(self, x: Any) -> Any:
        return self.b(x + F.dropout(self.a(x), 0.5, self.training))


class _Two(_Altered):
    def forward(self, x: Any) -> Any:
        return self.a(x), self.b(x)


class _Joined(_Altered):
    def forward(self, x: Any) -> Any:
        return self.b(x) + self.b(self.a(x))


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (_Chooses, r"_Chooses has a forward pass of its own that cannot be traced \(TraceError.*cuts="),
        (
            _ByMode,
            r"_ByMode has a forward pass of its own that applies other operations in training than in evaluation",
        ),
        (
            _DropsInBranch,
            r"_DropsInBranch has .*in training than in evaluation, such as a functional dropout inside a branch",
        ),
        (_Two, r"_Two has a forward pass of its own with 1 tensor\(s\) in and \(a, b\) out"),
        (_Joined, r"_Joined has 1 stage.*It branches around 'b', which is one block for that"),
    ],
)
def test_what_is_no_chain_is_refused(kind: type[nn.Module], message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        Chain(kind())


def test_a_mode_of_its_own_is_left_to_the_model() -> None:
    model = Functional().eval()
    Chain(model)
    assert not model.training


def test_parts_follow_the_mode_too() -> None:
    made = Credited(Functional(), "fa")
    parts = [made.part(0, 2), made.part(2, 4)]
    x = torch.randn(6, 1, 4, 4)
    for part in parts:
        part.eval()
    with torch.no_grad():
        expected = made.model.eval()(x)
        assert torch.equal(parts[1](parts[0](x)), expected)
    torch.testing.assert_close(parts[1](parts[0](x)), expected)
    parts[1].train()
    assert made.model.training
