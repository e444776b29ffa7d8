"""Feedback alignment and direct feedback alignment against networks whose layers were rewritten by hand."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch.nn.grad as conv_grad
from helpers import Attention, Recorder, Residual, blobs, convnet, equal, images, mlp, relative
from torch import Tensor, nn

from beyondprop import (
    Chain,
    Credit,
    Descent,
    DirectFeedbackAlignment,
    FeedbackAlignment,
    LocalRule,
    UnsupportedModelError,
    nets,
)
from beyondprop.nn import Residual as _Skip

CE = nn.CrossEntropyLoss()


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, feedback: Tensor) -> Tensor:
        ctx.save_for_backward(x, feedback)
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:  # type: ignore[override]
        x, feedback = ctx.saved_tensors
        rows, inputs = g.reshape(-1, g.shape[-1]), x.reshape(-1, x.shape[-1])
        return g @ feedback, rows.t() @ inputs, rows.sum(0), None


class _Conv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, feedback: Tensor, how: Any) -> Tensor:
        ctx.save_for_backward(x, weight, feedback)
        ctx.how, ctx.has_bias = how, bias is not None
        return F.conv2d(x, weight, bias, *how)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:  # type: ignore[override]
        x, weight, feedback = ctx.saved_tensors
        below = conv_grad.conv2d_input(list(x.shape), feedback, g, *ctx.how)
        own = conv_grad.conv2d_weight(x, list(weight.shape), g, *ctx.how)
        return below, own, g.sum((0, 2, 3)) if ctx.has_bias else None, None, None


class _FeedbackLinear(nn.Module):
    def __init__(self, layer: nn.Linear, feedback: Tensor) -> None:
        super().__init__()
        self.weight, self.bias, self.feedback = layer.weight, layer.bias, feedback

    def forward(self, x: Tensor) -> Tensor:
        return _Linear.apply(x, self.weight, self.bias, self.feedback)  # type: ignore[return-value]


class _FeedbackConv(nn.Module):
    def __init__(self, layer: nn.Conv2d, feedback: Tensor) -> None:
        super().__init__()
        self.weight, self.bias, self.feedback = layer.weight, layer.bias, feedback
        self.how = (layer.stride, layer.padding, layer.dilation, layer.groups)

    def forward(self, x: Tensor) -> Tensor:
        return _Conv.apply(x, self.weight, self.bias, self.feedback, self.how)  # type: ignore[return-value]


class _FeedbackAttention(nn.Module):
    """`nn.MultiheadAttention` of two heads, written out, with rewritten layers."""

    def __init__(self, attend: nn.MultiheadAttention, project: Tensor, out: Tensor) -> None:
        super().__init__()
        self.in_proj_weight, self.in_proj_bias = attend.in_proj_weight, attend.in_proj_bias
        self.out_proj = _FeedbackLinear(attend.out_proj, out)
        self.feedback, self.heads = project, attend.num_heads

    def forward(self, x: Tensor, _key: Tensor, _value: Tensor, **_: Any) -> tuple[Tensor, None]:
        joint: Any = _Linear.apply(x, self.in_proj_weight, self.in_proj_bias, self.feedback)
        q, k, v = (p.unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in joint.chunk(3, -1))
        weights = torch.softmax(q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5, -1)
        return self.out_proj((weights @ v).transpose(1, 2).flatten(2)), None


def _rewritten(model: nn.Module, feedback: dict[str, Tensor]) -> nn.Module:
    """The model, its weights copied, with every layer's backward sending errors through the feedback of its weight."""
    model = copy.deepcopy(model)
    for name, module in list(model.named_modules()):
        parent, _, child = name.rpartition(".")
        if type(module) is nn.Linear and f"{name}.weight" in feedback:
            setattr(model.get_submodule(parent), child, _FeedbackLinear(module, feedback[f"{name}.weight"]))
        if type(module) is nn.Conv2d and f"{name}.weight" in feedback:
            setattr(model.get_submodule(parent), child, _FeedbackConv(module, feedback[f"{name}.weight"]))
        if type(module) is nn.MultiheadAttention and f"{name}.in_proj_weight" in feedback:
            pair = feedback[f"{name}.in_proj_weight"], feedback[f"{name}.out_proj.weight"]
            setattr(model.get_submodule(parent), child, _FeedbackAttention(module, *pair))
    return model


