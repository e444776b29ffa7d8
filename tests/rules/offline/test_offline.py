"""What holds for every rule that keeps codes for a whole data set."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import CE, OFFLINE_RULES, equal, every_offline_rule, mlp, rule_state, state
from cases import digits as _digits
from cases import offline_rule as _rule
from cases import sweeps as _sweeps
from cases import whole_set as _data
from torch import nn

from beyondprop import ADMM, BCD, MAC, NonFiniteError, OfflineAltMin, OfflineRule, alignment
from beyondprop.rules.offline import layers as _layers

DESCENDING = [name for name in OFFLINE_RULES if "ADMM" not in name]  # ADMM has no such guarantee


@every_offline_rule
def test_at_the_start_the_relaxed_objective_is_the_networks_own(name: str) -> None:
    rule = _rule(name)
    x, y = _data()
    with pytest.raises(ValueError, match=r"There are no codes yet; call start\(x, y\) or step\(x, y\) first"):
        rule.gaps(x)
    rule.start(x, y)
    for stage in rule.gaps(x).values():
        assert all(float(gap) < 1e-14 for gap in stage.values())
    with torch.no_grad():
        output = rule.model(x)
        targets = rule.output_loss.targets(y, 10, x)
        features = rule._features(x)
        assert rule._state is not None
        energy = rule.energy(features, targets, rule._state, rule._weights)
        torch.testing.assert_close(energy, rule.output_loss.values(output, targets).mean())
    if rule.output_loss.name == "cross_entropy":
        torch.testing.assert_close(energy, F.cross_entropy(output, y))
    if rule.output_loss.name == "squared":
        torch.testing.assert_close(energy, 10 / 2 * F.mse_loss(output, targets))


@every_offline_rule
def test_a_step_reports_the_networks_own_loss_before_it(name: str) -> None:
    rule = _rule(name)
    x, y = _data()
    result = rule.step(x, y, diagnostics=True)
    for _ in range(3):
        with torch.no_grad():
            output = rule.model(x)
        result = rule.step(x, y, diagnostics=True)
        torch.testing.assert_close(result.output, output)
        torch.testing.assert_close(result.loss, F.cross_entropy(output, y))
        assert result.energy is not None
        assert result.energy.ndim == 0
    assert equal(result.stages, rule.gaps(x))
    assert "constraint_gap" in result.stages["1"]
    assert all(float(stage["nested_gap"]) > 1e-4 for stage in result.stages.values())
    first = result.stages["1"]
    torch.testing.assert_close(first["nested_gap"], first["constraint_gap"])  # nothing is below the first stage
    assert all(p.grad is None for p in rule.model.parameters())
    assert rule.step(x, y).stages == {}


@pytest.mark.parametrize("name", DESCENDING)
@pytest.mark.parametrize("activation", ["relu", "leaky_relu"])
def test_no_sweep_raises_the_relaxed_objective(name: str, activation: str) -> None:
    rule = _rule(name, activation=activation)
    x, y = _data()
    rule.start(x, y)
    energies = [float(rule.output_loss.values(rule.model(x), rule.output_loss.targets(y, 10, x)).mean().detach())]
    for _ in range(12):
        energy = rule.step(x, y, diagnostics=True).energy
        assert energy is not None
        energies.append(float(energy))
    assert all(after <= before * (1 + 1e-12) for before, after in itertools.pairwise(energies)), energies
    assert energies[-1] < 0.75 * energies[0]


@pytest.mark.parametrize("name", ["OfflineAltMin", "MAC"])
@pytest.mark.parametrize("activation", ["tanh", "sigmoid", "gelu", "softplus"])
def test_curved_activations_descend_too(name: str, activation: str) -> None:
    rule = _rule(name, activation=activation)
    x, y = _data()
    energies = [float(rule.step(x, y, diagnostics=True).energy) for _ in range(8)]  # type: ignore[arg-type]
    assert all(after <= before * (1 + 1e-12) for before, after in itertools.pairwise(energies)), energies


@pytest.mark.parametrize("name", ["BCD", "ADMM"])
@pytest.mark.parametrize("activation", ["hardtanh", "relu6", "identity"])
def test_closed_forms_serve_all_piecewise_linear_activations(name: str, activation: str) -> None:
    rule = _rule(name, activation=activation)
    x, y = _data()
    before = state(rule.model)
    assert all(torch.isfinite(torch.tensor(_sweeps(rule, x, y, 5))))
    assert not equal(before, state(rule.model))


@every_offline_rule
@pytest.mark.parametrize("how", ["state_dict", "deepcopy", "to"])
def test_a_restored_rule_goes_on_to_the_last_bit(name: str, how: str) -> None:
    x, y = _data(dtype=torch.float32)
    rule = _rule(name, dtype=torch.float32)
    _sweeps(rule, x, y, 4)
    if how == "deepcopy":
        other = copy.deepcopy(rule)
    elif how == "to":
        other = copy.deepcopy(rule)
        assert other.to("cpu") is other
    else:
        other = _rule(name, dtype=torch.float32, seed=5)
        saved = copy.deepcopy((rule.model.state_dict(), rule.state_dict()))
        other.model.load_state_dict(saved[0])
        other.load_state_dict(saved[1])
    assert _sweeps(rule, x, y, 4) == _sweeps(other, x.clone(), y.clone(), 4)
    assert equal(rule_state(rule), rule_state(other))
    assert not equal(state(rule.model), state(_rule(name, dtype=torch.float32).model))


@every_offline_rule
def test_a_state_before_the_first_step_and_of_others(name: str) -> None:
    rule = _rule(name)
    fresh = rule.state_dict()
    assert fresh["codes"] is None
    x, y = _data()
    rule.step(x, y)
    rule.load_state_dict(fresh)
    rule.step(*_data(50))  # no codes, no data set
    with pytest.raises(ValueError, match="This state is of 'Other', this rule is"):
        rule.load_state_dict({**rule.state_dict(), "rule": "Other"})


@every_offline_rule
def test_chunks_change_nothing_but_rounding(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = _data()
    whole, parts = _rule(name), _rule(name)
    _sweeps(whole, x, y, 3)
    monkeypatch.setattr(_layers, "CHUNK", 16)
    _sweeps(parts, x, y, 3)
    for p, q in zip(whole.model.parameters(), parts.model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-7, atol=1e-9)


@every_offline_rule
def test_another_data_set_is_refused_and_start_takes_it(name: str) -> None:
    rule = _rule(name)
    x, y = _data()
    rule.step(x, y)
    before = rule_state(rule)
    kind = type(rule).__name__
    refused = rf"This {kind} keeps codes for the data set of its first step, and this is another"
    with pytest.raises(
        ValueError, match=rf"{refused} \(shape \(90, 1, 8, 8\) then, \(40, 1, 8, 8\) now\).*no mini-batches"
    ):
        rule.step(x[:40], y[:40])
    order = torch.randperm(90)
    with pytest.raises(ValueError, match=rf"{refused} \(other rows, or another order\)"):
        rule.step(x[order], y[order])
    changed = x.clone()
    changed[7, 0, 3, 3] += 1e-3
    with pytest.raises(ValueError, match=refused):
        rule.step(changed, y)
    with pytest.raises(ValueError, match=refused):
        rule.step(x, (y + 1) % 10)
    assert equal(before, rule_state(rule))
    rule.step(x.clone(), y.clone())  # equal content is the same data set
    x[7, 0, 3, 3] += 1e-3  # in place: the same tensor, other content
    with pytest.raises(ValueError, match=refused):
        rule.step(x, y)
    rule.start(x, y)
    rule.step(x, y)


@every_offline_rule
def test_a_sweep_happens_whole_or_not_at_all(name: str) -> None:
    x, y = _data()
    bad = x.clone()
    bad[3, 0, 1, 1] = float("nan")
    for sweeps in (0, 2):
        rule = _rule(name)
        _sweeps(rule, x, y, sweeps)
        before = rule_state(rule)
        with pytest.raises(NonFiniteError, match=r"^x is not finite at step .* No weight was changed") as caught:
            rule.step(bad, y)
        assert caught.value.where == "x"
        assert equal(before, rule_state(rule))
        assert all(p.grad is None for p in rule.model.parameters())
        rule.step(x, y)
        with torch.no_grad():
            rule.model.get_submodule("3").weight[0, 0] = float("inf")  # type: ignore[index, operator]
        before = rule_state(rule)
        with pytest.raises(NonFiniteError, match=r"^Stage '3' is not finite at step"):
            rule.step(x, y)
        assert equal(before, rule_state(rule))


@every_offline_rule
@pytest.mark.parametrize("what", ["codes", "weights"])
def test_a_sweep_that_ends_in_nan_is_not_written(name: str, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rule = _rule(name)
    x, y = _data()
    sweep = rule.sweep

    def poisoned(*given: Any) -> Any:
        after, weights = sweep(*given)
        (weights[1][0] if what == "weights" else next(iter(after.codes.values()))[0])[2, 1] = float("nan")
        return after, weights

    for sweeps in (0, 2):
        _sweeps(rule, x, y, sweeps)
        before = rule_state(rule)
        with monkeypatch.context() as patch:
            patch.setattr(rule, "sweep", poisoned)
            with pytest.raises(NonFiniteError, match=r"^Stage '[13]' is not finite at step .* No weight was"):
                rule.step(x, y)
        assert equal(before, rule_state(rule))
        assert rule._pending is None


@every_offline_rule
def test_an_overflow_inside_names_a_stage_and_changes_nothing(name: str) -> None:
    rule = _rule(name, dtype=torch.float32, activation="relu")
    with torch.no_grad():
        rule.model.get_submodule("5").weight.zero_()  # type: ignore[operator]  # the loss is finite
        rule.model.get_submodule("1").weight.mul_(1e25)  # type: ignore[operator]
    x, y = _data(dtype=torch.float32)
    before = rule_state(rule)
    with pytest.raises(NonFiniteError, match="is not finite at step 1") as caught:
        rule.step(x, y)
    assert caught.value.where in ("1", "3", "5")
    assert equal(before, rule_state(rule))


@every_offline_rule
@pytest.mark.parametrize("of", ["gradient", "update"])
def test_alignment_is_of_the_whole_sweep_and_changes_nothing(name: str, of: str) -> None:
    rule = _rule(name)
    x, y = _data()
    rule.step(x, y)
    before = rule_state(rule)
    found = alignment(rule, x, y, of=of)
    assert equal(before, rule_state(rule))
    assert list(found) == ["1", "3", "5"]
    assert all(stage.norm_ratio > 0 for stage in found.values())
    weights = [layer.weight.detach().clone() for layer in rule.layers]
    rule.backward(x, y)
    wanted = [layer.weight.detach() - layer.weight.grad for layer in rule.layers if layer.weight.grad is not None]
    assert all(torch.equal(w, layer.weight) for w, layer in zip(weights, rule.layers, strict=True))
    rule.update()
    for value, layer in zip(wanted, rule.layers, strict=True):
        torch.testing.assert_close(layer.weight.detach(), value)
    assert all(p.grad is None for p in rule.model.parameters())


@every_offline_rule
def test_frozen_layers_stay(name: str) -> None:
    rule = _rule(name)
    rule.model.get_submodule("3").requires_grad_(False)
    rule = OFFLINE_RULES[name](rule.model, CE)
    before = state(rule.model)
    _sweeps(rule, *_data(), 3)
    after = state(rule.model)
    assert all(torch.equal(before[n], after[n]) == n.startswith("3") for n in before)


@every_offline_rule
def test_layers_without_biases_and_with_identities(name: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(64, 8, bias=False), nn.Identity(), nn.Linear(8, 7), nn.ReLU(), nn.Linear(7, 10)
    )
    rule = OFFLINE_RULES[name](model.double(), CE)
    x, y = _data()
    rule.start(x, y)
    assert all(float(gap) < 1e-14 for stage in rule.gaps(x).values() for gap in stage.values())
    losses = _sweeps(rule, x, y, 4)
    assert all(value == value for value in losses)


def test_targets_as_rows_and_a_mean_squared_error() -> None:
    x, y = _data()
    rows = F.one_hot(y, 10).double()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), *mlp(64, 12, 10)).double()
    twin = copy.deepcopy(model)
    one, other = BCD(model, nn.MSELoss()), BCD(twin, CE, output_loss="squared")
    for _ in range(3):
        one.step(x, rows)
        other.step(x, y)
    assert equal(state(model), state(twin))


LEARNING: dict[str, tuple[Callable[[nn.Module], OfflineRule], int, float]] = {
    "OfflineAltMin": (lambda m: OfflineAltMin(m, CE), 15, 0.92),
    "MAC": (lambda m: MAC(m, CE, mu=0.01), 15, 0.90),
    "BCD.paper": (lambda m: BCD.paper(m, CE), 25, 0.91),
    "BCD": (lambda m: BCD(m, CE, output_loss="squared"), 30, 0.85),
    "ADMM": (lambda m: ADMM(m, CE, output_loss="hinge"), 20, 0.88),
}


@pytest.mark.parametrize("name", list(LEARNING))
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_learns_digits(name: str, seed: int) -> None:
    build, sweeps, least = LEARNING[name]
    digits = _digits()
    torch.manual_seed(seed)
    from beyondprop.lab import nets

    model = nets.build("mlp:100x2", (1, 8, 8), 10)
    rule = build(model)
    for _ in range(sweeps):
        rule.step(digits.x_train, digits.y_train)
    accuracy = float((model(digits.x_test).argmax(1) == digits.y_test).double().mean())
    assert accuracy > least


def test_refitting_the_output_lowers_the_networks_loss() -> None:
    x, y = _data()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), *mlp(64, 12, 9, 10)).double()
    rule = MAC(model, CE, mu=0.01)
    _sweeps(rule, x, y, 5)
    before = F.cross_entropy(model(x), y).detach()
    hidden = state(model[:4])
    rule.refit_output(x, y)
    assert bool(F.cross_entropy(model(x), y) < before)
    assert equal(hidden, state(model[:4]))


def test_mu_grows_to_its_limit_and_codes_come_to_the_network() -> None:
    x, y = _data()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), *mlp(64, 12, 9, 10)).double()
    loose = MAC(copy.deepcopy(model), CE, mu=0.01, mu_growth=1.0)
    rule = MAC(model, CE, mu=0.01, mu_growth=2.0, mu_limit=3.0, sweeps_per_mu=2)
    grown = []
    for _ in range(30):
        rule.step(x, y)
        assert rule._state is not None
        grown.append(rule._state.numbers["mu"])
    assert grown[:4] == [0.01, 0.02, 0.02, 0.04]
    assert grown[-1] == 3.0
    _sweeps(loose, x, y, 30)
    for stage in ("1", "3"):
        assert bool(rule.gaps(x)[stage]["constraint_gap"] < loose.gaps(x)[stage]["constraint_gap"])
