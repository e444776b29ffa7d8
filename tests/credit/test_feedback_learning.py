"""What random feedback learns: digits, and to agree with the gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import mlp
from torch import nn

from beyondprop import Descent, DirectFeedbackAlignment, FeedbackAlignment, LocalRule, alignment, fit
from beyondprop.data import load
from beyondprop.lab import nets
from beyondprop.optim.factories import adam

CE = nn.CrossEntropyLoss()
seeds = pytest.mark.parametrize("seed", [0, 1, 2])
both = pytest.mark.parametrize("kind", [FeedbackAlignment, DirectFeedbackAlignment])


def _rule(kind: Any, seed: int, model: nn.Module, lr: float = 3e-3) -> LocalRule:
    return LocalRule(model, CE, kind(seed=seed), Descent(adam(lr)))


def _mlp(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), *mlp(64, 100, 100, 10, activation="tanh"))


@both
@seeds
def test_digits(kind: Any, seed: int) -> None:
    history = fit(_rule(kind, seed, _mlp(seed)), load("digits"), epochs=12, batch_size=50, seed=seed)
    assert history.evaluations[-1]["accuracy"] > 0.94


@both
@seeds
def test_the_lower_layers_learn(kind: Any, seed: int) -> None:
    """Against the same net with its lower layers left as they were drawn, through a bottleneck."""
    losses = []
    for trains in (True, False):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Flatten(), *mlp(64, 30, 6, 10, activation="tanh"))
        for layer in (model[1], model[3]):
            layer.requires_grad_(trains)
        history = fit(_rule(kind, seed, model, 1e-2), load("digits"), epochs=6, batch_size=50, seed=seed)
        losses.append(history.evaluations[-1]["loss"])
    assert losses[0] < 0.6 * losses[1]


@seeds
def test_weights_turn_toward_the_feedback(seed: int) -> None:
    """The cosine of feedback alignment's update with the true gradient rises as it trains (Lillicrap et al., figure 3)."""
    digits = load("digits")
    model = _mlp(seed)
    rule = _rule(FeedbackAlignment, seed, model)
    x, y = digits.x_train[:300], digits.y_train[:300]
    before = alignment(rule, x, y)
    fit(rule, digits, epochs=3, batch_size=50, seed=seed)
    after = alignment(rule, x, y)
    names = list(before)
    assert before[names[-1]].cosine > 0.999  # the last stage has the gradient itself
    for name in names[:-1]:
        assert abs(before[name].cosine) < 0.35
        assert after[name].cosine > before[name].cosine + 0.2
        assert after[name].cosine > 0.25


@both
def test_convolutions_on_digits(kind: Any) -> None:
    torch.manual_seed(0)
    model = nets.build("conv:8x2:tanh", (1, 8, 8), 10)
    history = fit(_rule(kind, 0, model), load("digits"), epochs=6, batch_size=50)
    assert history.evaluations[-1]["accuracy"] > 0.88