def _lenet() -> nn.Module:
    return nets.build("lenet5", (1, 16, 16), 3)


def _residual() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nets._basic_block(4, 8, 2),
        nets._basic_block(8, 8, 1),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(32, 3),
    )


def _attention(fused: bool) -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 6), Attention(6, fused=fused), nn.Flatten(), nn.Linear(18, 3))


NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (lambda: mlp(6, 8, 7, 5, 3, activation="tanh"), (6,)),
    "relu": (lambda: mlp(6, 8, 7, 3), (6,)),
    "norm": (lambda: mlp(6, 8, 7, 3, norm=True), (6,)),
    "lenet": (_lenet, (1, 16, 16)),
    "convnet": (lambda: convnet(norm=True), (1, 8, 8)),
    "grouped": (
        lambda: nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.Tanh(), nn.Conv2d(4, 6, 3, 2, 1, 1, 2), nn.ReLU(), nn.Flatten(), nn.Linear(54, 3)
        ),
        (1, 8, 8),
    ),
    "residual": (_residual, (1, 8, 8)),
    "skip": (lambda: nn.Sequential(nn.Linear(6, 8), nn.Tanh(), Residual(8), Residual(8), nn.Linear(8, 3)), (6,)),
    "block_first": (lambda: nn.Sequential(Residual(6), nn.Linear(6, 3)), (6,)),
    "closed_block_first": (
        lambda: nn.Sequential(
            _Skip(nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 1, 1))),
            nn.Flatten(),
            nn.Linear(64, 3),
        ),
        (1, 8, 8),
    ),
    "norm_first": (lambda: nn.Sequential(nn.BatchNorm1d(6), *mlp(6, 8, 3)), (6,)),
    "attention": (lambda: _attention(False), (3, 6)),
    "fused_attention": (lambda: _attention(True), (3, 6)),
}
every_net = pytest.mark.parametrize("net", list(NETS))


def _case(net: str, rows: int = 7) -> tuple[nn.Module, Tensor, Tensor]:
    build, shape = NETS[net]
    return build().double(), torch.randn(rows, *shape, dtype=torch.float64), torch.arange(rows) % 3


def _gradients(model: nn.Module, credit: Credit, x: Tensor, y: Tensor, **settings: Any) -> dict[str, Tensor]:
    rule = LocalRule(model, CE, credit, Descent(), **settings)
    rule.backward(x, y)
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    rule.discard()
    return found


@every_net
def test_feedback_alignment_is_the_rewritten_network(net: str) -> None:
    model, x, y = _case(net)
    credit = FeedbackAlignment(seed=3)
    found = _gradients(copy.deepcopy(model), credit, x, y)
    rewritten = _rewritten(model, credit.feedback)
    CE(rewritten(x), y).backward()
    expected = {name: p.grad for name, p in rewritten.named_parameters()}
    assert found.keys() == expected.keys()
    true = dict(zip(found, torch.autograd.grad(CE(model(x), y), list(model.parameters())), strict=True))
    scale = max(float(g.abs().max()) for g in found.values())
    for name, gradient in found.items():
        wanted = expected[name]
        assert wanted is not None
        assert float((gradient - wanted).abs().max()) < 1e-12 * max(1.0, scale), name
    first = next(iter(found))
    assert relative(found[first], true[first]) > 0.1  # and is not backpropagation


@every_net
def test_feedback_equal_to_the_weights_is_backpropagation(net: str) -> None:
    model, x, y = _case(net)
    true = torch.autograd.grad(CE(model(x), y), list(model.parameters()))
    credit = FeedbackAlignment()
    rule = LocalRule(model, CE, credit, Descent())
    weights = {name: p.detach().clone() for name, p in model.named_parameters() if name in credit.feedback}
    credit.load_state_dict({"feedback": weights})
    rule.backward(x, y)
    for p, g in zip(model.parameters(), true, strict=True):
        assert p.grad is not None
        assert float((p.grad - g).abs().max()) < 1e-12 * max(1.0, float(g.abs().max()))


