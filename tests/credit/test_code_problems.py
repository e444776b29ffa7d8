"""Code solvers against the explicit solution of every sample's quadratic problem."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import blobs, jacobian, mlp, relative
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from beyondprop import Chain, CodeProblem
from beyondprop.credit import code_solvers
from beyondprop.stages.losses import OutputLoss

LOSSES: dict[str, tuple[Any, Callable[[Tensor], Tensor]]] = {
    "ce": (nn.CrossEntropyLoss(), lambda y: y),
    "mse": (nn.MSELoss(), lambda y: F.one_hot(y, 3).double()),
    "bce": (nn.BCEWithLogitsLoss(), lambda y: F.one_hot(y, 3).double()),
    "ce_sum": (nn.CrossEntropyLoss(reduction="sum"), lambda y: y),
    "smooth": (nn.CrossEntropyLoss(label_smoothing=0.1), lambda y: y),
}


def _problem(width: int, out: int, damping: float, loss: str | None = None, normalize: bool = False) -> CodeProblem:
    """A code of `width` units below a tanh stage of `out` units; the top problem where a loss is given."""
    out = 3 if loss else out
    model = mlp(4, width, out, activation="tanh").double()
    x, y = blobs(7, 4, dtype=torch.float64)
    with torch.no_grad():
        trace = Chain(model).record(x, push=True)
        stage = trace[1]
        point = None
        delta = torch.randn_like(stage.output)
        if loss is not None:
            function, targets = LOSSES[loss]
            point = OutputLoss(function).at(stage.output, targets(y))
            delta = point.cotangent.neg()
        return CodeProblem(stage, delta, stage(delta), damping, point, normalize)


def _systems(problem: CodeProblem) -> tuple[Tensor, Tensor]:
    """`J^T H J + damping I` and `J^T delta` of every sample, from autograd's own Jacobian and Hessian."""
    j = jacobian(problem.stage.stage.forward, problem.stage.input)
    h = torch.eye(j.shape[1], dtype=j.dtype).expand(len(j), -1, -1)
    if problem.loss is not None:
        eye = torch.eye(j.shape[1], dtype=j.dtype)
        h = torch.stack([problem.loss.hessian(e.expand(len(j), -1)) for e in eye], -1)
    system = j.mT @ h @ j + problem.damping * torch.eye(j.shape[2], dtype=j.dtype)
    return system, (j.mT @ problem.delta.unsqueeze(-1)).squeeze(-1)


@pytest.mark.parametrize("damping", [1e-3, 1.0, 50.0])
@pytest.mark.parametrize(("width", "out"), [(3, 6), (6, 3), (4, 4), (1, 5), (5, 1)])
def test_exact_solves_the_hidden_problem(width: int, out: int, damping: float) -> None:
    problem = _problem(width, out, damping)
    system, right = _systems(problem)
    assert relative(code_solvers.exact()(problem), torch.linalg.solve(system, right)) < 1e-10


@pytest.mark.parametrize("loss", list(LOSSES))
@pytest.mark.parametrize("width", [2, 3, 6])
@pytest.mark.parametrize("mu", [0.01, 1.0])
def test_exact_solves_the_top_problem(width: int, loss: str, mu: float) -> None:
    problem = _problem(width, 3, mu, loss)
    system, right = _systems(problem)
    expected = torch.linalg.solve(system, right)
    assert relative(code_solvers.exact()(problem), expected) < 1e-10
    assert relative(code_solvers.cg(width + 2)(problem), expected) < 1e-8


@pytest.mark.parametrize(("width", "out"), [(3, 6), (6, 3), (4, 4)])
def test_exact_without_damping_is_the_pseudo_inverse(width: int, out: int) -> None:
    problem = _problem(width, out, 0.0)
    j = jacobian(problem.stage.stage.forward, problem.stage.input)
    expected = (torch.linalg.pinv(j) @ problem.delta.unsqueeze(-1)).squeeze(-1)
    assert relative(code_solvers.exact()(problem), expected) < 1e-8


