"""Spiking layers in other people's loops."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import Tensor, nn
from trains import every_rule, make_op, make_spikes, weight_gradient

from beyondprop.errors import NonFiniteError
from beyondprop.nn import CubaLIF, SpikeCounts, SpikingLayer


def test_derivatives_that_differ_in_time_are_refused() -> None:
    x = make_spikes(3, 20, 6)
    layer, behind = SpikingLayer(make_op(), CubaLIF(threshold=0.5)), SpikingLayer(make_op(5, 4), CubaLIF(threshold=0.5))
    with pytest.raises(RuntimeError, match="differ from step to step"):
        layer(x)[:, -1].sum().backward()
    with pytest.raises(RuntimeError, match="differ from step to step"):
        nn.Sequential(layer, nn.Dropout(), behind)(x).sum().backward()
    behind.rule = "surrogate"
    with pytest.raises(RuntimeError, match="rule='surrogate'"):
        behind(layer(x)).sum().backward()
    layer.rule = "surrogate"
    behind(layer(x)).sum().backward()


@pytest.mark.parametrize(
    "op",
    [
        nn.Sequential(nn.Linear(6, 5)),
        nn.Sequential(nn.Linear(6, 5, bias=False), nn.ReLU()),
        nn.Sequential(nn.Linear(6, 5, bias=False), nn.LayerNorm(5)),
        nn.Sequential(nn.Linear(6, 5, bias=False), nn.BatchNorm1d(5).eval()),
        nn.Sequential(nn.Dropout(), nn.Linear(6, 5, bias=False)),
    ],
    ids=["bias", "relu", "norm", "batch norm", "dropout"],
)
@every_rule
def test_operators_that_are_not_linear_are_refused(op: nn.Module, rule: str) -> None:
    for module in op.modules():
        if isinstance(module, nn.BatchNorm1d):
            nn.init.ones_(module.bias)
    with pytest.raises(ValueError, match="op must be linear"):
        SpikingLayer(op, CubaLIF(), rule=rule)(make_spikes(2, 5, 6, dtype=torch.float32))


def test_a_changed_operator_is_looked_at() -> None:
    layer, x = SpikingLayer(nn.Sequential(make_op()), CubaLIF()), make_spikes(2, 5, 6)
    layer(x)
    assert isinstance(layer.op, nn.Sequential)
    layer.op.append(nn.ReLU())
    with pytest.raises(ValueError, match="op must be linear"):
        layer(x)
    layer.op = nn.Sequential(make_op(), nn.Tanh())
    with pytest.raises(ValueError, match="op must be linear"):
        layer.step(x[:, 0])


def test_a_validation_first_does_not_let_in_what_is_linear_only_then() -> None:
    x, zero_bias = make_spikes(2, 5, 6), nn.Linear(6, 5, dtype=torch.float64)
    nn.init.zeros_(zero_bias.bias)
    for op in (
        nn.Sequential(make_op(), nn.Dropout()),
        nn.Sequential(make_op(), nn.BatchNorm1d(5)),
        nn.Sequential(zero_bias),
    ):
        with pytest.raises(ValueError, match="op must be linear"):
            SpikingLayer(op.double(), CubaLIF()).eval()(x)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@every_rule
def test_what_is_not_finite_is_refused(bad: float, rule: str) -> None:
    layer, x = SpikingLayer(make_op(), CubaLIF(), rule=rule), make_spikes(2, 5, 6)
    layer(x)
    x[1, 2, 3] = bad
    with pytest.raises(NonFiniteError, match="NaN or Inf"):
        layer(x)
    state = None
    for t in range(3):
        _, state = layer.step(x[:, t], state)
    with pytest.raises(NonFiniteError, match="NaN or Inf"):
        layer.step(x[:, 3], state)
    layer.op.get_parameter("weight").data[0, 0] = bad
    with pytest.raises(NonFiniteError, match="NaN or Inf"):
        layer(torch.ones(2, 5, 6, dtype=torch.float64))


def test_weights_changed_before_the_backward_pass_are_refused_or_do_not_matter() -> None:
    torch.manual_seed(0)
    layer, x = SpikingLayer(make_op(), CubaLIF(threshold=0.5)), make_spikes(3, 20, 6)
    old = layer.op.get_parameter("weight")
    (expected,) = torch.autograd.grad(layer(x).sum(), old)
    loss = layer(x).sum()
    layer.op.register_parameter("weight", nn.Parameter(torch.zeros_like(old)))
    (found,) = torch.autograd.grad(loss, old)
    assert torch.equal(found, expected)
    layer.op.register_parameter("weight", old)
    loss = layer(x).sum()
    with torch.no_grad():
        old.add_(1.0)
    with pytest.raises(RuntimeError, match="inplace"):
        loss.backward()


@every_rule
def test_two_losses_accumulate(rule: str) -> None:
    torch.manual_seed(0)
    layer, x = SpikingLayer(make_op(), CubaLIF(threshold=0.5), rule=rule), make_spikes(3, 20, 6)
    a, b = torch.randn(2, 3, 5, dtype=torch.float64)
    whole = weight_gradient(layer, x, a + b)
    spikes = layer(x).sum(1)
    ((spikes * a).sum() + (spikes * b).sum()).backward()
    torch.testing.assert_close(layer.op.get_parameter("weight").grad, whole, rtol=1e-10, atol=1e-12)


@every_rule
def test_frozen_operators_and_inputs(rule: str) -> None:
    torch.manual_seed(0)
    below, above = (SpikingLayer(make_op(6, n), CubaLIF(threshold=0.5), rule=rule) for n in (6, 3))
    net, x = nn.Sequential(below, above), make_spikes(3, 20, 6)
    net(x).sum().backward()
    weight = below.op.get_parameter("weight")
    expected, weight.grad = weight.grad, None
    above.requires_grad_(False)
    net(x).sum().backward()
    assert expected is not None
    assert expected.any()
    torch.testing.assert_close(weight.grad, expected)
    assert not net(x).detach().requires_grad
    with torch.no_grad():
        assert not net(x).requires_grad


@every_rule
def test_autocast_around_the_loop_changes_nothing(rule: str) -> None:
    torch.manual_seed(0)
    op, x = make_op(dtype=torch.float32), make_spikes(3, 60, 6, dtype=torch.float32)
    layer, coefficient = SpikingLayer(op, CubaLIF(threshold=0.5), rule=rule), torch.randn(3, 5)
    expected = weight_gradient(layer, x, coefficient)
    with torch.autocast("cpu", torch.bfloat16):
        loss = (layer(x).sum(1) * coefficient).sum()
        if rule == "hm2bp":  # its backward pass stands in a loop's autocast, too, where autograd's own would be rounded
            assert torch.equal(weight_gradient(layer, x, coefficient), expected)
        assert layer.step(x[:, 0])[0].dtype == torch.float32
    (found,) = torch.autograd.grad(loss, op.weight)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@every_rule
def test_half_weights_have_single_precision_recursions(dtype: torch.dtype, rule: str) -> None:
    torch.manual_seed(0)
    half = make_op(dtype=torch.float32).to(dtype)
    single = make_op(dtype=torch.float32)
    single.weight.data.copy_(half.weight.float())
    x, coefficient = make_spikes(3, 100, 6, dtype=torch.float32), torch.randn(3, 5)
    neuron = CubaLIF(threshold=0.5)
    layers = [SpikingLayer(op, neuron, rule=rule) for op in (half, single)]
    one, other = (layer(x) for layer in layers)
    assert one.dtype == dtype
    assert float((one.float() != other).float().mean()) < 0.02
    found, expected = (
        torch.autograd.grad((SpikeCounts()(layer(x)) * coefficient).sum(), layer.op.get_parameter("weight"))[0]
        for layer in layers
    )
    assert float((found.float() - expected).norm() / expected.norm()) < 0.05
    counts = SpikeCounts()(torch.ones(1, 1001, 2, dtype=dtype))
    assert counts.dtype == torch.float32
    assert counts.tolist() == [[1001, 1001]]


@every_rule
def test_copies_and_files(rule: str) -> None:
    torch.manual_seed(0)
    layer, x = (
        SpikingLayer(make_op(), CubaLIF(threshold=0.5), rule=rule, lateral=0.1, injected=2),
        make_spikes(3, 20, 6),
    )
    expected = layer(x)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(x), expected)
    twin = copy.deepcopy(layer)
    with torch.no_grad():
        twin.op.get_parameter("weight").zero_()
    assert not twin(x).any()
    assert torch.equal(layer(x), expected)
    assert set(layer.state_dict()) == {"op.weight"}


@every_rule
def test_lazy_and_parametrized_operators(rule: str) -> None:
    torch.manual_seed(0)
    x = make_spikes(2, 20, 6, dtype=torch.float32)
    lazy = SpikingLayer(nn.LazyLinear(4, bias=False), CubaLIF(threshold=0.1), rule=rule)
    lazy(x).sum().backward()
    assert lazy.op.get_parameter("weight").shape == (4, 6)
    normed = nn.utils.parametrizations.weight_norm(make_op(dtype=torch.float32))
    layer = SpikingLayer(normed, CubaLIF(threshold=0.5), rule=rule)
    layer(x).sum().backward()
    for name, weight in layer.named_parameters():
        assert weight.grad is not None, name
        assert weight.grad.any(), name


def test_a_second_derivative_is_refused() -> None:
    layer, x = SpikingLayer(make_op(), CubaLIF(threshold=0.5)), make_spikes(2, 20, 6)
    weight = layer.op.get_parameter("weight")
    (first,) = torch.autograd.grad(layer(x).sum(1).square().sum(), weight, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_derivatives_are_told_apart_from_rounding() -> None:
    layer, x = SpikingLayer(make_op(), CubaLIF(threshold=0.5)), make_spikes(3, 20, 6)
    ramp = torch.arange(20, dtype=torch.float64)[:, None] / 20
    (layer(x) * (1.0 + 1e-6 * ramp)).sum().backward()
    with pytest.raises(RuntimeError, match="differ from step to step"):
        (layer(x) * (1.0 + 1e-2 * ramp)).sum().backward()


@every_rule
def test_a_refraction_beyond_the_end_and_a_batch_of_none(rule: str) -> None:
    torch.manual_seed(0)
    layer = SpikingLayer(make_op(), CubaLIF(threshold=0.1, refractory=30), rule=rule)
    spikes = layer(make_spikes(2, 20, 6))
    spikes.sum().backward()
    assert spikes.sum(1).max() == 1
    assert layer(make_spikes(0, 20, 6)).shape == (0, 20, 5)
    fresh = SpikingLayer(make_op(), CubaLIF(), rule=rule)
    assert fresh(make_spikes(0, 20, 6)).shape == (0, 20, 5)


class _Spare(nn.Module):
    """A linear operator with a parameter that it does not use."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.spare = make_op(), nn.Parameter(torch.ones(3, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.used(x)
        return found


