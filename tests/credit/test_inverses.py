"""Where stages of target propagation end, and what inverses are made of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import Residual, blobs, mlp
from torch import Tensor, nn

from beyondprop import Chain, DifferenceTargetProp, UnsupportedModelError
from beyondprop.credit.inverses import apply, mirror
from beyondprop.lab import nets
from beyondprop.nn import Sign, activations
from beyondprop.rules.targetprop import activation_cuts

CE = nn.CrossEntropyLoss()


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
    for refused, message in (
        (model, "Sequential has hooks"),
        (Residual(6), "Residual has 1 stage.*It branches around"),
    ):
        with pytest.raises(UnsupportedModelError, match=message):
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
        assert torch.equal(inverse(h), activation(inverse[0](h)))
    assert inverse[1] is not activation
    rule.step(*blobs(9, dtype=torch.float64))


def test_a_sequence_that_is_flattened_behind_its_linear_is_unflattened() -> None:
    """Its inverse is of the Linear, position by position."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 6), nn.Flatten(), nn.Tanh(), nn.Linear(18, 3)
    ).double()
    rule = DifferenceTargetProp(model, CE)
    h = torch.randn(7, 18, dtype=torch.float64)
    inverse: Any = rule.credit.inverses["2"]
    weight, bias = inverse[1].weight, inverse[1].bias
    by_hand = torch.stack([torch.tanh(h[:, 6 * t : 6 * t + 6] @ weight.t() + bias) for t in range(3)], 1)
    assert torch.allclose(apply(inverse, h, (5,)), by_hand, atol=1e-14)
    x = torch.randn(30, 3, 5, dtype=torch.float64)
    y = x.sum(1)[:, :3].argmax(1)
    losses = [float(rule.step(x, y).loss) for _ in range(250)]
    assert losses[-1] < 0.5 * losses[0]


def test_an_inverse_keeps_a_units_target_rule() -> None:
    model = nn.Sequential(nn.Linear(6, 5), Sign("hinge"), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    inverse: Any = mirror(*list(Chain(model, ["1", "3"]))[:2])
    assert repr(inverse[1]) == repr(Sign("hinge")) != repr(Sign())


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