def test_exact_works_on_images() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Tanh(), nn.Conv2d(2, 2, 2), nn.Flatten(), nn.Linear(8, 3)).double()
    with torch.no_grad():
        stage = Chain(model).record(torch.randn(3, 1, 5, 5, dtype=torch.float64), push=True)[1]
        delta = torch.randn_like(stage.output)
        problem = CodeProblem(stage, delta, stage(delta), 0.5, None)
        d = code_solvers.exact()(problem)
    assert d.shape == stage.input.shape
    j = jacobian(stage.stage.forward, stage.input)
    system = j.mT @ j + 0.5 * torch.eye(18, dtype=j.dtype)
    right = (j.mT @ delta.flatten(1).unsqueeze(-1)).squeeze(-1)
    assert relative(d.flatten(1), torch.linalg.solve(system, right)) < 1e-10


@pytest.mark.parametrize("loss", [None, "ce"])
def test_conjugate_gradients_approach_the_exact_solution(loss: str | None) -> None:
    problem = _problem(6, 8, 0.3, loss)
    exact = code_solvers.exact()(problem)
    errors = [max(1e-12, relative(code_solvers.cg(k)(problem), exact)) for k in (1, 2, 4, 8)]
    assert errors[0] > 1e-3
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-10


@pytest.mark.parametrize("loss", [None, *LOSSES])
def test_one_conjugate_gradient_step_is_the_line_search(loss: str | None) -> None:
    problem = _problem(5, 4, 0.7, loss)
    one = code_solvers.cg(1)(problem)
    assert relative(code_solvers.line_search(problem), one) < 1e-12


@settings(deadline=None, max_examples=40)
@given(
    width=st.integers(1, 7),
    out=st.integers(1, 7),
    damping=st.floats(0, 20),
    loss=st.sampled_from([None, "ce", "mse", "bce"]),
    seed=st.integers(0, 99),
)
def test_line_search_is_the_minimum_along_the_gradient(
    width: int, out: int, damping: float, loss: str | None, seed: int
) -> None:
    torch.manual_seed(seed)
    problem = _problem(width, out, damping if loss is None else damping + 0.1, loss)
    g = problem.gradient.clone()
    image = problem.stage.push(g)
    slope = (g * g).sum(1)
    curvature = (image * problem.curve(image)).sum(1) + problem.damping * slope

    def objective(t: Tensor) -> Tensor:
        return -t * slope + 0.5 * t**2 * curvature

    d = code_solvers.line_search(problem)
    found = (d * g).sum(1) / slope
    torch.testing.assert_close(d, found[:, None] * g, rtol=1e-10, atol=1e-12)  # along g
    for shift in (0.99, 0.999, 1.001, 1.01):  # a numeric scan
        assert bool((objective(found) < objective(shift * found)).all())


@pytest.mark.parametrize("loss", [None, "ce"])
@pytest.mark.parametrize(
    "solver", [code_solvers.line_search, code_solvers.cg(3), code_solvers.exact(), code_solvers.momentum(5, 0.3)]
)
def test_normalize_keeps_the_size_and_the_direction_of_each(solver: Any, loss: str | None) -> None:
    torch.manual_seed(3)
    free = solver(_problem(5, 4, 2.0, loss))
    torch.manual_seed(3)
    problem = _problem(5, 4, 2.0, loss, normalize=True)
    g = problem.gradient.clone()
    kept = solver(problem)
    ratio = kept.norm() / free.norm()
    torch.testing.assert_close(kept, ratio * free, rtol=1e-10, atol=1e-14)  # one factor for the whole batch
    if solver is code_solvers.line_search:  # divided by its mean step factor
        factors = ((kept * g).sum(1) / (g * g).sum(1)).detach()
        assert float(factors.mean()) == pytest.approx(1.0, abs=1e-12)
    else:
        assert float(kept.detach().norm(dim=1).mean()) == pytest.approx(float(g.detach().norm(dim=1).mean()), rel=1e-12)


