"""Depth in float32, the watchdog, and the comparison with the true gradient."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from cases import SGD, Recorder, assignments, blobs, equal, mixed, mlp, relative, rule_state, train
from torch import Tensor, nn

from beyondprop import (
    AltMin,
    Assignment,
    Backprop,
    Codes,
    Descent,
    FrozenStageWarning,
    LocalRule,
    Memory,
    NonFiniteError,
    alignment,
)
from beyondprop.lab.registry import rules
from beyondprop.stages.chain import Trace
from beyondprop.stages.losses import LossPoint

WIDTHS = (6, *[32] * 16, 3)


def _deep(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    model = mlp(*WIDTHS)
    for p in model.parameters():
        if p.ndim > 1:
            nn.init.kaiming_normal_(p)
    return model.to(dtype)


def test_float32_wishes_are_those_of_float64_at_any_depth() -> None:
    x, y = blobs(32, dtype=torch.float64)
    fine = assignments(_deep(torch.float64), nn.CrossEntropyLoss(), Codes(), x, y)
    coarse = assignments(_deep(), nn.CrossEntropyLoss(), Codes(), x.float(), y)
    assert len(coarse) == 17
    assert max(relative(a.delta.double(), b.delta) for a, b in zip(coarse, fine, strict=True)) < 1e-3


@pytest.mark.filterwarnings("error::beyondprop.FrozenStageWarning")
def test_every_stage_of_a_deep_net_moves() -> None:
    model = _deep()
    before = [p.detach().clone() for p in model.parameters() if p.ndim > 1]
    rule = AltMin(model, nn.CrossEntropyLoss(), partial(torch.optim.Adam, lr=1e-3))
    x, y = blobs(32)
    for _ in range(60):
        rule.step(x, y)
    after = [p for p in model.parameters() if p.ndim > 1]
    assert min(relative(p, q) for p, q in zip(after, before, strict=True)) > 1e-2


def _absolute_gradients(model: nn.Sequential, x: Tensor, y: Tensor) -> list[Tensor]:
    """One code step as published: codes stored whole in float32, every mean over batch and features."""
    stages = [model[:1], *[model[i : i + 2] for i in range(1, len(model), 2)]]
    initial = [x]
    for stage in stages:
        initial.append(stage(initial[-1]).detach())
    moved = list(initial)
    for level in range(len(stages) - 1, 0, -1):
        code = initial[level].clone().requires_grad_()
        output = stages[level](code)
        if level == len(stages) - 1:
            objective = nn.functional.cross_entropy(output, y) / 0.003
        else:
            objective = nn.functional.mse_loss(output, moved[level + 1])
        (gradient,) = torch.autograd.grad(objective, code)
        moved[level] = initial[level] - 0.3 * gradient
    gradients = []
    for level, stage in enumerate(stages[:-1]):
        local = nn.functional.mse_loss(stage(initial[level]), moved[level + 1])
        gradients.append(torch.autograd.grad(local, stage[-1].weight)[0])  # type: ignore[arg-type]
    return gradients


def test_absolute_codes_leave_the_lowest_stages_as_they_were_and_deltas_do_not() -> None:
    model = _deep()
    x, y = blobs(32)
    gradients = _absolute_gradients(model, x, y)
    assert not any(bool(g.any()) for g in gradients[:8])
    AltMin(model, nn.CrossEntropyLoss(), SGD).backward(x, y)
    assert all(p.grad is not None and bool(p.grad.any()) for p in model.parameters())


class _TopOnly(Codes):
    """Deltas that vanish below the two upper stages."""

    def assign(self, trace: Trace, loss: LossPoint) -> Iterator[Assignment]:
        for a in super().assign(trace, loss):
            if a.index < len(trace.pullbacks) - 2:
                a.delta.zero_()
            yield a


def test_the_watchdog_names_stages_that_stand_still() -> None:
    rule = LocalRule(mlp(6, 8, 8, 8, 3), nn.CrossEntropyLoss(), _TopOnly(), Descent())
    rule.watchdog.interval = 10
    x, y = blobs(12)
    with pytest.warns(FrozenStageWarning) as caught:
        train(rule, [(x, y)] * 31)
    messages = [str(w.message) for w in caught]
    assert len(messages) == 2  # once each, not at every look
    assert all(any(m.startswith(f"Stage '{name}' stands still") for m in messages) for name in ("0", "2"))


def _healthy() -> list[Any]:
    frozen = mlp(6, 8, 8, 3)
    frozen[0].requires_grad_(False)
    frozen[2].requires_grad_(False)
    still = partial(torch.optim.SGD, lr=0.0)
    return [
        AltMin(mlp(6, 8, 8, 3), nn.CrossEntropyLoss()),
        AltMin(frozen, nn.CrossEntropyLoss()),
        Backprop(mlp(6, 8, 8, 3), nn.CrossEntropyLoss(), SGD),
        AltMin(mlp(6, 8, 8, 3), nn.CrossEntropyLoss(), still),
        AltMin(mlp(6, 8, 8, 3), nn.CrossEntropyLoss(), partial(torch.optim.SGD, lr=1e-9)),
    ]


@pytest.mark.parametrize("index", range(5))
def test_the_watchdog_is_silent_otherwise(index: int) -> None:
    rule = _healthy()[index]
    rule.watchdog.interval = 5
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(12):
            rule.step(*blobs(12))


def test_the_watchdog_continues_from_its_state() -> None:
    rules = [LocalRule(mlp(6, 8, 8, 8, 3), nn.CrossEntropyLoss(), _TopOnly(), Descent()) for _ in range(2)]
    x, y = blobs(12)
    for rule in rules:
        rule.watchdog.interval = 10
    for _ in range(9):
        rules[0].step(x, y)
    rules[1].model.load_state_dict(rules[0].model.state_dict())
    rules[1].load_state_dict(rules[0].state_dict())
    with pytest.warns(FrozenStageWarning):
        train(rules[1], [(x, y)] * 2)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_backpropagation_and_its_limit_are_aligned(dropout: float) -> None:
    model = mlp(6, 16, 16, 3, norm=True, dropout=dropout).double()
    x, y = blobs(12, dtype=torch.float64)
    rules: list[Any] = [
        Backprop(model, nn.CrossEntropyLoss(), SGD),
        AltMin(model, nn.CrossEntropyLoss(), SGD, code_solver="gradient"),
    ]
    for rule in rules:
        for of, ratio in (("gradient", 1.0), ("update", 0.1)):
            stages = alignment(rule, x, y, of=of)
            for stage in stages.values():
                assert stage.cosine == pytest.approx(1.0, abs=1e-9)
                assert stage.angle == pytest.approx(0.0, abs=1e-2)
                assert stage.norm_ratio == pytest.approx(ratio, rel=1e-9)
    assert list(alignment(rules[1], x, y)) == ["0", "4" if dropout else "3", "8" if dropout else "6"]


def test_alignment_measures_what_differs() -> None:
    class Uphill(Codes):
        def assign(self, trace: Trace, loss: LossPoint) -> Iterator[Assignment]:
            for a in super().assign(trace, loss):
                if a.index == 0:
                    a.delta.mul_(-3.0)
                yield a

    rule = LocalRule(mlp(6, 8, 3).double(), nn.CrossEntropyLoss(), Uphill("gradient"), Descent(SGD))
    found = alignment(rule, *blobs(9, dtype=torch.float64))
    assert found["0"].cosine == pytest.approx(-1.0)
    assert found["0"].angle == pytest.approx(180.0, abs=1e-3)
    assert found["0"].norm_ratio == pytest.approx(3.0)
    assert found["2"].cosine == pytest.approx(1.0)
    rule = LocalRule(mlp(6, 8, 8, 8, 3), nn.CrossEntropyLoss(), _TopOnly(), Descent())
    still = alignment(rule, *blobs(9))["0"]
    assert still.cosine != still.cosine
    assert still.norm_ratio == 0.0


@pytest.mark.parametrize("name", [n for n in rules.names() if not rules.get(n).whole_set])
@pytest.mark.parametrize("of", ["gradient", "update"])
def test_alignment_changes_nothing(name: str, of: str) -> None:
    spec = rules.get(name)
    rule = spec.build(mixed(), nn.CrossEntropyLoss(), spec.lr)
    x, y = blobs(12)
    rule.step(x, y)
    before, random_state = rule_state(rule), torch.get_rng_state()
    found = alignment(rule, x, y, of=of)
    after = rule_state(rule)
    assert equal(before, after)
    assert torch.equal(random_state, torch.get_rng_state())
    assert all(p.grad is None for p in rule.model.parameters())
    assert set(found) == set(rule.stage_parameters())


def test_alignment_names_what_it_takes_and_leaves_frozen_stages_out() -> None:
    model = mlp(6, 8, 8, 3)
    model[2].requires_grad_(False)
    rule = AltMin(model, nn.CrossEntropyLoss())
    assert list(alignment(rule, *blobs(6))) == ["0", "4"]
    with pytest.raises(ValueError, match="of must be one of 'gradient', 'update', got 'weights'"):
        alignment(rule, *blobs(6), of="weights")


def test_diagnostics_cost_nothing_unless_asked_and_change_nothing() -> None:
    x, y = blobs(12)
    for solver in (lambda: Descent(SGD), Memory, lambda: Descent(SGD, local_steps=3)):
        model = mixed()
        twin = copy.deepcopy(model)
        rules = [AltMin(m, nn.CrossEntropyLoss(), solver()) for m in (model, twin)]
        torch.manual_seed(4)
        plain = [rules[0].step(x, y) for _ in range(2)][-1]
        torch.manual_seed(4)
        asked = [rules[1].step(x, y, diagnostics=True) for _ in range(2)][-1]
        assert plain.energy is None
        assert plain.stages == {}
        assert list(asked.stages) == ["0", "3", "6"]
        assert set(asked.stages["0"]) == {"output_norm", "delta_norm", "relative_delta"}
        assert all(
            torch.equal(p, q) for p, q in zip(model.state_dict().values(), twin.state_dict().values(), strict=True)
        )


def test_recorded_deltas_of_a_converged_batch_stay_finite() -> None:
    model = mlp(6, 8, 8, 3)
    with torch.no_grad():
        model[4].weight.mul_(1e4)  # type: ignore[operator]
    credit = Recorder(Codes())
    x, _ = blobs(12)
    y = model(x).argmax(1)  # the loss is zero to the last bit
    try:
        LocalRule(model, nn.CrossEntropyLoss(), credit, Descent()).step(x, y)
    except NonFiniteError as error:
        pytest.fail(str(error))
    assert all(bool(a.delta.isfinite().all()) for a in credit.kept)
