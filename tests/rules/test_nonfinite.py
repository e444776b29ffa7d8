"""A NaN or Inf leaves weights, statistics and optimizers as they were, and is named."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from cases import SGD, blobs, equal, images, mixed, mlp, rule_state, state, train
from torch import Tensor, nn

from beyondprop import AltMin, Backprop, Descent, LearningRule, Memory, NonFiniteError
from beyondprop.lab import registry

pytestmark = pytest.mark.filterwarnings("ignore::beyondprop.FrozenStageWarning")
online = [n for n in registry.rules.names() if not registry.rules.get(n).whole_set]
every_rule = pytest.mark.parametrize("name", online)


def _rule(name: str, model: nn.Module | None = None) -> LearningRule:
    return registry.rules.get(name).build(model or mixed(), nn.CrossEntropyLoss(), registry.rules.get(name).lr)


def _refuses(rule: LearningRule, x: Tensor, y: Tensor, message: str) -> NonFiniteError:
    before = rule_state(rule)
    with pytest.raises(NonFiniteError, match=message) as caught:
        rule.step(x, y)
    assert equal(before, rule_state(rule))
    assert all(p.grad is None for p in rule.model.parameters())
    return caught.value


@every_rule
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("steps", [0, 2])
def test_an_input_that_is_not_finite(name: str, value: float, steps: int) -> None:
    rule = _rule(name)
    x, y = blobs(12)
    train(rule, [(x, y)] * steps)
    bad = x.clone()
    bad[3, 1] = value
    assert _refuses(rule, bad, y, "^x is not finite at step .* No weight was changed").where == "x"
    rule.step(x, y)  # training goes on


@pytest.mark.parametrize("rule", ["altmin", "backprop"])
def test_a_target_that_is_not_finite(rule: str) -> None:
    model = mlp(6, 5, 3)
    built = AltMin(model, nn.MSELoss()) if rule == "altmin" else Backprop(model, nn.MSELoss(), SGD)
    y = torch.zeros(12, 3)
    y[0, 0] = float("nan")
    assert _refuses(built, blobs(12)[0], y, "^y is not finite").where == "y"


@every_rule
@pytest.mark.parametrize("stage", ["0", "3", "6"])
def test_a_weight_that_is_not_finite(name: str, stage: str) -> None:
    rule = _rule(name)
    x, y = blobs(12)
    with torch.no_grad():
        rule.model.get_submodule(stage).weight[0, 0] = float("nan")  # type: ignore[index, operator]
    assert _refuses(rule, x, y, f"^Stage '{stage}' is not finite").where == stage


@every_rule
def test_an_overflow_inside_names_a_stage(name: str) -> None:
    model = mixed()
    with torch.no_grad():
        model[3].weight.fill_(1e38)  # type: ignore[operator]
        model[6].weight.fill_(1e38)  # type: ignore[operator]
        model[4] = nn.ReLU()
    where = _refuses(_rule(name, model), *blobs(12), "is not finite").where
    assert where in ("0", "1", "3", "6")
    if name.startswith("am"):
        assert where == "3"


def test_batches_of_any_kind_are_refused_before_a_block_is_blamed() -> None:
    """The first batch of a stage is looked at for mixed samples; NaN must not look like mixing."""
    model = nn.Sequential(
        nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3)
    )
    x, y = blobs(12)
    x[5, 2] = float("nan")
    assert _refuses(AltMin(model, nn.CrossEntropyLoss()), x, y, "^x is not finite").where == "x"


@pytest.mark.parametrize("mode", ["raise", "deferred", None])
@pytest.mark.parametrize("build", [AltMin, Backprop])
def test_deferred_errors_skip_the_step(mode: str | None, build: Any) -> None:
    model = mixed()
    rule = build(model, nn.CrossEntropyLoss(), partial(torch.optim.Adam, lr=0.01, fused=True), nonfinite=mode)
    x, y = blobs(12)
    bad = x.clone()
    bad[0] = float("nan")
    rule.step(x, y)
    before = state(model)
    optimizer = copy.deepcopy(rule.optimizers[0].state_dict())
    with pytest.raises(NonFiniteError, match=r"not finite|was skipped"):
        train(rule, [(bad, y), (x, y)])
    assert equal(before, state(model))
    assert equal(optimizer, rule.optimizers[0].state_dict())
    losses = train(rule, [(x, y)] * 20)
    assert losses[-1] < losses[0]
    rule.check_finite()


@pytest.mark.parametrize(
    "optimizer",
    [
        partial(torch.optim.SGD, lr=0.1, momentum=0.9),
        partial(torch.optim.Adam, lr=0.1),
        partial(torch.optim.AdamW, lr=0.1),
    ],
)
def test_a_deferred_error_at_the_first_step_leaves_no_trace(optimizer: Any) -> None:
    model = mlp(6, 5, 3)
    twin = copy.deepcopy(model)
    x, y = blobs(12)
    rules = [
        AltMin(m, nn.CrossEntropyLoss(), partial(optimizer, fused=True), nonfinite="deferred") for m in (model, twin)
    ]
    with pytest.raises(NonFiniteError):
        rules[0].step(torch.full_like(x, float("nan")), y)
    for rule in rules:
        train(rule, [(x, y)] * 2)
    assert equal(state(model), state(twin))


def test_a_late_error_leaves_a_good_step_whole() -> None:
    """The error of an earlier batch arrives after a good one: weights and statistics of that step belong together."""
    model = mixed(dropout=0.0)
    twin = copy.deepcopy(model)
    fused = partial(torch.optim.Adam, lr=0.01, fused=True)
    rules = [AltMin(m, nn.CrossEntropyLoss(), fused, nonfinite="deferred") for m in (model, twin)]
    x, y = blobs(12)
    rules[0]._guard.pending.append((1, torch.tensor(True), None))  # as if its flag had been under way
    with pytest.raises(NonFiniteError, match="Step 1 had a non-finite"):
        rules[0].step(x, y)
    rules[1].step(x, y)
    assert equal(state(model), state(twin))


def test_deferred_needs_optimizers_that_can_skip() -> None:
    for solver in (partial(torch.optim.Adam, lr=0.1), Memory()):
        rule = AltMin(mlp(6, 5, 3), nn.CrossEntropyLoss(), solver, nonfinite="deferred")
        with pytest.raises(ValueError, match=r'nonfinite="deferred" needs optimizers.*fused=True'):
            rule.step(*blobs(12))
    with pytest.raises(ValueError, match="nonfinite must be one of 'raise', 'deferred', got 'skip'"):
        AltMin(mlp(6, 5, 3), nn.CrossEntropyLoss(), nonfinite="skip")


@pytest.mark.parametrize("mode", ["model_eval_norm_train", "converted_after_building"])
def test_running_statistics_come_back_however_the_model_was_changed(mode: str) -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
    rule = AltMin(model, nn.CrossEntropyLoss(), SGD)
    x, y = blobs(12)
    rule.step(x, y)
    if mode == "model_eval_norm_train":
        model.eval()
        model[1].train()
    else:  # as model.to(device) does, this replaces the buffers by new tensors
        model.double()
        x = x.double()
        seen = int(model[1].num_batches_tracked)  # type: ignore[arg-type]
        rule.step(x, y, diagnostics=True)
        assert int(model[1].num_batches_tracked) == seen + 1  # type: ignore[arg-type]
    bad = x.clone()
    bad[0] = float("nan")
    _refuses(rule, bad, y, "^x is not finite")


@pytest.mark.parametrize("loss", ["mse", "ce"])
def test_later_local_steps_that_overflow_change_nothing(loss: str) -> None:
    x, y = blobs(12)
    target = y if loss == "ce" else torch.randn(12, 3)
    rule = AltMin(
        mlp(6, 5, 3),
        nn.CrossEntropyLoss() if loss == "ce" else nn.MSELoss(),
        Descent(partial(torch.optim.SGD, lr=1e25), local_steps=4),
    )
    before = state(rule.model)
    with pytest.raises(NonFiniteError):
        rule.step(x, target)
    assert equal(before, state(rule.model))


def test_moments_that_overflow_do_not_poison_the_memory() -> None:
    model = mlp(6, 5, 3)
    with torch.no_grad():
        model[0].weight.mul_(1e-20)  # type: ignore[operator]
    rule = AltMin(model, nn.CrossEntropyLoss(), Memory())
    x, y = blobs(12)
    _refuses(rule, 1e20 * x, y, "0")
    rule.step(x, y)


def test_errors_of_other_kinds_leave_nothing_either() -> None:
    def broken(output: Tensor, y: Tensor) -> Tensor:
        raise KeyError("broken")

    rule = AltMin(mixed(), broken)
    x, y = blobs(12)
    before = rule_state(rule)
    with pytest.raises(KeyError, match="broken"):
        rule.step(x, y)
    assert equal(before, rule_state(rule))
    assert all(p.grad is None for p in rule.model.parameters())


def _step_and_wait(rule: LearningRule, x: Tensor, y: Tensor) -> None:
    rule.step(x, y)
    rule.check_finite()


@pytest.mark.cuda
def test_deferred_errors_arrive_on_a_cuda_device() -> None:
    rule = AltMin(mixed(), nn.CrossEntropyLoss()).to("cuda")
    x, y = (t.cuda() for t in blobs(12))
    rule.step(x, y)
    before = state(rule.model)
    bad = torch.full_like(x, float("nan"))
    with pytest.raises(NonFiniteError):  # at that step or, at the latest, when its flag has been waited for
        _step_and_wait(rule, bad, y)
    assert equal(before, state(rule.model))


def test_images_with_an_infinite_pixel() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(72, 3))
    x, y = images(6)
    x[0, 0, 0, 0] = float("-inf")
    assert _refuses(AltMin(model, nn.CrossEntropyLoss()), x, y, "^x is not finite").where == "x"


# The published settings divide deltas by the features, which keeps these gradients below the overflow.
@pytest.mark.parametrize("name", [n for n in online if "paper" not in n])
def test_gradients_that_overflow_under_a_finite_loss(name: str) -> None:
    model = mlp(6, 5, 3, activation="tanh")
    with torch.no_grad():
        model[0].weight.zero_()  # type: ignore[operator]
        model[2].weight.mul_(1e3)  # type: ignore[operator]
    x, y = torch.full((12, 6), 3e38), blobs(12)[1]
    assert torch.isfinite(nn.functional.cross_entropy(model(x), y))
    rule = _rule(name, model)
    if name == "dfa":
        rule.credit.scale = 1e3  # type: ignore[attr-defined]  # its errors do not go through the weights
    _refuses(rule, x, y, "is not finite")
