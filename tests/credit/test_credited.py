"""Credit behind `loss.backward()`: equal to the rule's own steps, in whatever loop."""

from __future__ import annotations

import copy
import pickle
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from cases import CE
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from beyondprop import (
    Codes,
    Credit,
    Credited,
    Descent,
    DifferenceTargetPropagation,
    DirectFeedbackAlignment,
    FeedbackAlignment,
    LocalRule,
    RelativeDamping,
    TargetPropagation,
)
from beyondprop.credit import code_solvers
from beyondprop.nn import ElmanCell, Recurrent, Residual, Sign

SGD = partial(torch.optim.SGD, lr=0.03)

# fmt: off
NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (lambda: nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 10), nn.Tanh(), nn.Linear(10, 5)), (8,)),
    "conv": (lambda: nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout(0.2), nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.ReLU(),
        nn.Flatten(), nn.Linear(54, 5),
    ), (1, 12, 12)),
    "residual": (lambda: nn.Sequential(
        nn.Linear(8, 8), Residual(nn.Sequential(nn.ReLU(), nn.Linear(8, 8)), nn.Identity(), nn.Identity()), nn.ReLU(),
        nn.Linear(8, 5),
    ), (8,)),
    "transformer": (lambda: nn.Sequential(
        nn.Linear(8, 8), nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True), nn.Flatten(), nn.Linear(32, 5),
    ), (4, 8)),
    "recurrent": (lambda: nn.Sequential(Recurrent(ElmanCell(8, 7)), nn.Linear(7, 5)), (4, 8)),
    "signs": (lambda: nn.Sequential(nn.Linear(8, 12), Sign(), nn.Linear(12, 10), Sign("hinge"), nn.Linear(10, 5)), (8,)),
}
MADE: dict[str, Callable[[], Credit]] = {
    "line_search": Codes,
    "unnormalized": lambda: Codes(normalize=False, mu=0.5),
    "relative": lambda: Codes(damping=RelativeDamping(2.0)),
    "gradient": lambda: Codes("gradient"),
    "cg": lambda: Codes("cg"),
    "exact": lambda: Codes("exact"),
    "published": lambda: Codes(code_solvers.momentum(5, 0.3), normalize=False),
    "sparse": lambda: Codes(l1=1e-3),
    "fa": FeedbackAlignment,
    "dfa": DirectFeedbackAlignment,
    "tp": lambda: TargetPropagation(optimizer=SGD),
    "dtp": lambda: DifferenceTargetPropagation(optimizer=SGD),
}
LOSSES: dict[str, tuple[nn.Module, Callable[[int], Tensor]]] = {
    "ce": (CE, lambda n: torch.arange(n) % 5),
    "ce_sum": (nn.CrossEntropyLoss(reduction="sum"), lambda n: torch.arange(n) % 5),
    "ce_ignored": (CE, lambda n: torch.where(torch.arange(n) % 4 == 1, -100, torch.arange(n) % 5)),
    "mse": (nn.MSELoss(), lambda n: torch.linspace(-1, 1, n * 5, dtype=torch.float64).view(n, 5)),
    "bce": (nn.BCEWithLogitsLoss(), lambda n: torch.linspace(0, 1, n * 5, dtype=torch.float64).view(n, 5)),
}
# fmt: on
NO_INVERSE = {"residual", "transformer"}


def _apart(one: nn.Module, two: nn.Module) -> float:
    pairs = [*zip(one.parameters(), two.parameters(), strict=True), *zip(one.buffers(), two.buffers(), strict=True)]
    return max(float((p - q).detach().abs().max()) for p, q in pairs)


def _pair(net: str, credit: str, loss: str = "ce", n: int = 12) -> tuple[LocalRule, Credited, Tensor, Tensor]:
    build, shape = NETS[net]
    if net == "conv" and credit == "exact":
        pytest.skip("a sample has no Jacobian of its own behind BatchNorm")
    if net in NO_INVERSE and credit in ("tp", "dtp"):
        pytest.skip("no inverse of such a stage by default")
    torch.manual_seed(0)
    model = build().double()
    function, targets = LOSSES[loss]
    rule = LocalRule(copy.deepcopy(model), function, MADE[credit](), Descent(SGD))
    return rule, Credited(model, MADE[credit](), function), torch.randn(n, *shape, dtype=torch.float64), targets(n)


