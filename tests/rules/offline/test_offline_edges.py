"""Offline rules where something does not fit: other rows, other networks, dead units, frozen layers."""

from __future__ import annotations

import copy

import pytest
import torch
from cases import CE, OFFLINE_RULES, equal, every_offline_rule, mlp, offline_rule, rule_state, state, sweeps, whole_set
from torch import nn

from beyondprop import MAC, NonFiniteError


@every_offline_rule
def test_a_state_of_another_network_is_refused_whole(name: str) -> None:
    x, y = whole_set()
    rule = offline_rule(name)
    sweeps(rule, x, y, 2)
    torch.manual_seed(0)
    for widths in ((64, 13, 9, 10), (64, 12, 10), (64, 12, 9, 9, 10)):
        other = OFFLINE_RULES[name](nn.Sequential(nn.Flatten(), *mlp(*widths)).double(), CE)
        other.step(x, y)
        before = rule_state(other)
        with pytest.raises(
            ValueError, match=r"This state is of a model with parameters of shapes \[\[12, 64\], \[12\], "
        ):
            other.load_state_dict(rule.state_dict())
        assert equal(before, rule_state(other))


@every_offline_rule
def test_gaps_are_of_the_codes_own_rows(name: str) -> None:
    rule = offline_rule(name)
    x, y = whole_set()
    rule.step(x, y)
    refused = rf"This {type(rule).__name__} keeps codes for the data set of its first step, and this is another"
    for others in (x.flip(0), x + 1, x[:40]):
        with pytest.raises(ValueError, match=refused):
            rule.gaps(others)
    with pytest.raises(ValueError, match=r"x has dtype torch\.float32"):
        rule.gaps(x.float())
    found = rule.gaps(x)
    assert equal(found, rule.gaps(x.clone()))


@every_offline_rule
def test_codes_of_another_dtype_are_named_and_start_makes_new_ones(name: str) -> None:
    x, y = whole_set(dtype=torch.float32)
    rule = offline_rule(name, dtype=torch.float32)
    rule.step(x, y)
    rule.model.double()
    message = r"The codes are torch\.float32 on cpu, x and the weights torch\.float64 on cpu: call start\(x, y\)"
    for use in (lambda: rule.step(x.double(), y), lambda: rule.gaps(x.double())):
        with pytest.raises(ValueError, match=message):
            use()
    rule.start(x.double(), y)
    rule.step(x.double(), y)


@every_offline_rule
def test_a_start_that_is_refused_forgets_nothing_and_autocast_is_not_asked(name: str) -> None:
    x, y = whole_set(dtype=torch.float32)
    rule, twin = offline_rule(name, dtype=torch.float32), offline_rule(name, dtype=torch.float32)
    twin.start(x, y)
    with torch.autocast("cpu", torch.bfloat16):
        rule.start(x, y)
    assert equal(rule_state(rule), rule_state(twin))
    for bad, message in (
        ((x[:0], y[:0]), "The batch is empty"),
        ((x, y[:40]), "x has 90 rows and y has 40"),
        ((x.double(), y), r"x has dtype torch\.float64"),
        ((x, y + 90), "y has labels 90 to 99"),
    ):
        with pytest.raises(ValueError, match=message):
            rule.start(*bad)
        assert equal(rule_state(rule), rule_state(twin))


@every_offline_rule
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_layers_whose_inputs_are_all_zero(name: str, dtype: torch.dtype) -> None:
    """Dead units below a layer without bias: nothing can be learned there, and nothing must fail."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 7, bias=False), nn.ReLU(), nn.Linear(7, 10, bias=False)
    ).to(dtype)
    with torch.no_grad():
        model[1].bias.fill_(-100.0)  # type: ignore[union-attr, operator]
    rule = OFFLINE_RULES[name](model, CE)
    x, y = whole_set(dtype=dtype)
    before = state(model)
    rule.step(x, y)
    assert all(bool(p.isfinite().all()) for p in model.parameters())
    if "ADMM" in name:  # least squares of minimum norm
        assert not bool(model[3].weight.any())  # type: ignore[union-attr, operator]
    elif "BCD" not in name:  # dampings on the distance to the old weights
        assert equal(before["3.weight"], state(model)["3.weight"])
        assert equal(before["5.weight"], state(model)["5.weight"])
    assert all(value == value for value in sweeps(rule, x, y, 4))


def test_a_refit_happens_whole_or_not_at_all() -> None:
    x, _ = whole_set()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), *mlp(64, 12, 10)).double()
    rows = torch.randn(90, 10, dtype=torch.float64)
    rule = MAC(model, nn.MSELoss())
    before = state(model)
    bad_x, bad_rows, huge = x.clone(), rows.clone(), torch.full_like(rows, 1e308)
    bad_x[3, 0, 1, 1], bad_rows[5, 2] = float("inf"), float("nan")
    for inputs, targets, name in ((bad_x, rows, "x"), (x, bad_rows, "y"), (x, huge, "Stage '3'")):
        with pytest.raises(NonFiniteError, match=rf"^{name} is not finite in the refit of .* No weight was changed"):
            rule.refit_output(inputs, targets)
        assert equal(before, state(model))
    with pytest.raises(ValueError, match="x has 40 rows and y has 90"):
        rule.refit_output(x[:40], rows)
    with pytest.raises(ValueError, match=r"x has dtype torch.float32, the model's weights torch.float64"):
        rule.refit_output(x.float(), rows)
    other = MAC(copy.deepcopy(model), nn.MSELoss())
    rule.refit_output(x, rows)
    with torch.autocast("cpu", torch.bfloat16):
        other.refit_output(x, rows)
    assert equal(state(model), state(other.model))


def test_a_frozen_output_layer_is_not_refitted() -> None:
    x, y = whole_set()
    model = nn.Sequential(nn.Flatten(), *mlp(64, 12, 10)).double()
    model[3].requires_grad_(False)
    rule = MAC(model, CE)
    before = state(model)
    with pytest.raises(ValueError, match="The output layer '3' requires no gradient, so that there is nothing to fit"):
        rule.refit_output(x, y)
    assert equal(before, state(model))
