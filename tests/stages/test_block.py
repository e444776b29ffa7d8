"""Stages differentiated by autograd: agreement, masks, statistics, and what they refuse."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import SGD, Attention, Residual, blobs, relative
from torch import Tensor, nn

from beyondprop import AltMin, Descent, Memory, UnsupportedModelError
from beyondprop.stages.block import BlockStage

BLOCKS: dict[str, tuple[tuple[int, ...], Callable[[], nn.Module]]] = {
    "conv_norm": ((4, 2, 5, 5), lambda: nn.Sequential(nn.ReLU(), nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3))),
    "layer_norm": ((4, 6), lambda: nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5))),
    "residual": ((4, 6), lambda: Residual(6)),
    "attention": ((3, 5, 6), lambda: Attention(6, fused=False)),
    "fused_attention": ((3, 5, 6), lambda: Attention(6, fused=True)),
    "pool": ((4, 2, 6, 6), lambda: nn.Sequential(nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(2, 3, 2))),
    "transposed": ((4, 2, 3, 3), lambda: nn.Sequential(nn.Tanh(), nn.ConvTranspose2d(2, 3, 2, stride=2))),
}


def _block(name: str, dtype: torch.dtype = torch.float64) -> tuple[BlockStage, Tensor]:
    shape, build = BLOCKS[name]
    return BlockStage("s", [("b", build().to(dtype))]), torch.randn(shape, dtype=dtype)


def _slope(module: Callable[[Tensor], Tensor], z: Tensor, u: Tensor, step: float = 1e-5) -> Tensor:
    with torch.no_grad():
        return (module(z + step * u) - module(z - step * u)) / (2 * step)


@pytest.mark.parametrize("push", [True, False])
@pytest.mark.parametrize("name", list(BLOCKS))
def test_pullback_and_gradients_are_autograds(name: str, push: bool) -> None:
    stage, z = _block(name)
    leaf = z.clone().requires_grad_()
    output = stage.forward(leaf)
    v, w = torch.randn_like(output), torch.randn_like(output)
    pulled, *gradients = torch.autograd.grad(output, [leaf, *stage.parameters], v, retain_graph=True)
    (other,) = torch.autograd.grad(output, leaf, w)
    with torch.no_grad():
        pullback = stage.record(z, push=push)
        assert relative(pullback.output, output) < 1e-12
        assert relative(pullback(v), pulled) < 1e-12
        assert relative(pullback(w), other) < 1e-12
        pullback.add_gradients(v, -0.5)
        pullback.add_gradients(v, 2.0)
    for p, g in zip(stage.parameters, gradients, strict=True):
        assert p.grad is not None
        assert float((p.grad - 1.5 * g).abs().max()) < 1e-12
    assert not pullback.output.requires_grad


@pytest.mark.parametrize("name", list(BLOCKS))
@pytest.mark.parametrize("first", ["push", "pull"])
def test_push_is_the_transpose_of_the_pullback(name: str, first: str) -> None:
    stage, z = _block(name)
    with torch.no_grad():
        pullback = stage.record(z, push=True)
        u, v = torch.randn_like(z), torch.randn_like(pullback.output)
        if first == "pull":
            pullback(v)
        pushed = pullback.push(u)
        loose = 1e-8 if name == "fused_attention" else 1e-12  # the fused kernel has no second derivative: a difference
        assert abs(float((v * pushed).sum()) - float((pullback(v) * u).sum())) < loose * float(v.norm() * pushed.norm())
        with stage.replayed(None, z.device):
            assert relative(pushed, _slope(stage.forward, z, u)) < 1e-7


def test_the_difference_path_is_as_good_for_small_tangents_and_none() -> None:
    stage, z = _block("fused_attention", torch.float32)
    exact = Attention(6, fused=False).double()
    exact.load_state_dict(stage.modules[0].state_dict())
    u = torch.randn_like(z)
    u[0] *= 1e-6  # one sample's tangent is far smaller than the others'
    with torch.no_grad():
        pullback = stage.record(z, push=True)
        pushed = pullback.push(u)
        expected = BlockStage("e", [("b", exact)]).record(z.double(), push=True).push(u.double()).float()
        assert not bool(stage.record(1e6 * z, push=True).push(torch.zeros_like(u)).any())
    assert max(relative(pushed[i], expected[i]) for i in range(len(z))) < 1e-2


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        ctx.save_for_backward(z)
        return z**2

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        (z,) = ctx.saved_tensors
        return 2 * z * gradient


class _Square(nn.Module):
    def forward(self, z: Tensor) -> Tensor:
        return _Once.apply(z)  # type: ignore[return-value]


def test_push_through_an_operation_that_differentiates_once_is_not_zero() -> None:
    stage = BlockStage("s", [("0", _Square()), ("1", nn.Linear(4, 3).double())])
    z, u = torch.randn(5, 4, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64)
    with torch.no_grad():
        pushed = stage.record(z, push=True).push(u)
        assert relative(pushed, (2 * z * u) @ stage.parameters[0].t()) < 1e-8


def test_gradients_belong_to_the_cotangent_that_is_given() -> None:
    # A credit rule may pull a delta and rescale it in place before it yields it.
    stage, z = _block("residual")
    with torch.no_grad():
        pullback = stage.record(z)
        v = torch.randn_like(pullback.output)
        pullback(v)
        v.mul_(2.0)
        pullback.add_gradients(v, 1.0)
        other = _copy(stage).record(z)
        other.add_gradients(v, 1.0)
    for p, q in zip(stage.parameters, other.stage.parameters, strict=True):
        torch.testing.assert_close(p.grad, q.grad)


def _copy(stage: BlockStage) -> BlockStage:
    copied = copy.deepcopy(stage)
    for p in copied.parameters:
        p.grad = None
    return copied


@pytest.mark.parametrize(
    "layer",
    [
        nn.Dropout(0.5),
        nn.AlphaDropout(0.5),
        nn.RReLU(),
        nn.Sequential(nn.Unflatten(1, (2, 7, 7)), nn.FractionalMaxPool2d(2, output_size=3), nn.Flatten()),
    ],
    ids=lambda m: type(m).__name__,
)
def test_the_mask_of_the_first_run_is_kept(layer: nn.Module) -> None:
    z = torch.randn(6, 98)
    inputs = layer(z).shape[1]
    linear = nn.Linear(inputs, 4)
    stage = BlockStage("s", [("0", layer), ("1", linear)])
    v, u = torch.randn(6, 4), torch.randn_like(z)
    with torch.no_grad():
        pullback = stage.record(z, push=True)
        state = torch.get_rng_state()
        again = pullback.at(z)
        assert torch.equal(state, torch.get_rng_state())
        assert torch.equal(again.output, pullback.output)
        assert abs(float((v * pullback.push(u)).sum() - (pullback(v) * u).sum())) < 1e-3
        assert torch.equal(again(v), pullback(v))
        before = {p: p.clone() for p in stage.parameters}
        linear.weight.add_(0.5)
        fresh, change = pullback.relinearize(before)
        assert torch.equal(fresh.output - pullback.output, change)
        assert torch.equal(state, torch.get_rng_state())  # replaying draws nothing from the user's stream
        assert not torch.equal(stage.record(z).output, fresh.output)  # the next step draws anew


@pytest.mark.parametrize("code_solver", ["gradient", "line_search", "cg"])
@pytest.mark.parametrize("weight_inputs", ["old", "new"])
@pytest.mark.parametrize(
    "solver", [lambda: Descent(SGD), lambda: Descent(SGD, local_steps=3), lambda: Memory(rest=SGD)]
)
@pytest.mark.filterwarnings("ignore::beyondprop.FrozenStageWarning")
def test_running_statistics_move_once_a_step(code_solver: str, weight_inputs: str, solver: Any) -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4), nn.Tanh(), nn.Linear(4, 3))
    norm = model[1]
    assert isinstance(norm, nn.BatchNorm1d)
    rule = AltMin(model, nn.CrossEntropyLoss(), solver(), code_solver=code_solver, weight_inputs=weight_inputs)
    x, y = blobs(12)
    for step in range(1, 3):
        with torch.no_grad():
            mean = model[0](x).mean(0)
        assert norm.running_mean is not None
        expected = 0.9 * norm.running_mean + 0.1 * mean
        rule.step(x, y, diagnostics=True)
        assert int(norm.num_batches_tracked) == step  # type: ignore[arg-type]
        torch.testing.assert_close(norm.running_mean, expected, rtol=1e-5, atol=1e-6)


def test_norms_without_running_statistics_are_norms() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8, track_running_stats=False), nn.ReLU(), nn.Linear(8, 3))
    AltMin(model, nn.CrossEntropyLoss(), SGD).step(*blobs(12))


class _Mixing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) - x.mean(0)


@pytest.mark.parametrize(
    ("block", "shape"), [(_Mixing(), (5, 6)), (Attention(6, fused=False, batch_first=False), (5, 3, 6))]
)
def test_a_stage_that_mixes_samples_is_refused(block: nn.Module, shape: tuple[int, ...]) -> None:
    model = nn.Sequential(nn.Linear(6, 6), block, nn.Linear(6, 3))
    rule = AltMin(model, nn.MSELoss(), SGD)
    weights = [p.clone() for p in model.parameters()]
    with pytest.raises(UnsupportedModelError, match=r"Stage '1.*' mixes the samples.*Only BatchNorm may.*batch_first"):
        rule.step(torch.randn(shape), torch.randn(*shape[:-1], 3))
    assert all(torch.equal(p, w) for p, w in zip(model.parameters(), weights, strict=True))


def test_blocks_leave_no_warning_and_no_graph() -> None:
    stage, z = _block("attention")
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error")
        pullback = stage.record(z, push=True)
        assert not pullback(torch.ones_like(pullback.output)).requires_grad
        assert not pullback.push(torch.ones_like(z)).requires_grad


def test_local_steps_see_new_weights_under_autocast() -> None:
    """Autocast keeps its casts of weights until its context ends; a second local step must not see the old ones."""
    stage = BlockStage("s", [("0", nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3)))])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        pullback = stage.record(torch.randn(5, 4))
        before = {p: p.clone() for p in stage.parameters}
        stage.parameters[0].add_(torch.randn(3, 4))
        _, change = pullback.relinearize(before)
    assert float(change.norm()) > 0.1


def test_tangents_need_a_pullback_recorded_for_them() -> None:
    stage, z = _block("residual")
    with torch.no_grad(), pytest.raises((ValueError, RuntimeError), match=r"'s'.*push"):
        stage.record(z, push=False).push(torch.ones_like(z))


def test_a_block_may_run_fused_in_one_mode_only() -> None:
    """With dropout, attention has a second derivative in training and none in evaluation."""
    block = Attention(8, fused=True)
    block.attend.dropout = 0.1
    model = nn.Sequential(nn.Linear(6, 8), block, nn.Flatten(), nn.Linear(32, 3))
    rule = AltMin(model, nn.CrossEntropyLoss(), SGD)
    x, y = torch.randn(5, 4, 6), torch.arange(5) % 3
    for mode in (True, False, True, False):
        model.train(mode)
        rule.step(x, y)
