"""The sweep over codes: deltas of every stage, the relaxed energy, sparsity, the published code optimizer."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from cases import SGD, assignments, blobs, mlp, relative
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from references import literal_sweep
from torch import Tensor, nn

from beyondprop import AltMin, CodeProblem, Codes, Descent, LocalRule
from beyondprop.credit import code_solvers
from beyondprop.stages.losses import OutputLoss


@settings(deadline=None, max_examples=15)
@given(
    widths=st.lists(st.integers(2, 7), min_size=1, max_size=3),
    damping=st.floats(0.01, 20),
    mu=st.floats(0.01, 20),
    normalize=st.booleans(),
    activation=st.sampled_from(["relu", "tanh", "gelu"]),
    rows=st.integers(1, 4),
)
def test_the_sweep_is_the_literal_one(
    widths: list[int], damping: float, mu: float, normalize: bool, activation: str, rows: int
) -> None:
    torch.manual_seed(1)
    model = mlp(5, *widths, 3, activation=activation).double()
    x, y = blobs(rows, 5, dtype=torch.float64)
    credit = Codes(damping=damping, mu=mu, normalize=normalize)
    found = assignments(model, nn.CrossEntropyLoss(), credit, x, y)
    stages = [model[:1], *[model[i : i + 2] for i in range(1, len(model), 2)]]
    expected = literal_sweep(stages, x, y, lambda *_: damping, mu, normalize)
    assume(all(bool(delta.isfinite().all()) for delta in expected))  # a dead sample has no step factor
    assert [a.index for a in found] == list(range(len(expected) - 1, -1, -1))
    for a, delta in zip(found, expected, strict=True):
        torch.testing.assert_close(a.delta, delta.detach(), rtol=1e-9, atol=1e-12)
    for above, below in pairwise(found):
        assert above.input_delta is not None
        assert torch.equal(above.input_delta, below.delta)
    assert found[-1].input_delta is None
    assert found[0].loss is not None
    assert all(a.loss is None for a in found[1:])


def test_stages_with_and_without_closed_forms_agree() -> None:
    model = mlp(6, 8, 7, 3, activation="tanh").double()
    blocks = nn.Sequential(
        model[0], nn.Sequential(nn.Identity(), model[1], model[2]), nn.Sequential(model[3], model[4])
    )
    x, y = blobs(9, dtype=torch.float64)
    for solver in ("line_search", "gradient", "cg", "exact", code_solvers.momentum(3, 0.1)):
        for l1 in (0.0, 0.01):
            closed = assignments(model, nn.CrossEntropyLoss(), Codes(solver, l1=l1), x, y)
            local = assignments(blocks, nn.CrossEntropyLoss(), Codes(solver, l1=l1), x, y, cuts="block")
            assert max(relative(a.delta, b.delta) for a, b in zip(local, closed, strict=True)) < 1e-9


@pytest.mark.parametrize("damping", [1.0, 1e-3])
def test_rows_without_a_delta_do_not_shrink_the_others(damping: float) -> None:
    x, y = blobs(12, dtype=torch.float64)
    model = mlp(6, 8, 8, 3, activation="tanh").double()
    loss = nn.CrossEntropyLoss(ignore_index=-100, reduction="sum")
    padded = y.clone()
    padded[6:] = -100
    for solver in ("line_search", "cg", "exact"):
        alone, joined = (
            assignments(model, loss, Codes(solver, damping=damping, mu=damping), *rows)
            for rows in ((x[:6], y[:6]), (x, padded))
        )
        for a, b in zip(joined, alone, strict=True):
            assert relative(a.delta[:6], b.delta) < 1e-9
            assert not bool(a.delta[6:].any())


def test_top_code_gets_mu_and_hidden_codes_damping() -> None:
    seen: list[CodeProblem] = []

    def spy(problem: CodeProblem) -> Tensor:
        seen.append(problem)
        return problem.gradient

    x, y = blobs(4, dtype=torch.float64)
    assignments(mlp(6, 5, 4, 3).double(), nn.CrossEntropyLoss(), Codes(spy, mu=3.0, damping=0.5), x, y)
    assert [(p.damping, p.loss is not None, p.normalize) for p in seen] == [(3.0, True, True), (0.5, False, True)]


def test_energy_by_hand() -> None:
    """Two samples, two units, identity: c = x W0^T, o = c W1^T; MSE mean over 2 outputs; mu 2."""
    layers = [nn.Linear(2, 2, bias=False, dtype=torch.float64) for _ in range(2)]
    with torch.no_grad():
        layers[0].weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 2.0]]))
        layers[1].weight.copy_(torch.tensor([[1.0, 1.0], [0.0, 1.0]]))
    model = nn.Sequential(*layers)
    x = torch.tensor([[1.0, 1.0], [2.0, 0.0]], dtype=torch.float64)
    y = torch.zeros(2, 2, dtype=torch.float64)
    # Codes (1, 2), (2, 0); outputs (3, 2), (2, 0). Gradients of a sample's mean: themselves. g = -(o W1) = -(3, 5), -(2, 2).
    # |W1 g|^2 = 64 + 25, 16 + 4; Hessian 1: t = 34 / (2 * 34 + 89), 8 / (2 * 8 + 20).
    t = torch.tensor([34 / 157, 8 / 36], dtype=torch.float64)
    g = torch.tensor([[-3.0, -5.0], [-2.0, -2.0]], dtype=torch.float64)
    rule = AltMin(model, nn.MSELoss(), SGD, mu=2.0, normalize=False)
    result = rule.step(x, y, diagnostics=True)
    code = torch.tensor([[1.0, 2.0], [2.0, 0.0]], dtype=torch.float64) + t[:, None] * g
    out = torch.stack([code.sum(1), code[:, 1]], 1)
    penalty = (t**2 * torch.tensor([34.0, 8.0], dtype=torch.float64)).mean()
    expected = float(out.square().mean() + 2.0 / 2 * penalty)
    assert float(result.loss) == pytest.approx((9 + 4 + 4) / 4)
    assert result.energy is not None
    assert float(result.energy) == pytest.approx(expected, rel=1e-12)
    assert set(result.stages) == {"0", "1"}
    assert float(result.stages["0"]["delta_norm"]) == pytest.approx(float((t[:, None] * g).norm()))


@pytest.mark.parametrize("solver", ["line_search", "cg", "exact"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_energy_falls_where_steps_are_bounded(solver: str, reduction: str) -> None:
    model = mlp(6, 10, 10, 10, 3, activation="tanh").double()
    rule = AltMin(model, nn.CrossEntropyLoss(reduction=reduction), SGD, code_solver=solver, normalize=False)
    x, y = blobs(30, dtype=torch.float64)
    for _ in range(3):
        result = rule.backward(x, y, diagnostics=True)
        assert result.energy is not None
        assert float(result.energy) < float(result.loss)


def test_the_energy_of_a_sum_is_the_batch_size_times_that_of_the_mean() -> None:
    x, y = blobs(6, dtype=torch.float64)
    model = mlp(6, 5, 4, 3).double()
    energies = []
    for reduction in ("mean", "sum"):
        rule = AltMin(model, nn.CrossEntropyLoss(reduction=reduction), SGD, normalize=False)
        result = rule.backward(x, y, diagnostics=True)
        assert result.energy is not None
        energies.append(float(result.energy))
    assert energies[1] == pytest.approx(6 * energies[0], rel=1e-12)


@settings(deadline=None, max_examples=30)
@given(l1=st.floats(0.001, 2), seed=st.integers(0, 50))
def test_l1_shrinks_moved_codes_toward_zero(l1: float, seed: int) -> None:
    torch.manual_seed(seed)
    model = mlp(5, 6, 4, 3).double()
    x, y = blobs(4, 5, dtype=torch.float64)
    plain, _, _ = assignments(model, nn.CrossEntropyLoss(), Codes("gradient"), x, y)
    sparse, *_ = assignments(model, nn.CrossEntropyLoss(), Codes("gradient", l1=l1), x, y)
    assert plain.input_delta is not None
    assert sparse.input_delta is not None
    code = plain.pullback.input
    wanted = code + plain.input_delta
    expected = wanted.sign() * (wanted.abs() - l1).clamp_min(0)  # the proximal map of l1 |c|_1
    torch.testing.assert_close(code + sparse.input_delta, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"solver": "newton"},
            "solver must be one of 'fitted', 'line_search', 'gradient', 'cg', 'exact', got 'newton'",
        ),
        ({"damping": -1.0}, "damping must be a finite number >= 0, got -1.0"),
        ({"mu": 0.0}, "mu must be a finite number > 0, got 0.0"),
        ({"mu": float("nan")}, "mu must be a finite number > 0"),
        ({"l1": -0.1}, "l1 must be a finite number >= 0"),
    ],
)
def test_arguments_out_of_range(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Codes(**arguments)


def test_arguments_of_solvers() -> None:
    with pytest.raises(TypeError, match="a name or a function CodeProblem -> delta, got int"):
        Codes(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="iterations must be an integer >= 1"):
        code_solvers.cg(0)
    with pytest.raises(ValueError, match="limit must be an integer >= 1"):
        code_solvers.exact(0)
    with pytest.raises(ValueError, match="steps must be an integer >= 1"):
        code_solvers.momentum(0, 0.1)
    with pytest.raises(ValueError, match="lr must be a finite number > 0"):
        code_solvers.momentum(1, 0.0)
    with pytest.raises(ValueError, match=r"momentum must be .*1"):
        code_solvers.momentum(1, 0.1, momentum=1.0)


def test_mu_grows_to_its_limit_and_is_state() -> None:
    rule = AltMin(mlp(6, 5, 3), nn.CrossEntropyLoss(), SGD, mu=0.01, mu_growth=1.1, mu_limit=0.012)
    for expected in (0.011, 0.012, 0.012):
        rule.end_epoch()
        assert rule.credit.mu == pytest.approx(expected)
    other = AltMin(mlp(6, 5, 3), nn.CrossEntropyLoss(), SGD)
    other.load_state_dict(rule.state_dict())
    assert other.credit.mu == pytest.approx(0.012)


@pytest.mark.parametrize("changes", [{"mu_growth": 0.5}, {"mu_growth": -1.0}, {"mu_limit": float("nan")}])
def test_a_schedule_of_mu_that_would_do_nothing_is_refused(changes: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(changes))):
        AltMin(mlp(6, 5, 3), nn.CrossEntropyLoss(), SGD, **changes)  # type: ignore[arg-type]


def test_output_loss_is_reused_at_moved_outputs() -> None:
    point = OutputLoss(nn.MSELoss()).at(torch.zeros(2, 2), torch.ones(2, 2))
    assert float(point.again(torch.ones(2, 2)).value) == 0.0


def test_mu_grows_in_every_rule_that_holds_codes() -> None:
    """The growth is the credit's own: `AltMin` and any other pair with `Codes` advance it alike, and resume it."""
    codes = Codes(mu=0.01, mu_growth=1.5, mu_limit=0.02)
    rule = LocalRule(mlp(6, 5, 3), nn.CrossEntropyLoss(), codes, Descent(SGD))
    seen = []
    for _ in range(3):
        rule.end_epoch()
        seen.append(codes.mu)
    assert seen == pytest.approx([0.015, 0.02, 0.02])
    again = LocalRule(mlp(6, 5, 3), nn.CrossEntropyLoss(), Codes(mu=0.01), Descent(SGD))
    again.load_state_dict(rule.state_dict())
    assert again.credit.state_dict() == {"mu": 0.02}
    above = Codes(mu=0.1, mu_growth=2.0, mu_limit=0.05)
    above.end_epoch()
    assert above.mu == 0.1  # the limit ends the growth, and takes nothing back


def test_codes_serve_one_rule() -> None:
    codes = Codes()
    LocalRule(mlp(6, 5, 3), nn.CrossEntropyLoss(), codes, Descent(SGD))
    with pytest.raises(ValueError, match="This Codes serves another rule already; one instance serves one rule"):
        LocalRule(mlp(6, 5, 3), nn.CrossEntropyLoss(), codes, Descent(SGD))
