"""Sweeps of BCD and ADMM against literal implementations of the papers' formulas: samples in columns, explicit inverses."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from cases import mlp, relative
from torch import Tensor, nn

from beyondprop import ADMM, BCD, OfflineAltMin, data

CE = nn.CrossEntropyLoss()


def _setup() -> tuple[nn.Sequential, Tensor, Tensor]:
    digits = data.load("digits")
    model = nn.Sequential(nn.Flatten(), *mlp(64, 14, 11, 10)).double()
    return model, digits.x_train[:120].double(), digits.y_train[:120]


class _Literal:
    """Variables with samples in columns, from the forward pass."""

    def __init__(self, model: nn.Sequential, x: Tensor, y: Tensor) -> None:
        linears = [m for m in model if isinstance(m, nn.Linear)]
        self.w = [m.weight.detach().clone() for m in linears]
        self.b = [m.bias.detach().clone().unsqueeze(1) for m in linears]
        self.x, self.y = x.flatten(1).t(), F.one_hot(y, 10).double().t()
        self.u: list[Tensor] = []
        self.v: list[Tensor] = []
        z = self.x
        for index, (w, b) in enumerate(zip(self.w, self.b, strict=True)):
            self.u.append(w @ z + b)
            z = self.u[-1].relu() if index + 1 < len(self.w) else self.u[-1]
            self.v.append(z.clone())

    def below(self, index: int) -> Tensor:
        return self.v[index - 1] if index else self.x

    def prox(self, a: Tensor, b: Tensor, weight: float) -> Tensor:
        on, off = ((a + weight * b) / (1 + weight)).clamp_min(0), b.clamp_max(0)

        def cost(u: Tensor) -> Tensor:
            return (a - u.relu()).square() + weight * (u - b).square()

        return torch.where(cost(on) <= cost(off), on, off)

    def features(self, index: int, gamma: float, rho: float) -> Tensor:
        w, b = self.w[index], self.b[index]
        matrix = rho * w.t() @ w + gamma * torch.eye(w.shape[1]).double()
        return torch.linalg.inv(matrix) @ (rho * w.t() @ (self.u[index] - b) + gamma * self.u[index - 1].relu())

    def bcd(self, gamma: float, rho: float, alpha: float) -> None:
        rows = self.x.shape[1]
        self.v[-1] = (self.y + gamma * self.u[-1] + alpha * self.v[-1]) / (1 + gamma + alpha)
        for index in range(len(self.w) - 1, -1, -1):
            below, affine = self.below(index), self.w[index] @ self.below(index) + self.b[index]
            if index == len(self.w) - 1:
                self.u[index] = (gamma * self.v[index] + rho * affine) / (gamma + rho)
            else:
                center = (rho * affine + alpha * self.u[index]) / (rho + alpha)
                self.u[index] = self.prox(self.v[index], center, (rho + alpha) / gamma)
            gram = alpha * torch.eye(len(below)).double() + rho * below @ below.t()
            left = alpha * self.w[index] + rho * (self.u[index] - self.b[index]) @ below.t()
            self.w[index] = left @ torch.linalg.inv(gram)
            rest = (self.u[index] - self.w[index] @ below).sum(1, keepdim=True)
            self.b[index] = (alpha * self.b[index] + rho * rest) / (rho * rows + alpha)
            if index:
                self.v[index - 1] = self.features(index, gamma, rho)

    def admm(self, gamma: float, beta: float, multiplier: Tensor, move: bool) -> Tensor:
        last = len(self.w) - 1
        for index in range(len(self.w)):
            below = torch.cat([self.below(index), torch.ones(1, self.x.shape[1]).double()])
            solved = self.u[index] @ torch.linalg.pinv(below, rcond=1e-6)
            self.w[index], self.b[index] = solved[:, :-1], solved[:, -1:]
            if index < last:
                self.v[index] = self.features(index + 1, gamma, beta)
                affine = self.w[index] @ self.below(index) + self.b[index]
                self.u[index] = self.prox(self.v[index], affine, beta / gamma)
        affine = self.w[last] @ self.below(last) + self.b[last]
        self.u[last] = (self.y + beta * affine - multiplier) / (1 + beta)
        return multiplier + beta * (self.u[last] - affine) if move else multiplier


@pytest.mark.parametrize(("gamma", "rho", "alpha"), [(1.0, 1.0, 5.0), (0.3, 2.0, 0.7)])
def test_bcd_is_the_published_sweep(gamma: float, rho: float, alpha: float) -> None:
    model, x, y = _setup()
    rule = BCD(model, CE, output_loss="squared", gamma=gamma, rho=rho, alpha=alpha)
    literal = _Literal(model, x, y)
    for _ in range(6):
        rule.step(x, y)
        literal.bcd(gamma, rho, alpha)
        assert rule._state is not None
        for layer, w, b in zip(rule.layers, literal.w, literal.b, strict=True):
            assert relative(layer.weight, w) < 1e-10
            assert layer.bias is not None
            assert relative(layer.bias, b.squeeze(1)) < 1e-10
        for name, expected in (("pre", literal.u), ("post", literal.v)):
            assert all(relative(c, e.t()) < 1e-10 for c, e in zip(rule._state.codes[name], expected, strict=True))


def test_admm_is_the_published_sweep() -> None:
    model, x, y = _setup()
    x = x + 0.1 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0), dtype=x.dtype)
    rule = ADMM(model, CE, output_loss="squared", gamma=3.0, beta=0.5, warm_start=2, damping=0.0)
    literal = _Literal(model, x, y)
    multiplier = torch.zeros(10, 120).double()
    for sweep in range(5):
        rule.step(x, y)
        multiplier = literal.admm(3.0, 0.5, multiplier, sweep >= 2)
        assert rule._state is not None
        assert all(relative(layer.weight, w) < 1e-6 for layer, w in zip(rule.layers, literal.w, strict=True))
        assert all(relative(c, e.t()) < 1e-6 for c, e in zip(rule._state.codes["pre"], literal.u, strict=True))
        (own,) = rule._state.codes["multiplier"]
        assert bool(own.any()) == (sweep >= 2)
        assert float((own - multiplier.t()).norm()) <= 1e-6 * float(multiplier.norm())


def test_every_block_of_bcd_lowers_the_objective(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of V_N, (U, W, b) and V of every layer by itself, not only the sweep's sum."""
    model, x, y = _setup()
    rule = BCD(model, CE, output_loss="squared", gamma=0.8, rho=1.3, alpha=2.0)
    targets, features = F.one_hot(y, 10).double(), x.flatten(1)
    rule.step(x, y)
    assert rule._state is not None
    now, weights = copy.deepcopy(rule._state), [(w.clone(), None if b is None else b.clone()) for w, b in rule._weights]
    energies = [float(rule.energy(features, targets, now, weights))]
    fit, features_of = rule._fit, rule._features_of

    def note() -> None:
        energies.append(float(rule.energy(features, targets, now, weights)))

    def fitting(index: int, below: Tensor, pre: Tensor, post: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor | None]]:
        if index == len(rule.layers) - 1:
            now.codes["post"][-1] = post
            note()
        now.codes["pre"][index], weights[index] = found = fit(index, below, pre, post)
        note()
        return found

    def moving(index: int, pre_below: Tensor, pre: Tensor, affine: tuple[Tensor, Tensor | None]) -> Tensor:
        now.codes["post"][index - 1] = features_of(index, pre_below, pre, affine)
        note()
        return now.codes["post"][index - 1]

    monkeypatch.setattr(rule, "_fit", fitting)
    monkeypatch.setattr(rule, "_features_of", moving)
    for _ in range(4):
        rule.step(x, y)
    assert len(energies) == 1 + 4 * 6
    assert all(after <= before + 1e-13 for before, after in itertools.pairwise(energies))