@pytest.mark.parametrize("loss", ["ce", "mse", "bce"])
@pytest.mark.parametrize("credit", MADE)
@pytest.mark.parametrize("net", NETS)
def test_steps_are_those_of_the_rule(net: str, credit: str, loss: str) -> None:
    rule, model, x, y = _pair(net, credit, loss)
    optimizer = SGD(model.parameters())
    for seed in range(2 if credit == "tp" else 4):  # without the difference, what rounding leaves grows tenfold a step
        torch.manual_seed(seed)
        rule.step(x, y)
        torch.manual_seed(seed)
        optimizer.zero_grad()
        LOSSES[loss][0](model(x), y).backward()
        optimizer.step()
    assert _apart(rule.model, model.model) < 1e-12


@pytest.mark.parametrize("net", NETS)
def test_one_sweep_over_all_stages_is_one_stage_after_the_other(net: str) -> None:
    torch.manual_seed(0)
    start = NETS[net][0]().double()
    x, y = torch.randn(9, *NETS[net][1], dtype=torch.float64), torch.arange(9) % 5
    found: list[list[Tensor]] = []
    for asks in (False, True):  # where the input asks for a gradient, deltas come down stage by stage
        model = Credited(copy.deepcopy(start), Codes(), CE)
        torch.manual_seed(1)
        output = model(x.clone().requires_grad_(asks))
        assert ("Swept" in repr(output.grad_fn)) is not asks
        loss = CE(output, y)
        found += [[*torch.autograd.grad(loss, [*model.parameters()], retain_graph=True)] for _ in range(2)]
    for gradients in found[1:]:
        for g, h in zip(found[0], gradients, strict=True):
            torch.testing.assert_close(g, h, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("loss", ["ce_sum", "ce_ignored"])
@pytest.mark.parametrize("credit", ["line_search", "published", "sparse", "tp"])
def test_sums_and_ignored_targets(credit: str, loss: str) -> None:
    rule, model, x, y = _pair("mlp", credit, loss)
    optimizer = SGD(model.parameters())
    for seed in range(3):
        torch.manual_seed(seed)
        rule.step(x, y)
        torch.manual_seed(seed)
        optimizer.zero_grad()
        LOSSES[loss][0](model(x), y).backward()
        optimizer.step()
    assert _apart(rule.model, model.model) < 1e-12


@pytest.mark.parametrize("credit", MADE)
def test_a_scaled_loss_scales_the_gradients(credit: str) -> None:
    """GradScaler multiplies the loss and divides the gradients; accumulation divides the loss."""
    _, model, x, y = _pair("mlp", credit)
    other = copy.deepcopy(model)
    torch.manual_seed(1)
    CE(model(x), y).backward()
    torch.manual_seed(1)
    (CE(other(x), y) * 1024.0).backward()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert p.grad is not None
        assert q.grad is not None
        torch.testing.assert_close(q.grad / 1024.0, p.grad, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("credit", ["tp", "published", "sparse"])
def test_where_the_scale_does_not_show_it_is_given(credit: str) -> None:
    build, shape = NETS["mlp"]
    x, y = torch.randn(9, *shape, dtype=torch.float64), torch.randn(9, 5, dtype=torch.float64)
    model = build().double()
    grads = []
    for scale in (1.0, 512.0):
        torch.manual_seed(2)
        made = Credited(copy.deepcopy(model), MADE[credit](), nn.MSELoss(), loss_scale=lambda scale=scale: scale)
        (nn.functional.mse_loss(made(x), y) * scale).backward()
        grads.append([p.grad / scale for p in made.parameters() if p.grad is not None])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("credit", MADE)
def test_accumulation_is_that_of_the_rule(credit: str) -> None:
    rule, model, x, y = _pair("mlp", credit)
    optimizer = SGD(model.parameters())
    for start in (0, 6):
        torch.manual_seed(start)
        rule.backward(x[start : start + 6], y[start : start + 6], scale=0.5)
        torch.manual_seed(start)
        (CE(model(x[start : start + 6]), y[start : start + 6]) / 2).backward()
    rule.update()
    optimizer.step()
    assert _apart(rule.model, model.model) < 1e-14


@pytest.mark.parametrize("credit", MADE)
def test_two_passes_in_one_backward_are_two_batches(credit: str) -> None:
    """Batches of unequal size whose losses are summed before one backward pass, as contrastive and siamese losses do."""
    if credit in ("tp", "dtp"):
        pytest.skip("the corruption of two passes comes in another order")
    _, model, x, y = _pair("mlp", credit)
    other = copy.deepcopy(model)
    for rows in (slice(0, 4), slice(4, 12)):
        CE(other(x[rows]), y[rows]).backward()
    (CE(model(x[:4]), y[:4]) + CE(model(x[4:]), y[4:])).backward()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=0, atol=1e-14)


@pytest.mark.parametrize("credit", ["line_search", "fa", "dfa", "dtp"])
def test_looking_at_gradients_changes_nothing(credit: str) -> None:
    _, model, x, y = _pair("mlp", credit)
    torch.manual_seed(0)
    loss = CE(model(x), y)
    looked = torch.autograd.grad(loss, list(model.model.parameters()), retain_graph=True)
    assert all(p.grad is None for p in model.parameters())
    torch.manual_seed(0)
    loss.backward()
    for p, g in zip(model.model.parameters(), looked, strict=True):
        torch.testing.assert_close(p.grad, g, rtol=0, atol=0)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_a_graph_is_free_when_its_backward_pass_is_over() -> None:
    _, model, x, y = _pair("mlp", "line_search")
    seen: list[Any] = []
    record = type(model.chain[0]).record

    def noted(stage: Any, z: Tensor, *, push: bool = False) -> Any:
        pullback = record(stage, z, push=push)
        seen.append(weakref.ref(pullback))
        return pullback

    for stage in model.chain:
        stage.record = partial(noted, stage)  # type: ignore[method-assign]
    loss = CE(model(x), y)
    assert all(ref() is not None for ref in seen)
    loss.backward()
    assert all(ref() is None for ref in seen), "kept although the graph was freed"


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("credit", ["line_search", "fa"])
def test_checkpointing_around_it(credit: str, reentrant: bool) -> None:
    _, model, x, y = _pair("conv", credit, n=8)
    other = copy.deepcopy(model)
    x = x.requires_grad_()
    for made in (model, other):
        torch.manual_seed(3)
        output = checkpoint(made, x, use_reentrant=reentrant) if made is other else made(x)
        CE(output, y).backward()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=0, atol=1e-15)


