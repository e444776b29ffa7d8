"""What a user may do to a rule and its inputs: other memory layouts, foreign states, changed models, wrong batches."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from cases import SGD, blobs, difference, mlp
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from beyondprop import (
    AltMin,
    Descent,
    DirectFeedbackAlignment,
    FeedbackAlignment,
    LocalRule,
    Memory,
    UnsupportedModelError,
    alignment,
    data,
    evaluate,
    fit,
)
from beyondprop.credit import code_solvers
from beyondprop.optim.factories import adam


def _rule(name: str, model: nn.Module, loss: nn.Module, optimizer: Any = None) -> LocalRule:
    if name == "am":
        return AltMin(model, loss, optimizer)
    credit = FeedbackAlignment() if name == "fa" else DirectFeedbackAlignment()
    return LocalRule(model, loss, credit, Descent(optimizer))


every_rule = pytest.mark.parametrize("name", ["am", "fa", "dfa"])


class Heads(nn.Module):
    """A block whose weight gradient comes in another memory layout than the weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(0.3 * torch.randn(2, 6, 4))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("nd,hdk->nhk", x, self.weight).flatten(1)


@every_rule
def test_images_in_any_memory_layout_give_the_same_step(name: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 2)
    ).double()
    twin = copy.deepcopy(model)
    x, y = torch.rand(20, 12, 12, 3, dtype=torch.float64).permute(0, 3, 1, 2), torch.randint(2, (20,))
    for net, images in ((model, x), (twin, x.contiguous())):
        rule = _rule(name, net, nn.CrossEntropyLoss(), adam(1e-2))
        for _ in range(3):
            rule.step(images, y)
    assert difference(model.parameters(), twin.parameters()) < 1e-12


def test_fused_steps_of_a_block_are_the_plain_ones() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Heads(), nn.ReLU(), nn.Linear(8, 3)).double()
    twin = copy.deepcopy(model)
    x, y = blobs(12)
    x = x.double()
    for net, fused in ((model, True), (twin, False)):
        rule = AltMin(net, nn.CrossEntropyLoss(), partial(torch.optim.Adam, lr=1e-2, fused=fused))
        rule.backward(x, y)
        assert all(p.grad is not None and p.grad.stride() == p.stride() for p in net.parameters())
        rule.update()
    assert difference(model.parameters(), twin.parameters()) < 1e-12


@every_rule
def test_a_state_of_other_widths_is_refused_and_changes_nothing(name: str) -> None:
    x, y = blobs(12)
    narrow, wide = (_rule(name, mlp(6, width, width, 3), nn.CrossEntropyLoss()) for width in (8, 64))
    narrow.step(x, y)
    wide.step(x, y)
    before = copy.deepcopy(wide.state_dict())
    with pytest.raises(ValueError, match=r"model with parameters of shapes \[\[8, 6\].*this one's are \[\[64, 6\]"):
        wide.load_state_dict(narrow.state_dict())
    assert repr(wide.state_dict()) == repr(before)
    wide.step(x, y)


