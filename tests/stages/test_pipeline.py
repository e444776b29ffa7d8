"""Stages of operations with closed forms: agreement with autograd, masks, statistics, and what is left to autograd."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from cases import SGD, images, relative
from torch import Tensor, nn

from beyondprop import AltMin, Backprop, Chain, UnsupportedModelError
from beyondprop.credit import code_solvers
from beyondprop.nn import Residual, Shortcut
from beyondprop.stages.block import BlockStage
from beyondprop.stages.pipeline import PipelinePullback, PipelineStage


def _block(channels: int, width: int, stride: int) -> list[nn.Module]:
    branch = nn.Sequential(
        nn.Conv2d(channels, width, 3, stride, 1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Conv2d(width, width, 1),
    )
    return [Residual(branch, Shortcut(stride, (width - channels) // 2), nn.ReLU())]


PIPELINES: dict[str, tuple[tuple[int, ...], Callable[[], list[Any]]]] = {
    "conv, batch norm": ((5, 2, 6, 6), lambda: [nn.ReLU(), nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3)]),
    "conv without bias": (
        (5, 2, 6, 6),
        lambda: [nn.Conv2d(2, 4, 3, stride=2, padding=1, bias=False, groups=2), nn.BatchNorm2d(4)],
    ),
    "batch norm without weights": ((6, 4), lambda: [nn.Linear(4, 3), nn.BatchNorm1d(3, affine=False)]),
    "batch norm without statistics": ((6, 4), lambda: [nn.Linear(4, 3), nn.BatchNorm1d(3, track_running_stats=False)]),
    "batch norm, cumulative": ((6, 4), lambda: [nn.Linear(4, 3), nn.BatchNorm1d(3, momentum=None)]),
    "batch norm in between": ((6, 4), lambda: [nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3), nn.GELU()]),
    "layer norm": ((3, 4, 6), lambda: [nn.Linear(6, 5), nn.LayerNorm(5), nn.Sigmoid()]),
    "layer norm over two": ((3, 4, 6), lambda: [nn.LayerNorm([4, 6]), nn.Linear(6, 5)]),
    "layer norm without weights": ((3, 6), lambda: [nn.Linear(6, 5), nn.LayerNorm(5, elementwise_affine=False)]),
    "max pooling": ((4, 2, 6, 7), lambda: [nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(2, 3, 2)]),
    "max pooling, overlapping": ((4, 2, 7, 7), lambda: [nn.MaxPool2d(3, 2, 1, ceil_mode=True), nn.Conv2d(2, 3, 2)]),
    "max pooling, dilated": ((4, 2, 7, 7), lambda: [nn.MaxPool2d(2, 1, dilation=2), nn.Flatten(), nn.Linear(50, 3)]),
    "average pooling": (
        (4, 2, 7, 7),
        lambda: [nn.AvgPool2d(3, 2, 1, count_include_pad=False), nn.Flatten(), nn.Linear(32, 3)],
    ),
    "adaptive pooling": (
        (4, 2, 7, 6),
        lambda: [nn.Tanh(), nn.AdaptiveAvgPool2d((2, 3)), nn.Flatten(), nn.Linear(12, 3)],
    ),
    "two affine maps": (
        (4, 6),
        lambda: [nn.Linear(6, 5), nn.Softplus(), nn.Linear(5, 5), nn.LeakyReLU(0.1), nn.Linear(5, 2)],
    ),
    "residual": (
        (4, 6),
        lambda: [Residual(nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 6)), after=nn.ReLU())],
    ),
    "residual with batch norm": (
        (4, 6),
        lambda: [Residual(nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 6)))],
    ),
    "residual block": ((4, 2, 6, 6), lambda: [*list(_block(2, 4, 2)), nn.Flatten()]),
    "residual without after": (
        (4, 3, 5, 5),
        lambda: [nn.ReLU(), Residual(nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)))],
    ),
    "residual with a projection": (
        (4, 3, 5, 5),
        lambda: [Residual(nn.Sequential(nn.Conv2d(3, 4, 3, padding=1)), nn.Conv2d(3, 4, 1), nn.GELU())],
    ),
    "reshapes": (
        (4, 12),
        lambda: [nn.Unflatten(1, (3, 4)), nn.Conv1d(3, 2, 2), nn.Identity(), nn.Flatten(), nn.Linear(6, 2)],
    ),
}

each = pytest.mark.parametrize("name", list(PIPELINES))


def _stage(name: str, kind: type = PipelineStage, dtype: torch.dtype = torch.float64) -> tuple[PipelineStage, Tensor]:
    shape, build = PIPELINES[name]
    modules = [m.to(dtype) for m in build()]
    assert PipelineStage.fits(modules)
    for m in modules:
        for p in m.parameters():
            nn.init.normal_(p, std=0.5)
    return kind("s", [(str(i), m) for i, m in enumerate(modules)]), torch.randn(shape, dtype=dtype)


@each
@pytest.mark.parametrize("training", [True, False])
def test_output_pullback_and_gradients_are_autograds(name: str, training: bool) -> None:
    stage, z = _stage(name)
    for m in stage.modules:
        for b in m.buffers():
            if b.is_floating_point():
                b.uniform_(0.5, 2.0)
        m.train(training)
    twin = copy.deepcopy(stage)
    leaf = z.clone().requires_grad_()
    output = twin.forward(leaf)
    v, w = torch.randn_like(output), torch.randn_like(output)
    pulled, *gradients = torch.autograd.grad(output, [leaf, *twin.parameters], v, retain_graph=True)
    (other,) = torch.autograd.grad(output, leaf, w)
    with torch.no_grad():
        pullback = stage.record(z)
        assert relative(pullback.output, output) < 1e-12
        assert relative(pullback(w), other) < 1e-12
        pullback.add_gradients(v, -0.5)  # of a cotangent that was not pulled before
        assert relative(pullback(v), pulled) < 1e-12
        pullback.add_gradients(v, 2.0)  # of the one that was
        v.mul_(2.0)
        pullback.add_gradients(v, -0.25)  # of the same tensor with another value
    largest = max(float(g.norm()) for g in gradients)
    for p, g in zip(stage.parameters, gradients, strict=True):
        assert p.grad is not None
        # Normalisation takes away what a bias before it adds: its gradient is 0, and what is seen of it rounding.
        assert float((p.grad - g).norm()) < 1e-11 * max(float(g.norm()), 1e-3 * largest)
    for m, n in zip(stage.modules, twin.modules, strict=True):
        for found, expected in zip(m.buffers(), n.buffers(), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


@each
@pytest.mark.parametrize("training", [True, False])
def test_push_is_the_transpose_of_the_pullback(name: str, training: bool) -> None:
    stage, z = _stage(name)
    for m in stage.modules:
        m.train(training)
    with torch.no_grad():
        pullback = stage.record(z)
        u, v = torch.randn_like(z), torch.randn_like(pullback.output)
        left, right = float((v * pullback.push(u)).sum()), float((pullback(v) * u).sum())
        assert abs(left - right) < 1e-11 * float(v.norm() * pullback.push(u).norm())
        step = 1e-6
        slope = (pullback.at(z + step * u).output - pullback.at(z - step * u).output) / (2 * step)
        assert relative(pullback.push(u), slope) < 1e-6


@pytest.mark.parametrize("kind", [nn.Dropout, nn.Dropout2d])
def test_dropout_draws_what_autograd_draws_and_keeps_its_mask(kind: Callable[[float], nn.Module]) -> None:
    modules = [nn.ReLU(), kind(0.4), nn.Conv2d(3, 2, 3)]
    stage, z = PipelineStage("s", [(str(i), m) for i, m in enumerate(modules)]), torch.randn(4, 3, 6, 6)
    torch.manual_seed(3)
    expected = stage.forward(z)
    torch.manual_seed(3)
    with torch.no_grad():
        pullback = stage.record(z)
        assert relative(pullback.output, expected) < 1e-6
        state = torch.get_rng_state()
        assert torch.equal(pullback.at(z).output, pullback.output)
        assert torch.equal(torch.get_rng_state(), state)
        other = stage.record(z)
        assert not torch.equal(other.output, pullback.output)
        for m in stage.modules:
            m.eval()
        assert (
            relative(stage.record(z).output, nn.functional.conv2d(z.relu(), modules[2].weight, modules[2].bias)) < 1e-6
        )


def test_statistics_are_updated_once_a_step_whatever_the_code_solver_does() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(108, 3))
    x, y = images(12)
    twin = copy.deepcopy(model)
    twin(x)
    rule = AltMin(model, nn.CrossEntropyLoss(), SGD, code_solver=code_solvers.momentum(5, 0.1), weight_inputs="new")
    rule.step(x, y)
    assert isinstance(rule.chain[0], PipelineStage)
    for name, buffer in twin[1].named_buffers():
        torch.testing.assert_close(model[1].get_buffer(name), buffer)
    assert int(model[1].get_buffer("num_batches_tracked")) == 1


@each
def test_a_change_of_weights_moves_the_output_as_a_second_run_would(name: str) -> None:
    stage, z = _stage(name)
    with torch.no_grad():
        pullback = stage.record(z)
        before = {p: p.clone() for p in stage.parameters}
        for p in stage.parameters:
            p.add_(0.01 * torch.randn_like(p))
        _, change = pullback.relinearize(before)
        fresh = pullback.at(z)
        assert relative(change, fresh.output - pullback.output) < 1e-9


def _conv_net() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(4, 6, 3, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 3),
    )


@pytest.mark.parametrize("solver", ["line_search", "gradient", "cg"])
def test_a_pipeline_and_a_block_give_the_same_step(solver: str) -> None:
    torch.manual_seed(0)
    model = _conv_net().double()
    blocks = copy.deepcopy(model)
    for m in blocks:
        m.register_forward_hook(lambda *_: None)  # a module with hooks is left to autograd
    x, y = images(10, torch.float64)
    rules = [AltMin(m, nn.CrossEntropyLoss(), SGD, code_solver=solver) for m in (model, blocks)]
    assert [type(s) for s in rules[1].chain] == [BlockStage] * 3
    assert {type(s) for s in rules[0].chain} == {PipelineStage}
    for rule in rules:
        for _ in range(3):
            rule.step(x, y)
    for p, q in zip(model.state_dict().values(), blocks.state_dict().values(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)


def test_the_gradient_limit_is_backpropagation_with_norms_pooling_and_dropout() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*list(_conv_net())[:-1], nn.Dropout(0.3), nn.Linear(6, 3)).double()
    twin = copy.deepcopy(model)
    x, y = images(10, torch.float64)
    rule = AltMin(model, nn.CrossEntropyLoss(), SGD, code_solver="gradient")
    plain = Backprop(twin, nn.CrossEntropyLoss(), SGD)
    for step in range(4):
        for each in (rule, plain):
            torch.manual_seed(step)
            each.step(x, y)
    for p, q in zip(model.state_dict().values(), twin.state_dict().values(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("frozen", ["weight", "bias"])
def test_a_frozen_part_of_a_norm_gets_no_gradient(frozen: str) -> None:
    stage, z = _stage("conv, batch norm")
    norm = stage.modules[2]
    getattr(norm, frozen).requires_grad_(False)
    with torch.no_grad():
        pullback = stage.record(z)
        v = torch.randn_like(pullback.output)
        pullback(v)
        pullback.add_gradients(v, 1.0)
    assert getattr(norm, frozen).grad is None
    assert getattr(norm, "bias" if frozen == "weight" else "weight").grad is not None


@pytest.mark.parametrize("kind", [PipelineStage, BlockStage])
@pytest.mark.parametrize("name", ["batch norm in between", "batch norm without statistics", "residual with batch norm"])
def test_a_channels_only_value_is_not_normalised_wherever_the_norm_is(name: str, kind: Any) -> None:
    stage, z = _stage(name, kind)
    buffers = [b for m in stage.modules for b in m.buffers()]
    with pytest.raises(
        ValueError, match=r"Stage 's' normalises over the batch.*1 value for each channel.*model.eval\(\)"
    ):
        stage.record(z[:1])
    assert all(bool(b.isfinite().all()) for b in buffers)
    if buffers:
        for m in stage.modules:
            m.eval()
        assert stage.record(z[:1]).output.isfinite().all()


@pytest.mark.parametrize("kind", [PipelineStage, BlockStage])
@pytest.mark.parametrize("name", ["conv, batch norm", "residual block"])
def test_one_image_is_normalised_over_its_positions(name: str, kind: Any) -> None:
    stage, z = _stage(name, kind)
    expected = copy.deepcopy(stage).forward(z[:1])
    assert relative(stage.record(z[:1]).output, expected) < 1e-12


@pytest.mark.parametrize(
    "module", [nn.MaxPool2d(2, return_indices=True), nn.InstanceNorm2d(3), nn.Softmax(1), nn.Flatten(0), nn.ELU()]
)
def test_what_has_no_closed_form_is_left_to_autograd(module: nn.Module) -> None:
    assert not PipelineStage.fits([module, nn.Linear(3, 3)])


def test_a_residual_block_with_a_part_without_closed_form_is_left_to_autograd() -> None:
    block = Residual(nn.Sequential(nn.Linear(3, 3), nn.Softmax(1)))
    assert not PipelineStage.fits([block])
    assert torch.equal(block(torch.ones(2, 3)), 1 + block.branch(torch.ones(2, 3)))
    with pytest.raises(TypeError, match=r"branch must be an nn.Sequential, got Linear"):
        Residual(nn.Linear(3, 3))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        (lambda block: block.branch.register_forward_hook(lambda module, inputs, output: 3 * output), BlockStage),
        (lambda block: block.branch.insert(1, nn.ReLU(inplace=True)), PipelineStage),  # the branch's own tensor
    ],
)
def test_a_residual_block_that_is_changed_computes_what_the_model_does(
    change: Callable[[Any], Any], kind: type
) -> None:
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(4, 8), Residual(nn.Sequential(nn.Linear(8, 8))), nn.Linear(8, 3)).double()
    change(model[1])
    twin = copy.deepcopy(model)
    x, y = torch.randn(5, 4, dtype=torch.float64), torch.arange(5) % 3
    rule, plain = (
        AltMin(model, nn.CrossEntropyLoss(), SGD, code_solver="gradient"),
        Backprop(twin, nn.CrossEntropyLoss(), SGD),
    )
    assert isinstance(rule.chain[1], kind)
    torch.testing.assert_close(rule.step(x, y).output, plain.step(x, y).output, rtol=1e-13, atol=0)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14)


def test_a_residual_block_that_overwrites_its_input_is_refused_by_name() -> None:
    block = Residual(nn.Sequential(nn.ReLU(inplace=True), nn.Linear(8, 8)))
    rule = AltMin(nn.Sequential(nn.Linear(4, 8), block, nn.Linear(8, 3)), nn.CrossEntropyLoss(), SGD)
    with pytest.raises(UnsupportedModelError, match=r"Stage '1' changes its input in place.*inplace=False"):
        rule.step(torch.randn(5, 4), torch.arange(5) % 3)


@pytest.mark.parametrize("kind", [PipelineStage, BlockStage])
def test_a_skip_that_would_broadcast_is_refused_with_both_shapes(kind: Any) -> None:
    block = Residual(nn.Sequential(nn.Conv2d(3, 3, 1), nn.AdaptiveAvgPool2d(1)))
    with pytest.raises(ValueError, match=r"skip, of shape \(2, 3, 4, 4\), to its branch, of shape \(2, 3, 1, 1\)"):
        kind("s", [("0", block)]).record(torch.ones(2, 3, 4, 4))


def _watch(stage: PipelineStage, monkeypatch: pytest.MonkeyPatch) -> list[weakref.ref[Tensor]]:
    """References to what each operation of a stage returns from now on."""
    outputs: list[weakref.ref[Tensor]] = []

    def watched(operation: Any) -> Callable[..., Any]:
        record = operation.record

        def call(*arguments: Any) -> Any:
            output, recorded = record(*arguments)
            outputs.append(weakref.ref(output))
            return output, recorded

        return call

    for each in stage.operations:
        monkeypatch.setattr(each, "record", watched(each))
    return outputs


@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("conv, batch norm", [True, True, False]),  # the gate's value is the convolution's input
        ("max pooling", [True, True, False]),
        ("batch norm in between", [False, True, True, True]),
        ("residual", [True]),
        ("residual block", [True, False]),
        ("two affine maps", [True, True, True, True, False]),
    ],
)
def test_what_no_derivative_reads_is_free_without_codes(
    name: str, read: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    stage, z = _stage(name)
    outputs = _watch(stage, monkeypatch)
    with torch.no_grad():
        pullback = stage.record(z)
        v = torch.randn_like(pullback.output)
        pullback.forget("input")
        pullback.forget("output")
        assert [found() is not None for found in outputs] == read
        entered = weakref.ref(z)
        del z
        pullback(v)  # still there
        pullback.add_gradients(v, 1.0)
        assert (entered() is None) == isinstance(stage.modules[0], nn.ReLU)


def _bytes(tensors: Iterable[Tensor], known: Iterable[Tensor]) -> int:
    seen = {t.untyped_storage().data_ptr() for t in known}
    own = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(size for pointer, size in own.items() if pointer not in seen)


def test_a_recorded_net_holds_no_more_than_autograds_graph() -> None:
    torch.manual_seed(0)
    model, (x, _) = _conv_net(), images(16)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        output = model(x)
    held = _bytes(saved, [*model.parameters(), *model.buffers(), x])
    del output
    with torch.no_grad():
        gc.collect()
        before = [t for t in gc.get_objects() if type(t) is Tensor and t.layout == torch.strided]
        trace = Chain(model).record(x, keep_codes=False)
        found = [t for t in gc.get_objects() if type(t) is Tensor and t.layout == torch.strided]
    assert all(type(p) is PipelinePullback for p in trace.pullbacks)
    small = 16 * 3 * 4 + 2048  # the output, which the trace holds in any case, and numbers a channel
    assert _bytes(found, before) <= held + small


def test_cotangents_are_kept_for_weights_only() -> None:
    stage, z = _stage("max pooling")
    with torch.no_grad():
        pullback = stage.record(z)
        v = torch.randn_like(pullback.output)
        pullback(v)
        (kept,) = pullback._arrived.find(v) or []
        assert kept[1] is v
        head = PipelinePullback(PipelineStage("h", [("0", nn.ReLU()), ("1", nn.MaxPool2d(2))]), z)
        head.add_gradients(torch.randn_like(head.output), 1.0)  # a run without weights has none to add
        head(head.output)
        assert head._arrived.find(head.output) is None


def test_a_subclass_is_left_to_autograd() -> None:
    class Scaled(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    chain = Chain(nn.Sequential(Scaled(4, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2)))
    assert isinstance(chain[0], BlockStage)