def test_names_modes_and_state_are_the_models() -> None:
    for credit in ("line_search", "fa", "dfa"):
        rule, model, x, y = _pair("conv", credit)
        plain = rule.model
        assert [n for n, _ in model.named_parameters()] == [n for n, _ in plain.named_parameters()]
        assert [n for n, _ in model.named_buffers()] == [n for n, _ in plain.named_buffers()]
        own = [key for key in model.state_dict() if not key.startswith("_credit.")]
        assert own == list(plain.state_dict())
        assert (own == list(model.state_dict())) == (credit != "fa")
        model.eval()
        assert not any(m.training for m in model.model.modules())
        model.load_state_dict(plain.state_dict())  # a plain checkpoint
        with torch.no_grad():
            assert torch.equal(model(x), plain.eval()(x))
        model.train()
        CE(model(x), y).backward()
        other = _pair("conv", credit)[1]
        other.load_state_dict(model.state_dict())
        for key, value in model.credit.tensors().items():
            assert torch.equal(other.credit.tensors()[key], value)
        assert model.float()(x.float()).dtype is torch.float32
        assert next(model.model.parameters()).dtype is torch.float32


def test_what_a_credit_learns_is_among_the_parameters() -> None:
    _, model, _, _ = _pair("mlp", "dtp")
    names = [name for name, _ in model.named_parameters()]
    assert names[-2:] == ["_credit.0.weight", "_credit.0.bias"]
    assert len(names) == len(list(model.model.parameters())) + 2
    other = _pair("mlp", "dtp")[1]
    other.load_state_dict(model.state_dict())
    with pytest.raises(ValueError, match="Codes has no state of its own, got feedback"):
        _pair("mlp", "line_search")[1].load_state_dict(_pair("mlp", "fa")[1].state_dict())


def test_without_gradients_the_model_itself_runs() -> None:
    _, model, x, _ = _pair("mlp", "line_search")
    calls = []
    model.model.forward = lambda z: calls.append(1) or z  # type: ignore[method-assign]
    with torch.no_grad():
        model(x)
    with torch.inference_mode():
        model(x)
    assert len(calls) == 2


