"""Targets through inverses: against hand-written targets, exact inverses, and autograd."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import Recorder, Residual, blobs, equal, images, mlp, relative, rule_state
from torch import Tensor, nn

from beyondprop import (
    Chain,
    Descent,
    DifferenceTargetProp,
    DifferenceTargetPropagation,
    LocalRule,
    TargetPropagation,
    UnsupportedModelError,
    activations,
    nets,
)
from beyondprop.credit.base import Assignment
from beyondprop.credit.inverses import apply, mirror
from beyondprop.credit.targets import TargetPropagation as _Credit
from beyondprop.losses import OutputLoss
from beyondprop.nn import Sign
from beyondprop.rules.targetprop import activation_cuts
from beyondprop.stage import Stage

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
        return torch.tanh(h @ layer.inverse.weight.t() + layer.inverse.bias)

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


def test_exact_inverses_bring_the_wish_about() -> None:
    """Where g is f's inverse, both rules agree, and a moved input moves the output by the wish."""
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
        assert not bool(difference._below(2, trace[2], nothing).any())
        wrong = plain._below(2, trace[2], nothing)
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


# Where stages end, and what an inverse is made of


def test_stages_end_after_their_nonlinearity() -> None:
    def ends(*layers: nn.Module) -> list[str]:
        model = nn.Sequential(*layers)
        chain = Chain(model, activation_cuts(model))
        assert torch.equal(model(x), chain.record(x).output)
        return ["-".join(type(m).__name__ for m in stage.modules) for stage in chain]

    x = torch.randn(4, 6)
    assert ends(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)) == ["Linear-Tanh", "Linear"]
    assert ends(
        nn.Flatten(), nn.Linear(6, 5), nn.BatchNorm1d(5, track_running_stats=False).eval(), nn.ReLU(), nn.Dropout(0.0),
        nn.Linear(5, 3),
    ) == ["Flatten-Linear-BatchNorm1d-ReLU", "Dropout-Linear"]  # fmt: skip
    assert ends(nn.Linear(6, 5), nn.Tanh(), Sign(), nn.Linear(5, 3), nn.Tanh(), nn.Linear(3, 3)) == [
        "Linear-Tanh",
        "Sign-Linear-Tanh",
        "Linear",
    ]
    assert ends(nn.Linear(6, 5), nn.Linear(5, 3), nn.ReLU()) == ["Linear", "Linear-ReLU"]
    assert ends(nn.Linear(6, 5), nn.ReLU(), Residual(5), nn.Tanh(), nn.Linear(5, 3)) == [
        "Linear-ReLU",
        "Residual-Tanh",
        "Linear",
    ]
    nested = nn.Sequential(nn.Sequential(nn.Linear(6, 5), nn.Sequential(nn.Tanh())), nn.Sequential(nn.Linear(5, 3)))
    assert activation_cuts(nested) == ["0.1.0", "1.0"]
    lenet = nets.build("lenet5", (1, 28, 28), 10)
    assert activation_cuts(lenet) == ["2", "5", "8", "10", "11"]


class _Features(nn.Sequential):
    """A Sequential with a name of its own, as users write them."""


