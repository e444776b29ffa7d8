"""Closed-form gradients and curvatures of the task loss against autograd."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from beyondprop.stages.losses import OutputLoss

CLASSES = torch.tensor([0, 3, 2, 1, 3])
SEQUENCE = torch.randint(4, (5, 2))


def _targets(loss: Any) -> list[Tensor]:
    if isinstance(loss, nn.CrossEntropyLoss):
        return [CLASSES, torch.softmax(torch.randn(5, 4, dtype=torch.float64), 1)]
    return [torch.rand(5, 4, dtype=torch.float64)]


LOSSES: dict[str, Any] = {
    "cross_entropy": nn.CrossEntropyLoss,
    "ignore": lambda **k: nn.CrossEntropyLoss(ignore_index=3, **k),
    "smooth": lambda **k: nn.CrossEntropyLoss(label_smoothing=0.1, **k),
    "weights": lambda **k: nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 0.5, 1.0], dtype=torch.float64), **k),
    "mse": nn.MSELoss,
    "bce": nn.BCEWithLogitsLoss,
    "bce_weights": lambda **k: nn.BCEWithLogitsLoss(pos_weight=torch.full((4,), 2.0, dtype=torch.float64), **k),
    "l1": nn.SmoothL1Loss,
}


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("name", list(LOSSES))
def test_value_gradient_and_curvature_are_autograds(name: str, reduction: str) -> None:
    loss = LOSSES[name](reduction=reduction)
    for y in _targets(loss):
        if name == "ignore" and y.is_floating_point():
            continue
        output = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
        value = loss(output, y)
        (gradient,) = torch.autograd.grad(value, output, create_graph=True)
        v = torch.randn_like(output)
        (product,) = torch.autograd.grad(gradient, output, v)
        point = OutputLoss(loss).at(output.detach(), y)
        assert point.scale == (1 / 5 if reduction == "mean" else 1.0)
        torch.testing.assert_close(point.value, value.detach(), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(point.scale * point.cotangent, gradient.detach(), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(point.scale * point.hessian(v), product, rtol=1e-12, atol=1e-12)
        curvature = (v * product).sum(1).clamp_min(0) / point.scale
        torch.testing.assert_close(point.curvature(v), curvature.detach(), rtol=1e-12, atol=1e-12)
        assert not any(t.requires_grad for t in (point.value, point.cotangent, point.hessian(v)))
        moved = output.detach() + 1.0
        torch.testing.assert_close(point.again(moved).value, loss(moved, y))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_many_samples_in_half_precision(dtype: torch.dtype) -> None:
    """bfloat16 counts to 256, and squares of float16 end at 65504."""
    torch.manual_seed(0)
    output, y, v = torch.randn(1001, 4), torch.arange(1001) % 4, 400 * torch.randn(1001, 4)
    y[::7] = -100
    narrow, wide = (OutputLoss(nn.CrossEntropyLoss()).at(output.to(kind), y) for kind in (dtype, torch.float32))
    for of in ("cotangent", "scale"):
        torch.testing.assert_close(getattr(narrow, of), getattr(wide, of), rtol=2e-2, atol=2e-2, check_dtype=False)
    assert torch.isfinite(narrow.curvature(v.to(dtype))).all()
    sums = [point.cotangent.double().abs().sum() for point in (narrow, wide)]
    assert abs(float(sums[0] / sums[1]) - 1) < torch.finfo(dtype).eps
    bends = [point.curvature(v.to(point.cotangent.dtype)).double().sum() for point in (narrow, wide)]
    assert abs(float(bends[0] / bends[1]) - 1) < 1e-2


def test_one_ignored_row_among_many_in_half_precision() -> None:
    """1 of 1000: bfloat16 counts the others as 1000, too."""
    y = torch.arange(1000) % 4
    y[3] = -100
    point = OutputLoss(nn.CrossEntropyLoss()).at(torch.randn(1000, 4, dtype=torch.bfloat16), y)
    assert not point.cotangent[3].any()
    assert not point.hessian(torch.ones(1000, 4, dtype=torch.bfloat16) + torch.eye(1000, 4, dtype=torch.bfloat16))[
        3
    ].any()


def _triple(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    del module, inputs
    return 3 * output


def test_closed_forms_are_used_only_where_they_hold() -> None:
    output = torch.randn(5, 4, 2, dtype=torch.float64, requires_grad=True)
    for reduction in ("mean", "sum"):
        loss = nn.CrossEntropyLoss(reduction=reduction)
        (gradient,) = torch.autograd.grad(loss(output, SEQUENCE), output)
        point = OutputLoss(loss).at(output.detach(), SEQUENCE)
        torch.testing.assert_close(point.scale * point.cotangent, gradient)

    class Doubled(nn.MSELoss):
        def forward(self, input: Tensor, target: Tensor) -> Tensor:
            return 2 * super().forward(input, target)

    flat, y = torch.randn(3, 2), torch.randn(3, 2)
    assert torch.equal(OutputLoss(Doubled()).at(flat, y).value, Doubled()(flat, y))
    hooked = nn.MSELoss()
    hooked.register_forward_hook(_triple)
    assert torch.equal(OutputLoss(hooked).at(flat, y).value, hooked(flat, y))


def test_a_plain_function_is_a_loss() -> None:
    output, y = torch.randn(5, 4, dtype=torch.float64), torch.rand(5, 4, dtype=torch.float64)
    point = OutputLoss(F.mse_loss).at(output, y)
    known = OutputLoss(nn.MSELoss()).at(output, y)
    torch.testing.assert_close(point.cotangent, known.cotangent)
    torch.testing.assert_close(point.hessian(output), known.hessian(output))


def test_a_loss_that_is_linear_in_the_output_has_no_curvature() -> None:
    output, y = torch.randn(5, 4), torch.randn(5, 4)
    point = OutputLoss(lambda o, t: (o * t).mean()).at(output, y)
    torch.testing.assert_close(point.cotangent, y / 4)
    assert not bool(point.hessian(output).any())


def test_all_rows_ignored_is_what_torch_says() -> None:
    loss = nn.CrossEntropyLoss(ignore_index=0, reduction="sum")
    point = OutputLoss(loss).at(torch.randn(3, 2), torch.zeros(3, dtype=torch.int64))
    assert float(point.value) == 0.0
    assert not bool(point.cotangent.any())


@pytest.mark.parametrize(
    ("loss", "output", "y", "message"),
    [
        (
            nn.CrossEntropyLoss(),
            torch.ones(3, 2),
            torch.zeros(3, dtype=torch.int32),
            "int32: cross-entropy takes int64",
        ),
        (nn.CrossEntropyLoss(), torch.ones(3, 2), torch.zeros(3), "does not fit.*class indices, or probabilities"),
        (nn.CrossEntropyLoss(), torch.ones(3, 2), torch.ones(3, 2).double(), "float64 does not fit"),
        (nn.MSELoss(), torch.ones(3, 1), torch.ones(3), r"shape \(3,\), the output \(3, 1\)"),
        (nn.MSELoss(), torch.ones(3), torch.ones(3, dtype=torch.int64), "int64.*MSELoss takes equal dtypes"),
        (nn.BCEWithLogitsLoss(), torch.ones(3, 1), torch.ones(3, 1).double(), "BCEWithLogitsLoss takes equal dtypes"),
        (nn.BCEWithLogitsLoss(), torch.ones(3, 1), torch.ones(3, 2), "takes equal shapes"),
        (nn.MSELoss(), torch.ones(3, 1), torch.ones(3, 1, device="meta"), "y is on meta.*move y"),
        (lambda o, t: (o - t).square(), torch.ones(3, 1), torch.ones(3, 1), r"must return a scalar.*shape \(3, 1\)"),
    ],
)
def test_targets_that_do_not_fit_are_refused(loss: Any, output: Tensor, y: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OutputLoss(loss).at(output, y)


ELEMENTWISE = [
    nn.L1Loss,
    nn.SmoothL1Loss,
    nn.HuberLoss,
    nn.PoissonNLLLoss,
    nn.MSELoss,
    nn.KLDivLoss,
    nn.SoftMarginLoss,
    nn.HingeEmbeddingLoss,
]
BROADCASTING = {
    "square": lambda o, t: (o - t).square().mean(),
    "mse": F.mse_loss,
    "smooth_l1": F.smooth_l1_loss,
    "l1": lambda o, t: F.l1_loss(o, t, reduction="sum"),
    "pinball": lambda o, t: torch.maximum(0.9 * (t - o), 0.1 * (o - t)).mean(),
}
FITTING = {
    "squeezed": lambda o, t: (o.reshape(-1) - t.reshape(-1)).square().mean(),
    "viewed": lambda o, t: F.mse_loss(o, t.view_as(o)),
    "logits": lambda o, t: F.binary_cross_entropy_with_logits(o.flatten(), t.flatten()),
    "two classes": lambda o, t: (
        -torch.cat([o.reshape(-1, 1), -o.reshape(-1, 1)], 1).log_softmax(1).mul(t.reshape(-1, 1)).mean()
    ),
}
SHAPES = [((6, 1), (6,)), ((6,), (6, 1)), ((6, 6, 1), (6, 6)), ((6, 1, 1), (6, 1)), ((2, 1), (2,)), ((1, 1), (1,))]


@pytest.mark.filterwarnings("ignore:Using a target size")
@pytest.mark.parametrize(("shape", "other"), SHAPES)
@pytest.mark.parametrize("loss", [*(kind() for kind in ELEMENTWISE), *BROADCASTING.values()])
def test_targets_that_broadcast_are_refused(loss: Any, shape: tuple[int, ...], other: tuple[int, ...]) -> None:
    output, y = torch.zeros(shape), torch.zeros(other)  # equal rows: shapes alone decide
    for mode in (torch.no_grad(), torch.inference_mode(), torch.enable_grad()):
        with (
            mode,
            pytest.raises(
                ValueError, match=r"y has shape .*, the output .*: (\w+ takes equal shapes|the loss broadcasts)"
            ),
        ):
            OutputLoss(loss).check(output, y)


@pytest.mark.parametrize(("shape", "other"), [*SHAPES, ((6, 2, 1), (6, 2))])
@pytest.mark.parametrize("loss", FITTING.values())
def test_functions_that_bring_shapes_together_are_served(
    loss: Any, shape: tuple[int, ...], other: tuple[int, ...]
) -> None:
    output, y = torch.randn(shape), torch.rand(other)
    point = OutputLoss(loss).at(output, y)
    assert torch.equal(point.value, loss(output, y))


def test_a_function_is_looked_at_once() -> None:
    calls = []
    loss = OutputLoss(lambda o, t: calls.append(len(t)) or (o.squeeze(1) - t).square().mean())
    for rows in (1, 8, 8, 9):
        loss.check(torch.zeros(rows, 1), torch.zeros(rows))
        loss.check(torch.zeros(rows, 2), torch.zeros(rows, 2))
    assert calls == [7]


def test_batchmean_is_a_mean_over_samples() -> None:
    output, y = torch.randn(6, 3).log_softmax(1), torch.rand(6, 3).softmax(1)
    point = OutputLoss(nn.KLDivLoss(reduction="batchmean")).at(output, y)
    assert point.scale == 1 / 6
    torch.testing.assert_close(point.cotangent, -y)


def test_a_loss_must_reduce() -> None:
    with pytest.raises(ValueError, match="reduction='mean' or 'sum', got reduction='none'"):
        OutputLoss(nn.MSELoss(reduction="none"))
    with pytest.raises(TypeError, match="callable as loss"):
        OutputLoss("mse")  # type: ignore[arg-type]