def test_parameters_that_are_not_used_have_no_gradient() -> None:
    op = _Spare()
    SpikingLayer(op, CubaLIF(threshold=0.5))(make_spikes(2, 20, 6)).sum().backward()
    assert op.used.weight.grad is not None
    assert op.spare.grad is None


class _LinearOnlyInEvaluation(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.relu() if self.training else 2 * x


def test_an_operator_is_looked_at_in_training_too() -> None:
    layer, x = SpikingLayer(_LinearOnlyInEvaluation(), CubaLIF()), make_spikes(2, 5, 6)
    layer.eval()(x)
    with pytest.raises(ValueError, match="op must be linear"):
        layer.train()(x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@every_rule
def test_half_weights_lose_nothing_in_the_recursions(dtype: torch.dtype, rule: str) -> None:
    torch.manual_seed(0)
    half, single = make_op(dtype=torch.float32), make_op(dtype=torch.float32)
    single.weight.data.copy_((half.weight.data * 8).round() / 8)  # sums of these are exact in both
    half.to(dtype).weight.data.copy_(single.weight.data)
    x, coefficient = make_spikes(3, 400, 6, dtype=torch.float32), torch.randn(3, 5).to(dtype).float()
    neuron = CubaLIF(64.0, 8.0, threshold=8.0)
    one, other = (SpikingLayer(op, neuron, rule=rule) for op in (half, single))
    assert torch.equal(one(x).float(), other(x))
    found, expected = (
        torch.autograd.grad((SpikeCounts()(layer(x)) * coefficient).sum(), layer.op.get_parameter("weight"))[0]
        for layer in (one, other)
    )
    assert float((found.float() - expected).norm() / expected.norm()) < 0.01


def test_operators_in_half_precision_are_looked_at() -> None:
    op = nn.Sequential(make_op(dtype=torch.bfloat16), nn.ReLU())
    x = make_spikes(2, 5, 6)
    SpikingLayer(op[0], CubaLIF())(x)
    with pytest.raises(ValueError, match="op must be linear"):
        SpikingLayer(op, CubaLIF())(x)
