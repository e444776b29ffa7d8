"""Spiking layers in other people's loops, and what the layer is told beside its operator."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import Tensor, nn

from beyondprop.errors import NonFiniteError
from beyondprop.nn import CubaLIF, SpikeCountLoss, SpikeCounts, SpikingLayer
from beyondprop.nn.spiking import scans
from beyondprop.nn.spiking.hm2bp import _injected, lateral_factor

every_rule = pytest.mark.parametrize("rule", ["hm2bp", "surrogate"])
NEURONS = [CubaLIF(threshold=0.5), CubaLIF(8.0, 3.0, 0.5, refractory=2, delay=0), CubaLIF(5.0, 5.0, 0.5, 1, 3)]


def _op(inputs: int = 6, outputs: int = 5, dtype: torch.dtype = torch.float64) -> nn.Linear:
    op = nn.Linear(inputs, outputs, bias=False, dtype=dtype)
    nn.init.uniform_(op.weight, -1.0, 1.5)
    return op


def _spikes(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return (torch.rand(shape) < 0.4).to(dtype)


def _weight_gradient(layer: nn.Module, x: Tensor, coefficient: Tensor) -> Tensor:
    (layer(x).sum(1) * coefficient).sum().backward()
    (weight,) = layer.parameters()
    assert weight.grad is not None
    found, weight.grad = weight.grad, None
    return found


@pytest.mark.parametrize("neuron", NEURONS)
@pytest.mark.parametrize("lateral", [0.0, 0.4])
@every_rule
def test_steps_are_the_sequence(neuron: CubaLIF, lateral: float, rule: str) -> None:
    torch.manual_seed(0)
    layer, x = SpikingLayer(_op(), neuron, rule=rule, lateral=lateral), _spikes(3, 30, 6)
    whole, state, kept = layer(x), None, None
    for t in range(30):
        spikes, state = layer.step(x[:, t], state)
        assert torch.equal(spikes, whole[:, t])
        kept = state if t == 14 else kept
    assert whole.any()
    again, _ = layer.step(x[:, 15], kept)  # a state is not changed by what came after it
    assert torch.equal(again, whole[:, 15])
    with pytest.raises(ValueError, match="begin a new sequence"):
        layer.step(x[:2, 0], state)
    with pytest.raises(ValueError, match="begin a new sequence"):
        SpikingLayer(layer.op, CubaLIF(threshold=0.7)).step(x[:, 0], state)


@every_rule
def test_lateral_spikes_inhibit_all_others_a_step_later(rule: str) -> None:
    neuron = CubaLIF(tau_mem=10.0, tau_syn=1.0, threshold=1.0, delay=0)
    op = nn.Linear(3, 3, bias=False)
    op.weight.data.copy_(torch.eye(3) * 1.05)
    x = torch.zeros(1, 3, 3)
    x[0, 0, 0], x[0, 1, :] = 1, 1  # the first neuron fires at once, and then all are driven
    free = SpikingLayer(op, neuron, rule=rule)(x)[0]
    held = SpikingLayer(op, neuron, rule=rule, lateral=0.2)(x)[0]
    assert free.tolist() == [[1, 0, 0], [1, 1, 1], [0, 0, 0]]
    assert held.tolist() == [[1, 0, 0], [1, 0, 0], [0, 0, 0]]


@pytest.mark.parametrize("neuron", NEURONS)
def test_the_lateral_factor_is_the_sum_over_pairs(neuron: CubaLIF) -> None:
    torch.manual_seed(1)
    strength = 0.3
    spikes, _ = scans.simulate(_spikes(40, 2, 6) @ _op().weight.detach().T, neuron, strength)
    spikes[:, 1, 2] = False
    kernel = scans.Filter.of(neuron)
    q = scans.weights_of_firings(spikes, kernel.keep_mem, neuron.refractory, torch.float64)
    heard = scans.response(spikes.double(), kernel.delayed(1))
    for b in range(2):
        for j in range(5):
            back = 0.0
            for other in range(5):
                counts = float(spikes[:, b, j].sum()), float(spikes[:, b, other].sum())
                if other != j and min(counts) > 0:
                    there = float((q[:, b, other] * heard[:, b, j]).sum()) / (counts[0] * neuron.threshold)
                    back += there * float((q[:, b, j] * heard[:, b, other]).sum()) / (counts[1] * neuron.threshold)
            expected = 1.0 / max(1.0 - strength**2 * back, 0.1)
            found = lateral_factor(q, spikes, strength, neuron, kernel)[b, j]
            torch.testing.assert_close(float(found), expected, rtol=1e-10, atol=1e-10)
    plain = SpikingLayer(_op(), neuron, lateral=0.0)
    inhibited = SpikingLayer(copy.deepcopy(plain.op), neuron, lateral=1e-9)
    x, coefficient = _spikes(2, 40, 6), torch.randn(2, 5, dtype=torch.float64)
    torch.testing.assert_close(_weight_gradient(plain, x, coefficient), _weight_gradient(inhibited, x, coefficient))


def test_spikes_are_injected_where_the_loss_wants_them() -> None:
    torch.manual_seed(0)
    neuron = CubaLIF(threshold=1e6)  # never fires
    op, x = _op(), _spikes(2, 21, 6)
    coefficient = torch.zeros(2, 5, dtype=torch.float64)
    coefficient[0, 1], coefficient[0, 2] = -3.0, 2.0
    layer = SpikingLayer(op, neuron, injected=4, side_effect=False)
    found = _weight_gradient(layer, x, coefficient)
    spikes = torch.zeros(21, 2, 5, dtype=torch.bool)
    spikes[[5, 10, 15, 20], 0, 1] = True
    kernel = scans.Filter.of(neuron)
    q = scans.weights_of_firings(spikes, kernel.keep_mem, 0, torch.float64)
    e = torch.einsum("tbi,tbj->bij", q, scans.response(x.transpose(0, 1), kernel))
    torch.testing.assert_close(found[1], -3.0 / 1e6 * e[0, 1], rtol=1e-12, atol=0)
    torch.testing.assert_close(found[2], 2.0 / 1e6 * 0.1 * x[0].any(0).double(), rtol=1e-12, atol=0)
    assert not found[[0, 3, 4]].any()
    with pytest.raises(ValueError, match=r"injected must be <= 6.*refractory=2"):
        SpikingLayer(op, CubaLIF(refractory=2), injected=10)(x)


def test_silent_neurons_as_published() -> None:
    torch.manual_seed(0)
    op, x, coefficient = _op(), _spikes(2, 20, 6), torch.randn(2, 5, dtype=torch.float64)
    neuron = CubaLIF(threshold=50.0)
    heard = torch.einsum("bi,bj->bij", coefficient / 50.0, 0.1 * x.any(1).double())
    ours = _weight_gradient(SpikingLayer(op, neuron), x, coefficient)
    torch.testing.assert_close(ours, heard.sum(0), rtol=1e-12, atol=1e-14)
    side = 1.0 + 0.5 / 50.0 * op.weight.detach().sum(1)
    reference = _weight_gradient(SpikingLayer(op, neuron, silent="reference"), x, coefficient)
    torch.testing.assert_close(reference, heard.sum(0) * side[:, None], rtol=1e-12, atol=1e-14)


def test_the_continuous_kernel_is_its_formula() -> None:
    mem, syn = 16.0, 3.0
    kernel = scans.Filter.of(CubaLIF(mem, syn, delay=2), "continuous")
    found = scans.response(torch.eye(1, 30, dtype=torch.float64)[0, :, None], kernel)[:, 0]
    t = torch.arange(28, dtype=torch.float64)
    expected = (torch.exp(-t / mem) - torch.exp(-t / syn)) / (1.0 - syn / mem)
    torch.testing.assert_close(found[2:], expected, rtol=1e-12, atol=1e-14)
    assert not found[:2].any()
    with pytest.raises(ValueError, match="tau_mem - tau_syn"):
        SpikingLayer(_op(), CubaLIF(4.0, 4.0), kernel="continuous")


def test_the_kernels_agree_for_slow_neurons() -> None:
    torch.manual_seed(0)
    op, x, coefficient = _op(), _spikes(4, 400, 6), torch.randn(4, 5, dtype=torch.float64)
    neuron = CubaLIF(64.0, 8.0, 10.0, refractory=2)
    discrete, continuous = (
        _weight_gradient(SpikingLayer(op, neuron, kernel=kernel), x, coefficient)
        for kernel in ("discrete", "continuous")
    )
    apart = float((discrete - continuous).norm() / discrete.norm())
    assert 1e-6 < apart < 0.1


def test_derivatives_that_differ_in_time_are_refused() -> None:
    x = _spikes(3, 20, 6)
    layer, behind = SpikingLayer(_op(), CubaLIF(threshold=0.5)), SpikingLayer(_op(5, 4), CubaLIF(threshold=0.5))
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
        SpikingLayer(op, CubaLIF(), rule=rule)(_spikes(2, 5, 6, dtype=torch.float32))


def test_a_changed_operator_is_looked_at() -> None:
    layer, x = SpikingLayer(nn.Sequential(_op()), CubaLIF()), _spikes(2, 5, 6)
    layer(x)
    assert isinstance(layer.op, nn.Sequential)
    layer.op.append(nn.ReLU())
    with pytest.raises(ValueError, match="op must be linear"):
        layer(x)
    layer.op = nn.Sequential(_op(), nn.Tanh())
    with pytest.raises(ValueError, match="op must be linear"):
        layer.step(x[:, 0])


def test_a_validation_first_does_not_let_in_what_is_linear_only_then() -> None:
    x, zero_bias = _spikes(2, 5, 6), nn.Linear(6, 5, dtype=torch.float64)
    nn.init.zeros_(zero_bias.bias)
    for op in (nn.Sequential(_op(), nn.Dropout()), nn.Sequential(_op(), nn.BatchNorm1d(5)), nn.Sequential(zero_bias)):
        with pytest.raises(ValueError, match="op must be linear"):
            SpikingLayer(op.double(), CubaLIF()).eval()(x)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@every_rule
def test_what_is_not_finite_is_refused(bad: float, rule: str) -> None:
    layer, x = SpikingLayer(_op(), CubaLIF(), rule=rule), _spikes(2, 5, 6)
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
    layer, x = SpikingLayer(_op(), CubaLIF(threshold=0.5)), _spikes(3, 20, 6)
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
    layer, x = SpikingLayer(_op(), CubaLIF(threshold=0.5), rule=rule), _spikes(3, 20, 6)
    a, b = torch.randn(2, 3, 5, dtype=torch.float64)
    whole = _weight_gradient(layer, x, a + b)
    spikes = layer(x).sum(1)
    ((spikes * a).sum() + (spikes * b).sum()).backward()
    torch.testing.assert_close(layer.op.get_parameter("weight").grad, whole, rtol=1e-10, atol=1e-12)


@every_rule
def test_frozen_operators_and_inputs(rule: str) -> None:
    torch.manual_seed(0)
    below, above = (SpikingLayer(_op(6, n), CubaLIF(threshold=0.5), rule=rule) for n in (6, 3))
    net, x = nn.Sequential(below, above), _spikes(3, 20, 6)
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
    op, x = _op(dtype=torch.float32), _spikes(3, 60, 6, dtype=torch.float32)
    layer, coefficient = SpikingLayer(op, CubaLIF(threshold=0.5), rule=rule), torch.randn(3, 5)
    expected = _weight_gradient(layer, x, coefficient)
    with torch.autocast("cpu", torch.bfloat16):
        loss = (layer(x).sum(1) * coefficient).sum()
        if rule == "hm2bp":  # its backward pass stands in a loop's autocast, too, where autograd's own would be rounded
            assert torch.equal(_weight_gradient(layer, x, coefficient), expected)
        assert layer.step(x[:, 0])[0].dtype == torch.float32
    (found,) = torch.autograd.grad(loss, op.weight)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@every_rule
def test_half_weights_have_single_precision_recursions(dtype: torch.dtype, rule: str) -> None:
    torch.manual_seed(0)
    half = _op(dtype=torch.float32).to(dtype)
    single = _op(dtype=torch.float32)
    single.weight.data.copy_(half.weight.float())
    x, coefficient = _spikes(3, 100, 6, dtype=torch.float32), torch.randn(3, 5)
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
    layer, x = SpikingLayer(_op(), CubaLIF(threshold=0.5), rule=rule, lateral=0.1, injected=2), _spikes(3, 20, 6)
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
    x = _spikes(2, 20, 6, dtype=torch.float32)
    lazy = SpikingLayer(nn.LazyLinear(4, bias=False), CubaLIF(threshold=0.1), rule=rule)
    lazy(x).sum().backward()
    assert lazy.op.get_parameter("weight").shape == (4, 6)
    normed = nn.utils.parametrizations.weight_norm(_op(dtype=torch.float32))
    layer = SpikingLayer(normed, CubaLIF(threshold=0.5), rule=rule)
    layer(x).sum().backward()
    for name, weight in layer.named_parameters():
        assert weight.grad is not None, name
        assert weight.grad.any(), name


def test_a_second_derivative_is_refused() -> None:
    layer, x = SpikingLayer(_op(), CubaLIF(threshold=0.5)), _spikes(2, 20, 6)
    weight = layer.op.get_parameter("weight")
    (first,) = torch.autograd.grad(layer(x).sum(1).square().sum(), weight, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_labels_and_counts_that_are_none_are_refused() -> None:
    loss = SpikeCountLoss()
    for counts, labels in (
        (torch.zeros(2, 5, 3), torch.zeros(2, dtype=torch.long)),
        (torch.zeros(2, 3), torch.zeros(2, 1, dtype=torch.long)),
        (torch.zeros(2, 3), torch.zeros(2)),
    ):
        with pytest.raises(ValueError, match=r"takes counts \(N, classes\)"):
            loss(counts, labels)
    assert float(loss(torch.tensor([[10.0, 2.0, 0.0]]), torch.tensor([0], dtype=torch.int32))) == 0


@pytest.mark.parametrize(("steps", "count"), [(40, 10), (39, 20), (100, 35), (59, 29), (2, 1)])
def test_as_many_spikes_are_injected_as_are_asked_for(steps: int, count: int) -> None:
    into = torch.tensor([[True, False]])
    found = _injected(torch.zeros(steps, 1, 2, dtype=torch.bool), into, count)
    assert found.sum(0).tolist() == [[count, 0]]
    assert len(set(found[:, 0, 0].nonzero().flatten().diff().tolist())) <= 1


def test_a_tie_fires_by_both_rules_or_by_none() -> None:
    op = nn.Linear(1, 1, bias=False)
    for level in (1.0, 31.0, 40.0, 1000.0):
        nn.init.constant_(op.weight, level)
        neuron = CubaLIF(tau_mem=10.0, tau_syn=1.0, threshold=level, delay=0)
        one, other = (SpikingLayer(op, neuron, rule=rule)(torch.ones(1, 3, 1)) for rule in ("hm2bp", "surrogate"))
        assert torch.equal(one, other)


def test_trains_learn_from_silent_neurons_behind_them() -> None:
    x = torch.ones(2, 20, 6, dtype=torch.float64, requires_grad=True)
    op = _op()
    SpikingLayer(op, CubaLIF(threshold=1e3), silent_ratio=0.2)(x).sum(1).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad[0, 0], 0.2 / 1e3 * op.weight.detach().sum(0), rtol=1e-12, atol=0)
