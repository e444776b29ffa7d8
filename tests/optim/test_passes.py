"""Which backward passes a step of LocoProp and AffineProjection goes by: those that added to the gradients, in any order."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import blobs, difference, equal, mlp, state
from local_runs import RUNS, Run, every_run, update
from torch import Tensor, nn
from torch.optim import SGD
from torch.utils.checkpoint import checkpoint

from beyondprop import LocoProp, UnsupportedModelError

D = torch.float64
CE = nn.CrossEntropyLoss()
X, Y = blobs(12, dtype=D)


def _net() -> nn.Sequential:
    torch.manual_seed(0)
    return mlp(6, 8, 5, 3, activation="tanh").double()


def _trained(kind: str, passes: Callable[[nn.Module, Run], Any]) -> dict[str, Tensor]:
    """Return the weights after the step that follows `passes`, which must have moved them all."""
    model = _net()
    start = state(model)
    run = RUNS[kind](model)
    passes(model, run)
    update(model, run)
    assert all(difference([p], [start[n]]) > 1e-7 for n, p in model.named_parameters())
    if kind in ("matching", "quadratic"):
        assert isinstance(run, LocoProp)
        assert run.transfers.keys() == {"0", "2", "4"}
    return state(model)


def _same(kind: str, passes: Callable[[nn.Module, Run], Any], right: Callable[[nn.Module, Run], Any]) -> None:
    assert difference(_trained(kind, passes).values(), _trained(kind, right).values()) < 1e-12


def _plain(model: nn.Module, run: Run) -> None:
    CE(model(X), Y).backward()


# ---- the order of the four calls -----------------------------------------------------------------------------------------


@every_run
@pytest.mark.parametrize("where", ["model", "own"])
def test_gradients_may_be_cleared_anywhere_before_the_backward_pass(kind: str, where: str) -> None:
    """Three steps: the orders (zero, forward, backward, step), (forward, zero, ...) and (forward, backward, step, zero)."""
    ends = []
    for order in ("zfbs", "fzbs", "fbsz"):
        model = _net()
        run = RUNS[kind](model)
        zero = run.zero_grad if where == "own" and isinstance(run, LocoProp) else model.zero_grad
        for _ in range(3):
            loss: Any = None
            for call in order:
                if call == "z":
                    zero()
                elif call == "f":
                    loss = CE(model(X), Y)
                elif call == "b":
                    loss.backward()
                else:
                    update(model, run)
        ends.append(state(model))
        if kind == "matching":
            assert isinstance(run, LocoProp)
            assert run.transfers == {"0": "tanh", "2": "tanh", "4": "softmax"}
    assert equal(ends[0], ends[1])
    assert equal(ends[0], ends[2])


def test_a_pass_for_a_metric_between_forward_and_backward_changes_nothing() -> None:
    def passes(model: nn.Module, run: Run) -> None:
        loss = CE(model(X), Y)
        model(2 * X)  # with a graph of its own
        loss.backward()

    _same("matching", passes, _plain)


def test_nothing_asks_the_interpreter_for_all_objects(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gc, "get_objects", lambda *_: pytest.fail("all objects of the interpreter were scanned"))
    _trained("matching", _plain)


def test_a_function_that_cannot_be_read_is_a_warning_by_name_once() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            h: Any = checkpoint(self.b, torch.tanh(self.a(x)), use_reentrant=True)
            return self.c(torch.tanh(h))

    model = Net().double()
    optimizer = LocoProp(model)
    CE(model(X), Y).backward()
    with pytest.warns(UserWarning, match=r"behind the layers \['b'\] could not be read.*transfer=\{'b': 'tanh'\}"):
        optimizer.step()
    assert optimizer.transfers == {"a": "tanh", "b": "identity", "c": "softmax"}
    CE(model(X), Y).backward()
    optimizer.step()
    named = LocoProp(model, transfer={"b": "tanh"})
    CE(model(X), Y).backward()
    named.step()
    assert named.transfers == {"a": "tanh", "b": "tanh", "c": "softmax"}


def test_a_gradient_that_is_given_to_backward_is_named() -> None:
    model = _net()
    optimizer = LocoProp(model)
    out = model(X)
    out.backward(torch.ones_like(out))
    with pytest.warns(UserWarning, match=r"behind the layers \['4'\] could not be read"):
        optimizer.step()


def test_a_loss_that_is_set_after_the_forward_pass_is_no_silent_fallback() -> None:
    model = _net()
    optimizer = LocoProp(model, loss="squared")
    CE(model(X), Y).backward()
    for group in optimizer.param_groups:
        group["loss"] = "matching"
    with pytest.warns(UserWarning, match=r"behind the layers \['0', '2', '4'\] could not be read"):
        optimizer.step()
    optimizer.zero_grad()
    CE(model(X), Y).backward()
    optimizer.step()
    assert optimizer.transfers == {"0": "tanh", "2": "tanh", "4": "softmax"}


@pytest.mark.parametrize(
    "keep",
    [
        lambda out, loss: out.softmax(1),
        lambda out, loss: out.sigmoid(),
        lambda out, loss: nn.functional.mse_loss(out, torch.zeros_like(out)),
        lambda out, loss: loss * 2,
        lambda out, loss: (out.argmax(1), out.log_softmax(1), out.relu()),
    ],
)
@pytest.mark.parametrize("loss", ["ce", "bce", "mse"])
def test_what_is_kept_for_a_metric_has_no_say(keep: Callable[..., Any], loss: str) -> None:
    function: Any = {
        "ce": lambda out: CE(out, Y),
        "bce": lambda out: nn.functional.binary_cross_entropy_with_logits(out, torch.full_like(out, 0.3)),
        "mse": lambda out: nn.functional.mse_loss(out, torch.full_like(out, 0.3)),
    }[loss]
    expected = {"ce": "softmax", "bce": "sigmoid", "mse": "identity"}[loss]
    model = _net()
    optimizer = LocoProp(model)
    hidden = model[:2](X)
    out = model[2:](hidden)
    value = function(out)
    kept = keep(out, value), hidden.square().mean()
    value.backward()
    optimizer.step()
    assert optimizer.transfers == {"0": "tanh", "2": "tanh", "4": expected}
    del kept


# ---- what counts as a pass -----------------------------------------------------------------------------------------------


def _two(out: Tensor) -> tuple[Tensor, Tensor]:
    return CE(out, Y), nn.functional.mse_loss(out, torch.full_like(out, 0.2))


def _summed(model: nn.Module, run: Run) -> None:
    a, b = _two(model(X))
    (a + b).backward()


def _a_pass_a_loss(model: nn.Module, run: Run) -> None:
    a, b = _two(model(X))
    a.backward(retain_graph=True)
    b.backward()


def _looking(model: nn.Module, run: Run) -> None:
    x = X.clone().requires_grad_()
    a, b = _two(model(x))
    torch.autograd.grad(a, x, retain_graph=True)
    torch.autograd.grad(b, list(model.parameters()), retain_graph=True)
    (a + b).backward(retain_graph=True)
    torch.autograd.grad(a, [x, *model.parameters()])


def _for_an_input(model: nn.Module, run: Run) -> None:
    x = X.clone().requires_grad_()
    a, b = _two(model(x))
    a.backward(inputs=[x], retain_graph=True)
    (a + b).backward()


def _by_layers(model: nn.Module, run: Run) -> None:
    a, b = _two(model(X))
    for p in model.parameters():
        (a + b).backward(inputs=[p], retain_graph=True)


def _by_weights_and_biases(model: nn.Module, run: Run) -> None:
    a, b = _two(model(X))
    for part in ("bias", "weight"):
        inputs = [p for name, p in model.named_parameters() if name.endswith(part)]
        a.backward(inputs=inputs, retain_graph=True)
        b.backward(inputs=inputs, retain_graph=True)


@every_run
@pytest.mark.parametrize(
    "passes", [_a_pass_a_loss, _looking, _for_an_input, _by_layers, _by_weights_and_biases], ids=lambda f: f.__name__
)
def test_the_step_is_that_of_the_summed_loss(kind: str, passes: Callable[[nn.Module, Run], Any]) -> None:
    _same(kind, passes, _summed)


@every_run
def test_a_graph_may_be_used_again_after_its_calls_are_forgotten(kind: str) -> None:
    def passes(model: nn.Module, run: Run) -> None:
        loss = CE(model(X), Y)
        loss.backward(retain_graph=True)
        run.clear()
        model.zero_grad()
        loss.backward()
        assert [len(unit.calls) for unit in run._capture.units] == [1, 1, 1]

    _same(kind, passes, _plain)


@every_run
def test_a_graph_of_the_gradient_is_refused_by_name(kind: str) -> None:
    model = _net()
    run = RUNS[kind](model)
    with pytest.raises(UnsupportedModelError, match="create_graph=True reached layer '4'"):
        CE(model(X), Y).backward(create_graph=True)
    x = X.clone().requires_grad_()
    with pytest.raises(UnsupportedModelError, match="create_graph=True reached layer '4'"):
        torch.autograd.grad(model(x).sum(), x, create_graph=True)  # of a constant gradient, too
    del run


@every_run
def test_gradients_that_did_not_come_from_backward_are_named(kind: str) -> None:
    model = _net()
    run = RUNS[kind](model)
    gradients = torch.autograd.grad(CE(model(X), Y), list(model.parameters()))
    for p, g in zip(model.parameters(), gradients, strict=True):
        p.grad = g
    before = state(model)
    with pytest.raises(UnsupportedModelError, match=r"its gradient did not come from backward\(\)"):
        run.step()
    assert equal(before, state(model))


# ---- passes that led to no step ------------------------------------------------------------------------------------------


@every_run
@pytest.mark.parametrize("none", [True, False])
def test_calls_go_when_their_gradients_have_gone(kind: str, none: bool) -> None:
    def passes(model: nn.Module, run: Run) -> None:
        loss = None
        for scale in (3.0, 2.0, 1.0):  # the forward pass comes before the gradients of the last one are thrown away
            loss = CE(model(scale * X), Y)
            model.zero_grad(set_to_none=none)
            loss.backward()
            assert [len(unit.calls) for unit in run._capture.units] == [1, 1, 1]

    _same(kind, passes, _plain)


@every_run
def test_layers_that_are_called_themselves_forget_too(kind: str) -> None:
    def passes(model: Any, run: Run) -> None:
        for scale in (3.0, 1.0):
            h = scale * X
            for layer in model:
                h = layer(h)
            model.zero_grad()
            CE(h, Y).backward()

    _same(kind, passes, _plain)


@every_run
def test_clear_forgets_passes_whose_gradients_are_used_otherwise(kind: str) -> None:
    model = _net()
    run = RUNS[kind](model)
    CE(model(3 * X), Y).backward()
    run.clear()
    for p in model.parameters():
        p.grad = None
    assert not any(unit.calls for unit in run._capture.units)
    CE(model(X), Y).backward()
    update(model, run)
    assert difference(state(model).values(), _trained(kind, _plain).values()) == 0


@every_run
def test_an_attack_holds_nothing(kind: str) -> None:
    def passes(model: nn.Module, run: Run) -> None:
        x = X.clone()
        for _ in range(5):
            x.requires_grad_()
            (g,) = torch.autograd.grad(CE(model(x), Y), x)
            x = (x + 0.01 * g.sign()).detach()
            assert not any(unit.calls for unit in run._capture.units)
        CE(model(X), Y).backward()

    _same(kind, passes, _plain)


# ---- weights that move between the forward pass and the step -------------------------------------------------------------


def _scaled(p: Tensor) -> None:
    p.mul_(0.9)


def _exchanged(p: Tensor) -> None:
    p.data = p.data * 0.9


def _behind(p: Tensor) -> None:
    p.data.mul_(0.9)


def _row_behind(p: Tensor) -> None:
    p.data[-1].mul_(0.9)


def _column_behind(p: Tensor) -> None:
    p.data[..., -1].mul_(0.9)


@pytest.mark.parametrize("move", [_scaled, _exchanged, _behind, _row_behind, _column_behind])
@pytest.mark.parametrize("part", ["weight", "bias"])
@pytest.mark.parametrize("kind", ["matching", "quadratic", "direct", "gram"])
def test_a_gradient_of_zero_moves_nothing_wherever_weights_have_gone(
    kind: str, move: Callable[[Tensor], None], part: str
) -> None:
    model = _net()
    optimizer = RUNS[kind](model)
    for _ in range(2):  # the first step learns the transfer functions
        optimizer.step()
        (0 * model(X).softmax(1).square().sum()).backward()
        with torch.no_grad():
            for name, p in model.named_parameters():
                if name.endswith(part):
                    move(p)
    before = state(model)
    optimizer.step()
    assert equal(before, state(model))


@pytest.mark.parametrize("kind", ["matching", "quadratic"])
def test_a_gradient_at_other_weights_is_followed_from_where_they_are(kind: str) -> None:
    """SAM's way back: the local problem starts at the weights of the step, with the gradient and the inputs of the pass."""
    model, twin = _net()[:1], _net()[:1]
    run = LocoProp(model, lr=1e-3, local_optimizer=SGD, loss=kind, transfer={"0": "tanh"})
    other = LocoProp(twin, lr=1e-3, local_optimizer=SGD, loss=kind, transfer={"0": "tanh"})
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.2)
    model(X).tanh().square().sum().backward()
    twin(X).tanh().square().sum().backward()
    with torch.no_grad():
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            p.copy_(q)
            q.grad = copy.deepcopy(p.grad)
    run.step()
    other.step()
    assert difference(model.parameters(), twin.parameters()) < 1e-14
