"""What rules for a whole data set refuse, and what they say."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from cases import CE, every_offline_rule, mlp, offline_rule, whole_set
from torch import nn
from torch.nn.utils import prune

from beyondprop import ADMM, BCD, MAC, OfflineAltMin, UnsupportedModelError
from beyondprop.nn import Sign


@pytest.mark.parametrize("rule", [OfflineAltMin, MAC, functools.partial(BCD, output_loss="squared"), ADMM])
@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3)),
            "stage '0' is Linear -> BatchNorm1d. Take",
        ),
        (
            nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Dropout(0.1), nn.Linear(5, 3)),
            "stage '3' is ReLU -> Dropout -> Linear",
        ),
        (nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(72, 3)), "stage '0' is Conv2d. Take out"),
        (nn.Sequential(nn.Linear(6, 5), nn.Softmax(1), nn.Linear(5, 3)), "stage '2' is Softmax -> Linear"),
        (
            nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3), nn.Softmax(1)),
            "stage '2' is ReLU -> Linear -> Softmax",
        ),
        (nn.Sequential(nn.Linear(6, 6), nn.Unflatten(1, (1, 6)), nn.Linear(6, 3)), "stage '2' has an Unflatten behind"),
        (
            nn.Sequential(nn.Linear(6, 5), Sign(), nn.Linear(5, 3)),
            "stage '2' has Sign, which has none|ReLU, .* '2' has Sign",
        ),
    ],
    ids=["batchnorm", "dropout", "conv", "softmax", "tail", "unflatten", "sign"],
)
def test_models_without_closed_forms_are_refused_by_name(rule: Any, model: nn.Module, message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        rule(model, nn.MSELoss() if rule is not ADMM else CE, **({"output_loss": "hinge"} if rule is ADMM else {}))


def test_what_only_some_rules_take() -> None:
    tanh = mlp(6, 5, 3, activation="tanh")
    for rule in (BCD, ADMM):
        with pytest.raises(
            UnsupportedModelError, match=r"closed forms for the activations ReLU, LeakyReLU, .*; stage '2' has Tanh"
        ):
            rule(tanh, CE, output_loss="squared")
        with pytest.raises(
            ValueError, match=rf"{rule.__name__} has no closed form for CrossEntropyLoss. Pass output_loss, one"
        ):
            rule(mlp(6, 5, 3), CE)
    with pytest.raises(ValueError, match="MAC has no closed form for CrossEntropyLoss with weight"):
        MAC(tanh, nn.CrossEntropyLoss(label_smoothing=0.1))
    with pytest.raises(
        ValueError, match=r"no closed form for L1Loss\. Pass output_loss, one of 'cross_entropy', 'squared'"
    ):
        OfflineAltMin(tanh, nn.L1Loss())
    with pytest.raises(ValueError, match="output_loss must be one of 'squared', 'hinge' for BCD, got 'cross_entropy'"):
        BCD(mlp(6, 5, 3), CE, output_loss="cross_entropy")
    model = mlp(6, 5, 3)
    model[0].bias.requires_grad_(False)  # type: ignore[union-attr]
    with pytest.raises(UnsupportedModelError, match="of stage '0' only one requires a gradient"):
        MAC(model, CE)
    with pytest.raises(ValueError, match="No parameter of the model requires a gradient"):
        MAC(mlp(6, 5, 3).requires_grad_(False), CE)
    sequence = MAC(mlp(6, 5, 3), CE)
    with pytest.raises(ValueError, match=r"inputs of shape \(4, 2, 6\); MAC takes one row a sample"):
        sequence.step(torch.randn(4, 2, 6), torch.zeros(4, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"scale must be 1, got 0.5: a sweep is a solution"):
        sequence.backward(torch.randn(4, 6), torch.zeros(4, dtype=torch.int64), scale=0.5)


@pytest.mark.parametrize(
    ("rule", "bad"),
    [
        (OfflineAltMin, {"mu": 0.0}),
        (OfflineAltMin, {"code_steps": 0}),
        (OfflineAltMin, {"output_steps": 0}),
        (OfflineAltMin, {"damping": 0.0}),
        (MAC, {"mu": -1.0}),
        (MAC, {"mu_growth": 0.9}),
        (MAC, {"mu_limit": 0.0}),
        (MAC, {"sweeps_per_mu": 0}),
        (MAC, {"weight_steps": 0}),
        (MAC, {"code_steps": 1.5}),
        (BCD, {"gamma": 0.0}),
        (BCD, {"rho": float("nan")}),
        (BCD, {"alpha": -5.0}),
        (ADMM, {"gamma": 0.0}),
        (ADMM, {"beta": 0.0}),
        (ADMM, {"warm_start": -1}),
        (ADMM, {"damping": -1.0}),
        (ADMM, {"initial_codes": "zero"}),
    ],
)
def test_settings_out_of_range_are_refused_by_name(rule: Any, bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=rf"^{next(iter(bad))} must be"):
        rule(mlp(6, 5, 3), CE, output_loss="squared", **bad)


@every_offline_rule
@pytest.mark.parametrize("change", ["hook", "prune"])
def test_modules_that_were_changed_later_are_refused(name: str, change: str) -> None:
    x, y = whole_set()
    rule = offline_rule(name)
    rule.step(x, y)
    linear = next(m for m in rule.model.modules() if isinstance(m, nn.Linear))
    if change == "hook":
        linear.register_forward_hook(lambda *_: None)
    else:
        prune.l1_unstructured(linear, "weight", 0.5)
    for use in (lambda: rule.step(x, y), lambda: rule.gaps(x), lambda: rule.start(x, y)):
        with pytest.raises(
            UnsupportedModelError, match=r"(got a hook|was (exchanged|added|taken out)).*build the rule anew"
        ):
            use()