class Clipped(torch.optim.SGD):
    """An optimizer with an attribute that torch does not copy."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, lr=0.1)
        self.clip = 1.0

    def step(self, closure: Any = None) -> Any:
        assert self.clip == 1.0
        return super().step(closure)


@pytest.mark.parametrize("settings", [{"nonfinite": "deferred"}, {"weight_solver": Clipped}])
def test_copies_have_all_that_an_optimizer_has(settings: dict[str, Any]) -> None:
    digits = data.load("digits")
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 20), nn.ReLU(), nn.Linear(20, 10))
    rule = AltMin(model, nn.CrossEntropyLoss(), **settings)
    fit(rule, digits, epochs=0.1, batch_size=50)
    found = alignment(rule, digits.x_train[:20], digits.y_train[:20], of="update")
    assert all(compared.cosine > 0.1 for compared in found.values())


def test_a_rule_says_that_it_is_not_pickled() -> None:
    with pytest.raises(TypeError, match=r"AltMin cannot be pickled; save the model's state_dict\(\) and the rule's"):
        pickle.dumps(AltMin(mlp(6, 5, 3), nn.CrossEntropyLoss()))


@pytest.mark.parametrize("solver", ["line_search", "cg", "exact", "gradient"])
def test_one_output_may_be_flat(solver: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 1), nn.Flatten(0)).double()
    twin = copy.deepcopy(model)
    twin[3] = nn.Identity()
    x, y = blobs(12)
    x = x.double()
    AltMin(model, nn.MSELoss(), SGD, code_solver=solver).step(x, y.double())
    AltMin(twin, nn.MSELoss(), SGD, code_solver=solver).step(x, y.double()[:, None])
    assert difference(model.parameters(), twin.parameters()) < 1e-12


@pytest.mark.parametrize("weight", [None, [1.0, 9.0], [2.0, 0.5]])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_many_rows_are_evaluated_as_one_batch(weight: Any, reduction: str) -> None:
    torch.manual_seed(0)
    model = nn.Linear(2, 2).double()
    weight = None if weight is None else torch.tensor(weight, dtype=torch.float64)
    loss = nn.CrossEntropyLoss(weight, reduction=reduction)
    x = torch.randn(3000, 2, dtype=torch.float64)
    y = torch.cat([torch.full((1030,), -100), torch.zeros(700).long(), torch.ones(1270).long()])
    found = evaluate(model, (x, y), loss)
    with torch.no_grad():
        output = model(x)
    whole = loss(output, y)
    assert found["loss"] == pytest.approx(float(whole if reduction == "mean" else whole / len(x)), rel=1e-12)
    assert found["accuracy"] == pytest.approx(float((output.argmax(1) == y)[1030:].double().mean()), rel=1e-12)


@pytest.mark.parametrize("change", ["hook", "prune", "parametrize", "assign"])
def test_modules_that_were_changed_later_are_refused(change: str) -> None:
    model: Any = mlp(6, 5, 3)
    rule = AltMin(model, nn.CrossEntropyLoss())
    x, y = blobs(12)
    rule.step(x, y)
    if change == "hook":
        model[0].register_forward_hook(lambda *_: None)
    elif change == "prune":
        prune.l1_unstructured(model[0], "weight", 0.5)
    elif change == "parametrize":
        parametrizations.weight_norm(model[0])
    else:
        model[0].weight = nn.Parameter(torch.zeros_like(model[0].weight))
    with pytest.raises(
        UnsupportedModelError,
        match=r"of this Sequential (got a hook|was (exchanged|added|taken out)).*build the rule anew",
    ):
        rule.step(x, y)


def test_finite_gradients_of_half_precision_pass() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 80), nn.ReLU(), nn.Linear(80, 3)).half()
    x, y = (torch.rand(200, 6) * 10).half(), torch.full((200, 3), -5.0).half()
    rule = AltMin(model, nn.MSELoss(reduction="sum"), partial(torch.optim.SGD, lr=1e-5))
    rule.backward(x, y)
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert any(not bool(g.sum().isfinite()) for g in gradients)  # their sum is what overflows
    assert all(bool(g.isfinite().all()) for g in gradients)
    rule.discard()
    rule.step(x, y)
    assert all(bool(p.isfinite().all()) for p in model.parameters())


@pytest.mark.parametrize(
    ("y", "message"),
    [
        (torch.tensor([0, 1, 2, 7]), "y has labels from 0 to 7; 3 outputs accept 0 to 2"),
        (torch.tensor([0, 1, 2, -1]), "y has labels from -1 to 2; 3 outputs accept 0 to 2"),
        (torch.zeros(4, 1).long(), r"y has shape \(4, 1\); cross-entropy on the output \(4, 3\) takes .* shape \(4,\)"),
    ],
)
def test_labels_that_do_not_fit_are_named(y: Tensor, message: str) -> None:
    rule = AltMin(mlp(6, 5, 3), nn.CrossEntropyLoss())
    with pytest.raises(ValueError, match=message):
        rule.step(blobs(4)[0], y)
    rule.step(blobs(4)[0], torch.tensor([0, -100, 2, 1]))  # a row to ignore


@pytest.mark.parametrize("hidden", [4, 12])
def test_exact_codes_under_autocast(hidden: int) -> None:
    torch.manual_seed(0)
    rule = AltMin(mlp(6, hidden, 8, 3).float(), nn.CrossEntropyLoss(), code_solver="exact")
    x, y = blobs(12)
    with torch.autocast("cpu", torch.bfloat16):
        result = rule.step(x.float(), y)
    assert bool(result.loss.isfinite())


def test_wrong_surroundings_are_named() -> None:
    x, y = blobs(12)
    with torch.inference_mode(), pytest.raises(ValueError, match=r"torch.inference_mode\(\) is on"):
        AltMin(mlp(6, 5, 3), nn.CrossEntropyLoss()).step(x, y)
    with pytest.raises(TypeError, match="whose step takes no closure, got LBFGS"):
        AltMin(mlp(6, 5, 3), nn.CrossEntropyLoss(), torch.optim.LBFGS)
    with pytest.raises(TypeError, match="loss must return a tensor, got float"):
        AltMin(mlp(6, 5, 3), lambda output, y: 1.0).step(x, y)  # type: ignore[arg-type, return-value]
    with pytest.raises(ValueError, match="loss must follow the output by operations with a gradient"):
        AltMin(mlp(6, 5, 3), lambda output, y: output.detach().sum()).step(x, y)
    with pytest.raises(UnsupportedModelError, match=r"takes float32 or float64; the model has torch.bfloat16"):
        AltMin(mlp(6, 5, 3).bfloat16(), nn.CrossEntropyLoss(), Memory())


def test_fit_gives_learning_rates_back() -> None:
    digits = data.load("digits")
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 20), nn.ReLU(), nn.Linear(20, 10))
    rule = AltMin(model, nn.CrossEntropyLoss(), partial(torch.optim.SGD, lr=0.1))
    group = rule.optimizers[0].param_groups[0]
    for lr in (0.1, 0.02):  # a rate that is set by hand is the next fit's
        group["lr"] = lr
        fit(rule, digits, epochs=0.1, batch_size=50)
        assert group["lr"] == lr
        assert "initial_lr" not in group


def test_solvers_below_a_recurrent_stage_agree() -> None:
    from beyondprop.nn import ElmanCell, Recurrent

    def gradients(solver: Any, cell: Callable[..., nn.Module]) -> list[Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), Recurrent(cell(5, 7)), nn.Tanh(), nn.Linear(7, 3)).double()
        x, y = torch.randn(4, 5, 6).double(), torch.randint(3, (4,))
        AltMin(model, nn.CrossEntropyLoss(), code_solver=solver).backward(x, y)
        return [p.grad for p in model.parameters() if p.grad is not None]

    for cell in (ElmanCell, nn.GRUCell):
        exact, conjugate = gradients("exact", cell), gradients(code_solvers.cg(25), cell)
        for a, b in zip(exact, conjugate, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
