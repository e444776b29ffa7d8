"""What the optimizers are built of: Gram matrices, the two sides of the ridge problem, RMSProp, local problems."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from cases import difference, relative
from references import matching_loss, nlms
from torch import Tensor, nn

from beyondprop import LocoProp
from beyondprop.optim.matching import transfer
from beyondprop.optim.projection import RowMoments, gram, moments, solve_dual, solve_primal
from beyondprop.optim.rmsprop import RMSProp

SGD = torch.optim.SGD


def _draw(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype)


def _ridge(rows: Tensor, deltas: Tensor, damping: Tensor, bias: bool) -> Tensor:
    """Least squares on X and D with sqrt(damping) I below, group by group: `(groups, out, n + bias)`; 0: the least solution."""
    solved = []
    for x, d, eps in zip(rows, deltas, damping, strict=True):
        if bias:
            x = torch.cat([x, x.new_ones(len(x), 1)], 1)
        if float(eps) > 0:
            x = torch.cat([x, eps.sqrt() * torch.eye(x.shape[1], dtype=x.dtype)])
            d = torch.cat([d, d.new_zeros(x.shape[1], d.shape[1])])
        solved.append(torch.linalg.lstsq(x, d, driver="gelsd").solution.T)
    return torch.stack(solved)


def _joined(new: tuple[Tensor, Tensor | None]) -> Tensor:
    weight, bias = new
    return weight if bias is None else torch.cat([weight, bias.unsqueeze(-1)], -1)


def _primal(rows: Tensor, deltas: Tensor, damping: Tensor | float, bias: bool, *, mirror: bool = True) -> Tensor:
    gradient, column = deltas.mT @ rows, deltas.sum(-2) if bias else None
    return _joined(solve_primal(gradient, column, moments(rows, mirror=mirror), damping))


def _dual(rows: Tensor, deltas: Tensor, damping: Tensor | float, bias: bool) -> Tensor:
    return _joined(solve_dual(rows, deltas, damping, bias=bias))


@pytest.mark.parametrize("size", [1, 3, 255, 511, 512, 513, 700, 1031])
def test_a_gram_matrix_is_the_product(size: int) -> None:
    for shape in ((7, size), (1, 7, size), (3, 7, size)):
        rows = _draw(*shape)
        expected = rows.mT @ rows
        assert difference([gram(rows)], [expected]) < 1e-13
        half = gram(rows, mirror=False)
        assert difference([half.triu()], [expected.triu()]) < 1e-13
        turned = _draw(*shape).mT.contiguous().mT
        assert difference([gram(turned)], [turned.mT @ turned]) < 1e-13


def test_only_the_upper_blocks_of_a_large_gram_matrix_are_filled_when_that_is_enough() -> None:
    rows = _draw(2, 5, 600)
    assert float(gram(rows, mirror=False)[:, 300:, :300].abs().max()) == 0
    assert torch.equal(gram(rows)[:, 300:, :300], gram(rows)[:, :300, 300:].mT)


def test_moments_add_up_over_parts_of_the_rows() -> None:
    rows = _draw(3, 11, 4)
    whole, parts = moments(rows), moments(rows[:, :5]) + moments(rows[:, 5:])
    assert difference(whole, parts) < 1e-13
    assert difference([whole.inner, whole.sums], [rows.mT @ rows, rows.sum(1)]) < 1e-13
    assert float(whole.rows) == 11
    assert difference(whole.scaled(0.5), [part / 2 for part in whole]) == 0
    assert difference([whole.mean_square()], [rows.square().sum(-1).mean(-1)]) < 1e-13
    diagonal = RowMoments(whole.inner.diagonal(dim1=-2, dim2=-1), whole.sums, whole.rows)
    assert difference([diagonal.mean_square()], [whole.mean_square()]) < 1e-13


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("out", [1, 3, 20])  # 20: more right sides than unknowns
@pytest.mark.parametrize("count", [1, 5, 7, 8, 30])
@pytest.mark.parametrize("groups", [1, 3])
def test_both_sides_are_the_ridge_solution(groups: int, count: int, out: int, bias: bool) -> None:
    rows, deltas = _draw(groups, count, 7), _draw(groups, count, out)
    damping = torch.linspace(0.3, 2.0, groups, dtype=torch.float64)
    expected = _ridge(rows, deltas, damping, bias)
    assert relative(_primal(rows, deltas, damping, bias), expected) < 1e-12
    assert relative(_dual(rows, deltas, damping, bias), expected) < 1e-12
    one = torch.full((groups,), 0.7, dtype=torch.float64)
    assert relative(_primal(rows, deltas, 0.7, bias), _ridge(rows, deltas, one, bias)) < 1e-12
    assert relative(_dual(rows, deltas, 0.7, bias), _ridge(rows, deltas, one, bias)) < 1e-12


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("damping", [0.0, 0.5])
def test_the_upper_triangle_is_enough(damping: float, bias: bool) -> None:
    rows, deltas = _draw(2, 520, 515), _draw(2, 520, 2)
    rows[..., 40:] *= 0.1
    expected = _primal(rows, deltas, damping, bias)
    assert torch.equal(_primal(rows, deltas, damping, bias, mirror=False), expected)
    below = moments(rows)
    below.inner.copy_(below.inner.triu() + torch.full_like(below.inner, 7.0).tril(-1))
    new = _joined(solve_primal(deltas.mT @ rows, deltas.sum(1) if bias else None, below, damping))
    assert relative(new, expected) < 1e-12


def test_arguments_are_left_alone() -> None:
    rows, deltas = _draw(2, 9, 4), _draw(2, 9, 3)
    for damping in (0.0, 0.5):
        for bias in (False, True):
            given = (deltas.mT @ rows, deltas.sum(1), *moments(rows), rows.clone(), deltas.clone())
            copies = [t.clone() for t in given]
            solve_primal(given[0], given[1] if bias else None, RowMoments(*given[2:5]), damping)
            solve_dual(given[5], given[6], damping, bias=bias)
            assert all(torch.equal(a, b) for a, b in zip(given, copies, strict=True))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("count", [1, 4, 7, 8, 25])
def test_without_damping_both_sides_are_the_least_solution(count: int, bias: bool) -> None:
    rows, deltas = _draw(2, count, 7), _draw(2, count, 3)
    expected = _ridge(rows, deltas, torch.zeros(2), bias)
    # A Gram matrix squares the condition number.
    assert relative(_primal(rows, deltas, 0.0, bias), expected) < 1e-9
    assert relative(_dual(rows, deltas, 0.0, bias), expected) < 1e-9


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("count", [6, 30])
def test_without_damping_rank_may_be_missing(count: int, bias: bool) -> None:
    rows, deltas = _draw(2, count, 3) @ _draw(3, 9), _draw(2, count, 4)
    rows[1, :, 2] = 0.0
    expected = _ridge(rows, deltas, torch.zeros(2), bias)
    assert relative(_primal(rows, deltas, 0.0, bias), expected) < 1e-9
    assert relative(_dual(rows, deltas, 0.0, bias), expected) < 1e-9


@pytest.mark.parametrize(("bias", "count"), [(False, 7), (True, 8), (True, 3)])
def test_without_damping_all_targets_are_met(bias: bool, count: int) -> None:
    rows, deltas = _draw(2, count, 7), _draw(2, count, 3)
    whole = torch.cat([rows, torch.ones_like(rows[..., :1])], -1) if bias else rows
    for new in (_primal(rows, deltas, 0.0, bias), _dual(rows, deltas, 0.0, bias)):
        assert relative(whole @ new.mT, deltas) < 1e-9


def test_no_inputs_no_change() -> None:
    rows, deltas = torch.zeros(2, 5, 3), torch.randn(2, 5, 4)
    assert float(_primal(rows, deltas, 0.0, False).abs().max()) == 0
    assert float(_dual(rows, deltas, 0.0, False).abs().max()) == 0
    # With a column of ones the mean is what can be met.
    for new in (_primal(rows, deltas, 0.0, True), _dual(rows, deltas, 0.0, True)):
        assert float(new[..., :-1].abs().max()) < 1e-6
        assert torch.allclose(new[..., -1], deltas.mean(1), atol=1e-6)


@pytest.mark.parametrize("damping", [0.0, 0.4])
def test_normalised_lms_is_the_case_of_one_row(damping: float) -> None:
    row, delta = _draw(6), _draw(4)
    for solve in (_primal, _dual):
        ours = solve(row.view(1, 1, -1), delta.view(1, 1, -1), damping, False)[0]
        assert relative(ours, nlms(row, delta, damping)) < 1e-12
        if damping == 0:
            assert relative(ours @ row, delta) < 1e-14


def _nearly_collinear(count: int = 17, size: int = 12) -> Tensor:
    """Whole numbers whose Gram matrix is exact in float32, and mostly too ill-conditioned for a float32 Cholesky factor."""
    base = torch.randint(900, 990, (count, 1), dtype=torch.float64)
    return base + torch.randint(-1, 2, (count, size), dtype=torch.float64) * (torch.rand(count, size) < 0.3)


def test_where_single_precision_fails_double_precision_answers() -> None:
    failures = 0
    for seed in range(20):
        torch.manual_seed(seed)
        rows, deltas = _nearly_collinear().unsqueeze(0), _draw(1, 17, 3)
        inner = rows.mT @ rows
        assert float(inner.max()) < 2**24
        if int(torch.linalg.cholesky_ex(inner.float())[1]) == 0 or float(torch.linalg.eigvalsh(inner).min()) < 0.05:
            continue
        failures += 1
        for wide in (deltas, deltas.repeat(1, 1, 5)):  # fewer and more right sides than unknowns
            gradient = (wide.mT @ rows).float()
            new, _ = solve_primal(gradient, None, moments(rows.float()), 1e-3)
            assert new.dtype is torch.float32
            assert relative(new, gradient.double() @ torch.linalg.inv(inner)) < 1e-4
    assert failures >= 3  # else the fallback was never taken


def test_a_matrix_that_is_not_definite_is_answered_by_its_positive_part() -> None:
    # As rounding in a product over a million rows can make it: double precision cannot repair the entries.
    inner = torch.tensor([[[1.0, 1.001, 0.0], [1.001, 1.0, 0.0], [0.0, 0.0, 2.0]]])
    gradient = torch.randn(1, 2, 3)
    new, _ = solve_primal(gradient, None, RowMoments(inner, torch.zeros(1, 3), torch.tensor(9.0)), 1e-6)
    values, vectors = torch.linalg.eigh(inner[0].double())
    kept = vectors[:, values > 0]
    expected = gradient[0].double() @ (kept / values[values > 0]) @ kept.T
    assert relative(new[0], expected) < 1e-5


def test_what_is_not_finite_is_no_silent_zero() -> None:
    rows, deltas = _draw(1, 5, 3), _draw(1, 5, 2)
    rows[0, 1, 2] = float("nan")
    for damping in (0.0, 1.0):
        for solve in (_primal, _dual):
            try:
                new = solve(rows, deltas, damping, True)
            except RuntimeError:  # torch's LinAlgError
                continue
            assert not bool(new.isfinite().all())


# The local optimizer of LocoProp.


@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_rmsprop_by_hand(weight_decay: float, as_tensor: bool) -> None:
    p = nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64))
    lr: Any = torch.tensor(0.1, dtype=torch.float64) if as_tensor else 0.1
    optimizer = RMSProp([p], lr, alpha=0.8, momentum=0.5, eps=0.01, weight_decay=weight_decay)
    values, v, m = [1.0, -2.0], [1.0, 1.0], [0.0, 0.0]
    for step, gradient in enumerate(([0.5, -1.0], [2.0, 0.0], [-3.0, 0.25])):
        rate = 0.1 / (step + 1)
        optimizer.param_groups[0]["lr"] = torch.tensor(rate, dtype=torch.float64) if as_tensor else rate
        p.grad = torch.tensor(gradient, dtype=torch.float64)
        optimizer.step()
        assert p.grad.tolist() == gradient
        for i, g in enumerate(gradient):
            g += weight_decay * values[i]
            v[i] = 0.8 * v[i] + 0.2 * g * g
            m[i] = 0.5 * m[i] + rate * g / (v[i] + 0.01) ** 0.5
            values[i] -= m[i]
        assert p.tolist() == pytest.approx(values, rel=1e-14)
    assert optimizer.state[p]["square_avg"].tolist() == pytest.approx(v, rel=1e-14)
    assert optimizer.state[p]["momentum_buffer"].tolist() == pytest.approx(m, rel=1e-14)


def test_the_variance_of_centered_rmsprop_is_never_negative() -> None:
    # That of constant gradients is 0 but for rounding, which is far more than eps here.
    p = nn.Parameter(torch.zeros(50))
    optimizer = RMSProp([p], 1e-9, alpha=0.9, eps=1e-12, centered=True, initial=0.0)
    for _ in range(300):
        p.grad = torch.linspace(1, 2, 50) * 1e3
        optimizer.step()
    state = optimizer.state[p]
    assert float((state["square_avg"] - state["grad_avg"] ** 2).min()) < -1e-3
    assert bool(p.isfinite().all())


def test_rmsprop_is_not_torchs() -> None:
    # A vanishing rate stops new steps, not those under way.
    p = nn.Parameter(torch.ones(1, dtype=torch.float64))
    optimizer = RMSProp([p], 0.1, momentum=0.9)
    for rate in (0.1, 0.0):
        optimizer.param_groups[0]["lr"] = rate
        p.grad = torch.ones_like(p)
        before = float(p.detach())
        optimizer.step()
    assert before - float(p.detach()) == pytest.approx(0.9 * 0.1 / (1 + 1e-5) ** 0.5)
    frozen = nn.Parameter(torch.ones(2))
    RMSProp([frozen], 0.1).step()
    assert frozen.tolist() == [1, 1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"alpha": 1.0}, r"alpha must be in \[0, 1\), got 1\.0"),
        ({"momentum": -0.1}, r"momentum must be in \[0, 1\), got -0\.1"),
        ({"eps": 0.0}, "eps must be"),
        ({"lr": -1.0}, "lr must be"),
        ({"weight_decay": -1.0}, "weight_decay must be"),
    ],
)
def test_rmsprop_refuses(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RMSProp([nn.Parameter(torch.ones(1))], **settings)  # type: ignore[arg-type]


def test_rmsprop_calls_its_closure_once() -> None:
    p = nn.Parameter(torch.ones(1))
    calls = []

    def closure() -> Tensor:
        calls.append(torch.is_grad_enabled())
        p.grad = torch.ones_like(p)
        return p.detach().sum()

    assert float(RMSProp([p], 0.1).step(closure)) == 1
    assert calls == [True]


# The squared local loss of LocoProp in closed form.

LOCAL: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": partial(SGD, momentum=0.5),
    "adam": torch.optim.Adam,
    "rmsprop": partial(RMSProp, momentum=0.9),
}
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(6, 4), (20, 6)),
    "linear without bias": (lambda: nn.Linear(6, 4, bias=False), (20, 6)),
    "tokens": (lambda: nn.Linear(6, 4), (5, 4, 6)),
    "conv": (lambda: nn.Conv2d(2, 4, 3, stride=2, padding=1), (8, 2, 7, 7)),
    "conv in groups": (lambda: nn.Conv1d(4, 4, 3, groups=2, padding=1), (9, 4, 5)),
}


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("local", LOCAL)
@pytest.mark.parametrize("name", LAYERS)
def test_the_gram_form_is_the_direct_form(name: str, local: str, dtype: torch.dtype, limit: float) -> None:
    build, shape = LAYERS[name]
    for steps in (1, 5, 20):
        torch.manual_seed(steps)
        model, x = build().to(dtype), torch.randn(shape, dtype=dtype)
        changes = []
        for form in (True, False):
            net = copy.deepcopy(model)
            how = {"local_steps": steps, "loss": "squared", "local_optimizer": LOCAL[local], "gram": form}
            optimizer = LocoProp(net, 0.003 if local != "sgd" else 0.5 / x.square().sum().item(), **how)
            for batch in (x, x.flip(0) + 1):
                optimizer.zero_grad()
                net(batch).sin().mean().backward()
                optimizer.step()
            after = zip(net.parameters(), model.parameters(), strict=True)
            changes.append(torch.cat([(p - q).flatten() for p, q in after]))
        assert relative(*changes) < limit
        assert float(changes[0].norm().detach()) > 0


def _squared(steps: int, lr: float, prox: float = 0.0, bias: bool = True) -> tuple[Tensor, Tensor, Tensor, float]:
    """A layer's change, with the bias as last column; its gradient; its inputs with a column of ones; target_lr."""
    torch.manual_seed(3)
    model, x = nn.Linear(4, 3, bias=bias).double(), torch.randn(15, 4, dtype=torch.float64)
    before = copy.deepcopy(model)
    optimizer = LocoProp(
        model,
        lr,
        target_lr=2.5,
        local_steps=steps,
        loss="squared",
        local_optimizer=SGD,
        local_schedule="constant",
        prox=prox,
    )
    model(x).sin().sum(1).mean().backward()
    optimizer.step()
    parts = [p.detach() - q.detach() for p, q in zip(model.parameters(), before.parameters(), strict=True)]
    gradients = [g for p in model.parameters() if (g := p.grad) is not None]
    if not bias:
        return parts[0], gradients[0], x, 2.5
    whole = [torch.cat([w, b.unsqueeze(1)], 1) for w, b in (parts, gradients)]
    return whole[0], whole[1], torch.cat([x, torch.ones(15, 1, dtype=torch.float64)], 1), 2.5


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_gradient_steps_are_a_geometric_series(steps: int, bias: bool) -> None:
    # V_T = W - h gamma grad_W sum_{j<T} (I - h C)^j
    lr = 0.01
    change, gradient, x, gamma = _squared(steps, lr, bias=bias)
    factor = torch.eye(x.shape[1], dtype=torch.float64) - lr * x.T @ x
    series = sum(torch.linalg.matrix_power(factor, j) for j in range(steps))
    assert relative(change, -lr * gamma * gradient @ series) < 1e-12


