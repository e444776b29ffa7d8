"""What every registered rule does where the model, its flags or its surroundings change under it."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
import torch
from cases import blobs, equal, mlp, rule_state, state, train
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from beyondprop import AltMin, Backprop, FrozenStageWarning, LearningRule, UnsupportedModelError
from beyondprop.lab import registry
from beyondprop.lab.tasks.loader import evaluate

pytestmark = pytest.mark.filterwarnings("ignore::beyondprop.FrozenStageWarning")
every_rule = pytest.mark.parametrize("name", registry.rules.names())
by_steps = pytest.mark.parametrize("name", [n for n in registry.rules.names() if not registry.rules.get(n).whole_set])

CE = nn.CrossEntropyLoss()
RATES = {"sgd": 0.03, "sgd-decay": 0.03, "am-sgd": 0.03, "fa": 0.01, "dfa": 0.01}


def _rule(name: str, frozen: int | None = None) -> LearningRule:
    torch.manual_seed(3)
    model = mlp(6, 8, 8, 3)
    if frozen is not None:
        model[frozen].requires_grad_(False)
    return registry.rules.get(name).build(model, CE, RATES.get(name, registry.rules.get(name).lr))


def _by_hand(rule: LearningRule, x: Tensor, y: Tensor) -> None:
    rule.backward(x, y)
    rule.update()


def _assign(model: nn.Sequential) -> None:
    model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True)


def _adapter(model: nn.Sequential) -> None:
    model[2].register_module("adapter", nn.Linear(8, 8))


CHANGES: dict[str, tuple[Callable[[Any], object], str]] = {
    "new head": (lambda m: m.__setitem__(4, nn.Linear(8, 3)), "Module '4' .* was exchanged"),
    "another activation": (lambda m: m.__setitem__(1, nn.Tanh()), "Module '1' .* was exchanged"),
    "appended": (lambda m: m.append(nn.Tanh()), "Module '5' .* was added"),
    "inserted": (lambda m: m.insert(1, nn.Tanh()), "Module '1' .* was exchanged"),
    "taken out": (lambda m: m.__delitem__(3), "Module '3' .* was exchanged"),
    "adapter": (_adapter, r"Module '2\.adapter' .* was added"),
    "assigned": (_assign, r"Parameter '0\.weight' .* was exchanged"),
    "weight": (lambda m: setattr(m[2], "weight", nn.Parameter(m[2].weight.detach().clone())), r"Parameter '2\.weight'"),
    "bias taken out": (lambda m: setattr(m[2], "bias", None), r"Parameter '2\.bias' .* was taken out"),
    "one more": (
        lambda m: m[2].register_parameter("gain", nn.Parameter(torch.ones(1))),
        r"Parameter '2\.gain' .* was added",
    ),
    "pruned": (lambda m: prune.l1_unstructured(m[2], "weight", 0.1), r"Parameter '2\.weight"),
    "parametrized": (lambda m: parametrizations.weight_norm(m[2]), r"Module '2\.parametrizations' .* was added"),
}

PARAMETERS_STAY = ("another activation", "appended", "inserted", "taken out", "bias taken out", "pruned")
CALL_THE_MODEL = ("sgd", "sgd-decay", "adam")


@every_rule
@pytest.mark.parametrize("change", list(CHANGES))
def test_a_model_that_changed_is_followed_or_refused_by_name(name: str, change: str) -> None:
    rule = _rule(name)
    x, y = blobs(48)
    rule.step(x, y)
    how, message = CHANGES[change]
    how(rule.model)
    if change in PARAMETERS_STAY and name in CALL_THE_MODEL:
        expected = rule.model(x)
        before = state(rule.model)
        torch.testing.assert_close(rule.step(x, y).output, expected)
        rule.step(x, y)
        assert not any(torch.equal(p, before[key]) for key, p in rule.model.named_parameters())
        return
    before = rule_state(rule)
    for _ in range(2):
        with pytest.raises(UnsupportedModelError, match=f"^{message}.*build the rule anew"):
            rule.step(x, y)
    with pytest.raises(UnsupportedModelError, match=message):
        _by_hand(rule, x, y)
    rule.discard()
    assert equal(before, rule_state(rule))


def test_a_block_outside_of_the_model_counts_too() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.tanh(self.a(x)))

    model = Two()
    block = nn.Sequential(nn.Tanh(), model.b)
    rule = AltMin(model, CE, cuts=[model.a, block])
    rule.step(*blobs(12))
    block[0] = nn.ReLU()
    with pytest.raises(UnsupportedModelError, match=r"Module 'cuts\[1\]\.0' .* was exchanged .*build the rule anew"):
        rule.step(*blobs(12))


@every_rule
def test_a_hook_that_came_later_fires_or_is_refused(name: str) -> None:
    for place in ("", "2"):
        rule = _rule(name)
        x, y = blobs(12)
        rule.step(x, y)
        fired = []
        rule.model.get_submodule(place).register_forward_hook(lambda *_, fired=fired: fired.append(1))
        with suppress(UnsupportedModelError):
            rule.step(x, y)
        if not fired:
            with pytest.raises(UnsupportedModelError, match="got a hook after the rule was built"):
                rule.step(x, y)


@every_rule
def test_what_leaves_modules_and_parameters_in_place_is_no_change(name: str) -> None:
    rule = _rule(name)
    x, y = blobs(12)
    rule.step(x, y)
    twin = copy.deepcopy(rule)
    for each in (rule, twin):
        torch.manual_seed(7)
        each.model.load_state_dict(each.model.state_dict())
        each.model.eval().train()
        each.to("cpu").step(x, y)
    assert equal(rule_state(rule), rule_state(twin))
    twin.model[2] = nn.Linear(8, 8)  # type: ignore[operator]
    with pytest.raises(UnsupportedModelError, match=r"Module '2' .* was exchanged"):
        twin.step(x, y)
    rule.step(x, y)


@every_rule
@pytest.mark.parametrize("index", [0, 2, 4])
def test_a_thawed_layer_is_trained_or_refused_by_name(name: str, index: int) -> None:
    rule = _rule(name, frozen=index)
    x, y = blobs(12)
    rule.step(x, y)
    before = rule_state(rule)
    rule.model[index].requires_grad_(True)  # type: ignore[operator]
    held = {id(p) for optimizer in rule.optimizers for group in optimizer.param_groups for p in group["params"]}
    if held >= {id(p) for p in rule.model.parameters()}:  # LocoProp takes all, and asks at every step
        weights = state(rule.model)
        rule.step(x, y)
        assert not any(torch.equal(p, weights[key]) for key, p in rule.model.state_dict().items())
        return
    with pytest.raises(UnsupportedModelError, match=rf"^Parameter '{index}\.weight' was thawed .* build the rule anew"):
        rule.step(x, y)
    assert equal(before, rule_state(rule))
    rule.model[index].requires_grad_(False)  # type: ignore[operator]
    rule.step(x, y)


@by_steps
@pytest.mark.parametrize("index", [0, 2, 4])
def test_a_frozen_layer_stays_and_the_rest_moves(name: str, index: int) -> None:
    rule = _rule(name)
    x, y = blobs(48)
    rule.step(x, y)
    rule.model[index].requires_grad_(False)  # type: ignore[operator]
    before = state(rule.model)
    for _ in range(5):
        rule.step(x, y)
    for key, value in rule.model.state_dict().items():
        assert torch.equal(value, before[key]) == key.startswith(f"{index}."), key
    rule.model[index].requires_grad_(True)  # type: ignore[operator]
    rule.step(x, y)
    assert not torch.equal(rule.model[index].weight, before[f"{index}.weight"])  # type: ignore[operator, union-attr]


@every_rule
def test_a_model_frozen_as_a_whole_is_refused(name: str) -> None:
    rule = _rule(name)
    rule.step(*blobs(12))
    rule.model.requires_grad_(False)
    with pytest.raises(ValueError, match="there is nothing to train"):
        rule.step(*blobs(12))


@every_rule
def test_one_autocast_context_around_all_steps_trains_as_one_a_step(name: str) -> None:
    x, y = blobs(48)
    single, around = _rule(name), _rule(name)
    torch.manual_seed(7)
    values: list[list[float]] = [[], []]
    for _ in range(6):
        with torch.autocast("cpu", torch.bfloat16):
            values[0].append(float(single.step(x, y).loss))
        with torch.autocast("cpu", torch.bfloat16):
            values[0].append(evaluate(single.model, (x, y), CE)["loss"])
    torch.manual_seed(7)
    with torch.autocast("cpu", torch.bfloat16):
        for _ in range(6):
            values[1].append(float(around.step(x, y).loss))
            values[1].append(evaluate(around.model, (x, y), CE)["loss"])
    assert values[0] == values[1]
    assert equal(rule_state(single), rule_state(around))


@by_steps
def test_weights_written_by_others_inside_an_autocast_context_are_seen(name: str) -> None:
    x, y = blobs(48)
    rules = [_rule(name), _rule(name)]
    found = []
    with torch.autocast("cpu", torch.bfloat16):
        for rule in rules:
            torch.manual_seed(7)
            rule.step(x, y)
            rule.model(x)  # leaves casts
            with torch.no_grad():
                for p in rule.model.parameters():
                    p.mul_(0.5)
            if rule is rules[1]:
                torch.clear_autocast_cache()
            found.append(rule.step(x, y))
    assert torch.equal(found[0].output, found[1].output)
    assert equal(rule_state(rules[0]), rule_state(rules[1]))


REASONS = {
    "held by no optimizer": (
        "No optimizer of the rule holds them",
        lambda m: torch.optim.SGD(m[4].parameters(), lr=0.1),
    ),
    "learning rate 0": (
        "Their learning rate is 0",
        lambda m: torch.optim.SGD([{"params": m[4].parameters()}, {"params": m[2].parameters(), "lr": 0.0}], lr=0.1),
    ),
    "no part": ("or they may have no part in the output", lambda m: torch.optim.SGD(m.parameters(), lr=0.1)),
}


@pytest.mark.filterwarnings("default::beyondprop.FrozenStageWarning")
@pytest.mark.parametrize("case", list(REASONS))
def test_the_watchdog_knows_why_a_stage_stands_still(case: str) -> None:
    message, optimizer = REASONS[case]
    model = mlp(6, 8, 8, 3)
    if case == "no part":
        model[2].register_forward_hook(lambda module, inputs, output: inputs[0])
    for p in () if case == "no part" else model[0].parameters():
        p.requires_grad_(False)
    rule = Backprop(model, CE, optimizer(model))
    with pytest.warns(FrozenStageWarning, match=f"^Stage '2' stands still.*{message}"):
        train(rule, [blobs(12)] * 51)


def test_a_layer_that_was_frozen_for_a_while_is_no_stage_that_stands_still() -> None:
    rule = _rule("sgd")
    for step in range(60):
        rule.model[2].requires_grad_(not 2 < step < 49)  # type: ignore[operator]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            rule.step(*blobs(12))
