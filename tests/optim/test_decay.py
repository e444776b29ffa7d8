"""SGD that decays the weights of products alone."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from beyondprop import Backprop
from beyondprop.lab import nets, registry
from beyondprop.nn import ElmanCell, Positions
from beyondprop.optim import sgd_with_decay


def _names(model: nn.Module, group: dict[str, object]) -> set[str]:
    return {name for name, p in model.named_parameters() if any(p is q for q in group["params"])}  # type: ignore[attr-defined]


def test_weights_of_products_decay_and_nothing_else_does() -> None:
    model = nn.ModuleDict({
        "linear": nn.Linear(4, 4),
        "conv": nn.Conv1d(4, 4, 3),
        "norm": nn.BatchNorm1d(4),
        "layer": nn.LayerNorm(4),
        "attention": nn.MultiheadAttention(4, 2, add_bias_kv=True),
        "apart": nn.MultiheadAttention(4, 2, kdim=3, vdim=3),
        "embedding": nn.Embedding(5, 4),
        "positions": Positions(3, 4),
        "elman": ElmanCell(3, 4),
        "prelu": nn.PReLU(4),
    })
    decayed, others = sgd_with_decay(model, 0.1, 2e-4).param_groups
    products = {"linear.weight", "conv.weight", "attention.in_proj_weight", "attention.out_proj.weight"}
    apart = {f"apart.{name}" for name in ("q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj.weight")}
    assert _names(model, decayed) == products | apart
    assert (decayed["weight_decay"], others["weight_decay"]) == (2e-4, 0.0)
    assert _names(model, others) == {n for n, _ in model.named_parameters()} - products - apart
    assert all(
        (g["lr"], g["momentum"], g["nesterov"], g["dampening"]) == (0.1, 0.9, False, 0) for g in (decayed, others)
    )


def test_each_step_is_the_gradient_with_decay() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).double()
    optimizer = sgd_with_decay(model, 0.1, 0.5)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    moved = {name: torch.zeros_like(p) for name, p in before.items()}
    for _ in range(3):
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
        for name, p in before.items():
            moved[name] = 0.9 * moved[name] + 1 + (0.5 * p if name == "0.weight" else 0)
            p -= 0.1 * moved[name]
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), before[name])


def test_shared_and_frozen_weights() -> None:
    embedding, read = nn.Embedding(5, 4), nn.Linear(4, 5, bias=False)
    read.weight = embedding.weight
    frozen = nn.Linear(4, 4).requires_grad_(False)
    (only,) = sgd_with_decay(nn.Sequential(embedding, frozen, read), 0.1, 2e-4).param_groups
    assert len(only["params"]) == 1
    assert only["weight_decay"] == 2e-4
    with pytest.raises(ValueError, match="Linear has no parameter that can be trained"):
        sgd_with_decay(frozen, 0.1, 2e-4)


def test_the_rule_has_the_published_settings_for_every_net() -> None:
    spec = registry.rules.get("sgd-decay")
    assert spec.rate(100) == 0.1
    for form in ("revnet14", "resnet8", "mlp:8x2", "transformer:32x1"):
        rule = spec.build(nets.build(form, (3, 8, 8), 4), nn.CrossEntropyLoss(), 0.1)
        assert isinstance(rule, Backprop)
        assert sorted(g["weight_decay"] for g in rule.optimizers[0].param_groups) == [0.0, 2e-4]
        held = [p for g in rule.optimizers[0].param_groups for p in g["params"]]
        assert len(held) == len(set(held)) == len(list(rule.model.parameters()))
