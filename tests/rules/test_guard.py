"""Guard and watchdog know loss, gradients and weights, never the rule: copies are on their own, and nothing keeps a rule."""

from __future__ import annotations

import copy
import gc
import weakref
from functools import partial
from typing import Any

import pytest
import torch
from cases import SGD, blobs, equal, mlp, rule_state, state
from torch import nn

from beyondprop import AltMin, Backprop, LearningRule, NonFiniteError
from beyondprop.rules.guard import first_nonfinite

CE = nn.CrossEntropyLoss()
FUSED = partial(torch.optim.Adam, lr=0.01, fused=True)
modes = pytest.mark.parametrize("mode", ["raise", "deferred"])
builds = pytest.mark.parametrize("build", [AltMin, Backprop])


def _rule(build: Any, mode: str) -> LearningRule:
    rule = build(mlp(6, 5, 3), CE, FUSED, nonfinite=mode)
    rule.watchdog.interval = 2
    rule.step(*blobs(12))
    return rule


@modes
@builds
def test_a_twin_steps_its_own_weights(mode: str, build: Any) -> None:
    rule = _rule(build, mode)
    twin = copy.deepcopy(rule)
    before = rule_state(rule), rule.watchdog.state_dict(), rule._guard.steps
    for _ in range(2):
        twin.step(*blobs(12))
    assert equal(before[0], rule_state(rule))
    assert equal(before[1], rule.watchdog.state_dict())
    assert (rule._guard.steps, twin._guard.steps) == (before[2], before[2] + 2)
    for _ in range(2):
        rule.step(*blobs(12))
    assert equal(rule_state(rule), rule_state(twin))  # what the twin did is what the rule does
    assert equal(rule.watchdog.state_dict(), twin.watchdog.state_dict())


@modes
@builds
def test_a_twin_watches_and_refuses_for_itself(mode: str, build: Any) -> None:
    rule = _rule(build, mode)
    twin = copy.deepcopy(rule)
    with torch.no_grad():
        for p in twin.model.parameters():
            p.mul_(2.0)
    twin.step(*blobs(12))
    twin.step(*blobs(12))  # the third step: a look, before which all weights had moved, and whose sample is the twin's
    own = {name: torch.cat([p.detach().flatten() for p in ps]) for name, ps in twin.stage_parameters().items()}
    assert equal(own, twin.watchdog.state_dict()["before"])
    before = rule_state(rule), state(twin.model)
    x, y = blobs(12)
    with pytest.raises(NonFiniteError):
        twin.step(torch.full_like(x, float("nan")), y)
    assert equal(before[1], state(twin.model))
    assert equal(before[0], rule_state(rule))
    rule.check_finite()  # the twin's flag is not the rule's
    if mode == "deferred":
        twin._guard.pending.append((9, torch.tensor(True), None))
        with pytest.raises(NonFiniteError, match="Step 9"):
            copy.deepcopy(twin).check_finite()
        assert len(twin._guard.pending) == 1


@builds
def test_nothing_keeps_a_rule_that_nobody_holds(build: Any) -> None:
    rule = build(mlp(6, 5, 3), CE, SGD)
    gone = weakref.ref(rule)
    gc.collect()
    gc.disable()
    try:
        del rule
        assert gone() is None
    finally:
        gc.enable()


def test_the_first_that_is_not_finite_is_named() -> None:
    good, bad = torch.ones(2), torch.tensor([1.0, float("inf")])
    assert first_nonfinite([("a", good), ("b", None), ("c", bad), ("d", bad)]) == "c"
    assert first_nonfinite([("a", good), ("labels", torch.arange(3))]) is None
