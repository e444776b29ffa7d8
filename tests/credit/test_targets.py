"""Targets through inverses: against hand-written targets, exact inverses, and autograd."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import Recorder, Residual, blobs, equal, images, mlp, relative, rule_state
from torch import Tensor, nn

from beyondprop import (
    Chain,
    Descent,
    DifferenceTargetProp,
    DifferenceTargetPropagation,
    LocalRule,
    TargetPropagation,
    UnsupportedModelError,
)
from beyondprop.credit.base import Assignment
from beyondprop.credit.targets import TargetPropagation as _Credit
from beyondprop.lab import nets
from beyondprop.rules.targetprop import activation_cuts
from beyondprop.stages.losses import OutputLoss
from beyondprop.stages.stage import Stage

CE = nn.CrossEntropyLoss()


def _assign(model: nn.Sequential, credit: _Credit, x: Tensor, y: Tensor) -> tuple[Chain, dict[int, Assignment]]:
    chain = Chain(model, activation_cuts(model))
    credit.bind(chain)
    with torch.no_grad():
        trace = chain.record(x)
        kept = credit.assign(trace, OutputLoss(CE).at(trace.output, y))
        return chain, {a.index: a for a in kept}


def _net() -> tuple[nn.Sequential, Tensor, Tensor]:
    x, y = blobs(9, dtype=torch.float64)
    return mlp(6, 8, 7, 5, 3, activation="tanh").double(), x, y


@pytest.mark.parametrize("kind", [TargetPropagation, DifferenceTargetPropagation])
def test_targets_are_those_written_out(kind: Any) -> None:
    model, x, y = _net()
    credit = kind(step_size=0.7)
    chain, found = _assign(model, credit, x, y)
    assert [stage.names[-1] for stage in chain] == ["1", "3", "5", "6"]
    h1 = torch.tanh(model[0](x))
    h2 = torch.tanh(model[2](h1))
    h3 = torch.tanh(model[4](h2)).detach().requires_grad_()
    (gradient,) = torch.autograd.grad(F.cross_entropy(model[6](h3), y, reduction="sum"), h3)
    t3 = h3 - 0.7 * gradient

    def g(name: str, h: Tensor) -> Tensor:
        layer: Any = credit.inverses[name]
        return torch.tanh(h @ layer[0].weight.t() + layer[0].bias)

    if kind is DifferenceTargetPropagation:
        t2 = h2 - g("4", h3) + g("4", t3)
        t1 = h1 - g("2", h2) + g("2", t2)
    else:
        t2 = g("4", t3)
        t1 = g("2", t2)
    for index, (h, t) in enumerate(((h1, t1), (h2, t2), (h3, t3))):
        assert relative(found[index].delta, t - h) < 1e-12
    assert list(credit.inverses) == ["2", "4"]
    below = found[2].input_delta
    assert below is not None
    assert equal(below, found[1].delta)


def test_exact_inverses_bring_the_delta_about() -> None:
    """Where g is f's inverse, both rules agree, and a moved input moves the output by the delta."""
    model = mlp(5, 5, 5, 5, 3, activation="tanh").double()
    for layer in model:
        if isinstance(layer, nn.Linear) and layer.out_features == 5:
            nn.init.orthogonal_(layer.weight)
    x, y = 0.3 * torch.randn(9, 5, dtype=torch.float64), torch.arange(9) % 3

    class Exact(nn.Module):
        def __init__(self, layer: nn.Linear) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, h: Tensor) -> Tensor:
            return torch.linalg.solve(self.layer.weight, (torch.atanh(h) - self.layer.bias).t()).t()

    def exact(below: Stage, stage: Stage) -> nn.Module:
        del below
        return Exact(copy.deepcopy(stage.modules[0]).requires_grad_(False))  # type: ignore[arg-type]

    deltas = []
    for kind in (TargetPropagation, DifferenceTargetPropagation):
        _, found = _assign(model, kind(exact, step_size=0.05), x, y)
        deltas.append([found[i].delta for i in range(3)])
        for index in (1, 2):
            change = found[index].moved().output - found[index].pullback.output
            assert relative(change, found[index].delta) < 1e-10
    for a, b in zip(*deltas, strict=True):
        assert relative(a, b) < 1e-10