def test_every_matrix_above_the_first_stage_has_feedback_of_its_size() -> None:
    model, x, y = _case("residual")
    credit = FeedbackAlignment(scale=2.0)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    rule = LocalRule(model, CE, credit, Descent())
    expected = {n for n, p in before.items() if p.ndim >= 2 and n != "0.weight"}
    assert set(credit.feedback) == expected
    rule.step(x, y)
    for name, tensor in credit.feedback.items():
        assert tensor.shape == before[name].shape
        rms = float(before[name].square().mean().sqrt())
        assert 0.8 < float(tensor.square().mean().sqrt()) / (2 * rms) < 1.2, name
    again = {n: t.clone() for n, t in credit.feedback.items()}
    rule.step(x, y)
    assert equal(again, credit.feedback)  # fixed


def test_zero_weights_have_feedback_of_the_usual_size() -> None:
    model = mlp(6, 400, 3)
    nn.init.zeros_(model[2].weight)  # type: ignore[arg-type]
    credit = FeedbackAlignment()
    LocalRule(model, CE, credit, Descent())
    assert 0.9 < float(credit.feedback["2.weight"].std()) * 20 < 1.1


@pytest.mark.parametrize("kind", [FeedbackAlignment, DirectFeedbackAlignment])
def test_seeds(kind: Any) -> None:
    drawn = []
    for seed in (4, 4, 5):
        torch.manual_seed(0)
        model, x, y = _case("mlp")
        credit = kind(seed=seed)
        torch.manual_seed(seed + 100)  # the global state has no part in it
        state = torch.get_rng_state()
        LocalRule(model, CE, credit, Descent()).step(x, y)
        assert torch.equal(state, torch.get_rng_state())
        drawn.append(dict(credit.feedback))
    assert equal(drawn[0], drawn[1])
    assert not equal(drawn[0], drawn[2])
    values = list(drawn[0].values())
    assert not torch.equal(values[0].flatten()[:5], values[1].flatten()[:5])


def test_weights_in_other_orders_of_memory_and_frozen_ones() -> None:
    model, x, y = _case("residual")
    model[3].requires_grad_(False)  # type: ignore[index]
    credit = FeedbackAlignment(seed=3)
    expected = _gradients(copy.deepcopy(model), credit, x, y)
    other = copy.deepcopy(model).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    rule = LocalRule(other, CE, FeedbackAlignment(seed=3), Descent())
    rule.backward(x, y)
    found = {n: p.grad for n, p in other.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys()
    assert not any(p.requires_grad for p in other[3].parameters())
    for name, gradient in found.items():
        assert float((gradient - expected[name]).abs().max()) < 1e-12
    frozen = _rewritten(model, credit.feedback)
    CE(frozen(x), y).backward()
    weight = frozen.get_parameter("0.weight").grad
    assert weight is not None
    assert relative(expected["0.weight"], weight) < 1e-12
    rule.discard()
    other.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]  # after the rule was built
    rule.backward(x, y)
    for name, p in other.named_parameters():
        assert p.grad is None or float((p.grad - expected[name]).abs().max()) < 1e-12


@pytest.mark.parametrize("frozen", [False, True])
def test_autocast_goes_through_the_feedback_too(frozen: bool) -> None:
    """Autocast saves cast copies of the weights; what goes down must not be the weights' own error."""
    model, x, y = _case("residual")
    model, x = model.float(), x.float()
    model[4].requires_grad_(not frozen)  # type: ignore[index]
    whole = _gradients(copy.deepcopy(model), FeedbackAlignment(seed=1), x, y)
    with torch.autocast("cpu", torch.bfloat16):
        half = _gradients(copy.deepcopy(model), FeedbackAlignment(seed=1), x, y)
        true = dict(
            zip(
                whole,
                torch.autograd.grad(CE(model(x), y), [p for p in model.parameters() if p.requires_grad]),
                strict=True,
            )
        )
    for name in ("0.weight", "3.branch.0.weight"):
        assert relative(half[name], whole[name]) < 0.1
        assert relative(half[name], true[name]) > 0.5


def test_what_hides_its_weight_is_refused_by_name() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3))
    nn.utils.parametrizations.weight_norm(model[2])
    rule = LocalRule(model, CE, FeedbackAlignment(), Descent())
    with pytest.raises(
        UnsupportedModelError, match=r"Stage '2': its backward pass does not use .*Linear\.weight as it is"
    ):
        rule.step(*blobs(8))


class _Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        from torch.utils.checkpoint import checkpoint

        return x + checkpoint(self.inner, x, use_reentrant=False)  # type: ignore[operator]


