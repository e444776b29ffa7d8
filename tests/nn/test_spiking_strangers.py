"""Spiking layers with operators, states and threads as strangers have them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor
from torch.func import functional_call
from torch.nn.utils import prune
from trains import NEURON, every_rule, gradient, linear, spikes

from beyondprop.errors import NonFiniteError, UnsupportedModelError
from beyondprop.nn.spiking import CubaLIF, CurrentEncoder, SpikeCountLoss, SpikeCounts, SpikingLayer


class Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(linear().weight.detach().clone())
        self.mask: Tensor
        self.register_buffer("mask", torch.ones(4, 6))

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.weight * self.mask).t()


class Elsewhere(nn.Module):
    """Weights of a module that it does not hold, as a tied decoder has them."""

    def __init__(self, source: nn.Linear) -> None:
        super().__init__()
        self.source = (source,)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.source[0].weight


@every_rule
def test_gradients_are_those_of_the_buffers_that_were_called(rule: str) -> None:
    x, mask = spikes(3, 20, 6), torch.ones(4, 6)
    mask[:, :3] = 0.0
    layer = SpikingLayer(Masked(), NEURON, rule=rule)
    functional_call(layer, {"op.mask": mask}, (x,)).sum((0, 1)).sum().backward()
    assert not gradient(layer)[:, :3].any()
    assert gradient(layer)[:, 3:].any()


def test_a_buffer_changed_before_the_backward_pass_does_not_matter() -> None:
    x = spikes(3, 20, 6)
    found = []
    for change in (False, True):
        layer = SpikingLayer(Masked(), NEURON)
        loss = layer(x).sum()
        if change:
            layer.get_buffer("op.mask").zero_()
        loss.backward()
        found.append(gradient(layer))
    torch.testing.assert_close(found[1], found[0])


def test_weights_that_an_operator_does_not_hold_are_refused() -> None:
    source, x = linear(4, 6), spikes(3, 20, 6)
    layer = SpikingLayer(Elsewhere(source), NEURON)
    with pytest.raises(UnsupportedModelError, match="no parameters of it"):
        layer(x)
    with torch.no_grad():
        assert layer(x).any()
    source.requires_grad_(False)
    assert layer(x).any()
    source.requires_grad_(True)
    SpikingLayer(Elsewhere(source), NEURON, rule="surrogate")(x).sum().backward()
    assert gradient(source, "weight").any()


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    """A process group of one."""
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("use_orig_params", [False, True])
def test_weights_that_are_sharded_outside_of_the_operator_are_refused(alone: None, use_orig_params: bool) -> None:
    layer = SpikingLayer(linear(), NEURON)
    net = FullyShardedDataParallel(layer, use_orig_params=use_orig_params, device_id=torch.device("cpu"))
    with pytest.raises(UnsupportedModelError, match="fully_shard works"):
        net(spikes(3, 20, 6))


@pytest.mark.filterwarnings("ignore")
def test_fully_sharded_weights_learn(alone: None) -> None:
    x = spikes(3, 20, 6)
    layer, whole = (SpikingLayer(linear(), NEURON) for _ in range(2))
    whole(x).sum().backward()
    fully_shard(layer, mesh=init_device_mesh("cpu", (1,)))
    layer(x).sum().backward()
    found = gradient(layer)
    assert isinstance(found, DTensor)
    torch.testing.assert_close(found.full_tensor(), gradient(whole))


@every_rule
def test_a_penalty_of_a_pruned_weight_is_learned_from(rule: str) -> None:
    op = linear()
    prune.random_unstructured(op, "weight", 0.3)
    layer = SpikingLayer(op, NEURON, rule=rule)
    (0.0 * layer(spikes(3, 20, 6)).sum() + op.weight.abs().sum()).backward()
    assert gradient(op, "weight_orig").any()


def test_an_operator_in_the_place_of_one_that_is_gone_is_looked_at() -> None:
    for _ in range(50):  # a new module may have the address of the old one
        layer = SpikingLayer(linear(), NEURON)
        layer(spikes(2, 5, 6))
        del layer.op
        layer.op = nn.Linear(6, 4)
        with pytest.raises(ValueError, match="op must be linear"):
            layer(spikes(2, 5, 6))


@every_rule
def test_a_bias_given_later_is_refused(rule: str) -> None:
    layer = SpikingLayer(linear(), NEURON, rule=rule)
    layer(spikes(2, 5, 6))
    layer.op.register_parameter("bias", nn.Parameter(torch.ones(4)))
    with pytest.raises(ValueError, match="bias"):
        layer(spikes(2, 5, 6))


def test_a_state_does_not_change_with_a_tensor_that_the_caller_fills_again() -> None:
    layer = SpikingLayer(nn.Identity(), CubaLIF(tau_mem=4.0, tau_syn=1.0, threshold=0.1))
    x, buffer = spikes(2, 6, 3), torch.empty(2, 3)
    state, found = None, []
    for t in range(6):
        out, state = layer.step(buffer.copy_(x[:, t]), state)
        found.append(out)
    torch.testing.assert_close(torch.stack(found, 1), layer(x))


def test_a_state_of_another_lateral_strength_is_refused() -> None:
    op = linear()
    _, state = SpikingLayer(op, NEURON).step(spikes(2, 6))
    with pytest.raises(ValueError, match="lateral"):
        SpikingLayer(op, NEURON, lateral=5.0).step(spikes(2, 6), state)


def test_a_state_of_another_precision_is_refused() -> None:
    layer = SpikingLayer(linear(), NEURON)
    _, state = layer.step(spikes(2, 6))
    with pytest.raises(ValueError, match="float32"):
        layer.double().step(spikes(2, 6), state)


def test_a_state_of_another_shape_is_refused() -> None:
    layer = SpikingLayer(nn.Identity(), NEURON)
    _, state = layer.step(spikes(2, 2, 3, 4))
    with pytest.raises(ValueError, match=r"\(2, 2, 3, 4\).*\(2, 2, 2, 6\)"):
        layer.step(spikes(2, 2, 2, 6), state)


@every_rule
@pytest.mark.parametrize("delay", [1, 3])
def test_what_is_not_finite_is_refused_before_it_arrives(rule: str, delay: int) -> None:
    x = spikes(2, 8, 6)
    x[0, -1, 0] = float("nan")
    with pytest.raises(NonFiniteError):
        SpikingLayer(linear(), CubaLIF(delay=delay), rule=rule)(x)


def test_a_loss_of_single_steps_is_not_hidden_by_a_larger_one() -> None:
    found = SpikingLayer(linear(), NEURON)(spikes(3, 20, 6))
    with pytest.raises(RuntimeError, match="differ from step to step"):
        (1e4 * found[..., 0].sum() + found[:, -1, 1].sum()).backward()


@every_rule
def test_an_empty_batch_has_a_gradient_of_zero(rule: str) -> None:
    layer = SpikingLayer(linear(), NEURON, rule=rule)
    x = torch.zeros(0, 5, 6, requires_grad=True)
    layer(x).mul(1.0).square().sum().backward()
    assert x.grad is not None
    assert x.grad.shape == x.shape
    assert not gradient(layer).any()


def test_counts_of_whole_numbers_have_the_loss_of_the_same_floats() -> None:
    loss, counts, labels = SpikeCountLoss(10.0, 0.5, 0.0), torch.zeros(2, 3), torch.tensor([0, 1])
    torch.testing.assert_close(loss(counts.long(), labels), loss(counts, labels))


def test_counts_of_bool_spikes_are_in_single_precision() -> None:
    assert SpikeCounts()(torch.ones(2, 3, 4, dtype=torch.bool)).dtype == torch.float32


def test_a_step_of_a_current_that_is_changed_leaves_the_others_and_the_input() -> None:
    x = torch.ones(1, 2)
    trains = CurrentEncoder(3)(x)
    trains[:, 0] = 0.0
    assert x.all()
    assert trains[:, 1:].all()


@every_rule
def test_threads_that_share_a_layer_leave_its_parameters(rule: str) -> None:
    layer = SpikingLayer(nn.Linear(400, 400, bias=False), CubaLIF(tau_mem=8.0, tau_syn=2.0, threshold=0.3), rule=rule)
    weight, x = layer.get_parameter("op.weight"), spikes(20, 20, 400)
    layer(x)
    arrived: list[bool] = []

    def work() -> None:
        for _ in range(15):
            (found,) = torch.autograd.grad(layer(x).sum(), weight, allow_unused=True)
            arrived.append(found is not None)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert layer.get_parameter("op.weight") is weight
    assert arrived == [True] * 30


def test_trains_with_negative_numbers_get_no_derivatives_by_counts() -> None:
    layer, x = SpikingLayer(linear(), NEURON), spikes(2, 20, 6)
    x[0, 3, 1] = -1.0
    layer(x).sum().backward()  # the weights have theirs
    assert gradient(layer).any()
    with pytest.raises(ValueError, match="negative numbers"):
        layer(x.requires_grad_())
    SpikingLayer(linear(), NEURON, rule="surrogate")(x).sum().backward()


def test_a_layer_keeps_bits() -> None:
    kept: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel() * tensor.element_size())
        return tensor

    layer, x = SpikingLayer(nn.Linear(100, 80, bias=False), CubaLIF(threshold=0.2)), spikes(4, 200, 100)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(x)
    # The weight, a bit for each step, and a number for each neuron.
    assert sum(kept) <= 4 * 80 * 100 + 4 * 200 * (100 + 80) / 8 + 4 * 4 * 80
