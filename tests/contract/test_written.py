"""A step of any registered rule leaves weights, statistics and states finite, or all as they were."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import blobs, equal, mixed, mlp, rule_state, train
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from beyondprop import Backprop, LearningRule, LocalRule, NonFiniteError, OnlineEWC, Solver
from beyondprop.credit import Codes
from beyondprop.lab import registry
from beyondprop.rules import guard

pytestmark = [
    pytest.mark.filterwarnings("ignore::beyondprop.FrozenStageWarning"),
    pytest.mark.filterwarnings("ignore:The local steps of"),
]
every_rule = pytest.mark.parametrize("name", registry.rules.names())
CE = nn.CrossEntropyLoss()


def _rule(name: str, lr: float | None = None) -> LearningRule:
    torch.manual_seed(2)
    spec = registry.rules.get(name)
    return spec.build(mlp(6, 8, 8, 3) if spec.whole_set else mixed(), CE, spec.lr if lr is None else lr)


def _is_finite(state: Any) -> bool:
    return all(bool(leaf.isfinite().all()) for leaf in tree_leaves(state) if isinstance(leaf, Tensor))


def _steps(rule: LearningRule, x: Tensor, y: Tensor, count: int = 4) -> int:
    """Step until refused; return how often that went well."""
    for number in range(count):
        before = rule_state(rule)
        try:
            rule.step(x, y)
        except NonFiniteError:
            assert equal(before, rule_state(rule))
            assert all(p.grad is None for p in rule.model.parameters())
            return number
        assert _is_finite(rule_state(rule))
    return count


@every_rule
@pytest.mark.parametrize("lr", [1e20, 1e30, 1e38])
def test_a_learning_rate_beyond_all_measure(name: str, lr: float) -> None:
    _steps(_rule(name, lr), *blobs(12))


@every_rule
@pytest.mark.parametrize("size", [1e10, 1e18, 1e19, 1e20, 1e30, 3e38])
@pytest.mark.parametrize("before", [0, 2])
def test_inputs_beyond_all_measure(name: str, size: float, before: int) -> None:
    if before and registry.rules.get(name).whole_set:
        pytest.skip("keeps codes for one data set")
    rule = _rule(name)
    x, y = blobs(12)
    train(rule, [(x, y)] * before)
    _steps(rule, (x * size).clamp(-3e38, 3e38), y)


@pytest.mark.parametrize("name", ["adam", "sgd", "am-adam", "am-mem", "locoprop-m", "fa", "dfa", "dtp"])
def test_running_statistics_that_overflow_are_named(name: str) -> None:
    rule = _rule(name)
    x, y = blobs(12)
    before = rule_state(rule)
    with pytest.raises(NonFiniteError, match=r"^Stage '1' is not finite at step .*No weight was changed"):
        rule.step(x * 1e20, y)  # normalised, so that loss and gradients are finite
    assert equal(before, rule_state(rule))
    rule.step(x, y)


@pytest.mark.parametrize("name", ["adam", "am-adam", "fa", "dfa", "dtp"])
def test_weights_that_would_overflow_are_not_written(name: str) -> None:
    rule = _rule(name, 1e38)
    before = rule_state(rule)
    with pytest.raises(NonFiniteError, match=r"^The update is not finite at step 1 .*No weight was changed"):
        rule.step(*blobs(12))
    assert equal(before, rule_state(rule))
    for optimizer in rule.optimizers:
        for group in optimizer.param_groups:
            group["lr"] = 1e-3
    rule.step(*blobs(12))
    assert not equal(before, rule_state(rule))


class _Breaks(torch.optim.SGD):
    """Steps half of the parameters, then does `what`."""

    what = "raise"

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for p in self.param_groups[0]["params"][:2]:
            self.state[p]["seen"] = torch.ones(1)
            p.add_(1.0)
        if self.what == "raise":
            raise ValueError("a device out of memory")
        self.param_groups[0]["params"][0].view(-1)[0] = float(self.what)


@pytest.mark.parametrize("what", ["raise", "nan", "inf"])
@pytest.mark.parametrize("kind", ["backprop", "ewc"])
def test_what_an_optimizer_of_any_kind_writes_is_looked_at(what: str, kind: str) -> None:
    model = mixed()
    optimizer = _Breaks(model.parameters(), lr=0.1)
    optimizer.what = what
    if kind == "backprop":
        rule: LearningRule = Backprop(model, CE, optimizer)
    else:
        rule = OnlineEWC(model, CE, lambda parameters: optimizer)
    before = rule_state(rule)
    with pytest.raises(
        ValueError if what == "raise" else NonFiniteError, match=r"out of memory|The update is not finite"
    ):
        rule.step(*blobs(12))
    assert equal(before, rule_state(rule))
    assert not optimizer.state


def test_adam_without_an_epsilon_is_refused_where_it_divides_zero_by_zero() -> None:
    model = mlp(6, 8, 3)
    model[1].register_forward_hook(lambda *arguments: arguments[2] * 0.0)
    rule = Backprop(model, CE, torch.optim.Adam(model.parameters(), lr=1e-3, eps=0.0))
    before = rule_state(rule)
    with pytest.raises(NonFiniteError, match=r"^The update is not finite"):
        rule.step(*blobs(12))
    assert equal(before, rule_state(rule))


class _Memorizes(Solver):
    """A solver of somebody's own, with state outside of optimizers that goes wrong."""

    defers_update = False
    needs_codes = False

    def bind(self, chain: Any) -> None:
        self.seen = torch.zeros(1)
        self.optimizers = (torch.optim.SGD([p for s in chain for p in s.parameters], lr=0.1),)

    def collect(self, assignment: Any, factor: float) -> None:
        assignment.pullback.add_gradients(assignment.delta, factor)

    def solve(self) -> None:
        self.seen = self.seen + float("inf")

    def state_dict(self) -> dict[str, Any]:
        return {"seen": self.seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.seen = state["seen"]


def test_what_a_solver_of_any_kind_keeps_is_looked_at() -> None:
    rule = LocalRule(mlp(6, 8, 3), CE, Codes(), _Memorizes())
    before = rule_state(rule)
    with pytest.raises(NonFiniteError, match=r"^The update is not finite"):
        rule.step(*blobs(12))
    assert equal(before, rule_state(rule))


def test_an_infinite_mask_and_inert_weights_are_nobodys_fault() -> None:
    model = mlp(6, 8, 3)
    model.register_buffer("mask", torch.full((3, 3), float("-inf")).triu(1))
    model.register_buffer("seen", torch.zeros(2))
    rule = Backprop(model, CE, torch.optim.SGD(model.parameters(), lr=1e4))
    for _ in range(2):
        rule.step(*blobs(12))
    model.seen.fill_(float("inf"))  # type: ignore[operator, union-attr]
    with pytest.raises(NonFiniteError, match=r"^Stage '' is not finite"):
        rule.step(*blobs(12))


@every_rule
def test_ordinary_steps_keep_nothing_and_look_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rule = _rule(name)
    monkeypatch.setattr(guard, "Kept", None)
    for _ in range(3):
        rule.step(*blobs(12))


def test_large_gradients_that_harm_nothing_are_taken() -> None:
    def loss(output: Tensor, y: Tensor) -> Tensor:
        return 1e20 * nn.functional.cross_entropy(output, y)

    model = mlp(6, 8, 3)
    rule = Backprop(model, loss, torch.optim.SGD(model.parameters(), lr=1e-21))
    before = rule_state(rule)
    rule.step(*blobs(12))
    assert not equal(before, rule_state(rule))
