"""Feedback alignment against networks whose layers were rewritten by hand, and what both rules refuse."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from cases import blobs, equal, mlp, relative
from references import CE, every_net
from references import case as _case
from references import rewritten as _rewritten
from torch import Tensor, nn

from beyondprop import (
    Chain,
    Credit,
    Descent,
    DirectFeedbackAlignment,
    FeedbackAlignment,
    LocalRule,
    UnsupportedModelError,
)


def _gradients(model: nn.Module, credit: Credit, x: Tensor, y: Tensor, **settings: Any) -> dict[str, Tensor]:
    rule = LocalRule(model, CE, credit, Descent(), **settings)
    rule.backward(x, y)
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    rule.discard()
    return found


@every_net
def test_feedback_alignment_is_the_rewritten_network(net: str) -> None:
    model, x, y = _case(net)
    credit = FeedbackAlignment(seed=3)
    found = _gradients(copy.deepcopy(model), credit, x, y)
    rewritten = _rewritten(model, credit.feedback)
    CE(rewritten(x), y).backward()
    expected = {name: p.grad for name, p in rewritten.named_parameters()}
    assert found.keys() == expected.keys()
    true = dict(zip(found, torch.autograd.grad(CE(model(x), y), list(model.parameters())), strict=True))
    scale = max(float(g.abs().max()) for g in found.values())
    for name, gradient in found.items():
        wanted = expected[name]
        assert wanted is not None
        assert float((gradient - wanted).abs().max()) < 1e-12 * max(1.0, scale), name
    first = next(iter(found))
    assert relative(found[first], true[first]) > 0.1  # and is not backpropagation


@every_net
def test_feedback_equal_to_the_weights_is_backpropagation(net: str) -> None:
    model, x, y = _case(net)
    true = torch.autograd.grad(CE(model(x), y), list(model.parameters()))
    credit = FeedbackAlignment()
    rule = LocalRule(model, CE, credit, Descent())
    weights = {name: p.detach().clone() for name, p in model.named_parameters() if name in credit.feedback}
    credit.load_state_dict({"feedback": weights})
    rule.backward(x, y)
    for p, g in zip(model.parameters(), true, strict=True):
        assert p.grad is not None
        assert float((p.grad - g).abs().max()) < 1e-12 * max(1.0, float(g.abs().max()))


def test_every_matrix_above_the_first_stage_has_feedback_of_its_size() -> None:
    model, x, y = _case("residual")
    credit = FeedbackAlignment(scale=2.0)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    rule = LocalRule(model, CE, credit, Descent())
    expected = {n for n, p in before.items() if p.ndim >= 2 and n != "0.weight"}
    assert set(credit.feedback) == expected
    rule.step(x, y)
    for name, tensor in credit.feedback.items():
        assert tensor.shape == before[name].shape
        rms = float(before[name].square().mean().sqrt())
        assert 0.8 < float(tensor.square().mean().sqrt()) / (2 * rms) < 1.2, name
    again = {n: t.clone() for n, t in credit.feedback.items()}
    rule.step(x, y)
    assert equal(again, credit.feedback)  # fixed


def test_zero_weights_have_feedback_of_the_usual_size() -> None:
    model = mlp(6, 400, 3)
    nn.init.zeros_(model[2].weight)  # type: ignore[arg-type]
    credit = FeedbackAlignment()
    LocalRule(model, CE, credit, Descent())
    assert 0.9 < float(credit.feedback["2.weight"].std()) * 20 < 1.1


@pytest.mark.parametrize("kind", [FeedbackAlignment, DirectFeedbackAlignment])
def test_seeds(kind: Any) -> None:
    drawn = []
    for seed in (4, 4, 5):
        torch.manual_seed(0)
        model, x, y = _case("mlp")
        credit = kind(seed=seed)
        torch.manual_seed(seed + 100)  # the global state has no part in it
        state = torch.get_rng_state()
        LocalRule(model, CE, credit, Descent()).step(x, y)
        assert torch.equal(state, torch.get_rng_state())
        drawn.append(dict(credit.feedback))
    assert equal(drawn[0], drawn[1])
    assert not equal(drawn[0], drawn[2])
    values = list(drawn[0].values())
    assert not torch.equal(values[0].flatten()[:5], values[1].flatten()[:5])


def test_weights_in_other_orders_of_memory_and_frozen_ones() -> None:
    model, x, y = _case("residual")
    model[3].requires_grad_(False)  # type: ignore[index]
    credit = FeedbackAlignment(seed=3)
    expected = _gradients(copy.deepcopy(model), credit, x, y)
    other = copy.deepcopy(model).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    rule = LocalRule(other, CE, FeedbackAlignment(seed=3), Descent())
    rule.backward(x, y)
    found = {n: p.grad for n, p in other.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys()
    assert not any(p.requires_grad for p in other[3].parameters())
    for name, gradient in found.items():
        assert float((gradient - expected[name]).abs().max()) < 1e-12
    frozen = _rewritten(model, credit.feedback)
    CE(frozen(x), y).backward()
    weight = frozen.get_parameter("0.weight").grad
    assert weight is not None
    assert relative(expected["0.weight"], weight) < 1e-12
    rule.discard()
    other.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]  # after the rule was built
    rule.backward(x, y)
    for name, p in other.named_parameters():
        assert p.grad is None or float((p.grad - expected[name]).abs().max()) < 1e-12


@pytest.mark.parametrize("frozen", [False, True])
def test_autocast_goes_through_the_feedback_too(frozen: bool) -> None:
    """Autocast saves cast copies of the weights; what goes down must not be the weights' own error."""
    model, x, y = _case("residual")
    model, x = model.float(), x.float()
    model[4].requires_grad_(not frozen)  # type: ignore[index]
    whole = _gradients(copy.deepcopy(model), FeedbackAlignment(seed=1), x, y)
    with torch.autocast("cpu", torch.bfloat16):
        half = _gradients(copy.deepcopy(model), FeedbackAlignment(seed=1), x, y)
        true = dict(
            zip(
                whole,
                torch.autograd.grad(CE(model(x), y), [p for p in model.parameters() if p.requires_grad]),
                strict=True,
            )
        )
    for name in ("0.weight", "3.branch.0.weight"):
        assert relative(half[name], whole[name]) < 0.1
        assert relative(half[name], true[name]) > 0.5