def _twice(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    del module, inputs
    return 2 * output


def test_stages_end_where_the_chain_can_end_them() -> None:
    """A Sequential of another name is taken apart as its base is, one with a hook is not."""
    x, y = blobs(9)
    features = _Features(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 5), nn.Tanh())
    model = nn.Sequential(features, nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    assert activation_cuts(model) == ["0.1", "0.3", "2", "3"]
    rule = DifferenceTargetProp(model, CE)
    assert [stage.names for stage in rule.chain] == [["0.0", "0.1"], ["0.2", "0.3"], ["1", "2"], ["3"]]
    features.register_forward_hook(_twice)
    assert activation_cuts(model) == ["0", "2", "3"]
    rule = DifferenceTargetProp(model, CE)
    with torch.no_grad():
        output = model(x)
    assert torch.equal(rule.step(x, y).output, output)
    model.register_forward_hook(_twice)
    for refused in (model, Residual(6)):
        with pytest.raises(UnsupportedModelError, match=f"{type(refused).__name__} has a forward pass of its own"):
            DifferenceTargetProp(refused, CE)


CONVS: dict[str, tuple[Callable[[], list[nn.Module]], tuple[int, ...]]] = {
    "plain": (lambda: [nn.Conv2d(2, 3, 3), nn.ReLU()], (2, 8, 9)),
    "padded": (lambda: [nn.Conv2d(2, 3, 3, padding=1), nn.ReLU()], (2, 8, 9)),
    "stride": (lambda: [nn.Conv2d(2, 3, 3, stride=2, padding=1), nn.ReLU()], (2, 8, 9)),
    "same": (lambda: [nn.Conv2d(2, 3, 5, padding="same"), nn.ReLU()], (2, 8, 9)),
    "valid": (lambda: [nn.Conv2d(2, 3, 3, padding="valid"), nn.ReLU()], (2, 8, 9)),
    "dilated": (lambda: [nn.Conv2d(2, 4, 3, dilation=2, groups=2), nn.Tanh()], (2, 8, 9)),
    "pooled": (lambda: [nn.Conv2d(2, 3, 3), nn.ReLU(), nn.MaxPool2d(2)], (2, 9, 9)),
    "pool_first": (lambda: [nn.MaxPool2d(2), nn.Conv2d(2, 3, 3), nn.ReLU()], (2, 9, 9)),
    "1d": (lambda: [nn.Conv1d(2, 3, 3, stride=2), nn.ReLU(), nn.AvgPool1d(2)], (2, 17)),
    "3d": (lambda: [nn.Conv3d(2, 3, 2, padding=1), nn.ReLU()], (2, 4, 5, 4)),
    "flat": (lambda: [nn.Flatten(), nn.Linear(36, 5), nn.Tanh()], (4, 3, 3)),
    "sequence": (lambda: [nn.Linear(6, 5), nn.Tanh()], (7, 6)),
}


def test_a_code_behind_a_norm_is_not_squashed_by_its_inverse() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.BatchNorm1d(4, affine=False), nn.Linear(4, 2))
    below, stage = Chain(model, ["2"])
    assert [type(m) for m in below.modules][-1] is nn.BatchNorm1d
    assert isinstance(mirror(below, stage), nn.Linear)  # no tanh behind it: normalised codes go beyond 1


@pytest.mark.parametrize("case", list(CONVS))
def test_the_default_inverse_finds_the_inputs_shape(case: str) -> None:
    build, shape = CONVS[case]
    kind = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}.get(len(shape) - 1, nn.Conv2d)
    below = nn.Linear(6, 6) if case == "sequence" else kind(shape[0], shape[0], 1)
    chain = Chain(_with_head(below, build(), shape), ["1", str(1 + len(build()))])
    inverse = mirror(chain[0], chain[1])
    x = torch.randn(4, *shape)
    with torch.no_grad():
        trace = chain.record(x)
        found = apply(inverse, trace[1].output, tuple(shape[1:]))
    assert found.numel() == trace[1].input.numel()
    found = found.view_as(trace[1].input)
    assert found.shape == x.shape
    assert bool((found < 0).any())  # a leaky ReLU of the same slope, as below
    weight = next(p for p in inverse.parameters() if p.ndim > 1).detach().flatten(1)
    gram = weight @ weight.t() if weight.shape[0] <= weight.shape[1] else weight.t() @ weight
    torch.testing.assert_close(gram, torch.eye(len(gram)), rtol=1e-4, atol=1e-4)
    assert "negative_slope=0.3" in repr(inverse)


