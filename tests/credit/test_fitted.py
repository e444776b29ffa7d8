"""The line search by lengths: exact where it says so, near it in between, the same by a sweep and by a backward pass."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from cases import CE, mlp
from torch import Tensor, nn
from torch.nn import functional as F

from beyondprop import AltMin, Codes, Credited, NonFiniteError, alignment, data
from beyondprop.credit import code_solvers, fitted
from beyondprop.credit.fitted import FittedLineSearch

SGD = partial(torch.optim.SGD, lr=0.05)


def _batch(seed: int, n: int = 64) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 12, generator=g, dtype=torch.float64)
    return x, (x[:, :4].sum(1) > 0).long() + (x[:, 4:8].sum(1) > 0).long()


def _rule(model: nn.Module, solver: object) -> AltMin:
    return AltMin(model, CE, SGD, code_solver=solver)  # type: ignore[arg-type]


def test_exact_steps_are_those_of_the_exact_search() -> None:
    torch.manual_seed(0)
    model = mlp(12, 16, 16, 16, 3).double()
    one, two = _rule(copy.deepcopy(model), "fitted"), _rule(copy.deepcopy(model), FittedLineSearch(refit=1))
    three = _rule(model, "line_search")
    for step in range(8):
        for rule in (one, two, three):
            rule.step(*_batch(step))
        apart = [
            max(
                float((p - q).detach().abs().max())
                for p, q in zip(r.model.parameters(), model.parameters(), strict=True)
            )
            for r in (one, two)
        ]
        assert apart[1] == 0.0
        assert (apart[0] == 0.0) == (step < 3)


def test_between_them_it_is_nearer_to_the_exact_search_than_the_gradient_is() -> None:
    digits = data.load("digits")
    torch.manual_seed(0)
    rule = AltMin(mlp(64, 100, 100, 10), CE, partial(torch.optim.Adam, lr=3e-3), code_solver="fitted")
    for _ in range(95):
        rows = torch.randint(len(digits.x_train), (200,))
        rule.step(digits.x_train[rows].flatten(1), digits.y_train[rows])
    solver = rule.credit.solver
    assert isinstance(solver, FittedLineSearch)
    assert not solver.is_exact
    rows, found = torch.randint(len(digits.x_train), (200,)), {}
    for name, other in (("fitted", solver), ("exact", code_solvers.line_search), ("gradient", code_solvers.gradient)):
        rule.credit.solver = other
        rule.backward(digits.x_train[rows].flatten(1), digits.y_train[rows])
        found[name] = [p.grad.flatten() for p in rule.model.parameters() if p.grad is not None and p.ndim > 1][:-1]
        rule.discard()
    angle = {
        name: sum(1 - float(F.cosine_similarity(a, b, dim=0)) for a, b in zip(found[name], found["exact"], strict=True))
        for name in ("fitted", "gradient")
    }
    assert angle["fitted"] < 0.5 * angle["gradient"]


def test_a_backward_pass_makes_the_steps_of_the_rule() -> None:
    torch.manual_seed(0)
    model = mlp(12, 16, 16, 16, 3).double()
    rule = _rule(copy.deepcopy(model), "fitted")
    made = Credited(model, Codes("fitted"), CE)
    optimizer = SGD(made.parameters())
    for step in range(24):
        x, y = _batch(step)
        rule.step(x, y)
        optimizer.zero_grad()
        CE(made(x), y).backward()
        optimizer.step()
    for p, q in zip(rule.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-12)


def test_factors_one_by_one_are_those_of_all_together(monkeypatch: pytest.MonkeyPatch) -> None:
    solver = FittedLineSearch()
    solver.coefficients = torch.tensor([[1.3, 0.0], [0.4, 0.7], [0.9, 0.0], [0.2, 1.5]], dtype=torch.float64)
    lengths = [torch.rand(6, dtype=torch.float64) for _ in range(4)]
    for k in range(4):
        lengths[k][: max(0, k - 1)] = 0.0  # samples whose gradient ends on the way down
    curvature = torch.rand(6, dtype=torch.float64)
    found = []
    for most in (0, 4):
        monkeypatch.setattr(fitted, "_SHALLOW", most)
        found.append(torch.stack([*solver.products(lengths, curvature, 0.5)]))
    assert torch.isfinite(found[0]).all()
    torch.testing.assert_close(found[0], found[1], rtol=1e-14, atol=0)
    square = lengths[0].square()
    product = 1.3 * square / (0.5 * square + curvature)
    for k, (alpha, beta) in enumerate([(0.4, 0.7), (0.9, 0.0), (0.2, 1.5)], 1):
        product = product / (alpha + beta * lengths[k] / lengths[k - 1])
        live = lengths[k - 1] > 0
        torch.testing.assert_close(found[0][k][live], product[live], rtol=1e-13, atol=0)


@pytest.mark.parametrize("normalize", [True, False])
def test_its_state_resumes_to_the_last_bit(normalize: bool) -> None:
    torch.manual_seed(0)
    start = mlp(12, 16, 16, 3).double()
    rules = [AltMin(copy.deepcopy(start), CE, SGD, code_solver="fitted", normalize=normalize) for _ in range(2)]
    for step in range(15):
        rules[0].step(*_batch(step))
    rules[1].model.load_state_dict(rules[0].model.state_dict())
    rules[1].load_state_dict(rules[0].state_dict())
    for step in range(15, 25):
        for rule in rules:
            rule.step(*_batch(step))
    for p, q in zip(rules[0].model.parameters(), rules[1].model.parameters(), strict=True):
        assert torch.equal(p, q)


def test_samples_without_gradient_and_frozen_stages() -> None:
    torch.manual_seed(0)
    model = mlp(12, 16, 16, 3).double()
    rule = _rule(model, "fitted")
    for step in range(9):
        x, y = _batch(step)
        y[: 60 if step % 2 else 3] = -100
        rule.step(x, y)
    assert all(bool(p.isfinite().all()) for p in model.parameters())
    model[0].requires_grad_(False)
    for step in range(9, 14):
        rule.step(*_batch(step))
    assert all(bool(p.isfinite().all()) for p in model.parameters())
    with pytest.raises(ValueError, match="refit must be"):
        FittedLineSearch(0)


def test_what_only_looks_or_is_refused_changes_nothing() -> None:
    torch.manual_seed(0)
    start = mlp(12, 16, 16, 16, 3).double()
    one, two = (_rule(copy.deepcopy(start), "fitted") for _ in range(2))
    for step in range(24):
        for rule in (one, two):
            rule.step(*_batch(step))
        alignment(two, *_batch(100 + step))
        x, y = _batch(step)
        with pytest.raises(NonFiniteError):
            two.step(x * float("nan"), y)
    for p, q in zip(one.model.parameters(), two.model.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("dead", [(20,), (0, 1, 2)])
def test_a_batch_without_gradient_leaves_the_fit_as_it_was(dead: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    start = mlp(12, *[16] * 6, 3).double()
    total = nn.CrossEntropyLoss(reduction="sum")
    rules = [AltMin(copy.deepcopy(start), total, SGD, code_solver=solver) for solver in ("fitted", "line_search")]
    for step in range(24):
        x, y = _batch(step)
        if step in dead:
            y = torch.full_like(y, -100)
        lengths = []
        for rule in rules:
            rule.model.load_state_dict(start.state_dict())
            rule.backward(x, y)
            lengths.append(torch.stack([p.grad.norm() for p in rule.model.parameters() if p.grad is not None]))
            rule.update()
            for p in rule.model.parameters():
                p.grad = None
        assert lengths[0].isfinite().all()
        if step not in dead:
            assert float((lengths[0] / lengths[1]).log().abs().max()) < 0.5
