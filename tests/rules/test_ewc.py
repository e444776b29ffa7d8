"""Online EWC: its penalty against autograd, its Fisher information against the exact one, and what it remembers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import SGD, difference, mlp
from torch import Tensor, nn

from beyondprop import Backprop, NonFiniteError, OnlineEWC, UnsupportedModelError, data
from beyondprop.data.streams import PermutedStream
from beyondprop.lab.training.streaming import run_stream
from beyondprop.optim.factories import adam


def ewc(**settings: Any) -> OnlineEWC:
    torch.manual_seed(0)
    return OnlineEWC(mlp(6, 8, 3).double(), nn.CrossEntropyLoss(), SGD, **settings)


def test_without_a_past_or_without_strength_it_is_backpropagation() -> None:
    x, y = torch.randn(12, 6).double(), torch.arange(12) % 3
    for strength in (0.0, 50.0):
        rule = ewc(strength=strength)
        torch.manual_seed(0)
        plain = Backprop(mlp(6, 8, 3).double(), nn.CrossEntropyLoss(), SGD)
        for _ in range(3):
            a, b = rule.step(x, y), plain.step(x, y)
            assert torch.equal(a.loss, b.loss)
            if strength == 0:
                rule.end_task()
        assert difference(rule.model.parameters(), plain.model.parameters()) == 0


def test_the_penaltys_gradient_is_autograds() -> None:
    x, y = torch.randn(12, 6).double(), torch.arange(12) % 3
    rule = ewc(strength=7.0)
    for _ in range(3):
        rule.step(x, y)
    rule.end_task()
    rule.step(x, y)  # away from the anchor
    weights = [p.detach().clone().requires_grad_() for p in rule.model.parameters()]
    names = [name for name, _ in rule.model.named_parameters()]
    output = torch.func.functional_call(rule.model, dict(zip(names, weights, strict=True)), x)
    pull = sum((f * (w - a).square()).sum() for f, w, a in zip(rule.fisher, weights, rule.anchor, strict=True))
    expected = torch.autograd.grad(nn.functional.cross_entropy(output, y) + 7.0 / 2 * pull, weights)
    for share in (0.25, 0.75):  # two parts of an accumulated batch
        rule.backward(x, y, scale=share)
    found = [p.grad for p in rule.model.parameters()]
    assert difference([g for g in found if g is not None], expected) < 1e-12


def test_fisher_information_is_the_predictions_own() -> None:
    """The estimate's mean against the exact diagonal: every sample, every label, weighed by its probability."""
    torch.manual_seed(1)
    model = nn.Linear(4, 3).double()
    x = torch.randn(5, 4).double()
    exact = [torch.zeros_like(p) for p in model.parameters()]
    for sample in x:
        for label in range(3):
            chance = model(sample).softmax(0)[label].detach()
            gradient = torch.autograd.grad(
                nn.functional.cross_entropy(model(sample[None]), torch.tensor([label])), list(model.parameters())
            )
            for e, g in zip(exact, gradient, strict=True):
                e += chance * g.square() / len(x)
    rule = OnlineEWC(model, nn.CrossEntropyLoss(), lambda p: torch.optim.SGD(p, 1e-30), rate=1e-9)
    for _ in range(4000):  # rate 1/batches until then: the plain mean
        rule.step(x, torch.zeros(5).long())
    rule.end_task()
    for found, e in zip(rule.fisher, exact, strict=True):
        assert torch.allclose(found, e, rtol=0.12, atol=0.01 * float(e.max()))


def test_tasks_add_up_with_decay() -> None:
    x, y = torch.randn(12, 6).double(), torch.arange(12) % 3
    rule = ewc(decay=0.5, rate=0.3)
    rule.end_task()  # nothing was seen
    assert rule.fisher == []
    squares: list[list[Tensor]] = []
    for _ in range(2):
        present = [torch.zeros_like(p) for p in rule.model.parameters()]
        for n in range(1, 5):
            rule.backward(x, y)
            (drawn,) = rule._pending
            present = [p + max(0.3, 1 / n) * (d - p) for p, d in zip(present, drawn, strict=True) if d is not None]
            rule.update()
        squares.append(present)
        rule.end_task()
    expected = [0.5 * a + b for a, b in zip(*squares, strict=True)]
    assert difference(rule.fisher, expected) < 1e-14
    assert difference(rule.anchor, rule.model.parameters()) == 0