def _with_head(below: nn.Module, middle: list[nn.Module], shape: tuple[int, ...]) -> nn.Sequential:
    model = nn.Sequential(below, nn.LeakyReLU(0.3), *middle, nn.Flatten())
    return nn.Sequential(*model, nn.Linear(model(torch.zeros(1, *shape)).shape[1], 3))


def test_the_transposed_convolution_is_the_convolutions_transpose() -> None:
    """With the convolution's own weights, the inverse is the map's adjoint, stride and padding included."""
    conv = nn.Conv2d(2, 3, 3, stride=2, padding=1, bias=False).double()
    chain = Chain(nn.Sequential(nn.Conv2d(2, 2, 1), conv, nn.Flatten(), nn.Linear(60, 3)), ["0", "1"])
    inverse: Any = mirror(chain[0], chain[1]).double()
    conv.requires_grad_(False)
    inverse.requires_grad_(False).transposed.weight = conv.weight
    for size in ((8, 9), (7, 10), (8, 8)):
        z = torch.randn(2, 2, *size, dtype=torch.float64)
        h = conv(z)
        v = torch.randn_like(h)
        assert abs(float((h * v).sum() - (z * inverse(v, size)).sum())) < 1e-10


def test_pre_activation_codes_have_linear_inverses() -> None:
    chain = Chain(mlp(6, 5, 4, 3))
    assert type(mirror(chain[0], chain[1])) is nn.Linear


class _Scaled(nn.Module):
    """`size tanh(z)`: an activation of a user's own, with an argument that has no default."""

    def __init__(self, size: float) -> None:
        super().__init__()
        self.size = size

    def forward(self, z: Tensor) -> Tensor:
        return self.size * torch.tanh(z)


@pytest.mark.parametrize(
    "activation",
    [nn.Hardtanh(0.0, 3.0), nn.LeakyReLU(0.3), nn.Softplus(2.0, 1.0), nn.GELU("tanh"), _Scaled(2.0), nn.ReLU6()],
    ids=lambda activation: type(activation).__name__,
)
def test_an_inverse_ends_in_the_codes_own_nonlinearity(activation: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(
        activations._FACTORIES,
        _Scaled,
        lambda m: activations.Activation(m.forward, lambda z, a: m.size - a * a / m.size, needs_input=False),
    )
    model = nn.Sequential(nn.Linear(6, 5), activation, nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    rule = DifferenceTargetProp(model, CE)
    inverse: Any = rule.credit.inverses["2"]
    h = 5 * torch.randn(40, 4, dtype=torch.float64)
    with torch.no_grad():
        assert torch.equal(inverse(h), activation(inverse.inverse(h)))
    assert inverse.activation is not activation
    rule.step(*blobs(9, dtype=torch.float64))


def test_an_inverse_keeps_a_units_target_rule() -> None:
    model = nn.Sequential(nn.Linear(6, 5), Sign("hinge"), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    inverse: Any = mirror(*list(Chain(model, ["1", "3"]))[:2])
    assert repr(inverse.activation) == repr(Sign("hinge")) != repr(Sign())


@pytest.mark.parametrize(
    ("middle", "kinds"),
    [
        (Residual(5), "Residual"),
        (nn.LSTM(5, 5), "LSTM"),
        (nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 5)), "Linear, Linear"),
    ],
)
def test_stages_without_a_default_inverse_are_named(middle: nn.Module, kinds: str) -> None:
    modules = [nn.Linear(6, 5), *(middle if type(middle) is nn.Sequential else [middle]), nn.Linear(5, 3)]
    model = nn.Sequential(*modules)
    names = ["0", str(len(modules) - 2)]
    with pytest.raises(
        UnsupportedModelError, match=rf"Stage '\d' \({kinds}\) has no inverse by default.*inverse=factory"
    ):
        DifferenceTargetProp(model, CE, cuts=names)


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
    with pytest.raises(UnsupportedModelError, match="has a forward pass of its own"):
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
        credit = DifferenceTargetPropagation(step_size=1e-3)  # a wish that bfloat16 cannot tell from its output
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
