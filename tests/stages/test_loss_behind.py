"""The loss without its targets: Hessian, changed gradient and scale follow from the output and the gradient there."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from beyondprop.errors import UnsupportedModelError
from beyondprop.stages.loss_behind import check_known, factor_of, loss_behind, unknown_loss
from beyondprop.stages.losses import OutputLoss

N = 7
LOSSES: dict[str, tuple[nn.Module, Callable[[], Tensor], tuple[int, ...]]] = {
    "ce": (nn.CrossEntropyLoss(), lambda: torch.arange(N) % 4, (N, 4)),
    "ce_sum": (nn.CrossEntropyLoss(reduction="sum"), lambda: torch.arange(N) % 4, (N, 4)),
    "ce_ignored": (nn.CrossEntropyLoss(), lambda: torch.tensor([0, 1, -100, 3, 2, -100, 1]), (N, 4)),
    "ce_positions": (nn.CrossEntropyLoss(), lambda: torch.arange(N * 3).view(N, 3) % 4, (N, 4, 3)),
    "ce_smooth": (nn.CrossEntropyLoss(label_smoothing=0.2), lambda: torch.arange(N) % 4, (N, 4)),
    "nll": (nn.NLLLoss(), lambda: torch.arange(N) % 4, (N, 4)),
    "mse": (nn.MSELoss(), lambda: torch.randn(N, 3, 2, dtype=torch.float64), (N, 3, 2)),
    "mse_sum": (nn.MSELoss(reduction="sum"), lambda: torch.randn(N, 3, dtype=torch.float64), (N, 3)),
    "bce": (nn.BCEWithLogitsLoss(), lambda: torch.rand(N, 3, dtype=torch.float64), (N, 3)),
}


@pytest.mark.parametrize("name", LOSSES)
def test_what_follows_is_what_the_targets_give(name: str) -> None:
    function, targets, shape = LOSSES[name]
    loss, y, output = OutputLoss(function), targets(), torch.randn(shape, dtype=torch.float64)
    seen, behind = loss.at(output, y), None
    check_known(loss)
    behind = loss_behind(loss, output, seen.cotangent)
    tangent, move = torch.randn_like(output), 0.3 * torch.randn_like(output)
    torch.testing.assert_close(behind.hessian(tangent), seen.hessian(tangent), rtol=0, atol=1e-12)
    torch.testing.assert_close(behind.curvature(tangent), seen.curvature(tangent), rtol=0, atol=1e-12)
    again, expected = behind.again(output + move), seen.again(output + move)
    torch.testing.assert_close(again.cotangent, expected.cotangent, rtol=0, atol=1e-12)
    torch.testing.assert_close(again.hessian(tangent), expected.hessian(tangent), rtol=0, atol=1e-12)
    assert behind.scale == seen.scale
    assert bool(behind.value.isnan())


@pytest.mark.parametrize("scale", [1.0, 1024.0, 1e-3])
@pytest.mark.parametrize("name", LOSSES)
def test_the_scale_shows_in_the_gradient_of_a_cross_entropy(name: str, scale: float) -> None:
    function, targets, shape = LOSSES[name]
    loss, y, output = OutputLoss(function), targets(), torch.randn(shape, dtype=torch.float64, requires_grad=True)
    (function(output, y) * scale).backward()
    assert output.grad is not None
    found = factor_of(loss, output.detach(), output.grad)
    if not name.startswith("ce") or name == "ce_smooth":
        assert found is None
        return
    assert float(found) == pytest.approx(scale * loss.scale(output), rel=1e-12)  # type: ignore[arg-type]


def test_the_scale_does_not_show_where_labels_are_mixed() -> None:
    function, output = nn.CrossEntropyLoss(), torch.randn(9, 4, dtype=torch.float64, requires_grad=True)
    (0.7 * function(output, torch.arange(9) % 4) + 0.3 * function(output, torch.arange(9).flip(0) % 4)).backward()
    assert output.grad is not None
    assert factor_of(OutputLoss(function), output.detach(), output.grad) is None


def test_classes_may_come_last() -> None:
    """A language model's output `(N, T, V)`, flattened in front of the loss."""
    function, output = nn.CrossEntropyLoss(), torch.randn(4, 5, 6, dtype=torch.float64, requires_grad=True)
    y = torch.arange(20) % 6
    function(output.view(20, 6), y).backward()
    assert output.grad is not None
    loss = OutputLoss(function)
    behind = loss_behind(loss, output.detach(), output.grad * 4)
    other = output.detach().movedim(2, 1)
    seen = loss.at(other, y.view(4, 5))
    tangent = torch.randn_like(other)
    torch.testing.assert_close(
        behind.hessian(tangent.movedim(1, 2)), seen.hessian(tangent).movedim(1, 2), rtol=0, atol=1e-12
    )
    assert float(factor_of(loss, output.detach(), output.grad)) == pytest.approx(0.25)  # type: ignore[arg-type]
    with pytest.raises(
        UnsupportedModelError, match=r"gradient at the output \(4, 5, 6\) is not that of a cross-entropy"
    ):
        loss_behind(OutputLoss(function), output.detach(), torch.randn_like(output))


def test_other_losses_are_refused() -> None:
    for function in (nn.L1Loss(), nn.BCELoss(), nn.functional.cross_entropy):
        with pytest.raises(ValueError, match=r"loss must be an nn.CrossEntropyLoss, nn.NLLLoss"):
            check_known(OutputLoss(function))
    with pytest.raises(ValueError, match="with pos_weight"):
        check_known(OutputLoss(nn.BCEWithLogitsLoss(pos_weight=torch.ones(3))))
    point = unknown_loss(torch.randn(3, 2), torch.randn(3, 2))
    for ask in (point.hessian, point.again):
        with pytest.raises(ValueError, match="asks for the curvature of the loss: pass loss="):
            ask(torch.randn(3, 2))