class _Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.other = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.used(x))


def test_checkpointing_is_refused_and_unused_layers_are_not() -> None:
    rule = LocalRule(
        nn.Sequential(nn.Linear(6, 8), _Checkpointed(), nn.Linear(8, 3)), CE, FeedbackAlignment(), Descent()
    )
    with pytest.raises(UnsupportedModelError, match=r"Stage '1': .* activation checkpointing"):
        rule.step(*blobs(8))
    LocalRule(nn.Sequential(nn.Linear(6, 8), _Unused(), nn.Linear(8, 3)), CE, FeedbackAlignment(), Descent()).step(
        *blobs(8)
    )


# Direct feedback alignment


def _heads(net: str) -> list[Callable[[Tensor], Tensor]]:
    """What each stage above the first does before its weights, by hand."""
    relu, tanh = torch.relu, torch.tanh
    return {
        "mlp": [tanh, tanh, tanh],
        "norm": [relu, relu],
        "lenet": [
            lambda z: F.max_pool2d(relu(z), 2),
            lambda z: F.max_pool2d(relu(z), 2).flatten(1),
            relu,
            relu,
        ],
        "residual": [relu, lambda z: z, lambda z: F.adaptive_avg_pool2d(z, 2).flatten(1)],
        "skip": [tanh, lambda z: z, lambda z: z],
    }[net]


@pytest.mark.parametrize("net", ["mlp", "norm", "lenet", "residual", "skip"])
def test_direct_feedback_is_one_projection_and_one_slope(net: str) -> None:
    model, x, y = _case(net)
    credit = DirectFeedbackAlignment(seed=2)
    recorder = Recorder(credit)
    recorder.needs_codes = True
    recorder.bind = credit.bind  # type: ignore[method-assign]
    rule = LocalRule(model, CE, recorder, Descent())
    rule.backward(x, y)
    top, *hidden = recorder.kept
    error = -top.delta
    output = rule.chain.record(x).output
    torch.testing.assert_close(error, torch.softmax(output, 1) - F.one_hot(y, 3))
    for assignment, head in zip(reversed(hidden), _heads(net), strict=True):
        code = assignment.pullback.output.requires_grad_()
        with torch.enable_grad():
            features = head(code)
        matrix = credit.feedback[rule.chain[assignment.index].name]
        assert matrix.shape == (3, features[0].numel())
        (expected,) = torch.autograd.grad(features, code, -(error @ matrix).view_as(features))
        assert relative(assignment.delta, expected) < 1e-12


@pytest.mark.parametrize("net", ["mlp", "lenet", "residual", "skip", "attention"])
def test_with_skips_there_is_exactly_one_path(net: str) -> None:
    """Another matrix for one stage changes that stage's update and no other; another weight above changes none."""
    model, x, y = _case(net)
    credit = DirectFeedbackAlignment()
    rule = LocalRule(model, CE, credit, Descent())
    rule.step(x, y)

    def updates() -> dict[str, list[Tensor]]:
        rule.backward(x, y)
        found = {
            name: [p.grad.clone() for p in ps if p.grad is not None] for name, ps in rule.stage_parameters().items()
        }
        rule.discard()
        return found

    before = updates()
    names = [stage.name for stage in rule.chain]
    assert list(credit.feedback) == names[-2::-1]
    for name in names[:-1]:
        kept = credit.feedback[name].clone()
        credit.feedback[name].mul_(-1.5)
        moved = [n for n, gradients in updates().items() if not equal(gradients, before[n])]
        assert moved == [name]
        credit.feedback[name].copy_(kept)
    for name in names[:-1]:
        kept = credit.feedback[name].clone()
        credit.feedback[name].zero_()
        assert not any(bool(g.any()) for g in updates()[name])  # nothing else arrives
        credit.feedback[name].copy_(kept)


def test_direct_feedback_sees_the_same_dropout_masks() -> None:
    model = nn.Sequential(nn.Linear(6, 40), nn.Tanh(), nn.Dropout(0.5), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 3))
    x, y = blobs(1)
    credit = DirectFeedbackAlignment()
    rule = LocalRule(model, CE, credit, Descent())
    torch.manual_seed(4)
    rule.backward(x, y)
    torch.manual_seed(4)
    mask = F.dropout(torch.ones(1, 40), 0.5) > 0
    bias = model[0].bias.grad  # type: ignore[union-attr]
    assert bias is not None
    assert torch.equal(bias != 0, mask[0])  # type: ignore[arg-type]
    generator = torch.get_rng_state()
    torch.manual_seed(4)
    model(x)
    assert torch.equal(generator, torch.get_rng_state())  # one draw a step


