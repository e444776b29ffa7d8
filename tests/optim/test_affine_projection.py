"""Affine projection: targets met exactly, both sides of the linear system, and what it equals."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import convnet, difference, mlp, relative
from references import nlms
from torch import Tensor, nn

from beyondprop import AffineProjection, LocoProp, NonFiniteError, UnsupportedModelError
from beyondprop.optim.projection import moments, solve_primal
from beyondprop.optim.rmsprop import RMSProp

D = torch.float64
SGD = torch.optim.SGD
N = 4

# Name: layer, shape of an input of N samples. All have fewer rows, or as many, as inputs of a unit.
SOLVABLE: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(6, 3), (N, 6)),
    "linear without bias": (lambda: nn.Linear(N, 3, bias=False), (N, N)),
    "as many as inputs and bias": (lambda: nn.Linear(N - 1, 3), (N, N - 1)),
    "tokens": (lambda: nn.Linear(13, 3), (N, 3, 13)),
    "conv": (lambda: nn.Conv2d(5, 3, 2), (N, 5, 3, 3)),
    "conv with padding": (lambda: nn.Conv2d(8, 3, 3, stride=2, padding=1), (N, 8, 4, 3)),
    "conv in groups": (lambda: nn.Conv1d(12, 4, 3, groups=2, padding=1, bias=False), (N, 12, 4)),
    "conv circular": (lambda: nn.Conv1d(8, 4, 3, padding=1, padding_mode="circular"), (N, 8, 5)),
}
# Any number of rows.
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = SOLVABLE | {
    "many rows": (lambda: nn.Linear(3, 5), (20, 3)),
    "many rows without bias": (lambda: nn.Linear(3, 5, bias=False), (20, 3)),
    "many positions": (lambda: nn.Conv2d(2, 3, 3, padding="same", bias=False), (N, 2, 5, 5)),
    "many positions in groups": (lambda: nn.Conv2d(4, 6, 2, groups=2, dilation=2, stride=2), (N, 4, 6, 6)),
}


def _case(name: str) -> tuple[Any, Tensor]:
    build, shape = LAYERS[name]
    return build().double(), torch.randn(shape, dtype=D)


def _objective(out: Tensor) -> Tensor:
    """A mean over samples of a nonlinear loss."""
    return (out.sin() + out.square() / 3).flatten(1).sum(1).mean()


def _projected(model: nn.Module, x: Tensor, objective: Callable[[Tensor], Tensor] = _objective, **settings: Any) -> Any:
    """The gradients of a copy of a model after projection, in the order of its parameters."""
    model = copy.deepcopy(model)
    projection = AffineProjection(model, **settings)
    objective(model(x)).backward()
    projection.step()
    return [p.grad for p in model.parameters()]


def _gradients(model: nn.Module, x: Tensor, objective: Callable[[Tensor], Tensor] = _objective) -> list[Tensor]:
    return list(torch.autograd.grad(objective(model(x)), list(model.parameters())))


@pytest.mark.parametrize("side", ["smaller", "inputs", "samples"])
@pytest.mark.parametrize("name", SOLVABLE)
def test_every_sample_gets_to_its_target(name: str, side: str) -> None:
    layer, x = _case(name)
    before = layer(x)
    (gradient,) = torch.autograd.grad(_objective(before), before, retain_graph=True)
    optimizer, projection = SGD(layer.parameters(), lr=1.0), AffineProjection(layer, damping=0.0, side=side)
    _objective(layer(x)).backward()
    projection.step()
    optimizer.step()
    assert relative(layer(x) - before, -len(x) * gradient) < 1e-8


@pytest.mark.parametrize("damping", [0.0, 1e-3, 1.0, 50.0])
@pytest.mark.parametrize("name", LAYERS)
def test_both_sides_are_the_ridge_solution(name: str, damping: float) -> None:
    layer, x = _case(name)
    out = layer(x)
    (g,) = torch.autograd.grad(_objective(out), out)
    inputs, samples, smaller = (
        _projected(layer, x, damping=damping, side=side) for side in ("inputs", "samples", "smaller")
    )
    expected = [torch.zeros_like(p) for p in layer.parameters()]
    groups = getattr(layer, "groups", 1)
    for group in range(groups):
        rows = _patches(layer, x, group, groups)
        bias = len(expected) == 2
        whole = torch.cat([rows, torch.ones(len(rows), 1, dtype=D)], 1) if bias else rows
        deltas = len(x) * (g.movedim(1, -1) if g.ndim > 2 and not isinstance(layer, nn.Linear) else g).flatten(0, -2)
        deltas = deltas.chunk(groups, 1)[group]
        eps = damping * whole.square().sum(1).mean()
        pinv = (
            torch.linalg.pinv(whole)
            if damping == 0
            else torch.linalg.solve(whole.T @ whole + eps * torch.eye(whole.shape[1], dtype=D), whole.T)
        )
        solution = (pinv @ deltas).T
        expected[0].flatten(1).chunk(groups)[group].copy_(solution[:, : rows.shape[1]])
        if bias:
            expected[1].chunk(groups)[group].copy_(solution[:, -1])
    for found in (inputs, samples, smaller):
        for ours, theirs in zip(found, expected, strict=True):
            assert relative(ours, theirs) < (1e-8 if damping == 0 else 1e-10)


def _patches(layer: Any, x: Tensor, group: int, groups: int) -> Tensor:
    """Rows of inputs by `unfold`, `(positions, n)`."""
    if isinstance(layer, nn.Linear):
        return x.flatten(0, -2)
    x = x.chunk(groups, 1)[group]
    padding: Any = layer.padding if not isinstance(layer.padding, str) else tuple(k // 2 for k in layer.kernel_size)
    how = {"kernel_size": layer.kernel_size, "stride": layer.stride, "padding": padding, "dilation": layer.dilation}
    if layer.padding_mode == "circular":
        x, how["padding"] = F.pad(x, (1, 1), mode="circular"), (0,)
    if x.ndim == 3:  # unfold takes images: height 1
        x = x.unsqueeze(2)
        filler = {"kernel_size": 1, "stride": 1, "padding": 0, "dilation": 1}
        how = {key: (filler[key], *value) for key, value in how.items()}
    return F.unfold(x, **how).mT.flatten(0, 1)


@pytest.mark.parametrize("damping", [0.0, 0.7])
@pytest.mark.parametrize("side", ["inputs", "samples"])
def test_one_sample_is_normalised_lms(side: str, damping: float) -> None:
    layer, x = nn.Linear(5, 3, bias=False).double(), torch.randn(1, 5, dtype=D)
    out = layer(x)
    (g,) = torch.autograd.grad(_objective(out), out)
    (found,) = _projected(layer, x, damping=damping, side=side)
    assert relative(found, nlms(x[0], g[0], damping * float(x.square().sum()))) < 1e-12
    # A bias is an input that is 1.
    layer = nn.Linear(5, 3).double()
    out = layer(x)
    (g,) = torch.autograd.grad(_objective(out), out)
    row = torch.cat([x[0], torch.ones(1, dtype=D)])
    expected = nlms(row, g[0], damping * float(row.square().sum()))
    weight, bias = _projected(layer, x, damping=damping, side=side)
    assert relative(torch.cat([weight, bias.unsqueeze(1)], 1), expected) < 1e-12


def test_it_is_isaac() -> None:
    # Petersen et al. 2023: grad lambda (C / N + lambda I)^-1, here without the factor lambda.
    layer, x = nn.Linear(5, 3, bias=False).double(), torch.randn(12, 5, dtype=D)
    (gradient,) = _gradients(layer, x)
    damping = 0.6
    lam = damping * float(x.square().sum(1).mean()) / 12
    expected = gradient @ torch.linalg.inv(x.T @ x / 12 + lam * torch.eye(5, dtype=D))
    assert relative(_projected(layer, x, damping=damping)[0], expected) < 1e-12


@pytest.mark.parametrize("side", ["inputs", "samples"])
@pytest.mark.parametrize("name", ["linear", "many rows", "many positions in groups"])
def test_strong_damping_leaves_the_plain_gradient(name: str, side: str) -> None:
    layer, x = _case(name)
    damping = 1e9
    found = _projected(layer, x, damping=damping, side=side)
    plain = _gradients(layer, x)
    groups = getattr(layer, "groups", 1)
    for group in range(groups):
        eps = damping * float(_patches(layer, x, group, groups).square().sum(1).mean() + 1)
        for ours, theirs in zip(found, plain, strict=True):
            assert relative(ours.chunk(groups)[group] * eps, len(x) * theirs.chunk(groups)[group]) < 1e-6


@pytest.mark.parametrize("side", ["smaller", "inputs", "samples"])
def test_reductions(side: str) -> None:
    model = convnet().double()
    x = torch.randn(5, 1, 8, 8, dtype=D)
    mean = _projected(model, x, side=side)
    total = _projected(model, x, lambda out: 5 * _objective(out), side=side, reduction="sum")
    assert difference(mean, total) < 1e-12
    plain = _projected(model, x, side=side, reduction="sum")
    assert difference(mean, [5 * g for g in plain]) < 1e-12


@pytest.mark.parametrize("side", ["smaller", "inputs", "samples"])
def test_clipping_by_norm_carries_over(side: str) -> None:
    models = [convnet().double()]
    models.append(copy.deepcopy(models[0]))
    x = torch.randn(5, 1, 8, 8, dtype=D)
    projections = [AffineProjection(m, side=side) for m in models]
    for model in models:
        _objective(model(x)).backward()
    norm = float(nn.utils.clip_grad_norm_(models[0].parameters(), 0.01))
    for projection in projections:
        projection.step()
    clipped, free = ([p.grad for p in m.parameters()] for m in models)
    assert difference(clipped, [g * 0.01 / (norm + 1e-6) for g in free if g is not None]) < 1e-14  # type: ignore[arg-type]


def test_clipping_by_value_is_refused_where_it_would_be_lost() -> None:
    model, x = mlp(6, 7, 3).double(), torch.randn(4, 6, dtype=D)
    projection = AffineProjection(model, side="samples")
    _objective(model(x)).backward()
    nn.utils.clip_grad_value_([model[2].weight], 0.01)  # type: ignore[list-item]
    before = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    with pytest.raises(UnsupportedModelError, match=r"layer '2' is not a multiple of .* pass side='inputs'"):
        projection.step()
    assert all(p.grad is not None and torch.equal(p.grad, g) for p, g in zip(model.parameters(), before, strict=True))


def test_clipping_by_value_counts_over_inputs() -> None:
    layer, x = nn.Linear(6, 3, bias=False).double(), torch.randn(9, 6, dtype=D)
    projection = AffineProjection(layer, side="inputs", damping=0.5)
    _objective(layer(x)).backward()
    nn.utils.clip_grad_value_(layer.parameters(), 0.1)
    assert layer.weight.grad is not None
    clipped = layer.weight.grad.clone()
    projection.step()
    eps = 0.5 * float(x.square().sum(1).mean())
    expected, _ = solve_primal(9 * clipped.unsqueeze(0), None, moments(x.unsqueeze(0)), eps)
    assert relative(layer.weight.grad, expected[0]) < 1e-12


def test_an_embedding_has_a_closed_form() -> None:
    layer, x = nn.Embedding(6, 3, padding_idx=4).double(), torch.tensor([[0, 1, 1], [1, 4, 5]])
    (gradient,) = _gradients(layer, x)
    counts = torch.tensor([1.0, 3.0, 0.0, 0.0, 1.0, 1.0], dtype=D).unsqueeze(1)
    for side in ("smaller", "inputs", "samples"):
        for damping in (0.0, 0.8):
            (found,) = _projected(layer, x, damping=damping, side=side)
            # One-hot rows have length 1; rows that were not looked up have no gradient.
            expected = 2 * gradient / (counts + damping).clamp_min(1e-9)
            assert difference([found], [expected]) < 1e-14
            assert not bool(found[[2, 3, 4]].any())


@pytest.mark.parametrize("side", ["smaller", "inputs", "samples"])
@pytest.mark.parametrize("name", ["linear", "many rows", "conv", "many positions in groups"])
def test_frozen_weights_and_biases(name: str, side: str) -> None:
    layer, x = _case(name)
    layer.bias.requires_grad_(False)
    bare = copy.deepcopy(layer)
    weight, none = _projected(layer, x, side=side)
    assert none is None
    # As a layer whose bias is part of the target, not of the layer.
    bare.bias = None
    shift = layer.bias.view([-1 if d == (1 if x.ndim > 2 else x.ndim - 1) else 1 for d in range(x.ndim)])
    (expected,) = _projected(bare, x, lambda out: _objective(out + shift), side=side)
    assert relative(weight, expected) < 1e-12
    # The bias alone has one input, which is 1.
    layer.requires_grad_(False).bias.requires_grad_(True)
    none, found = _projected(layer, x, side=side, damping=0.5)
    assert none is None
    out = layer(x)
    (gradient,) = torch.autograd.grad(_objective(out), layer.bias)
    assert relative(found, len(x) * gradient / (out.numel() / out.shape[1] + 0.5)) < 1e-12


class _Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(torch.tanh(self.inner(x)))


@pytest.mark.parametrize("count", [2, 9])
def test_calls_of_a_shared_layer_are_one_system(count: int) -> None:
    model, x = _Twice().double(), torch.randn(count, 6, dtype=D)
    found = [_projected(model, x, damping=0.3, side=side) for side in ("inputs", "samples", "smaller")]
    rows = torch.cat([x, torch.tanh(model.inner(x))])
    weight, bias = _gradients(model, x)
    eps = 0.3 * float(rows.detach().square().sum(1).mean() + 1)
    expected = solve_primal(
        count * weight.unsqueeze(0), count * bias.unsqueeze(0), moments(rows.detach().unsqueeze(0)), eps
    )
    for new in found:
        assert relative(new[0], expected[0][0]) < 1e-11
        assert relative(new[1], expected[1][0]) < 1e-11  # type: ignore[index]


def test_accumulated_batches_are_one_batch() -> None:
    model, x = convnet().double(), torch.randn(6, 1, 8, 8, dtype=D)
    for side in ("smaller", "inputs", "samples"):
        expected = _projected(model, x, side=side)
        parts = copy.deepcopy(model)
        projection = AffineProjection(parts, side=side)
        for part in x.split((4, 2)):
            (_objective(parts(part)) * len(part) / 6).backward()
        projection.step()
        assert difference([p.grad for p in parts.parameters() if p.grad is not None], expected) < 1e-12


@pytest.mark.parametrize("bias", [False, True])
def test_running_moments_by_hand(bias: bool) -> None:
    layer = nn.Linear(4, 3, bias=bias).double()
    projection = AffineProjection(layer, damping=0.5, forgetting=0.25, refresh=2)
    inner, sums, inverse = None, None, None
    for step in range(5):
        x = torch.randn(6, 4, dtype=D)
        layer.zero_grad()
        _objective(layer(x)).backward()
        plain = torch.cat([p.grad.view(3, -1) for p in layer.parameters() if p.grad is not None], 1)
        projection.step()
        found = torch.cat([p.grad.view(3, -1) for p in layer.parameters() if p.grad is not None], 1)
        # Moments per sample, averaged; the column of ones has no need to be.
        new, new_sums = x.T @ x / 6, x.mean(0)
        inner = new if inner is None else 0.75 * inner + 0.25 * new
        sums = new_sums if sums is None else 0.75 * sums + 0.25 * new_sums
        if step % 2 == 0:
            whole = inner
            if bias:
                whole = torch.cat([
                    torch.cat([inner, sums.unsqueeze(1)], 1),
                    torch.cat([sums, torch.ones(1)]).view(1, -1),
                ])
            eps = 0.5 * (inner.trace() + bias)
            inverse = torch.linalg.inv(6 * whole + eps * torch.eye(len(whole), dtype=D))
        assert inverse is not None
        assert relative(found, 6 * plain @ inverse) < 1e-11


def test_a_running_average_of_one_batch_is_the_batch() -> None:
    model, x = convnet().double(), torch.randn(6, 1, 8, 8, dtype=D)
    expected = _projected(model, x, side="inputs")
    assert difference(_projected(model, x, forgetting=0.3), expected) < 1e-11
    assert difference(_projected(model, x, forgetting=0.3, refresh=5), expected) < 1e-11


def test_moments_may_be_estimated_from_a_part_of_the_batch() -> None:
    for name in ("many rows", "many positions in groups"):
        layer, x = _case(name)
        plain = _gradients(layer, x)
        own = AffineProjection(layer, rows=0.5)._capture.layers[0]
        found = _projected(layer, x, damping=0.4, rows=0.5)
        half = moments(own.rows(x[: len(x) // 2])).scaled(2)
        weight, bias = solve_primal(
            len(x) * own.matrix(plain[0]), len(x) * plain[1].view(own.groups, -1), half, 0.4 * (half.mean_square() + 1)
        )
        assert bias is not None
        assert relative(found[0], own.unmatrix(weight)) < 1e-11
        assert relative(found[1], bias.flatten()) < 1e-11
        assert difference(_projected(layer, x, rows=len(x)), _projected(layer, x, side="inputs")) < 1e-12


@pytest.mark.parametrize("optimizer", [partial(SGD, lr=0.1, momentum=0.9), partial(RMSProp, lr=1e-3), torch.optim.Adam])
def test_any_optimizer_steps_on_what_is_projected(optimizer: Callable[..., torch.optim.Optimizer]) -> None:
    models = [convnet(norm=True).double()]
    models.append(copy.deepcopy(models[0]))
    projection = AffineProjection(models[0])
    ours, theirs = (optimizer(m.parameters()) for m in models)
    for _ in range(3):
        x = torch.randn(5, 1, 8, 8, dtype=D)
        expected = _projected(models[1], x)
        ours.zero_grad()
        _objective(models[0](x)).backward()
        plain = models[0][1].weight.grad.clone()  # type: ignore[union-attr, operator]
        projection.step()
        assert torch.equal(models[0][1].weight.grad, plain)  # type: ignore[arg-type]
        models[1](x)  # moves the running statistics
        for p, g in zip(models[1].parameters(), expected, strict=True):
            p.grad = g
        ours.step()
        theirs.step()
    assert difference(models[0].state_dict().values(), models[1].state_dict().values()) < 1e-9


def test_excluded_layers_keep_their_gradients() -> None:
    model, x = mlp(6, 7, 3).double(), torch.randn(4, 6, dtype=D)
    found, plain = _projected(model, x, exclude=["2"]), _gradients(model, x)
    assert difference(found[2:], plain[2:]) == 0
    assert difference(found[:2], _projected(model, x)[:2]) == 0
    assert difference(found[:1], plain[:1]) > 1e-3


@pytest.mark.parametrize("name", ["linear", "many rows", "many positions"])
def test_it_is_the_squared_local_problem_solved_exactly(name: str) -> None:
    # Of LocoProp, with target_lr N for the mean over N samples, and eps as weight of the prox term.
    layer, x = _case(name)
    twin = copy.deepcopy(layer)
    eps = float(_patches(layer, x, 0, 1).square().sum(1).mean()) + ("many positions" not in name)
    size = float(torch.linalg.eigvalsh(_patches(layer, x, 0, 1).T @ _patches(layer, x, 0, 1))[-1]) + len(x) * 9 + eps
    optimizer = LocoProp(
        layer,
        1 / size,
        target_lr=len(x),
        local_steps=3000,
        loss="squared",
        prox=eps,
        local_optimizer=SGD,
        local_schedule="constant",
    )
    _objective(layer(x)).backward()
    optimizer.step()
    for p, g in zip(twin.parameters(), _projected(twin, x, damping=1.0), strict=True):
        p.data.sub_(g)
    assert difference(layer.parameters(), twin.parameters()) < 1e-11


def test_a_system_that_overflows_is_refused_by_name_and_no_gradient_changes() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 3))
    with torch.no_grad():
        model[0].weight.mul_(1e25)  # type: ignore[operator]
        model[1].weight.mul_(1e-25)  # type: ignore[operator]
    projection = AffineProjection(model)
    F.cross_entropy(model(torch.randn(20, 6)), torch.arange(20) % 3).backward()
    before = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    assert all(bool(g.isfinite().all()) for g in before)
    with pytest.raises(NonFiniteError, match="The linear system of layer '1' has no finite solution"):
        projection.step()
    assert all(torch.equal(g, p.grad) for g, p in zip(before, model.parameters(), strict=True) if p.grad is not None)


@pytest.mark.parametrize("value", [3e38, float("inf")])  # finite, if only the sum of all is not; or not
def test_solutions_are_checked_one_by_one(value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    model = mlp(6, 8, 3)
    projection = AffineProjection(model)
    F.cross_entropy(model(torch.randn(20, 6)), torch.arange(20) % 3).backward()
    before = {p: p.grad.clone() for p in model.parameters() if p.grad is not None}
    found = {p: torch.zeros_like(p).detach() for p in model.parameters()}
    found[model[0].bias][0], found[model[2].bias][0] = 3e38, value  # type: ignore[index]
    monkeypatch.setattr(projection, "_solve", lambda unit, samples: tuple(found[p] for p in unit.layers[0].parameters))
    if value == float("inf"):
        with pytest.raises(NonFiniteError, match="layer '2' has no finite solution"):
            projection.step()
        found = before
    else:
        projection.step()
    assert all(torch.equal(found[p], p.grad) for p in model.parameters() if p.grad is not None)
