"""A black box under every rule: the steps of its twin that autograd sees, for the promised calls, or a refusal by name."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from boxes import Counted, Noisy, Smooth, far, points, random_pattern
from torch import Tensor, nn

from beyondprop import (
    AltMin,
    Codes,
    CreditBlock,
    Credited,
    Descent,
    FeedbackAlignment,
    LocalRule,
    OnlineEWC,
    UnsupportedModelError,
)
from beyondprop.credit import code_solvers
from beyondprop.errors import BlackBoxError, CallBudgetExceededError
from beyondprop.lab import registry
from beyondprop.nn import BlackBox, Residual

CE = nn.CrossEntropyLoss()
SGD = partial(torch.optim.SGD, lr=0.03)
X, Y = points(12, 5), torch.arange(12) % 3
WIDE, FIRST, LAST, INNER = (Smooth(random_pattern(m, n, k)) for m, n, k in ((7, 8, 3), (5, 5, 2), (3, 3, 2), (8, 8, 2)))


class Seen(nn.Module):
    """A box as autograd sees it."""

    def __init__(self, smooth: Smooth) -> None:
        super().__init__()
        self.smooth = smooth

    def forward(self, x: Tensor) -> Tensor:
        return self.smooth.torch(x)


Make = Callable[[Smooth], nn.Module]


class Block(nn.Module):
    """A user's own block around a box."""

    def __init__(self, make: Make) -> None:
        super().__init__()
        self.inner, self.box = nn.Linear(8, 8), make(INNER)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.box(torch.tanh(self.inner(x)))


class Functional(nn.Module):
    """A model with a forward pass of its own."""

    def __init__(self, make: Make) -> None:
        super().__init__()
        self.a, self.box, self.b = nn.Linear(5, 8), make(WIDE), nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.box(torch.tanh(self.a(x))))


def _twice(make: Make) -> nn.Module:
    box = make(INNER)
    return nn.Sequential(nn.Linear(5, 8), box, nn.Linear(8, 8), nn.Tanh(), box, nn.Linear(8, 3))


# fmt: off
NETS: dict[str, Callable[[Make], nn.Module]] = {
    "middle": lambda make: nn.Sequential(nn.Linear(5, 8), nn.Tanh(), make(WIDE), nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, 3)),
    "first": lambda make: nn.Sequential(make(FIRST), nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)),
    "last": lambda make: nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3), make(LAST)),
    "twice": _twice,
    "residual": lambda make: nn.Sequential(
        nn.Linear(5, 8), Residual(nn.Sequential(nn.Linear(8, 8), make(INNER), nn.Linear(8, 8)), nn.Identity(), nn.Identity()),
        nn.Tanh(), nn.Linear(8, 3),
    ),
    "block": lambda make: nn.Sequential(nn.Linear(5, 8), Block(make), nn.Linear(8, 3)),
    "functional": Functional,
    "norm": lambda make: nn.Sequential(
        nn.Linear(5, 8), nn.BatchNorm1d(8), make(WIDE), nn.BatchNorm1d(7), nn.ReLU(), nn.Dropout(0.2), nn.Linear(7, 3),
    ),
}
# fmt: on
NO_INVERSE = ("residual", "block")
every_net = pytest.mark.parametrize("net", NETS)


def _net(
    name: str, *, seen: bool = False, box: Callable[[Smooth], Any] = lambda smooth: smooth, **options: Any
) -> nn.Module:
    torch.manual_seed(0)
    make: Make = Seen if seen else (lambda smooth: BlackBox(box(smooth), pattern=smooth.mask, **options))
    return NETS[name](make).double()


