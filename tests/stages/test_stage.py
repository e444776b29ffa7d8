"""Closed forms of Linear and Conv stages against autograd."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from cases import ACTIVATIONS, relative
from torch import Tensor, nn

from beyondprop.nn.activations import closed_form
from beyondprop.nn.functional import patches
from beyondprop.stages.affine import AffinePullback, AffineStage

Case = tuple[tuple[int, ...], list[nn.Module]]


def _cases(bias: bool) -> dict[str, Case]:
    return {
        "linear": ((4, 5), [nn.Linear(5, 3, bias=bias)]),
        "linear_3d": ((4, 2, 5), [nn.Linear(5, 3, bias=bias)]),
        "flatten_linear": ((4, 2, 3, 3), [nn.Flatten(), nn.Linear(18, 3, bias=bias)]),
        "unflatten_conv": ((4, 18), [nn.Unflatten(1, (2, 3, 3)), nn.Conv2d(2, 3, 2, bias=bias)]),
        "conv1d": ((4, 2, 9), [nn.Conv1d(2, 3, 3, stride=2, padding=1, bias=bias)]),
        "conv2d": ((4, 2, 7, 6), [nn.Conv2d(2, 4, (3, 2), stride=(2, 1), padding=(1, 2), bias=bias)]),
        "conv2d_dilated": ((4, 2, 8, 8), [nn.Conv2d(2, 4, 3, dilation=2, padding=1, bias=bias)]),
        "conv2d_groups": ((4, 4, 5, 5), [nn.Conv2d(4, 6, 3, groups=2, bias=bias)]),
        "conv2d_depthwise": ((4, 3, 5, 5), [nn.Conv2d(3, 6, 3, groups=3, stride=2, bias=bias)]),
        "conv3d": ((3, 2, 4, 5, 4), [nn.Conv3d(2, 3, (2, 3, 2), stride=(1, 2, 1), padding=(0, 1, 1), bias=bias)]),
    }


def _check(shape: tuple[int, ...], modules: list[nn.Module], dtype: torch.dtype, tolerance: float) -> None:
    net = nn.Sequential(*modules).to(dtype)
    net.zero_grad()
    assert AffineStage.fits(modules)
    stage = AffineStage("s", [(str(i), m) for i, m in enumerate(modules)])
    z = torch.randn(shape, dtype=dtype)
    leaf = z.clone().requires_grad_()
    output = net(leaf)
    v, u = torch.randn_like(output), torch.randn_like(z)
    parameters = list(net.parameters())
    pulled, *gradients = torch.autograd.grad(output, [leaf, *parameters], v)
    _, pushed = torch.autograd.functional.jvp(net, z, u)
    with torch.no_grad():
        pullback = stage.record(z)
        assert relative(pullback.output, output) < tolerance
        assert relative(pullback(v), pulled) < tolerance
        assert relative(pullback.push(u), pushed) < tolerance  # type: ignore[arg-type]
        left, right = float((v * pullback.push(u)).sum()), float((pullback(v) * u).sum())
        assert abs(left - right) < tolerance * float(v.norm() * pullback.push(u).norm())
        pullback.add_gradients(v, -0.5)
        pullback.add_gradients(v, 2.0)  # the second adds to the first
    for p, g in zip(parameters, gradients, strict=True):
        assert p.grad is not None
        assert relative(p.grad, 1.5 * g) < tolerance
    assert not pullback.output.requires_grad


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("case", list(_cases(True)))
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_every_map_agrees_with_autograd(case: str, bias: bool, dtype: torch.dtype, tolerance: float) -> None:
    shape, modules = _cases(bias)[case]
    _check(shape, [nn.Tanh(), *modules], dtype, tolerance)
    _check(shape, modules, dtype, tolerance)


@pytest.mark.parametrize("name", list(ACTIVATIONS))
@pytest.mark.parametrize("case", ["linear", "conv2d", "flatten_linear"])
def test_every_activation_agrees_with_autograd(case: str, name: str) -> None:
    shape, modules = _cases(True)[case]
    _check(shape, [ACTIVATIONS[name](), *modules], torch.float64, 1e-12)
    _check(shape, [ACTIVATIONS[name](), *modules], torch.float32, 1e-5)
    if case == "flatten_linear":  # the order of reshape and nonlinearity is the user's
        _check(shape, [modules[0], ACTIVATIONS[name](), modules[1]], torch.float64, 1e-12)


@pytest.mark.parametrize("name", [n for n in ACTIVATIONS if n != "identity"])
def test_slopes_at_kinks_and_far_out_are_autograds(name: str) -> None:
    module = ACTIVATIONS[name]()
    activation = closed_form(module)
    assert activation is not None
    # Softplus: beta 2 and threshold 3 switch to the identity at 1.5.
    points = torch.tensor([-50.0, -1.5, -1e-9, -0.0, 0.0, 1e-9, 1.5, 1.5 + 1e-9, 50.0], dtype=torch.float64)
    leaf = points.clone().requires_grad_()
    (expected,) = torch.autograd.grad(module(leaf).sum(), leaf)
    value = activation.value(points)
    torch.testing.assert_close(value, module(points), rtol=0, atol=0)
    torch.testing.assert_close(activation.slope(points, value), expected, rtol=1e-12, atol=1e-12)


def test_gated_push_may_skip_the_slope_of_a_pulled_tangent_only() -> None:
    stage = AffineStage("s", [("0", nn.ReLU()), ("1", nn.Linear(6, 4, dtype=torch.float64))])
    z, v, u = (torch.randn(5, n, dtype=torch.float64) for n in (6, 4, 6))
    with torch.no_grad():
        pullback = stage.record(z)
        pulled = pullback(v)
        torch.testing.assert_close(pullback.push(pulled, gated=True), pullback.push(pulled), rtol=0, atol=0)
        assert not torch.equal(pullback.push(u, gated=True), pullback.push(u))
        leaky = AffineStage("l", [("0", nn.LeakyReLU()), *zip("1", stage.modules[1:], strict=True)]).record(z)
        torch.testing.assert_close(leaky.push(pulled, gated=True), leaky.push(pulled), rtol=0, atol=0)


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(2, 3, 3),
        nn.Conv2d(2, 3, (2, 3), stride=(2, 1), padding=(1, 0)),
        nn.Conv2d(2, 3, 2, dilation=(1, 2), padding=1, stride=2),
    ],
)
def test_patches_are_those_of_unfold(conv: nn.Conv2d) -> None:
    x = torch.randn(4, 2, 7, 8, dtype=torch.float64)
    settings = {"dilation": conv.dilation, "padding": conv.padding, "stride": conv.stride}
    expected = F.unfold(x, conv.kernel_size, **settings).transpose(1, 2).reshape(-1, conv.weight[0].numel())  # type: ignore[arg-type]
    torch.testing.assert_close(patches(x, conv), expected, rtol=0, atol=0)


@pytest.mark.parametrize("case", [c for c in _cases(True) if "groups" not in c and "depthwise" not in c])
@pytest.mark.parametrize("bias", [True, False])
def test_rows_times_weights_are_the_output(case: str, bias: bool) -> None:
    shape, modules = _cases(bias)[case]
    stage = AffineStage("s", [(str(i), m.double()) for i, m in enumerate(modules)])
    with torch.no_grad():
        pullback = stage.record(torch.randn(shape, dtype=torch.float64))
        weight = stage.weight.reshape(stage.weight.shape[0], -1)
        if stage.bias is not None:
            weight = torch.cat([weight, stage.bias[:, None]], 1)
        rows, output = pullback.feature_rows(), pullback.output
        expected = output if stage.is_linear else output.flatten(2).transpose(1, 2)  # one row an output position
        torch.testing.assert_close(rows @ weight.t(), expected.reshape(len(rows), -1), rtol=0, atol=1e-12)


def test_frozen_weight_or_bias_gets_no_gradient() -> None:
    for frozen in ("weight", "bias"):
        linear = nn.Linear(4, 3)
        getattr(linear, frozen).requires_grad_(False)
        stage = AffineStage("s", [("0", linear)])
        with torch.no_grad():
            stage.record(torch.randn(5, 4)).add_gradients(torch.randn(5, 3), 1.0)
        assert (linear.weight.grad is None) == (frozen == "weight")
        assert (linear.bias.grad is None) == (frozen == "bias")


def test_relinearize_keeps_changes_that_a_difference_of_outputs_would_lose() -> None:
    linear = nn.Linear(4, 3)
    stage = AffineStage("s", [("0", linear)])
    with torch.no_grad():
        linear.weight.fill_(1.0)
        pullback = stage.record(torch.full((2, 4), 1000.0))
        before = {p: p.clone() for p in stage.parameters}
        linear.bias.add_(2.0**-20)
        _, change = pullback.relinearize(before)
        assert 0 < float(change.max()) < 2e-6
        assert torch.equal(stage.record(pullback.input).output, pullback.output)  # lost there


def test_stale_gradient_buffers_do_not_leak() -> None:
    linear = nn.Linear(4, 3)
    stage = AffineStage("s", [("0", linear)])
    z, v = torch.randn(5, 4), torch.randn(5, 3)
    with torch.no_grad():
        stage.record(torch.full_like(z, float("nan"))).add_gradients(v, 1.0)
        linear.weight.grad = linear.bias.grad = None
        stage.record(z).add_gradients(v, 1.0)
    torch.testing.assert_close(linear.weight.grad, v.t() @ z)
    torch.testing.assert_close(linear.bias.grad, v.sum(0))


def test_channels_last_weights_behind_unflatten() -> None:
    modules = [nn.ReLU(), nn.Unflatten(1, (2, 3, 3)), nn.Conv2d(2, 3, 2)]
    net = nn.Sequential(*modules).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    _check((6, 18), list(net), torch.float64, 1e-12)


@pytest.mark.parametrize(
    "modules",
    [
        [nn.Dropout(0.5), nn.Linear(3, 2)],
        [nn.ReLU(), nn.Tanh(), nn.Linear(3, 2)],
        [nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular")],
        [nn.Conv2d(2, 2, 3, padding="same")],
        [nn.ConvTranspose2d(2, 2, 3)],
        [nn.utils.parametrizations.orthogonal(nn.Linear(3, 3))],
        [nn.Linear(3, 3), nn.BatchNorm1d(3)],
    ],
)
def test_other_runs_have_no_closed_form(modules: list[nn.Module]) -> None:
    assert not AffineStage.fits(modules)


def _double(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    del module, inputs
    return 2 * output


def test_hooked_modules_have_no_closed_form() -> None:
    linear = nn.Linear(3, 3)
    handle = linear.register_forward_hook(_double)
    assert not AffineStage.fits([linear])
    handle.remove()
    assert AffineStage.fits([linear])


def test_pullback_at_another_input_is_the_stage_there() -> None:
    stage = AffineStage("s", [("0", nn.Tanh()), ("1", nn.Linear(4, 3))])
    z, other = torch.randn(2, 4), torch.randn(2, 4)
    with torch.no_grad():
        moved: Tensor = stage.record(z).at(other).output
        assert torch.equal(moved, stage.record(other).output)
    assert isinstance(stage.record(z), AffinePullback)