def test_a_refused_step_changes_nothing_and_state_comes_back() -> None:
    x, y = torch.randn(12, 6).double(), torch.arange(12) % 3
    rule = ewc(strength=3.0)
    for _ in range(2):
        rule.step(x, y)
    rule.end_task()
    rule.step(x, y)
    before = {k: v for k, v in rule.state_dict().items() if k not in ("watchdog", "steps")}
    with pytest.raises(NonFiniteError):
        rule.step(x * float("nan"), y)
    after = {k: v for k, v in rule.state_dict().items() if k not in ("watchdog", "steps")}
    for name in ("fisher", "anchor", "present"):
        assert difference(before[name], after[name]) == 0
    assert before["batches"] == after["batches"]
    twin = ewc(strength=3.0)
    twin.model.load_state_dict(rule.model.state_dict())
    twin.load_state_dict(rule.state_dict())
    for r in (rule, twin):
        torch.manual_seed(5)
        r.step(x, y)
        r.end_task()
        r.step(x, y)
    assert difference(rule.model.parameters(), twin.model.parameters()) == 0
    assert difference(rule.fisher, twin.fisher) == 0


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_it_remembers_more_than_backpropagation_on_permuted_digits(seed: int) -> None:
    def learned(strength: float) -> float:
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Flatten(), *mlp(64, 100, 100, 10))
        rule = OnlineEWC(model, nn.CrossEntropyLoss(), adam(3e-3), strength=strength)
        return run_stream(rule, PermutedStream(data.load("digits"), 5, seed=seed), batch_size=20, seed=seed).forgetting

    assert learned(300.0) < 0.8 * learned(0.0)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"strength": -1.0}, ValueError, r"strength must be a finite number >= 0, got -1.0"),
        ({"decay": 1.5}, ValueError, r"decay must be in \[0, 1\], got 1.5"),
        ({"rate": 0.0}, ValueError, r"rate must be a finite number > 0, got 0.0"),
        ({"rate": 2.0}, ValueError, r"rate must be in \[0, 1\], got 2.0"),
        ({"loss": nn.MSELoss()}, TypeError, r"loss must be nn.CrossEntropyLoss, whose labels .* got MSELoss"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        OnlineEWC(nn.Linear(2, 2), settings.pop("loss", nn.CrossEntropyLoss()), **settings)


def test_outputs_of_other_shapes_and_frozen_models_are_refused() -> None:
    with pytest.raises(ValueError, match=r"needs a model with outputs \(N, classes\), got \(4, 3, 2\)"):
        OnlineEWC(nn.Conv1d(1, 3, 2), nn.CrossEntropyLoss()).step(torch.zeros(4, 1, 3), torch.zeros(4, 2).long())
    with pytest.raises(ValueError, match="No parameter of the model requires a gradient"):
        OnlineEWC(nn.Linear(2, 2).requires_grad_(False), nn.CrossEntropyLoss())


def test_layers_frozen_later_stay_and_the_rest_is_held_and_trained() -> None:
    rule = ewc(strength=5.0)
    x, y = torch.randn(12, 6).double(), torch.arange(12) % 3
    rule.step(x, y)
    rule.end_task()
    rule.step(x, y)
    rule.model[0].requires_grad_(False)  # type: ignore[operator]
    before, fisher = [p.detach().clone() for p in rule.model.parameters()], [f.clone() for f in rule._present]
    for _ in range(3):
        rule.step(x, y)
    assert [torch.equal(p, q) for p, q in zip(rule.model.parameters(), before, strict=True)] == [True] * 2 + [False] * 2
    assert [torch.equal(p, q) for p, q in zip(rule._present, fisher, strict=True)] == [True] * 2 + [False] * 2
    rule.end_task()
    rule.model[0].requires_grad_(True)  # type: ignore[operator]
    rule.step(x, y)
    assert not torch.equal(next(rule.model.parameters()), before[0])


def test_parameters_without_fisher_information_are_refused() -> None:
    model = mlp(6, 8, 3)
    model[0].requires_grad_(False)
    rule = OnlineEWC(model, nn.CrossEntropyLoss())
    x, y = torch.randn(12, 6), torch.arange(12) % 3
    rule.step(x, y)
    model[0].requires_grad_(True)
    with pytest.raises(UnsupportedModelError, match=r"Parameter '0\.weight' was thawed .*build the rule anew"):
        rule.step(x, y)
    model[0].requires_grad_(False)
    model[1] = nn.Tanh()  # no parameter comes or goes
    rule.step(x, y)
    model[2] = nn.Linear(8, 3)
    with pytest.raises(UnsupportedModelError, match=r"Module '2' .* was exchanged .*build the rule anew"):
        rule.step(x, y)