@pytest.mark.parametrize("name", ["line_search", "cg", "exact", "momentum"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_samples_without_a_delta_stay_where_they_are(name: str, dtype: torch.dtype) -> None:
    solver = code_solvers.momentum(3, 0.1) if name == "momentum" else code_solvers.BY_NAME[name]()
    model = mlp(4, 5, 3).to(dtype)
    with torch.no_grad():
        stage = Chain(model).record(torch.randn(6, 4, dtype=dtype), push=True)[1]
        delta = torch.randn_like(stage.output)
        delta[2:4] = 0.0
        for w in (delta, torch.zeros_like(delta)):
            for damping in (1.0, 0.0) if name != "momentum" else (1.0,):
                for normalize in (False, True):
                    d = solver(CodeProblem(stage, w, stage(w), damping, None, normalize))
                    assert bool(d.isfinite().all())
                    assert not bool(d[2:4].any())


def test_a_batch_that_is_normalised_together_is_one_system() -> None:
    """With batch statistics, samples' problems are coupled: conjugate gradients solve the whole batch's."""
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).double()
    with torch.no_grad():
        stage = Chain(model).record(torch.randn(5, 4, dtype=torch.float64), push=True)[1]
        assert stage.stage.couples_batch
        delta = torch.randn_like(stage.output)
        d = code_solvers.cg(15)(CodeProblem(stage, delta, stage(delta), 0.5, None))
    twin = nn.Sequential(*stage.stage.modules)
    full = torch.autograd.functional.jacobian(twin, stage.input).reshape(20, 15)  # type: ignore[union-attr]
    expected = torch.linalg.solve(full.T @ full + 0.5 * torch.eye(15, dtype=full.dtype), full.T @ delta.flatten())
    assert relative(d.flatten(), expected) < 1e-8


def test_a_concave_loss_gives_finite_deltas() -> None:
    torch.manual_seed(0)
    model = mlp(4, 8, 3).double()
    x, y = torch.randn(6, 4, dtype=torch.float64), torch.randn(6, 3, dtype=torch.float64)
    with torch.no_grad():
        model[2].weight.mul_(5)  # type: ignore[operator]
        stage = Chain(model).record(x, push=True)[1]
        point = OutputLoss(lambda o, t: -(torch.exp(-(o - t).square().sum(1))).mean()).at(stage.output, y)
        delta = point.cotangent.neg()
        for solver in (code_solvers.line_search, code_solvers.cg(3)):
            d = solver(CodeProblem(stage, delta, stage(delta), 1e-3, point))
            assert float(d.norm()) < 1e6 * float(delta.norm())


@pytest.mark.parametrize("mu_below", [False, True])
def test_the_lenet_code_divides_the_upper_term_of_every_code_by_mu(mu_below: bool) -> None:
    torch.manual_seed(0)
    model = mlp(4, 8, 3).double()
    with torch.no_grad():
        stage = Chain(model).record(torch.randn(6, 4, dtype=torch.float64))[1]
        delta = torch.randn_like(stage.output)
        solver = code_solvers.momentum(1, 0.5, momentum=0.0, mu_below=mu_below)
        d = solver(CodeProblem(stage, delta, stage(delta), 1.0, None, mu=0.01))
        # One step of 0.5 on mean((delta - J d)^2) [/ mu] + mean(d^2), from d = 0.
        expected = 0.5 * (2 / delta.numel()) * stage(delta) / (0.01 if mu_below else 1.0)
    torch.testing.assert_close(d, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("damping", [0.0, 1e-3, 1.0])
@pytest.mark.parametrize(("width", "out", "top"), [(3, 6, False), (6, 3, False), (5, 3, True)])
@pytest.mark.parametrize("name", ["exact", "cg"])
def test_half_precision_is_solved_in_float32(
    name: str, width: int, out: int, top: bool, damping: float, dtype: torch.dtype
) -> None:
    if damping == 0 and name == "cg":
        pytest.skip("no damping, no few iterations")
    torch.manual_seed(0)
    model = mlp(4, width, out, activation="tanh").to(dtype)
    x, y = blobs(7, 4)
    deltas = []
    for m in (model, copy.deepcopy(model).float()):
        with torch.no_grad():
            stage = Chain(m).record(x.to(dtype).to(next(m.parameters()).dtype), push=True)[1]
            point = OutputLoss(nn.CrossEntropyLoss()).at(stage.output, y) if top else None
            delta = torch.ones_like(stage.output) if point is None else point.cotangent.neg()
            delta = delta * (1 if top else 200)  # a sum of squares above 65504
            solver = code_solvers.exact() if name == "exact" else code_solvers.cg(3)
            deltas.append(solver(CodeProblem(stage, delta, stage(delta), damping, point)))
    assert deltas[0].dtype is dtype
    assert bool(deltas[0].isfinite().all())
    if damping == 1.0:
        assert relative(deltas[0].float(), deltas[1]) < 0.1
