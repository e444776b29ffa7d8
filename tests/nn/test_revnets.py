"""Reversible residual networks: what was published, the same in every mode."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from beyondprop.nn import (
    PooledShortcut,
    ReversibleEncoder,
    preactivation_resnet,
    resnet32,
    resnet50,
    resnet101,
    resnet110,
    resnet164,
    revnet,
    revnet38,
    revnet56,
    revnet104,
    revnet110,
    revnet164,
)
from beyondprop.nn.revnets import MODES


@pytest.mark.parametrize(
    ("build", "classes", "count", "published", "layers"),
    [
        (resnet32, 10, 464_154, "0.46", 32),
        (resnet110, 10, 1_727_962, "1.73", 110),
        (resnet164, 10, 1_703_258, "1.70", 164),
        (revnet38, 10, 464_890, "0.46", 38),
        (revnet110, 10, 1_729_194, "1.73", 110),
        (revnet164, 10, 1_748_778, "1.75", 164),
        (resnet50, 1000, 25_549_352, "25.5", 50),
        (resnet101, 1000, 44_541_480, "44.5", 101),
        (revnet56, 1000, 27_553_128, "27.6", 56),
        (revnet104, 1000, 45_428_072, "45.4", 104),
    ],
)
def test_as_many_parameters_as_published(
    build: Callable[[int], nn.Module], classes: int, count: int, published: str, layers: int
) -> None:
    with torch.device("meta"):
        model = build(classes)
    found = sum(p.numel() for p in model.parameters())
    assert found == count
    assert f"{found / 1e6:.{len(published.partition('.')[2])}f}" == published
    deep = [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear) and "skip" not in n]
    assert len(deep) == layers


def test_normalisation_and_weights_are_those_of_the_authors() -> None:
    torch.manual_seed(0)
    model = revnet164(10)
    for module in model.requires_grad_(False).modules():
        if isinstance(module, nn.BatchNorm2d):
            assert (module.eps, module.momentum) == (1e-3, 0.01)
        if isinstance(module, nn.Conv2d):
            std = math.sqrt(2 / (module.kernel_size[0] ** 2 * module.out_channels))
            assert module.bias is None
            assert float(module.weight.abs().max()) <= 2 * std
            if module.weight.numel() > 5000:  # what is left of a normal distribution between -2 and 2
                assert float(module.weight.std()) == pytest.approx(0.8796 * std, rel=0.05)
        if isinstance(module, nn.Linear):
            bound = math.sqrt(3 / module.in_features)
            assert 0.9 * bound < float(module.weight.abs().max()) <= bound
            assert not module.bias.any()


# The authors' program, line by line


def _branch(branch: nn.Sequential, x: Tensor, stride: int, *, activates: bool) -> Tensor:
    layers: list[Any] = [m for m in branch if not isinstance(m, nn.ReLU)]
    assert isinstance(layers[0], nn.BatchNorm2d) == activates
    assert [m.stride[0] for m in layers if isinstance(m, nn.Conv2d)] == [stride] + [1] * (len(branch) // 3 - activates)
    for layer in layers:
        if isinstance(layer, nn.BatchNorm2d):
            x = F.relu(F.batch_norm(x, None, None, layer.weight, layer.bias, True, 0.0, 1e-3))
        else:
            x = F.conv2d(x, layer.weight, None, layer.stride, layer.padding)
    return x


def _skip(skip: nn.Module, x: Tensor, outputs: int, stride: int, *, bottleneck: bool) -> Tensor:
    if bottleneck:
        (weight,) = skip.parameters()
        return F.conv2d(x, weight, None, stride)
    if stride > 1:
        x = F.avg_pool2d(x, 2, 2)
    zeros = x.new_zeros(len(x), (outputs - x.shape[1]) // 2, *x.shape[2:])
    return torch.cat([zeros, x, zeros], 1)


def _published(model: Any, units: tuple[int, ...], x: Tensor, *, bottleneck: bool, reversible: bool) -> Tensor:
    stem = model.stem.module if reversible else model.stem
    x = F.conv2d(x, stem[0].weight, None, 1, 1)
    x = F.relu(F.batch_norm(x, None, None, stem[1].weight, stem[1].bias, True, 0.0, 1e-3))
    for stage, count in enumerate(units, 1):
        chain = list(getattr(model, f"stage{stage}", ()))
        transition = getattr(model, f"transition{stage}", None)
        blocks = chain if transition is None else [transition.module, *chain]
        assert len(blocks) == count
        for unit, block in enumerate(blocks):
            stride = 2 if unit == 0 and stage > 1 else 1
            activates = (stage, unit) != (1, 0)
            if not reversible:
                changes = not isinstance(block.skip, nn.Identity)
                assert changes == (unit == 0 and (stage > 1 or bottleneck))
                inner = _branch(block.branch, x, stride, activates=activates)
                x = inner + (_skip(block.skip, x, inner.shape[1], stride, bottleneck=bottleneck) if changes else x)
                continue
            x1, x2 = x.chunk(2, 1)
            f = _branch(block.f, x2, stride, activates=activates)
            if transition is not None and unit == 0:
                x1 = _skip(block.skip1, x1, f.shape[1], stride, bottleneck=bottleneck)
                x2 = _skip(block.skip2, x2, f.shape[1], stride, bottleneck=bottleneck)
            y1 = x1 + f
            x = torch.cat([y1, x2 + _branch(block.g, y1, 1, activates=True)], 1)
    x = F.relu(F.batch_norm(x, None, None, model.head[0].weight, model.head[0].bias, True, 0.0, 1e-3))
    return x.mean((2, 3)) @ model.head[4].weight.t() + model.head[4].bias


@pytest.mark.parametrize("bottleneck", [False, True])
@pytest.mark.parametrize("build", [revnet, preactivation_resnet])
def test_it_computes_what_the_authors_program_does(build: Any, bottleneck: bool) -> None:
    torch.manual_seed(0)
    units = (2, 1, 3)
    model = build(units, (8, 8, 16, 28), 5, bottleneck=bottleneck).double()
    for p in model.parameters():
        p.data.add_(0.1 * torch.randn_like(p))  # what is 0 or 1 at first shall count, too
    x = torch.randn(4, 3, 12, 8, dtype=torch.float64)
    expected = _published(model, units, x, bottleneck=bottleneck, reversible=build is revnet)
    torch.testing.assert_close(model(x), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("shape", [(3, 64, 64), (1, 65, 70)])
def test_large_images_lose_a_factor_of_four_in_the_stem(shape: tuple[int, ...]) -> None:
    model: Any = revnet((1, 1), (8, 8, 8), 5, bottleneck=True, large=True, channels=shape[0])
    assert model.stem(torch.zeros(2, *shape)).shape == (2, 8, -(-shape[1] // 4), -(-shape[2] // 4))
    assert model(torch.zeros(2, *shape)).shape == (2, 5)


# Modes


def _steps(model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> list[float]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    losses = []
    for x, y in batches:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("bottleneck", [False, True])
def test_every_mode_trains_alike(bottleneck: bool) -> None:
    """Weights and running statistics: these are updated once a step, whatever is computed again."""
    torch.manual_seed(0)
    batches = [(torch.randn(6, 3, 8, 8, dtype=torch.float64), torch.randint(5, (6,))) for _ in range(3)]
    found = []
    for mode in MODES:
        torch.manual_seed(1)
        model = revnet((2, 2), (8, 8, 16), 5, bottleneck=bottleneck, mode=mode).double()
        losses = _steps(model, batches)
        found.append((losses, dict(model.state_dict())))
    (losses, states), *others = found
    assert losses[-1] != losses[0]
    for other_losses, other in others:
        assert other_losses == pytest.approx(losses, rel=1e-10)
        assert list(other) == list(states)
        for name, value in states.items():
            torch.testing.assert_close(other[name], value, rtol=1e-10, atol=1e-12, msg=name)
    assert {int(v) for n, v in states.items() if n.endswith("num_batches_tracked")} == {3}


def test_weights_of_one_mode_go_into_another() -> None:
    stored, inverse = revnet38(10, mode="store"), revnet38(10)
    inverse.load_state_dict(stored.state_dict())
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(stored.eval()(x), inverse.eval()(x))


# Refusals


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (((), (8,), 5), r"one more than units, got \(8,\) and \(\)"),
        (((1, 1), (8, 8), 5), "one more than units"),
        (((1, 0), (8, 8, 8), 5), "units of a stage must be an integer >= 1, got 0"),
        (((1,), (8, 10), 5), r"multiples of 4, got \(8, 10\)"),
        (((1,), (8, 0), 5), "a width must be an integer >= 1, got 0"),
        (((1,), (8, 8), 0), "num_classes must be an integer >= 1, got 0"),
        (((1,), (16, 8), 5), "padding must be an integer >= 0, got -2"),
    ],
)
def test_what_is_no_revnet_is_refused(arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        revnet(*arguments)


def test_a_mode_that_there_is_not_is_refused() -> None:
    with pytest.raises(ValueError, match=r"mode must be one of .*'stored'"):
        revnet38(10, mode="stored")
    with pytest.raises(
        ValueError, match=r"mode must be one of .*'inverse'.*got 'inverted'; perhaps you meant 'inverse'"
    ):
        revnet((1,), (8, 16), 3, mode="inverted")  # which has no chain to refuse it


def test_a_skip_that_pools_takes_what_can_be_pooled() -> None:
    x = torch.arange(16.0).reshape(1, 1, 4, 4)
    assert PooledShortcut(2, 1)(x).tolist() == [[[[0, 0], [0, 0]], [[2.5, 4.5], [10.5, 12.5]], [[0, 0], [0, 0]]]]
    with pytest.raises(ValueError, match=r"multiples of the stride 2, got 4x5"):
        PooledShortcut(2)(torch.zeros(1, 1, 4, 5))
    with pytest.raises(ValueError, match="stride must be an integer >= 1, got 0"):
        PooledShortcut(0)


# The transformer encoder


def _encoder(**settings: Any) -> ReversibleEncoder:
    torch.manual_seed(0)
    return ReversibleEncoder(8, 3, 2, 12, **settings).double()


def test_attention_is_f_and_the_perceptron_is_g() -> None:
    encoder = _encoder()
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    padding = torch.zeros(2, 5, dtype=torch.float64)
    padding[1, 3:] = -torch.inf
    bias = torch.randn(5, 5, dtype=torch.float64)
    x1 = x2 = x
    layers: Any = encoder.layers
    for block in layers:
        normed, hidden = block.f.norm(x2), block.g.layers
        x1 = x1 + block.f.attention(normed, normed, normed, padding, attn_mask=bias)[0]
        x2 = x2 + hidden[4](F.gelu(hidden[1](hidden[0](x1))))
    expected = encoder.norm(torch.cat([x1, x2], -1))
    torch.testing.assert_close(encoder(x, padding, bias), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_encoders_of_every_mode_have_one_gradient(dropout: float) -> None:
    """With masks and dropout, whose draws are those of the forward pass."""
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    bias = torch.randn(5, 5, dtype=torch.float64)
    unseen = torch.zeros(2, 5, dtype=torch.float64).masked_fill(padding, -torch.inf)
    found = []
    for mode in MODES:
        encoder = _encoder(dropout=dropout, mode=mode)
        given = x.clone().requires_grad_()
        torch.manual_seed(4)
        loss = encoder(given, unseen, bias).square().mean(-1)[~padding].pow(1.5).sum() + encoder(given).sin().sum()
        loss.backward()
        found.append([given.grad, *(p.grad for p in encoder.parameters())])
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-10, atol=1e-12)


def test_padding_is_not_attended_to() -> None:
    encoder = _encoder().eval()
    x = torch.randn(1, 5, 8, dtype=torch.float64)
    padding = torch.tensor([[False] * 3 + [True] * 2])
    changed = x.clone()
    changed[:, 3:] += 1.0
    with torch.no_grad():
        assert torch.equal(encoder(x, padding)[:, :3], encoder(changed, padding)[:, :3])
        assert not torch.equal(encoder(x)[:, :3], encoder(changed)[:, :3])


@pytest.mark.parametrize(
    ("arguments", "settings", "message"),
    [
        ((8, 0, 2), {}, "depth must be an integer >= 1, got 0"),
        ((9, 1, 2), {}, "width must be a multiple of heads, got 9 and 2"),
        ((8, 1, 0), {}, "heads must be an integer >= 1, got 0"),
        ((8, 1, 2, 0), {}, "hidden must be an integer >= 1, got 0"),
        ((8, 1, 2), {"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
        ((8, 1, 2), {"mode": "stored"}, "mode must be one of"),
    ],
)
def test_what_is_no_encoder_is_refused(arguments: Any, settings: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ReversibleEncoder(*arguments, **settings)


def test_copies_are_whole() -> None:
    model = revnet((2,), (8, 8), 3)
    twin = copy.deepcopy(model)
    x = torch.randn(4, 3, 8, 8)
    F.cross_entropy(twin(x), torch.arange(4) % 3).backward()
    assert all(p.grad is None for p in model.parameters())
    assert all(p.grad is not None for p in twin.parameters())
