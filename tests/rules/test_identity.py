"""With `gradient` credit and SGD, alternating minimization is backpropagation, to the last digits of float64."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import ACTIVATIONS, SGD, Attention, Residual, blobs, convnet, difference, images, mlp, state
from torch import Tensor, nn

from beyondprop import AltMin, Backprop

Batches = list[tuple[Tensor, Tensor]]


def _vectors(sizes: tuple[int, ...] = (9, 9, 4)) -> Batches:
    x, y = blobs(sum(sizes), dtype=torch.float64)
    return list(zip(x.split(sizes), y.split(sizes), strict=True))


def _images() -> Batches:
    x, y = images(18, torch.float64)
    return list(zip(x.split(6), y.split(6), strict=True))


def _sequences() -> Batches:
    return [(torch.randn(5, 4, 6, dtype=torch.float64), torch.arange(5) % 3) for _ in range(3)]


def _agree(model: nn.Module, loss: Any, batches: Batches, optimizer: Any = SGD, **settings: Any) -> None:
    """Train a model and its twin by both rules from the same random state, and compare all that they hold."""
    model = model.double()
    twin = copy.deepcopy(model)
    before = state(model)
    if "cuts" in settings and not isinstance(settings["cuts"], str):
        settings["cuts"] = [model.get_submodule(name) for name in settings["cuts"]]
    rules = [
        AltMin(model, loss, optimizer, code_solver="gradient", normalize=False, **settings),
        Backprop(twin, loss, optimizer),
    ]
    losses = []
    for rule in rules:
        torch.manual_seed(1)
        losses.append([float(rule.step(x, y).loss) for x, y in batches])
    assert losses[0] == pytest.approx(losses[1], abs=1e-12)
    ours, theirs = state(model), state(twin)
    assert difference(ours.values(), theirs.values()) < 1e-12
    for name, p in model.named_parameters():
        if p.ndim > 1 or not p.requires_grad:  # a bias below a norm has no gradient
            assert torch.equal(p, before[name]) != p.requires_grad, name


@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_mlp(activation: str) -> None:
    _agree(mlp(6, 7, 5, 3, activation=activation), nn.CrossEntropyLoss(), _vectors())


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_mlp_with_norm_and_dropout(momentum: float) -> None:
    optimizer = partial(torch.optim.SGD, lr=0.1, momentum=momentum, weight_decay=0.01)
    _agree(mlp(6, 8, 8, 3, norm=True, dropout=0.3), nn.CrossEntropyLoss(), _vectors(), optimizer)


def test_convolutions_with_pooling_norm_and_dropout() -> None:
    model = convnet(norm=True)
    model.insert(6, nn.Dropout(0.3))
    _agree(model, nn.CrossEntropyLoss(), _images())


def test_residual_blocks() -> None:
    _agree(nn.Sequential(nn.Linear(6, 8), Residual(8), Residual(8), nn.Linear(8, 3)), nn.CrossEntropyLoss(), _vectors())


@pytest.mark.parametrize("fused", [False, True])
def test_attention_blocks(fused: bool) -> None:
    blocks = [Attention(8, fused=fused) for _ in range(2)]
    model = nn.Sequential(nn.Linear(6, 8), *blocks, nn.Flatten(), nn.Linear(32, 3))
    _agree(model, nn.CrossEntropyLoss(), _sequences())


class _Own(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle = nn.Linear(6, 8), Residual(8)
        self.act, self.head = nn.Tanh(), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.act(self.middle(self.first(x))))


def test_a_list_of_blocks() -> None:
    _agree(_Own(), nn.CrossEntropyLoss(), _vectors(), cuts=["first", "middle", "act", "head"])
    _agree(_Own(), nn.CrossEntropyLoss(), _vectors(), cuts=["first", "middle", "act", "head"], weight_inputs="old")


@pytest.mark.parametrize("cuts", ["linear", "block"])
def test_nested_sequentials(cuts: str) -> None:
    model = nn.Sequential(mlp(6, 7, 5), nn.ReLU(), nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4)), nn.Linear(4, 3))
    _agree(model, nn.CrossEntropyLoss(), _vectors(), cuts=cuts)


CLASS_WEIGHT = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize(
    "loss",
    [
        nn.CrossEntropyLoss,
        partial(nn.CrossEntropyLoss, ignore_index=1),
        partial(nn.CrossEntropyLoss, label_smoothing=0.1),
        partial(nn.CrossEntropyLoss, weight=CLASS_WEIGHT),
    ],
    ids=["plain", "ignore", "smooth", "weight"],
)
def test_cross_entropy(loss: Callable[..., nn.Module], reduction: str) -> None:
    # A sum is as many times the mean as there are samples: the same step size would diverge.
    _agree(mlp(6, 7, 5, 3), loss(reduction=reduction), _vectors(), partial(torch.optim.SGD, lr=0.02))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("loss", [nn.MSELoss, nn.BCEWithLogitsLoss, nn.CrossEntropyLoss])
def test_targets_of_the_outputs_shape(loss: Callable[..., nn.Module], reduction: str) -> None:
    batches = [(x, F.one_hot(y, 3).double()) for x, y in _vectors()]
    _agree(mlp(6, 7, 5, 3), loss(reduction=reduction), batches, partial(torch.optim.SGD, lr=0.02))


def test_a_plain_function_as_loss() -> None:
    _agree(mlp(6, 7, 5, 3), F.cross_entropy, _vectors())
    _agree(mlp(6, 7, 5, 3), lambda o, y: (o.logsumexp(1) - o[:, 0]).mean() + 0.0 * y.sum(), _vectors())


@pytest.mark.parametrize("frozen", [[0], [2], [0, 2], [4], [2, 4]])
def test_frozen_stages(frozen: list[int]) -> None:
    model = mlp(6, 7, 5, 3, activation="tanh")
    for index in frozen:
        model[index].requires_grad_(False)
    _agree(model, nn.CrossEntropyLoss(), _vectors())


def test_frozen_bias_and_frozen_norm() -> None:
    model = mlp(6, 7, 5, 3, norm=True)
    assert isinstance(model[0], nn.Linear)
    model[0].bias.requires_grad_(False)
    model[1].requires_grad_(False)
    _agree(model, nn.CrossEntropyLoss(), _vectors())


@pytest.mark.parametrize("rule", ["altmin", "backprop"])
def test_accumulation_is_one_step_on_the_joined_batch(rule: str) -> None:
    (x, y), (x2, y2) = _vectors((6, 4))
    model = mlp(6, 7, 5, 3).double()
    other = copy.deepcopy(model)

    def build(m: nn.Module) -> Any:
        if rule == "backprop":
            return Backprop(m, nn.CrossEntropyLoss(), SGD)
        return AltMin(m, nn.CrossEntropyLoss(), SGD, code_solver="gradient")

    parts, whole = build(model), build(other)
    for _ in range(3):
        parts.backward(x, y, scale=0.6)
        parts.backward(x2, y2, scale=0.4)
        parts.update()
        whole.step(torch.cat([x, x2]), torch.cat([y, y2]))
    assert difference(model.parameters(), other.parameters()) < 1e-12


def test_shared_blocks_of_a_stage_and_unused_parameters() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.unused = nn.Linear(8, 8), nn.Linear(2, 2).requires_grad_(False)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(torch.tanh(self.linear(x)))

    _agree(nn.Sequential(nn.Linear(6, 8), Twice(), nn.Linear(8, 3)), nn.CrossEntropyLoss(), _vectors())


def test_integers_into_an_embedding() -> None:
    batches = [(torch.randint(9, (5, 4)), torch.arange(5) % 3) for _ in range(2)]
    batches[0] = (torch.arange(9).repeat(3)[:20].view(5, 4), batches[0][1])  # every row moves
    model = nn.Sequential(nn.Embedding(9, 6), nn.Flatten(), nn.Linear(24, 8), nn.ReLU(), nn.Linear(8, 3))
    _agree(model, nn.CrossEntropyLoss(), batches)


def test_new_inputs_without_deltas_below_are_old_inputs() -> None:
    """The published order differs from the parallel one only where codes move."""
    (x, y), *_ = _vectors()
    models = [mlp(6, 7, 5, 3).double()]
    models.append(copy.deepcopy(models[0]))
    for model, inputs in zip(models, ("old", "new"), strict=True):
        # A trust region so tight that codes stay, weights step on what is left of their deltas: the top's alone.
        AltMin(model, nn.CrossEntropyLoss(), SGD, mu=1e12, normalize=False, weight_inputs=inputs).step(x, y)
    assert difference(models[0].parameters(), models[1].parameters()) < 1e-10