def _weights(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def _layer(model: nn.Module) -> BlackBox:
    return next(m for m in model.modules() if isinstance(m, BlackBox))


def _moved(net: str, steps: Callable[[nn.Module], None], **options: Any) -> tuple[Tensor, Tensor, BlackBox]:
    """Return how far the weights went with a box and with its twin, and the box."""
    found, layer = [], None
    for seen in (False, True):
        model = _net(net, seen=seen, **options)
        start = _weights(model)
        torch.manual_seed(1)
        steps(model)
        found.append(_weights(model) - start)
        layer = layer or _layer(model)
    assert layer is not None
    assert bool(found[1].any())
    return found[0], found[1], layer


def _registered(name: str, count: int = 3) -> Callable[[nn.Module], None]:
    def steps(model: nn.Module) -> None:
        spec = registry.rules.get(name)
        rule = spec.build(model, CE, spec.lr)
        for _ in range(count):
            rule.step(X, Y)

    return steps


# What a Memory can serve depends on what a stage is: behind a block of the user's it has none, behind a box it has.
ONLINE = [n for n in registry.rules.names() if not registry.rules.get(n).whole_set and not n.startswith("am-mem")]


@pytest.mark.parametrize("rule", ONLINE)
@every_net
def test_every_rule_takes_the_steps_of_the_twin(net: str, rule: str) -> None:
    if rule == "dtp" and net in NO_INVERSE:
        with pytest.raises(UnsupportedModelError, match="no inverse by default"):
            _moved(net, _registered(rule))
        return
    mine, right, _ = _moved(net, _registered(rule))
    assert far(mine, right) <= 1e-6


@pytest.mark.parametrize("rule", ["am-mem", "am-mem-bcd"])
def test_rules_with_memory_train(rule: str) -> None:
    model = _net("middle")
    spec = registry.rules.get(rule)
    trained = spec.build(model, CE, spec.lr)
    losses = [float(trained.step(X, Y).loss) for _ in range(30)]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("rule", [n for n in registry.rules.names() if registry.rules.get(n).whole_set])
def test_offline_rules_refuse_by_name(rule: str) -> None:
    spec = registry.rules.get(rule)
    with pytest.raises(UnsupportedModelError, match=r"BlackBox -> Linear.*or use AltMin, which trains it"):
        spec.build(_net("middle"), CE, spec.lr).step(X, Y)


CREDITS: dict[str, Callable[[], Any]] = {
    "line_search": Codes,
    "unnormalized": lambda: Codes(normalize=False, mu=0.5),
    "gradient": lambda: Codes("gradient"),
    "cg": lambda: Codes("cg"),
    "exact": lambda: Codes("exact"),
    "fitted": lambda: Codes("fitted"),
    "published": lambda: Codes(code_solvers.momentum(5, 0.3), normalize=False),
    "sparse": lambda: Codes(l1=1e-3),
    "fa": FeedbackAlignment,
}


@pytest.mark.parametrize("credit", CREDITS)
@pytest.mark.parametrize("cuts", ["linear", "block"])
@pytest.mark.parametrize("behind", [False, True], ids=["rule", "credited"])
def test_every_credit_and_code_solver(credit: str, cuts: str, behind: bool) -> None:
    def steps(model: nn.Module) -> None:
        if not behind:
            rule = LocalRule(model, CE, CREDITS[credit](), Descent(SGD), cuts=cuts)
            for _ in range(2):
                rule.step(X, Y)
            return
        credited, optimizer = Credited(model, CREDITS[credit](), CE, cuts=cuts), SGD(model.parameters())
        for _ in range(2):
            optimizer.zero_grad()
            CE(credited(X), Y).backward()
            optimizer.step()

    mine, right, layer = _moved("middle", steps)
    assert far(mine, right) <= 1e-6
    if credit != "published":  # which runs its inner steps through the box
        assert layer.plan is not None
        assert (layer.stats.forward, layer.stats.backward) == (24, 24 * layer.plan.calls)


def test_a_credit_block_with_a_box() -> None:
    def steps(model: nn.Module) -> None:
        assert isinstance(model, nn.Sequential)
        whole = nn.Sequential(CreditBlock(model[:4], "fa"), model[4], model[5])
        optimizer = SGD(whole.parameters())
        for _ in range(3):
            optimizer.zero_grad()
            CE(whole(X), Y).backward()
            optimizer.step()

    mine, right, _ = _moved("middle", steps)
    assert far(mine, right) <= 1e-6


def test_a_penalty_on_past_tasks() -> None:
    def steps(model: nn.Module) -> None:
        rule = OnlineEWC(model, CE, SGD)
        for _ in range(2):
            rule.step(X, Y)
        rule.end_task()
        for _ in range(2):
            rule.step(X, Y)

    mine, right, _ = _moved("middle", steps)
    assert far(mine, right) <= 1e-6


# ---- calls ---------------------------------------------------------------------------------------------------------------

EACH = ("am-adam", "am-sgd", "fa", "dfa", "adam", "locoprop-m", "consequentialism")


@pytest.mark.parametrize("rule", EACH)
@pytest.mark.parametrize("net", ["middle", "last", "block", "residual", "functional"])
@pytest.mark.parametrize("difference", ["central", "forward"])
def test_a_step_costs_one_forward_call_and_one_jacobian(rule: str, net: str, difference: str) -> None:
    counted: list[Counted] = []

    def box(smooth: Smooth) -> Counted:
        counted.append(Counted(smooth))
        return counted[-1]

    model = _net(net, box=box, difference=difference)
    spec = registry.rules.get(rule)
    trained = spec.build(model, CE, spec.lr)
    layer = _layer(model)
    for _ in range(3):
        trained.step(X, Y)
        assert layer.plan is not None
        assert counted[0].since() == 12 * (1 + layer.plan.calls)
    assert layer.stats.total == layer.counters["calls"] == 36 * (1 + layer.plan.calls)  # type: ignore[union-attr]


@pytest.mark.parametrize("rule", EACH)
def test_a_box_in_front_costs_its_value_alone(rule: str) -> None:
    model = _net("first")
    spec = registry.rules.get(rule)
    spec.build(model, CE, spec.lr).step(X, Y)
    assert _layer(model).stats.total == 12


# ---- what else happens in training ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["am-adam", "fa", "adam"])
@pytest.mark.parametrize("net", ["middle", "functional"])
@pytest.mark.parametrize("seeded", [False, True])
def test_noisy_boxes_train(rule: str, net: str, seeded: bool) -> None:
    noisy = {id(s): Noisy(s, 0.05) for s in (WIDE,)}
    options: dict[str, Any] = {"seed_kwarg": "seed"} if seeded else {"noise": 0.05}
    model = _net(net, box=lambda s: noisy[id(s)].seeded if seeded else noisy[id(s)], **options)
    spec = registry.rules.get(rule)
    trained = spec.build(model, CE, 1e-2)
    losses = [float(trained.step(X, Y).loss) for _ in range(60)]
    assert np.mean(losses[-5:]) < 0.9 * np.mean(losses[:5])


@pytest.mark.parametrize("rule", ["am-adam", "fa", "adam", "locoprop-m"])
@pytest.mark.parametrize("at", [3, 4], ids=["forward", "backward"])
def test_a_step_is_whole_or_not_at_all(rule: str, at: int) -> None:
    made = [0]

    def failing(smooth: Smooth) -> Any:
        def box(x: np.ndarray) -> np.ndarray:
            made[0] += 1
            if made[0] == at:
                raise OSError("the licence server is gone")
            return smooth(x)

        return box

    model, whole = _net("middle", box=failing), _net("middle")
    spec = registry.rules.get(rule)
    trained, other = spec.build(model, CE, spec.lr), spec.build(whole, CE, spec.lr)
    trained.step(X, Y)
    other.step(X, Y)
    before = copy.deepcopy(_weights(model))
    with pytest.raises(BlackBoxError, match="licence server"):
        trained.step(X, Y)
    assert torch.equal(_weights(model), before)
    trained.step(X, Y)
    other.step(X, Y)
    assert far(_weights(model), _weights(whole)) <= 1e-9


def test_a_budget_ends_training_between_steps() -> None:
    model = _net("middle", max_calls=250)
    rule = AltMin(model, CE)
    rule.step(X, Y)
    rule.step(X, Y)
    before = _weights(model)
    with pytest.raises(CallBudgetExceededError, match="max_calls=250"):
        rule.step(X, Y)
    assert torch.equal(_weights(model), before)
    assert _layer(model).stats.total <= 250


def test_boxes_of_several_outputs_are_refused_inside_a_chain() -> None:
    model = nn.Sequential(nn.Linear(5, 8), BlackBox(lambda a: (a, a)), nn.Linear(8, 3)).double()
    with pytest.raises(UnsupportedModelError, match="one tensor on, and its BlackBox returns 2"):
        AltMin(model, CE).step(X, Y)