def test_copies_are_apart_and_pickles_refused() -> None:
    for credit in ("line_search", "fa", "dtp"):
        _, model, x, y = _pair("mlp", credit)
        again = copy.deepcopy(model)
        assert not set(again.parameters()) & set(model.parameters())
        assert again.chain.model is again.model
        for made in (model, again):
            torch.manual_seed(0)
            CE(made(x), y).backward()
        for p, q in zip(model.parameters(), again.parameters(), strict=True):
            assert torch.equal(p.grad, q.grad)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"Credited cannot be pickled.*save its state_dict"):
        pickle.dumps(model)


def test_frozen_stages_and_inputs_that_require_a_gradient() -> None:
    rule, model, x, y = _pair("mlp", "line_search")
    for made in (rule.model, model):
        for name, p in made.named_parameters():
            p.requires_grad_(not name.startswith("0."))
    rule.step(x, y)
    optimizer = SGD(p for p in model.parameters() if p.requires_grad)
    CE(model(x), y).backward()
    optimizer.step()
    assert _apart(rule.model, model.model) < 1e-14
    for credit in MADE:
        _, model, x, y = _pair("mlp", credit)
        x.requires_grad_()
        CE(model(x), y).backward()
        assert x.grad is not None
        assert bool(x.grad.abs().sum() > 0)
        alone = Credited(copy.deepcopy(model.model), "fa")
        (g,) = torch.autograd.grad(CE(alone(x), y), x)
        assert g.shape == x.shape


@pytest.mark.parametrize("credit", ["line_search", "fa", "dtp"])
def test_autocast_as_in_the_rule(credit: str) -> None:
    build, shape = NETS["mlp"]
    torch.manual_seed(0)
    model = build()
    rule = LocalRule(copy.deepcopy(model), CE, MADE[credit](), Descent(SGD))
    made = Credited(model, MADE[credit](), CE)
    optimizer, x, y = SGD(made.parameters()), torch.randn(12, *shape), torch.arange(12) % 5
    for seed in range(3):
        torch.manual_seed(seed)
        with torch.autocast("cpu", torch.bfloat16):
            rule.step(x, y)
        torch.manual_seed(seed)
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = CE(made(x), y)
        loss.backward()
        optimizer.step()
    assert _apart(rule.model, made.model) < 1e-4


@pytest.mark.parametrize("asks", [False, True])
@pytest.mark.parametrize("what", ["a step", "the input"])
def test_what_changes_before_the_backward_pass_is_refused_as_by_torch(what: str, asks: bool) -> None:
    _, model, x, y = _pair("mlp", "line_search")
    optimizer = SGD(model.parameters())
    output = model(x.requires_grad_(asks))
    losses = [CE(output, y), CE(2 * output, y)]
    losses[0].backward(retain_graph=True)
    if what == "a step":
        optimizer.step()
    else:
        x.detach().zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        losses[1].backward()


@pytest.mark.parametrize("credit", ["line_search", "fa"])
@pytest.mark.parametrize("frozen", [False, True])
def test_a_head_behind_what_runs_in_half_precision(credit: str, frozen: bool) -> None:
    torch.manual_seed(0)
    body, head = nn.Linear(8, 12), nn.Sequential(nn.Linear(12, 10), nn.ReLU(), nn.Linear(10, 5))
    if frozen:
        head[0].weight.requires_grad_(False)
    model = Credited(head, MADE[credit](), CE)
    with torch.autocast("cpu", torch.bfloat16):
        loss = CE(model(body(torch.randn(9, 8))).float(), torch.arange(9) % 5)
    loss.backward()
    grads = [p.grad for p in (*head.parameters(), *body.parameters()) if p.requires_grad]
    assert all(g is not None and g.dtype is torch.float32 and bool(g.isfinite().all()) for g in grads)


def test_a_step_on_fake_tensors_leaves_nothing_behind() -> None:
    _, model, x, y = _pair("mlp", "gradient", n=77)
    with FakeTensorMode(allow_non_fake_inputs=True):
        CE(copy.deepcopy(model)(x), y).backward()
    CE(model(x), y).backward()
    expected = copy.deepcopy(model.model)
    expected.zero_grad()
    CE(expected(x), y).backward()
    for p, q in zip(model.model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


def test_a_gradient_that_is_not_finite_is_passed_on_for_whoever_skips_the_step() -> None:
    _, model, x, y = _pair("mlp", "line_search")
    CE(model(x * float("nan")), y).backward()
    assert all(p.grad is not None and not bool(p.grad.isfinite().all()) for p in model.parameters())