def test_the_difference_cancels_what_the_inverse_gets_wrong() -> None:
    model, x, _ = _net()
    chain = Chain(model, activation_cuts(model))
    plain, difference = TargetPropagation(), DifferenceTargetPropagation()
    for credit in (plain, difference):
        credit.bind(chain)
    with torch.no_grad():
        trace = chain.record(x)
        nothing = torch.zeros_like(trace[2].output)
        assert not bool(difference.below(2, trace[2], nothing, None).any())
        wrong = plain.below(2, trace[2], nothing, None)
    layer: Any = plain.inverses["4"]
    assert relative(wrong, layer(trace[2].output) - trace[2].input) < 1e-12
    assert float(wrong.abs().max()) > 0.1


@pytest.mark.parametrize("std", [0.0, 0.4])
def test_learning_descends_the_corrupted_reconstruction(std: float) -> None:
    model, x, _ = _net()
    chain = Chain(model, activation_cuts(model))
    credit = DifferenceTargetPropagation(noise=std)
    credit.bind(chain)
    with torch.no_grad():
        trace = chain.record(x)
        torch.manual_seed(3)
        credit.learn(trace, 0.5)
        credit.learn(chain.record(x), 0.0)  # adds
    torch.manual_seed(3)
    for index, name in ((2, "4"), (1, "2")):  # last first
        h = trace[index].input
        corrupted = h + (std * torch.randn_like(h) if std else 0.0)
        layer: Any = model[2 * index]
        image = torch.tanh(layer(corrupted)).detach()
        error = (credit.inverses[name](image) - corrupted).square().sum(1).mean()
        parameters = list(credit.inverses[name].parameters())
        for p, g in zip(parameters, torch.autograd.grad(error, parameters), strict=True):
            assert p.grad is not None
            assert relative(p.grad, 0.5 * g) < 1e-12
    assert all(p.grad is None for p in model.parameters())


def test_halves_of_a_batch_teach_as_the_whole() -> None:
    model, x, y = _net()
    x, y = x[:8], y[:8]
    rule = DifferenceTargetProp(model, CE, noise=0.0)
    rule.backward(x, y)
    whole = [p.grad.clone() for p in rule._parameters if p.grad is not None]
    rule.discard()
    for rows in (slice(0, 4), slice(4, 8)):
        rule.backward(x[rows], y[rows], scale=0.5)
    halves = [p.grad for p in rule._parameters if p.grad is not None]
    assert len(whole) == len(list(model.parameters())) + 4
    for a, b in zip(halves, whole, strict=True):
        assert relative(a, b) < 1e-12


def test_any_rule_teaches_the_credit_that_it_was_given() -> None:
    model, x, y = _net()
    rule = LocalRule(model, CE, TargetPropagation(), Descent(), cuts=activation_cuts(model))
    before = copy.deepcopy(rule.credit.state_dict())
    assert rule.optimizers[-1] is rule.credit.optimizers[0]
    rule.step(x, y)
    after: Any = rule.credit.state_dict()
    for name, saved in before["inverses"].items():  # type: ignore[attr-defined]
        assert all(not torch.equal(saved[key], after["inverses"][name][key]) for key in saved)


def test_a_block_learns_with_an_inverse_that_is_given() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), Residual(8), Residual(8), nn.Linear(8, 3))
    rule = DifferenceTargetProp(model, CE, inverse=lambda below, stage: Residual(8), cuts=["1", "2", "3"])
    assert list(rule.credit.inverses) == ["2", "3"]
    x, y = blobs(60)
    first, *_, last = [float(rule.step(x, y).loss) for _ in range(60)]
    assert last < 0.5 * first


def test_inverses_that_do_not_fit_are_named() -> None:
    model, x, y = _net()
    rule = DifferenceTargetProp(model, CE, inverse=lambda below, stage: nn.Linear(stage.modules[0].out_features, 4))  # type: ignore[arg-type]
    with pytest.raises(
        UnsupportedModelError, match=r"inverse of stage '4' maps its output \(9, 5\) to \(9, 4\); .*\(9, 7\)"
    ):
        rule.step(x, y)
    with pytest.raises(
        TypeError, match=r"inverse\(below, stage\) must return a torch.nn.Module, got int for stage '2'"
    ):
        DifferenceTargetProp(model, CE, inverse=lambda below, stage: 3)  # type: ignore[arg-type, return-value]