def test_what_hides_its_weight_is_refused_by_name() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3))
    nn.utils.parametrizations.weight_norm(model[2])
    rule = LocalRule(model, CE, FeedbackAlignment(), Descent())
    with pytest.raises(
        UnsupportedModelError, match=r"Stage '2': its backward pass does not use .*Linear\.weight as it is"
    ):
        rule.step(*blobs(8))


class _Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        from torch.utils.checkpoint import checkpoint

        return x + checkpoint(self.inner, x, use_reentrant=False)  # type: ignore[operator]


class _Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.other = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.used(x))


def test_checkpointing_is_refused_and_unused_layers_are_not() -> None:
    rule = LocalRule(
        nn.Sequential(nn.Linear(6, 8), _Checkpointed(), nn.Linear(8, 3)), CE, FeedbackAlignment(), Descent()
    )
    with pytest.raises(UnsupportedModelError, match=r"Stage '1': .* activation checkpointing"):
        rule.step(*blobs(8))
    LocalRule(nn.Sequential(nn.Linear(6, 8), _Unused(), nn.Linear(8, 3)), CE, FeedbackAlignment(), Descent()).step(
        *blobs(8)
    )


@pytest.mark.parametrize("kind", [FeedbackAlignment, DirectFeedbackAlignment])
def test_bad_arguments_and_foreign_states(kind: Any) -> None:
    with pytest.raises(ValueError, match="scale must be a finite number > 0, got 0"):
        kind(scale=0)
    with pytest.raises(ValueError, match="seed must be an integer >= 0, got -1"):
        kind(seed=-1)
    credit = kind()
    model, x, y = _case("mlp")
    rule = LocalRule(model, CE, credit, Descent())
    rule.step(x, y)
    with pytest.raises(ValueError, match="serves another rule already"):
        credit.bind(Chain(model))
    other = LocalRule(mlp(6, 9, 3), CE, kind(), Descent())
    other.step(*blobs(4))
    with pytest.raises(ValueError, match=r"This state holds feedback of shapes .*this network takes"):
        other.credit.load_state_dict(credit.state_dict())


@pytest.mark.parametrize("kind", [FeedbackAlignment, DirectFeedbackAlignment])
def test_feedback_follows_a_model_that_is_moved(kind: Any) -> None:
    model, x, y = _case("lenet")
    model, x = model.float(), x.float()
    credit = kind()
    rule = LocalRule(model, CE, credit, Descent())
    rule.step(x, y)
    before = {name: tensor.clone() for name, tensor in credit.feedback.items()}
    model.double()
    rule.backward(x.double(), y)
    assert all(tensor.dtype == torch.float64 for tensor in credit.feedback.values())
    assert equal({n: t.double() for n, t in before.items()}, dict(credit.feedback))


@pytest.mark.parametrize("net", ["residual", "attention"])
def test_weights_that_share_one_memory(net: str) -> None:
    """As flattened parameters do: each is known by where it starts."""
    model, x, y = _case(net)
    expected = _gradients(copy.deepcopy(model), FeedbackAlignment(), x, y)
    flat = torch.cat([p.detach().flatten() for p in model.parameters()])
    start = 0
    for p in model.parameters():
        p.data = flat[start : start + p.numel()].view_as(p)
        start += p.numel()
    found = _gradients(model, FeedbackAlignment(), x, y)
    for name, gradient in found.items():
        assert float((gradient - expected[name]).abs().max()) < 1e-12, name