def test_direct_feedback_keeps_an_error_at_its_length() -> None:
    model, x, y = _case("lenet", 40)
    credit = DirectFeedbackAlignment(scale=3.0)
    LocalRule(model, CE, credit, Descent()).backward(x, y)
    for matrix in credit.feedback.values():
        error = torch.randn(50, 3, dtype=torch.float64)
        ratio = (error @ matrix).norm(dim=1) / error.norm(dim=1)
        assert 2.0 < float(ratio.mean()) < 4.0


@pytest.mark.parametrize("kind", [FeedbackAlignment, DirectFeedbackAlignment])
def test_bad_arguments_and_foreign_states(kind: Any) -> None:
    with pytest.raises(ValueError, match="scale must be a finite number > 0, got 0"):
        kind(scale=0)
    with pytest.raises(ValueError, match="seed must be an integer >= 0, got -1"):
        kind(seed=-1)
    credit = kind()
    model, x, y = _case("mlp")
    rule = LocalRule(model, CE, credit, Descent())
    rule.step(x, y)
    with pytest.raises(ValueError, match="serves another rule already"):
        credit.bind(Chain(model))
    other = LocalRule(mlp(6, 9, 3), CE, kind(), Descent())
    other.step(*blobs(4))
    with pytest.raises(ValueError, match=r"This state holds feedback of shapes .*this network takes"):
        other.credit.load_state_dict(credit.state_dict())


def test_direct_feedback_of_a_network_of_other_widths_is_refused() -> None:
    """Whose stages have the same names: what the matrices are for is in the state."""
    rule, other = (LocalRule(mlp(6, width, 3), CE, DirectFeedbackAlignment(), Descent()) for width in (8, 9))
    rule.step(*blobs(4))
    saved = rule.credit.state_dict()
    with pytest.raises(ValueError, match=r"feedback for weights of .*'0': \[\[8, 6\], \[8\]\].*, this network has"):
        other.credit.load_state_dict(saved)
    other.step(*blobs(4))
    del saved["weights"]  # as it was saved before
    rule.credit.load_state_dict(saved)


def test_direct_feedback_takes_inputs_of_one_size() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Conv2d(2, 3, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    rule = LocalRule(model, CE, DirectFeedbackAlignment(), Descent())
    rule.step(*images(4))
    with pytest.raises(
        ValueError, match=r"feedback of stage '0' takes 3 outputs to 72 units, this batch has 3 and 128"
    ):
        rule.step(torch.randn(4, 1, 10, 10), torch.arange(4) % 3)


@pytest.mark.parametrize("kind", [FeedbackAlignment, DirectFeedbackAlignment])
def test_feedback_follows_a_model_that_is_moved(kind: Any) -> None:
    model, x, y = _case("lenet")
    model, x = model.float(), x.float()
    credit = kind()
    rule = LocalRule(model, CE, credit, Descent())
    rule.step(x, y)
    before = {name: tensor.clone() for name, tensor in credit.feedback.items()}
    model.double()
    rule.backward(x.double(), y)
    assert all(tensor.dtype == torch.float64 for tensor in credit.feedback.values())
    assert equal({n: t.double() for n, t in before.items()}, dict(credit.feedback))


@pytest.mark.parametrize("net", ["residual", "attention"])
def test_weights_that_share_one_memory(net: str) -> None:
    """As flattened parameters do: each is known by where it starts."""
    model, x, y = _case(net)
    expected = _gradients(copy.deepcopy(model), FeedbackAlignment(), x, y)
    flat = torch.cat([p.detach().flatten() for p in model.parameters()])
    start = 0
    for p in model.parameters():
        p.data = flat[start : start + p.numel()].view_as(p)
        start += p.numel()
    found = _gradients(model, FeedbackAlignment(), x, y)
    for name, gradient in found.items():
        assert float((gradient - expected[name]).abs().max()) < 1e-12, name
