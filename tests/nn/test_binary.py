"""Sign and Step: forward a threshold, backward by a target rule, alike in autograd and in closed form."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from cases import relative
from torch import Tensor, nn

from beyondprop import AltMin
from beyondprop.nn import ElmanCell, Recurrent, Sign, Step, register_target_rule
from beyondprop.nn.binary import TARGET_RULES, Threshold
from beyondprop.solvers.descent import Descent
from beyondprop.stages.affine import AffineStage
from beyondprop.stages.block import BlockStage
from beyondprop.stages.pipeline import PipelineStage

every_rule = pytest.mark.parametrize("rule", list(TARGET_RULES))
every_unit = pytest.mark.parametrize("unit", [Sign, Step])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_forward_is_a_threshold(dtype: torch.dtype) -> None:
    z = torch.tensor([-3.0, -0.1, -0.0, 0.0, 0.1, 3.0, float("inf"), -float("inf")], dtype=dtype)
    signs = Sign()(z)
    assert signs.dtype == dtype
    assert signs.tolist() == [-1, -1, 1, 1, 1, 1, 1, -1]
    assert Step()(z).tolist() == [0, 0, 1, 1, 1, 1, 1, 0]
    assert bool(Sign()(torch.tensor([float("nan")])).isnan())


def _expected(rule: str, z: Tensor, gradient: Tensor) -> Tensor:
    target = -gradient.sign()  # a unit is to send what lowers the loss
    factors = {
        "identity": torch.ones_like(z),
        "hardtanh": (z.abs() <= 1).double(),
        "tanh": 1 / z.cosh() ** 2,
        "hinge": (z * target <= 1).double(),
    }
    return gradient * factors[rule]


@every_unit
@every_rule
def test_backward_is_the_rules(rule: str, unit: type[Threshold]) -> None:
    z = torch.linspace(-2, 2, 21, dtype=torch.float64).requires_grad_()
    g = torch.randn(21, dtype=torch.float64)
    (found,) = torch.autograd.grad(unit(rule)(z), z, g)
    assert torch.allclose(found, _expected(rule, z.detach(), g), rtol=1e-14, atol=0)


def test_a_hinge_moves_units_on_the_wrong_side_however_far_and_lets_the_others_rest() -> None:
    z = torch.tensor([-5.0, -0.5, 0.5, 5.0], requires_grad=True)
    (found,) = torch.autograd.grad(Sign("hinge")(z).sum(), z)  # all shall send less: -1
    assert found.tolist() == [0, 1, 1, 1]
    (found,) = torch.autograd.grad(-Sign("hinge")(z).sum(), z)
    assert found.tolist() == [-1, -1, -1, 0]


def test_it_is_a_module() -> None:
    model = nn.Sequential(nn.Linear(3, 4), Sign("identity"), nn.Linear(4, 1))
    twin = copy.deepcopy(model)
    assert "target_rule='identity'" in repr(model)
    x = torch.randn(5, 3)
    assert torch.equal(model(x), twin(x))
    model(x).sum().backward()
    assert bool(model[0].weight.grad.any())  # type: ignore[union-attr]


STAGES = {
    "affine": lambda unit: (AffineStage, [unit, nn.Linear(6, 5)]),
    "pipeline": lambda unit: (PipelineStage, [unit, nn.Linear(6, 5), nn.LayerNorm(5)]),
}


@every_unit
@every_rule
@pytest.mark.parametrize("form", list(STAGES))
def test_closed_forms_are_those_of_autograd(form: str, rule: str, unit: type[Threshold]) -> None:
    torch.manual_seed(1)
    kind, modules = STAGES[form](unit(rule))
    named = [(str(i), m.double()) for i, m in enumerate(modules)]
    z = 1.5 * torch.randn(7, 6, dtype=torch.float64)
    delta, tangent = torch.randn(7, 5, dtype=torch.float64), torch.randn(7, 6, dtype=torch.float64)
    closed, block = kind("s", named).record(z, push=True), BlockStage("s", named).record(z, push=True)
    assert relative(closed.output, block.output) < 1e-14
    assert relative(closed(delta.clone()), block(delta.clone())) < 1e-12
    assert relative(closed.push(tangent.clone()), block.push(tangent.clone())) < 1e-12
    other = torch.randn(7, 5, dtype=torch.float64)  # the first delta has set the targets: the second sees the same map
    assert relative(closed(other.clone()), block(other.clone())) < 1e-12
    pulled, pushed = closed(other.clone()).detach(), closed.push(tangent.clone()).detach()
    assert abs(float((pulled * tangent).sum() - (other * pushed).sum())) < 1e-10


@every_rule
@pytest.mark.parametrize("modules", ["affine", "blocks"])
def test_gradient_codes_are_backpropagation_through_the_target_rule(rule: str, modules: str) -> None:
    torch.manual_seed(2)
    between = [nn.Softsign()] if modules == "blocks" else []  # a module without closed form
    model = nn.Sequential(
        nn.Linear(6, 8), *between, Sign(rule), nn.Linear(8, 8), *between, Step(rule), nn.Linear(8, 3)
    ).double()
    twin = copy.deepcopy(model)
    x, y = torch.randn(12, 6, dtype=torch.float64), torch.randint(3, (12,))
    nn.CrossEntropyLoss()(twin(x), y).backward()
    am = AltMin(model, nn.CrossEntropyLoss(), Descent(lambda p: torch.optim.SGD(p, lr=0.1)), code_solver="gradient")
    before = [p.detach().clone() for p in model.parameters()]
    assert {type(stage) for stage in am.chain.stages[1:]} == {BlockStage if between else AffineStage}
    am.step(x, y)
    moved = [(old - p.detach()) / 0.1 for old, p in zip(before, model.parameters(), strict=True)]
    for found, p in zip(moved, twin.parameters(), strict=True):
        assert p.grad is not None
        assert bool(p.grad.any())
        assert relative(found, p.grad) < 1e-12


@every_rule
def test_recurrent_signs(rule: str) -> None:
    torch.manual_seed(3)
    model = nn.Sequential(Recurrent(ElmanCell(4, 6, Sign(rule))), Sign(rule), nn.Linear(6, 3)).double()
    twin = copy.deepcopy(model)
    x, y = torch.randn(9, 5, 4, dtype=torch.float64), torch.randint(3, (9,))
    nn.CrossEntropyLoss()(twin(x), y).backward()
    am = AltMin(model, nn.CrossEntropyLoss(), code_solver="gradient")
    am.backward(x, y)
    for found, expected in zip(model.parameters(), twin.parameters(), strict=True):
        assert found.grad is not None
        assert expected.grad is not None
        assert bool(expected.grad.any())
        assert relative(found.grad, expected.grad) < 1e-12


@pytest.fixture
def own_rule() -> Iterator[str]:
    register_target_rule("own", lambda z, target: 2 * torch.ones_like(z))
    yield "own"
    del TARGET_RULES["own"]


def test_own_rules(own_rule: str) -> None:
    z = torch.randn(5, requires_grad=True)
    (found,) = torch.autograd.grad(Sign(own_rule)(z).sum(), z)
    assert found.tolist() == [2.0] * 5
    with pytest.raises(ValueError, match="There is a target rule 'own' already; registered are hardtanh"):
        register_target_rule("own", lambda z, target: z)
    with pytest.raises(TypeError, match="A target rule is a function"):
        register_target_rule("other", 3)  # type: ignore[arg-type]


def test_unknown_rules() -> None:
    with pytest.raises(
        ValueError, match="target_rule must be one of 'hardtanh', 'identity', 'tanh', 'hinge', got 'relu'"
    ):
        Sign("relu")