@pytest.mark.parametrize("activation", ["relu", "tanh"])
def test_offline_codes_move_last_first_each_seeing_the_moved_code_above(activation: str) -> None:
    """Problems (4) and (5) by autograd: one exact line search for every row, on top of codes that were moved already."""
    torch.manual_seed(4)
    model = nn.Sequential(nn.Flatten(), *mlp(64, 9, 8, 7, 10, activation=activation)).double()
    _, x, y = _setup()
    mu = 0.3
    rule = OfflineAltMin(model, CE, mu=mu)
    rule.step(x, y)
    assert rule._state is not None
    codes = [c.clone() for c in rule._state.codes["pre"]]
    weights = [(w.clone(), None if b is None else b.clone()) for w, b in rule._weights]  # those before the next step
    function = getattr(torch, activation)
    rule.step(x, y)

    def below(index: int) -> Tensor:
        return function(codes[index - 1]) if index else x.flatten(1)

    checked = 0
    old = [c.clone() for c in codes]
    for index in (2, 1, 0):
        center = F.linear(below(index), *weights[index])

        def value(c: Tensor, index: int = index, center: Tensor = center) -> Tensor:
            above = F.linear(function(c), *weights[index + 1])
            own = 0.5 * mu * (c - center).square().sum(1)
            if index == 2:
                return own + F.cross_entropy(above, y, reduction="none")
            return own + 0.5 * mu * (codes[index + 1] - above).square().sum(1)

        moved = rule._state.codes["pre"][index]
        leaf = old[index].clone().requires_grad_()
        (gradient,) = torch.autograd.grad(value(leaf).sum(), leaf)
        step = old[index] - moved
        cosine = F.cosine_similarity(step, gradient, dim=1)
        assert float(cosine[step.norm(dim=1) > 1e-9].min()) > 1 - 1e-8  # along this very gradient
        assert bool((value(moved) <= value(old[index]) + 1e-12).all())
        checked += int((step.norm(dim=1) > 1e-9).sum())
        codes[index] = moved
    assert checked > 3 * 100


def test_paper_settings() -> None:
    model = mlp(64, 14, 11, 10)
    rule = BCD.paper(model, CE, generator=torch.Generator().manual_seed(3), alpha=1.0)
    assert (rule.gamma, rule.rho, rule.alpha, rule.output_loss.name) == (1.0, 1.0, 1.0, "squared")
    first = model[0]
    assert isinstance(first, nn.Linear)
    assert float(first.weight.detach().std()) == pytest.approx(0.01, rel=0.1)
    assert bool((first.bias == 0.1).all())
    again = BCD.paper(mlp(64, 14, 11, 10), CE, generator=torch.Generator().manual_seed(3))
    assert BCD.paper(mlp(64, 14, 11, 10), CE, output_loss="hinge").output_loss.name == "hinge"
    assert torch.equal(again.layers[0].weight, first.weight)


def test_normal_codes_forget_the_initial_weights() -> None:
    """As published: the first least-squares fit depends on the data and the codes alone."""
    _, x, y = _setup()
    after = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Flatten(), *mlp(64, 14, 11, 10)).double()
        rule = ADMM(model, CE, output_loss="hinge", initial_codes="normal", generator=torch.Generator().manual_seed(0))
        rule.step(x, y)
        after.append(rule.layers[0].weight.detach().clone())
    assert relative(after[0], after[1]) < 1e-12