@pytest.mark.parametrize("bias", [True, False])
def test_many_gradient_steps_end_at_the_exact_solution(bias: bool) -> None:
    change, gradient, x, gamma = _squared(5000, 0.02, bias=bias)
    exact, _ = solve_primal(gradient.unsqueeze(0), None, moments(x.unsqueeze(0)), 0.0)
    assert relative(change, -gamma * exact[0]) < 1e-10
    change, gradient, x, gamma = _squared(5000, 0.02, prox=3.0, bias=bias)
    exact, _ = solve_primal(gradient.unsqueeze(0), None, moments(x.unsqueeze(0)), 3.0)
    assert relative(change, -gamma * exact[0]) < 1e-10


@pytest.mark.parametrize("f", ["identity", "relu", "tanh", "sigmoid", "softplus", "gelu", "softmax"])
def test_small_local_steps_never_raise_the_local_objective(f: str) -> None:
    model, x = nn.Linear(5, 4).double(), _draw(12, 5)
    before = copy.deepcopy(model)
    objectives: list[float] = []

    def objective() -> float:
        linear = sum(
            (g * (p - w)).sum() for p, w, g in zip(model.parameters(), before.parameters(), gradients, strict=True)
        )
        return float(3.0 * linear + matching_loss(model(x), before(x), transfer(f)))

    def schedule(step: int, steps: int) -> float:
        objectives.append(objective())
        return 1.0

    lr = 0.5 / float((x.square().sum() + 12).detach())
    optimizer = LocoProp(
        model, lr, target_lr=3.0, local_steps=60, local_optimizer=SGD, local_schedule=schedule, transfer={"": f}
    )
    model(x).sin().sum(1).mean().backward()
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    optimizer.step()
    changes = torch.tensor(objectives, dtype=torch.float64).diff()
    assert objectives[0] == 0
    assert float(changes.max()) < 1e-13
    assert objectives[-1] < -1e-3
