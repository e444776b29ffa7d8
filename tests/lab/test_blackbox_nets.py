"""Nets with a black box: their forms, their gradients beside those of the twin that autograd sees, and their calls."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from cases import difference, equal, images
from torch import Tensor, nn
from torch.nn import functional as F

from beyondprop import FrozenStageWarning, LearningRule
from beyondprop.lab import nets, registry
from beyondprop.lab.nets.blackbox import METHODS, Oscillators, TorchOscillators
from beyondprop.nn import BlackBox

SHAPE, WIDTH = (1, 8, 8), 8
EXACT = ("auto", "dense", "coloring", "regression", "rainbow", "robust", "discover")
"""Methods that find the Jacobian itself, as far as differences do."""
RULES = ("adam", "sgd", "am-adam", "am-mem", "fa", "dfa", "dtp", "locoprop-m", "consequentialism")


def _net(options: str = "", width: int = WIDTH, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    found = nets.build(f"blackbox:{width}{options and ':' + options}", SHAPE, 4)
    assert isinstance(found, nn.Sequential)
    return found


def _box(model: nn.Module) -> Any:
    return next(m for m in model.modules() if hasattr(m, "counters"))


def _rule(name: str, model: nn.Module, lr: float = 1e-2) -> LearningRule:
    return registry.rules.get(name).build(model, nn.CrossEntropyLoss(), lr)


def _batch(rows: int = 12, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    x, _ = images(rows, dtype)
    return x, torch.arange(rows) % 4


def _weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in model.named_parameters()}


# The box


def test_the_twin_is_the_same_function() -> None:
    x = torch.randn(5, 7, dtype=torch.float64)
    expected = torch.from_numpy(Oscillators()(x.numpy()))
    torch.testing.assert_close(TorchOscillators()(x), expected, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("units", [3, 4, 7, 64])
def test_its_pattern_is_that_of_its_jacobian(units: int) -> None:
    x = torch.randn(units, dtype=torch.float64)
    full = torch.autograd.functional.jacobian(lambda z: TorchOscillators()(z[None])[0], x)
    assert torch.equal(full != 0, torch.from_numpy(Oscillators.pattern(units).toarray()))  # type: ignore[operator]
    assert Oscillators.pattern(units).nnz == 3 * units


def test_noise_is_of_its_size_and_of_the_global_seed() -> None:
    x = np.zeros((400, 50), dtype=np.float32)
    torch.manual_seed(3)
    first, second = Oscillators(0.05)(x), Oscillators(0.05)(x)
    torch.manual_seed(3)
    assert np.array_equal(first, Oscillators(0.05)(x))
    assert not np.array_equal(first, second)
    assert first.dtype == np.float32
    assert first.std() == pytest.approx(0.05, rel=0.02)
    torch.manual_seed(3)
    assert np.allclose(first, TorchOscillators(0.05)(torch.from_numpy(x)).numpy())


# Forms


@pytest.mark.parametrize("conv", ["", ":conv"])
@pytest.mark.parametrize("noise", ["", ":noise=0.05"])
def test_all_methods_start_from_the_same_weights(conv: str, noise: str) -> None:
    models = {method: _net(f"{method}{noise}{conv}") for method in METHODS}
    first, states = _weights(models["exact"]), torch.get_rng_state()
    for method, model in models.items():
        assert equal(_weights(model), first), method
    _net(f"exact{noise}{conv}")
    assert torch.equal(torch.get_rng_state(), states)
    x, _ = _batch(dtype=torch.float32)
    if not noise:
        outputs = [model(x) for model in models.values()]
        for output in outputs[1:]:
            torch.testing.assert_close(output, outputs[0])


def test_the_form_says_how_it_is_sensed() -> None:
    assert _box(_net()).plan.method == "coloring"
    assert "4 colours" in _box(_net()).plan.reason
    for method in ("coloring", "regression", "robust", "rainbow"):
        assert _box(_net(method)).plan.method == method
    assert _box(_net("regression:probes=6")).plan.probes == 6
    assert _box(_net("noise=0.1")).sensor.steps.noise == 0.1
    assert isinstance(_box(_net("exact:noise=0.1")), TorchOscillators)
    assert _box(_net("stopped")) is not None
    dense, spsa = _net("dense"), _net("spsa:probes=2")
    for model in (dense, spsa):
        model(_batch(dtype=torch.float32)[0])
    assert _box(dense).plan.calls == 2 * WIDTH  # as of somebody who knows nothing
    assert _box(dense).pattern is None
    assert (_box(spsa).plan.method, _box(spsa).plan.calls) == ("spsa", 4)


@pytest.mark.parametrize(
    ("form", "shape", "message"),
    [
        ("blackbox", SHAPE, "'blackbox': WIDTH must be a whole number >= 3, such as blackbox:64, got ''"),
        ("blackbox:2", SHAPE, "WIDTH must be a whole number >= 3"),
        ("blackbox:64x2", SHAPE, "got '64x2'"),
        ("blackbox:2000000", SHAPE, "the width must be at most 100,000"),
        ("blackbox:64:forward", SHAPE, "unknown option 'forward'; accepted: auto, dense, coloring"),
        ("blackbox:64:dense:coloring", SHAPE, "'dense' and 'coloring' are given; take one"),
        ("blackbox:64:noise=-1", SHAPE, "noise must be a number >= 0, the standard deviation of the outputs, got '-1'"),
        ("blackbox:64:noise=nan", SHAPE, "noise must be"),
        ("blackbox:64:noise=some", SHAPE, "noise must be"),
        ("blackbox:64:spsa:probes=0", SHAPE, "probes must be a whole number >= 1, got '0'"),
        (
            "blackbox:64:dense:probes=4",
            SHAPE,
            "probes=K is for coloring, regression, spsa, robust, rainbow; leave it out",
        ),
        ("blackbox:64:exact:probes=4", SHAPE, "probes=K is for coloring"),
        ("blackbox:64:stopped:probes=4", SHAPE, "probes=K is for coloring"),
        ("blackbox:64:probes=4", SHAPE, "or name one of them"),
        ("blackbox:64:rainbow:probes=4", SHAPE, "'blackbox:64:rainbow:probes=4': .*probes for each of"),
        (
            "blackbox:64:coloring:probes=3",
            SHAPE,
            "'blackbox:64:coloring:probes=3': .*as many probes as there are colours",
        ),
        (
            "blackbox:64:regression:probes=2",
            SHAPE,
            "probes must be at least 3, the largest number of nonzeros in a row",
        ),
        ("blackbox:64:conv", (64,), r"takes images \(C, H, W\)"),
        ("blackbox:64:conv", (1, 3, 8), "'conv' takes images of 4x4 or more, got 3x8"),
        ("blackbox:100000", (100, 200, 200), "weights or more"),
    ],
)
def test_what_is_no_such_net_is_refused(form: str, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        nets.build(form, shape, 10)


# Gradients and calls


@pytest.mark.parametrize("method", EXACT)
@pytest.mark.parametrize("rule", ["adam", "am-adam", "fa", "dfa", "dtp", "locoprop-m"])
def test_the_first_steps_are_those_of_autograd(rule: str, method: str) -> None:
    x, y = _batch()
    models = [_net(how).double() for how in (method, "exact")]
    start = _weights(copy.deepcopy(models[0]))
    rules = [_rule(rule, model, 3e-5 if rule == "locoprop-m" else 1e-2) for model in models]
    for step in range(5):
        losses = []
        for each in rules:
            torch.manual_seed(step)
            losses.append(float(each.step(x, y).loss))
        assert losses[0] == pytest.approx(losses[1], rel=1e-6), step
    ours, theirs = (list(model.parameters()) for model in models)
    assert difference(ours, theirs) < 1e-6
    assert all(difference([p], [start[name]]) > 1e-5 for name, p in models[0].named_parameters())


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("method", [m for m in METHODS if m != "discover"])
def test_a_step_makes_the_calls_that_were_promised(method: str, rule: str) -> None:
    """From the first step on, to the last call; where nothing is differentiated, one a sample."""
    model = _net(method)
    trained, box = _rule(rule, model, 1e-3), _box(model)
    assert box.counters == {"calls": 0, "evaluation_calls": 0}
    for step, rows in enumerate((12, 12, 5, 1)):
        before = box.counters["calls"]
        trained.step(*_batch(rows, torch.float32))
        again = rule == "dfa" and method in ("exact", "stopped")  # below a block, its head is run once more
        sensed = box.plan.calls if method not in ("exact", "stopped") else 0
        assert box.counters["calls"] - before == rows * (1 + sensed + again), step
    model.eval()(_batch(7, torch.float32)[0])
    assert box.counters["evaluation_calls"] == 7


def test_iterated_codes_call_the_box_at_every_code() -> None:
    model = _net()
    _rule("am-paper-fc", model).step(*_batch(12, torch.float32))
    assert _box(model).counters["calls"] == 12 * (1 + 5 * (1 + _box(model).plan.calls))


def test_no_gradient_goes_through_a_stopped_box() -> None:
    for rule in ("adam", "am-adam", "fa"):
        model = _net("stopped")
        start = _weights(copy.deepcopy(model))
        trained = _rule(rule, model)
        for _ in range(3):
            trained.step(*_batch(12, torch.float32))
        moved = {name for name, p in model.named_parameters() if not torch.equal(p, start[name])}
        assert moved == {"3.weight", "3.bias"}, rule


def test_the_watchdog_sees_that_it_is_stopped() -> None:
    trained = _rule("adam", _net("stopped"))
    x, y = _batch(12, torch.float32)
    for _ in range(50):
        trained.step(x, y)
    with pytest.warns(FrozenStageWarning, match="Stage '1' stands still"):
        trained.step(x, y)


def test_noise_is_measured_against_at_few_calls() -> None:
    model = _net("coloring:noise=0.05")
    trained, box = _rule("adam", model), _box(model)
    for _ in range(40):
        trained.step(*_batch(12, torch.float32))
    assert box.counters["calls"] == 40 * 12 * (1 + box.plan.calls) + box.stats.setup
    assert 0 < box.stats.setup < 0.1 * box.stats.total
    assert box.info.step > 0.1  # far beyond what rounding alone would ask for


def test_the_state_has_the_calls_and_the_pattern_that_was_found() -> None:
    for method in ("discover", "exact", "coloring:noise=0.05", "stopped"):
        model, fresh = _net(method), _net(method, seed=1)
        _rule("adam", model).step(*_batch(12, torch.float32))
        fresh.load_state_dict(model.state_dict())
        assert _box(fresh).counters == _box(model).counters
        assert _box(fresh).counters["calls"] > 0
        for _ in range(3):
            for each in (model, fresh):
                _rule("adam", each).step(*_batch(12, torch.float32))
            assert _box(fresh).counters == _box(model).counters  # nothing is found or measured again


def test_a_block_that_autograd_differentiates_is_not_run_on_the_side() -> None:
    """A stage without closed forms is looked at once, by another run; not where that costs calls."""

    class Skip(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.box = BlackBox(Oscillators(), WIDTH, pattern=Oscillators.pattern(WIDTH))

        def forward(self, z: Tensor) -> Tensor:
            return z + self.box(z)

    model = nn.Sequential(nn.Flatten(), nn.Linear(64, WIDTH), Skip(), nn.Linear(WIDTH, 4))
    for rule in ("am-adam", "fa"):
        own = copy.deepcopy(model)
        box = _box(own)
        trained, before = _rule(rule, own), box.stats.total
        for _ in range(2):
            trained.step(*_batch(12, torch.float32))
        assert box.stats.total - before == 2 * 12 * (1 + box.plan.calls)


def test_someone_elses_loop_gets_the_same_gradients() -> None:
    x, y = _batch()
    found = []
    for method in ("auto", "exact"):
        model = _net(method).double()
        F.cross_entropy(model(x), y).backward()
        found.append([p.grad for p in model.parameters() if p.grad is not None])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-9)