def test_bad_arguments() -> None:
    for changes, message in (
        ({"step_size": 0.0}, "step_size must be a finite number > 0, got 0.0"),
        ({"noise": -1.0}, "noise must be a finite number >= 0, got -1.0"),
        ({"noise_halving": 0}, "noise_halving must be a finite number > 0, got 0"),
        ({"seed": -1}, "seed must be an integer >= 0"),
    ):
        with pytest.raises(ValueError, match=message):
            TargetPropagation(**changes)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="optimizer must be a function, got float"):
        TargetPropagation(optimizer=0.1)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="inverse must be a function, got str"):
        TargetPropagation("linear")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="inverse_training must be one of 'interleaved', 'epoch', got 'never'"):
        DifferenceTargetProp(mlp(6, 5, 4, 3), CE, inverse_training="never")
    credit = TargetPropagation()
    credit.bind(Chain(mlp(6, 5, 4, 3)))
    with pytest.raises(ValueError, match="serves another rule already"):
        credit.bind(Chain(mlp(6, 5, 4, 3)))
    other = TargetPropagation()
    other.bind(Chain(mlp(6, 5, 4, 4, 3)))
    with pytest.raises(ValueError, match=r"holds inverses of \['2', '4'\], this network has \['2'\]"):
        credit.load_state_dict(other.state_dict())
    with pytest.raises(UnsupportedModelError, match=r"It branches around 'inner\.2'"):
        DifferenceTargetProp(Residual(4), CE)


def test_inverses_follow_seed_dtype_and_leave_the_global_state() -> None:
    weights = []
    for seed, dtype in ((0, torch.float32), (0, torch.float64), (1, torch.float32)):
        model = mlp(6, 5, 4, 3).to(dtype)
        state = torch.get_rng_state()
        rule = DifferenceTargetProp(model, CE, seed=seed)
        assert torch.equal(state, torch.get_rng_state())
        (p, _) = rule.credit.inverses["2"].parameters()
        assert p.dtype == dtype
        weights.append(p.detach().double())
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize("training", ["interleaved", "epoch"])
def test_a_model_that_was_converted_without_its_inverses_is_named(training: str) -> None:
    model = mlp(6, 8, 7, 3, activation="tanh")
    rule = DifferenceTargetProp(model, CE, inverse_training=training)
    model.double()
    x, y = blobs(9, dtype=torch.float64)
    before = rule_state(rule)
    use = rule.step if training == "interleaved" else (lambda x, y: rule.begin_epoch([(x, y)]))
    with pytest.raises(
        ValueError,
        match=r"The inverse of stage '2' has weights of torch\.float32 on cpu, the stage sends torch\.float64 on cpu",
    ):
        use(x, y)
    assert equal(before, rule_state(rule))
    rule = DifferenceTargetProp(model, CE, inverse=lambda below, stage: nn.Linear(5, 5))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):  # another reason
        rule.step(x, y)


def test_autocast_leaves_differences_whole() -> None:
    x, y = images(12)
    model = nets.build("conv:4x3:tanh", (1, 8, 8), 3)
    recorders = []
    for enabled in (False, True):
        credit = DifferenceTargetPropagation(step_size=1e-3)  # a delta that bfloat16 cannot tell from its output
        recorder = Recorder(credit)
        recorder.bind = credit.bind  # type: ignore[method-assign]
        rule = LocalRule(copy.deepcopy(model), CE, recorder, Descent(), cuts=activation_cuts(model))
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            rule.backward(x, y)
        recorders.append(recorder)
    for a, b in zip(recorders[1].kept, recorders[0].kept, strict=True):
        assert a.delta.dtype == torch.float32
        assert relative(a.delta, b.delta) < 0.1
        assert math.isfinite(float(a.delta.norm()))
