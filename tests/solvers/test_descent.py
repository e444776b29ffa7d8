"""Gradient steps on each stage's own problem."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from cases import SGD, Residual, blobs, difference, mlp
from torch import nn

from beyondprop import AltMin, Descent
from beyondprop.optim.factories import adam


@pytest.mark.parametrize("block", [False, True])
def test_local_steps_descend_the_stages_own_squared_distance(block: bool) -> None:
    model = (nn.Sequential(nn.Linear(6, 5), Residual(5), nn.Linear(5, 3)) if block else mlp(6, 5, 4, 3)).double()
    twin = copy.deepcopy(model)
    x, y = blobs(8, dtype=torch.float64)
    rule = AltMin(model, nn.CrossEntropyLoss(), Descent(SGD, local_steps=4), normalize=False)
    # Literally: keep every stage's input and target, then descend each stage alone.
    stages = [nn.Sequential(*twin)[i:j] for i, j in ([(0, 1), (1, 2), (2, 3)] if block else [(0, 1), (1, 3), (3, 5)])]
    with torch.no_grad():
        trace = rule.chain.record(x, push=True)
        kept = list(rule.credit.assign(trace, rule.loss.at(trace.output, y)))
    for a in kept:
        stage = stages[a.index]
        optimizer = SGD(stage.parameters())
        goal = a.pullback.output + a.delta
        for _ in range(4):
            optimizer.zero_grad()
            output = stage(a.pullback.input)
            if a.loss is not None:
                nn.functional.cross_entropy(output, y).backward()
            else:
                (0.5 * (goal - output).square().sum(1).mean()).backward()
            optimizer.step()
    rule.step(x, y)
    assert difference(model.parameters(), twin.parameters()) < 1e-10


def test_one_local_step_is_the_plain_update() -> None:
    model = mlp(6, 5, 3).double()
    twin = copy.deepcopy(model)
    x, y = blobs(8, dtype=torch.float64)
    AltMin(model, nn.CrossEntropyLoss(), Descent(SGD, local_steps=1)).step(x, y)
    AltMin(twin, nn.CrossEntropyLoss(), SGD).step(x, y)
    assert difference(model.parameters(), twin.parameters()) == 0.0


def test_an_optimizer_of_its_own_for_the_last_stage() -> None:
    model = mlp(6, 5, 3)
    rule = AltMin(model, nn.CrossEntropyLoss(), Descent(SGD, output=partial(torch.optim.SGD, lr=0.0)))
    lower, last = model[0].weight.clone(), model[2].weight.clone()  # type: ignore[operator]
    rule.step(*blobs(8))
    assert len(rule.optimizers) == 2
    assert torch.equal(model[2].weight, last)  # type: ignore[arg-type]
    assert not torch.equal(model[0].weight, lower)  # type: ignore[arg-type]


def test_the_default_is_adam() -> None:
    (optimizer,) = AltMin(mlp(6, 5, 3), nn.CrossEntropyLoss()).optimizers
    assert isinstance(optimizer, torch.optim.Adam)
    assert optimizer.param_groups[0]["lr"] == 3e-3
    assert adam(0.5)([nn.Parameter(torch.zeros(1))]).param_groups[0]["lr"] == 0.5


def test_momentum_of_the_optimizer_survives_buffer_reuse() -> None:
    model = mlp(6, 5, 3).double()
    twin = copy.deepcopy(model)
    batches = [blobs(n, dtype=torch.float64) for n in (8, 5, 7)]
    rule = AltMin(model, nn.CrossEntropyLoss(), partial(torch.optim.SGD, lr=0.1, momentum=0.9), code_solver="gradient")
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9)
    for x, y in batches:
        rule.backward(x, y)
        kept = [p.grad for p in model.parameters() if p.grad is not None]
        values = [g.clone() for g in kept]
        rule.update()
        assert all(torch.equal(g, v) for g, v in zip(kept, values, strict=True))
        optimizer.zero_grad()
        nn.functional.cross_entropy(twin(x), y).backward()
        optimizer.step()
    assert difference(model.parameters(), twin.parameters()) < 1e-12


@pytest.mark.parametrize("steps", [0, -1, 1.5, True])
def test_local_steps_out_of_range(steps: int) -> None:
    with pytest.raises(ValueError, match="local_steps must be an integer >= 1"):
        Descent(local_steps=steps)


def test_an_optimizer_instance_is_refused_with_what_is_accepted() -> None:
    model = mlp(6, 5, 3)
    with pytest.raises(TypeError, match=r"SGD.*factory|factory.*SGD"):
        AltMin(model, nn.CrossEntropyLoss(), SGD(model.parameters()))  # type: ignore[arg-type]
