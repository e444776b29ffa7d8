"""Closed-form minimisers against brute force, least squares against torch's own, row losses against autograd."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from cases import relative
from torch import Tensor, nn

from beyondprop.nn.activations import closed_form
from beyondprop.rules.offline.layer_fits import fit_output, fit_units
from beyondprop.rules.offline.least_squares import LeastSquares
from beyondprop.rules.offline.proximal import (
    feature_prox,
    hinge_prox,
    pieces_of,
    piecewise_prox,
    relu_prox,
    squared_prox,
)
from beyondprop.rules.offline.row_descent import CodeMap, Goal, descend
from beyondprop.rules.offline.row_losses import ROW_LOSSES

GRID = torch.linspace(-60.0, 60.0, 48_001, dtype=torch.float64)
PIECEWISE: dict[str, nn.Module | None] = {
    "identity": None,
    "relu": nn.ReLU(),
    "leaky_relu": nn.LeakyReLU(0.1),
    "leaky_negative": nn.LeakyReLU(-0.5),
    "hardtanh": nn.Hardtanh(0.0, 1.0),
    "relu6": nn.ReLU6(),
    "hardsigmoid": nn.Hardsigmoid(),
}


def _pairs(count: int = 60) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return tuple(3 * torch.randn(count, generator=generator, dtype=torch.float64) for _ in range(2))  # type: ignore[return-value]


def _assert_lowest(found: Tensor, cost: Callable[[Tensor], Tensor]) -> None:
    """No point of the grid is lower, and the found points cost what they should."""
    lowest = cost(GRID.unsqueeze(1)).min(0).values
    own = cost(found.unsqueeze(0)).squeeze(0)
    assert float((own - lowest).max()) < 1e-12
    assert float((lowest - own).max()) < 2e-5  # the grid's own coarseness


@pytest.mark.parametrize("weight", [0.1, 1.0, 7.0])
@pytest.mark.parametrize("name", list(PIECEWISE))
def test_piecewise_prox_is_the_lowest_point(name: str, weight: float) -> None:
    module = PIECEWISE[name]
    pieces = pieces_of(module)
    assert pieces is not None
    a, b = _pairs()
    function = (lambda u: u) if module is None else module
    _assert_lowest(
        piecewise_prox(a, b, weight, pieces), lambda u: (a - function(u)).square() / 2 + weight * (u - b).square() / 2
    )


@pytest.mark.parametrize("weight", [0.1, 1.0, 7.0])
def test_relu_prox_is_the_published_one(weight: float) -> None:
    a, b = _pairs(4000)
    threshold = a * (weight - math.sqrt(weight * (weight + 1)))
    expected = torch.where(a + weight * b < 0, b.clamp_max(0), torch.zeros_like(a))
    inner = ((a + weight * b >= 0) & (b >= 0)) | ((threshold <= weight * b) & (b < 0))
    expected = torch.where(inner, (a + weight * b) / (1 + weight), expected)
    expected = torch.where((-a <= weight * b) & (weight * b <= threshold), b, expected)

    def cost(u: Tensor) -> Tensor:
        return (a - u.relu()).square() / 2 + weight * (u - b).square() / 2

    found = relu_prox(a, b, weight)
    torch.testing.assert_close(cost(found), torch.minimum(cost(expected), cost(found)), rtol=0, atol=1e-12)
    # The published conditions take the worse branch for a < 0 < -a / weight < b only; elsewhere both are one.
    positive = a >= 0
    torch.testing.assert_close(found[positive], expected[positive], rtol=0, atol=1e-12)


@pytest.mark.parametrize("weight", [0.3, 1.0, 5.0])
def test_output_proxes_are_the_lowest_points(weight: float) -> None:
    t, b = _pairs()
    _assert_lowest(squared_prox(t, b, weight), lambda z: (z - t).square() / 2 + weight * (z - b).square() / 2)
    t = (t > 0).double()
    hinge = ROW_LOSSES["hinge"]
    _assert_lowest(
        hinge_prox(t, b, weight),
        lambda z: torch.where(t > 0.5, 1 - z, z).clamp_min(0) + weight * (z - b).square() / 2,
    )
    for name, target in (("squared", _pairs()[0]), ("hinge", t)):
        prox, loss = ROW_LOSSES[name].prox, ROW_LOSSES[name]
        assert prox is not None
        z = prox(target, b, weight).unsqueeze(1)
        for step in (1e-3, -1e-3):
            worse = loss.values(z + step, target.unsqueeze(1)) + weight * (z[:, 0] + step - b).square() / 2
            assert bool((worse >= loss.values(z, target.unsqueeze(1)) + weight * (z[:, 0] - b).square() / 2).all())
    assert hinge.prox is hinge_prox


@pytest.mark.parametrize(("inputs", "outputs"), [(7, 3), (3, 7)])
@pytest.mark.parametrize("bias", [True, False])
def test_feature_prox_is_the_published_inverse(inputs: int, outputs: int, bias: bool) -> None:
    g = torch.Generator().manual_seed(1)
    w, b, s, t = (
        torch.randn(*n, generator=g).double() for n in ((outputs, inputs), (outputs,), (5, inputs), (5, outputs))
    )
    gamma, rho = 0.7, 2.5
    rest = t - b if bias else t
    expected = (rho * rest @ w + gamma * s) @ torch.linalg.inv(rho * w.t() @ w + gamma * torch.eye(inputs).double())
    found = feature_prox(w, b if bias else None, gamma=gamma, rho=rho)(s, t)
    assert relative(found, expected) < 1e-12


def test_proxes_refuse_weights_that_are_none() -> None:
    a = torch.zeros(2)
    for call in (lambda: relu_prox(a, a, 0.0), lambda: squared_prox(a, a, -1.0), lambda: hinge_prox(a, a, math.nan)):
        with pytest.raises(ValueError, match="weight must be a finite number > 0"):
            call()
    with pytest.raises(ValueError, match="gamma must be a finite number > 0"):
        feature_prox(torch.eye(2), None, gamma=0.0, rho=1.0)


def _rows(count: int = 400, inputs: int = 500, outputs: int = 4) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(2)
    x = torch.randn(count, inputs, generator=g, dtype=torch.float64)
    return x, torch.randn(count, outputs, generator=g, dtype=torch.float64)


@pytest.mark.parametrize("bias", [True, False])
def test_moments_give_the_least_squares_fit(bias: bool) -> None:
    x, t = _rows(900, 450)  # wider than a block of the symmetric product
    moments = LeastSquares(450, 4)
    for part in (slice(0, 500), slice(500, 900)):
        moments.add(x[part], t[part])
    assert relative(moments.gram, x.t() @ x) < 1e-13
    full = F.pad(x, (0, 1), value=1.0) if bias else x
    expected = torch.linalg.lstsq(full, t).solution.t()
    weight, offset = moments.solve(0.0, bias=bias)
    assert relative(weight, expected[:, :450]) < 1e-9
    assert (offset is None) is not bias
    if offset is not None:
        assert relative(offset, expected[:, 450]) < 1e-9


def test_moments_without_damping_are_the_pseudo_inverse() -> None:
    x, t = _rows(60, 10)
    x = torch.cat([x, x[:, :3] - x[:, 3:6], torch.zeros(60, 1).double()], 1)  # columns that say nothing new
    moments = LeastSquares(14, 4)
    moments.add(x, t)
    weight, _ = moments.solve(0.0, bias=False)
    assert relative(weight, (torch.linalg.pinv(x) @ t).t()) < 1e-9
    near, _ = moments.solve(1e-9, bias=False)
    assert relative(near, weight) < 1e-6


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("how", ["proximal", "proximal_in_turn"])
def test_proximal_fits_are_stationary(how: str, bias: bool) -> None:
    x, t = _rows(60, 20)
    g = torch.Generator().manual_seed(4)
    old = torch.randn(4, 20, generator=g).double()
    old_bias = torch.randn(4, generator=g).double() if bias else None
    moments = LeastSquares(20, 4)
    moments.add(x, t)
    alpha, rho = 3.0, 0.5
    weight, offset = getattr(moments, how)(old, old_bias, alpha=alpha, rho=rho)
    leaves = [weight.detach().requires_grad_(), *([] if offset is None else [offset.detach().requires_grad_()])]

    def objective(w: Tensor, b: Tensor | None) -> Tensor:
        value = rho * (t - F.linear(x, w, b)).square().sum() + alpha * (w - old).square().sum()
        return value if b is None or old_bias is None else value + alpha * (b - old_bias).square().sum()

    if how == "proximal":
        gradients = torch.autograd.grad(objective(*leaves) if bias else objective(leaves[0], None), leaves)
    else:  # the weight at the old bias, then the bias at the new weight
        gradients = torch.autograd.grad(objective(leaves[0], old_bias), leaves[:1])
        if bias:
            gradients += torch.autograd.grad(objective(leaves[0].detach(), leaves[1]), leaves[1:])
    assert max(float(gradient.abs().max()) for gradient in gradients) < 1e-9


@pytest.mark.parametrize("name", list(ROW_LOSSES))
def test_row_losses_agree_with_autograd(name: str) -> None:
    loss = ROW_LOSSES[name]
    g = torch.Generator().manual_seed(6)
    z = (2 * torch.randn(8, 5, generator=g).double()).requires_grad_()
    v = torch.randn(8, 5, generator=g).double()
    t = loss.targets(torch.arange(8) % 5, 5, z.detach())
    (gradient,) = torch.autograd.grad(loss.values(z, t).sum(), z, create_graph=True)
    assert relative(loss.gradient(z.detach(), t), gradient) < 1e-12
    if name != "hinge":
        (product,) = torch.autograd.grad(gradient, z, v)
        curvature = loss.curvature(z.detach(), t, v)
        assert relative(curvature, (product * v).sum(1)) < 1e-12
        assert bool((curvature <= loss.bound * v.square().sum(1) + 1e-12).all())
    if name == "cross_entropy":
        assert relative(loss.values(z, t).mean(), F.cross_entropy(z, t)) < 1e-12


def test_targets_that_do_not_fit_are_refused() -> None:
    like = torch.zeros(4, 3)
    with pytest.raises(ValueError, match="y has labels 0 to 3; 3 outputs accept 0 to 2"):
        ROW_LOSSES["squared"].targets(torch.tensor([0, 1, 2, 3]), 3, like)
    with pytest.raises(ValueError, match=r"y of shape \(4, 2\) .* squared takes int64 labels \(N,\), or rows \(N, 3\)"):
        ROW_LOSSES["squared"].targets(torch.zeros(4, 2), 3, like)
    with pytest.raises(ValueError, match=r"cross_entropy takes int64 labels \(N,\)\."):
        ROW_LOSSES["cross_entropy"].targets(torch.zeros(4, 3), 3, like)
    with pytest.raises(ValueError, match="y has entries other than 0 and 1"):
        ROW_LOSSES["hinge"].targets(torch.full((4, 3), 0.5), 3, like)


@pytest.mark.parametrize("bias", [True, False])
def test_output_steps_descend_to_the_minimum(bias: bool) -> None:
    x, _ = _rows(200, 6)
    y = (x[:, 0] + 0.8 * x[:, 1] > 0).long() + (x[:, 2] > 0.5).long()
    y = torch.where(torch.rand(200, generator=torch.Generator().manual_seed(1)) < 0.2, torch.zeros_like(y), y)
    loss = ROW_LOSSES["cross_entropy"]
    weight, offset = torch.zeros(3, 6).double(), torch.zeros(3).double() if bias else None
    values = [float(loss.values(F.linear(x, weight, offset), y).sum())]
    for _ in range(20):
        weight, offset = fit_output(
            lambda: [(x[:90], y[:90]), (x[90:], y[90:])], weight, offset, loss, steps=30, damping=1e-9
        )
        values.append(float(loss.values(F.linear(x, weight, offset), y).sum()))
    assert all(after <= before + 1e-10 for before, after in itertools.pairwise(values))
    leaves = [weight.requires_grad_(), *([] if offset is None else [offset.requires_grad_()])]
    gradients = torch.autograd.grad(loss.values(F.linear(x, *leaves), y).sum(), leaves)
    assert max(float(g.abs().max()) for g in gradients) < 1e-6 * 200


def test_one_output_step_solves_the_squared_loss() -> None:
    x, t = _rows(60, 10)
    zero = torch.zeros(4, 10).double()
    weight, _ = fit_output(lambda: [(x, t)], zero, None, ROW_LOSSES["squared"], steps=1, damping=1e-12)
    assert relative(weight, torch.linalg.lstsq(x, t).solution.t()) < 1e-9


@pytest.mark.parametrize("activation", [None, nn.ReLU(), nn.Tanh(), nn.Sigmoid()])
def test_unit_fits_never_rise_and_find_a_planted_layer(activation: nn.Module | None) -> None:
    g = torch.Generator().manual_seed(8)
    x = torch.randn(300, 5, generator=g).double()
    planted, planted_bias = torch.randn(6, 5, generator=g).double(), torch.randn(6, generator=g).double()
    function = None if activation is None else closed_form(activation)
    value = (lambda z: z) if function is None else function.value
    t = value(F.linear(x, planted, planted_bias))
    weight = planted + 0.5 * torch.randn(6, 5, generator=g).double()
    bias = torch.zeros(6).double()
    losses = [(value(F.linear(x, weight, bias)) - t).square().sum(0)]
    for _ in range(40):
        weight, new = fit_units(
            lambda: [(x[:100], t[:100]), (x[100:], t[100:])], weight, bias, function, steps=3, damping=1e-9
        )
        assert new is not None
        bias = new
        losses.append((value(F.linear(x, weight, bias)) - t).square().sum(0))
        assert bool((losses[-1] <= losses[-2] + 1e-12).all())
    share = 0.05 if isinstance(activation, nn.Tanh | nn.Sigmoid) else 1e-3  # the bound is loose where units saturate
    assert float(losses[-1].max()) < share * float(losses[0].max())


@pytest.mark.parametrize("side", ["before", "after"])
@pytest.mark.parametrize("activation", [None, nn.ReLU(), nn.Tanh(), nn.GELU()])
@pytest.mark.parametrize("name", ["squared", "cross_entropy"])
def test_row_descent_never_rises_on_any_row(side: str, activation: nn.Module | None, name: str) -> None:
    if name == "cross_entropy" and side == "after":
        activation = None  # the output layer has none
    g = torch.Generator().manual_seed(9)
    w, b, v, center = (4 * torch.randn(*n, generator=g).double() for n in ((6, 5), (6,), (50, 5), (50, 5)))
    loss = ROW_LOSSES[name]
    target = torch.arange(50) % 6 if name == "cross_entropy" else torch.randn(50, 6, generator=g).double()
    function = None if activation is None else closed_form(activation)
    above, goal = CodeMap(w, b, **{side: function}), Goal(target, loss, 2.0)
    leaf = v.clone().requires_grad_()

    def total(z: Tensor) -> Tensor:
        f = (lambda u: u) if activation is None else activation
        output = F.linear(f(z), w, b) if side == "before" else f(F.linear(z, w, b))
        return 2.0 * loss.values(output, target) + 0.15 * (z - center).square().sum(1)

    (expected,) = torch.autograd.grad(total(leaf).sum(), leaf)
    torch.testing.assert_close(above(v), above.point(v, goal).output)
    assert relative(above.point(v, goal).gradient() + 0.3 * (v - center), expected) < 1e-10
    before = v.clone()
    values = [total(v)]
    for steps in (1, 3, 30):
        values.append(total(descend(v, above, goal, center, 0.3, steps)))
        assert bool((values[-1] <= values[0] + 1e-10).all())
    assert torch.equal(v, before)
    assert float(values[-1].sum()) < float(values[1].sum()) < float(values[0].sum())


def test_row_descent_is_exact_along_the_gradient_of_a_quadratic() -> None:
    g = torch.Generator().manual_seed(10)
    w, v, center, target = (torch.randn(*n, generator=g).double() for n in ((6, 5), (9, 5), (9, 5), (9, 6)))
    above, goal = CodeMap(w, None), Goal(target, ROW_LOSSES["squared"], 1.7)
    moved = descend(v, above, goal, center, 0.4, 1)
    gradient = above.point(v, goal).gradient() + 0.4 * (v - center)
    after = above.point(moved, goal).gradient() + 0.4 * (moved - center)
    assert float((gradient * after).sum(1).abs().max()) < 1e-10  # the line's lowest point


def test_a_row_that_cannot_descend_stays() -> None:
    """A kink: along the gradient the loss rises at once."""
    w = torch.tensor([[1.0], [1.0]]).double()
    above = CodeMap(w, torch.tensor([0.0, 0.0]).double(), before=closed_form(nn.ReLU()))
    goal = Goal(torch.zeros(1, 2).double(), ROW_LOSSES["squared"])
    v = torch.zeros(1, 1).double()
    assert torch.equal(descend(v, above, goal, v.clone(), 1.0, 3), v)


@pytest.mark.parametrize(
    "module", [nn.Hardtanh(-0.5, 1.5), nn.ReLU6(), nn.Hardsigmoid()], ids=lambda m: type(m).__name__
)
def test_slopes_of_clipped_activations_are_autograds(module: nn.Module) -> None:
    z = torch.tensor([-4.0, -3.0, -0.5, -0.2, 0.0, 0.3, 1.5, 2.0, 3.0, 6.0, 7.0]).double().requires_grad_()
    activation = closed_form(module)
    assert activation is not None
    (expected,) = torch.autograd.grad(module(z).sum(), z)
    value = activation.value(z.detach())
    torch.testing.assert_close(value, module(z).detach(), rtol=0, atol=1e-15)
    torch.testing.assert_close(
        activation.slope(z.detach(), value), expected, rtol=0, atol=1e-8
    )  # torch's 1/6 is float32
