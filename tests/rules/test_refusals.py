"""Bad input fails loudly: what was wrong, where, and what is accepted."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from cases import SGD, blobs, equal, mlp, rule_state
from torch import Tensor, nn

from beyondprop import AltMin, Backprop, Codes, Descent, LocalRule, Memory, UnsupportedModelError
from beyondprop.credit import code_solvers
from beyondprop.lab.nets.forms import build

CE = nn.CrossEntropyLoss()
both = pytest.mark.parametrize("rule", [AltMin, partial(Backprop, optimizer=SGD)], ids=["AltMin", "Backprop"])


def _refuses(rule: Any, x: Any, y: Any, message: str, kind: type[Exception] = ValueError) -> None:
    before = rule_state(rule)
    with pytest.raises(kind, match=message):
        rule.step(x, y)
    assert equal(before, rule_state(rule))


BATCHES: dict[str, tuple[Any, Any, type[Exception], str]] = {
    "empty": (
        torch.zeros(0, 6),
        torch.zeros(0, dtype=torch.int64),
        ValueError,
        r"batch is empty: x has shape \(0, 6\)",
    ),
    "lengths": (torch.zeros(4, 6), torch.zeros(3, dtype=torch.int64), ValueError, "x has 4 rows and y has 3"),
    "x_list": ([[0.0] * 6], torch.zeros(1), TypeError, "x must be a torch.Tensor, got list"),
    "y_int": (torch.zeros(1, 6), 3, TypeError, "y must be a torch.Tensor, got int"),
    "scalar": (torch.tensor(1.0), torch.zeros(1), ValueError, "x must have the batch as its first dimension"),
    "x_dtype": (
        torch.zeros(4, 6).double(),
        torch.zeros(4).long(),
        ValueError,
        "x has dtype torch.float64.*torch.float32",
    ),
    "x_device": (torch.zeros(4, 6, device="meta"), torch.zeros(4).long(), ValueError, "x is on meta, the model on cpu"),
    "y_device": (torch.zeros(4, 6), torch.zeros(4, device="meta").long(), ValueError, "y is on meta.*cpu; move y"),
    "y_dtype": (torch.zeros(4, 6), torch.zeros(4).int(), ValueError, "y has dtype torch.int32.*int64 class indices"),
    "y_float": (
        torch.zeros(4, 6),
        torch.zeros(4),
        ValueError,
        "does not fit the output.*class indices, or probabilities",
    ),
}


@both
@pytest.mark.parametrize("case", list(BATCHES))
def test_batches(rule: Any, case: str) -> None:
    x, y, kind, message = BATCHES[case]
    _refuses(rule(mlp(6, 5, 3), CE), x, y, message, kind)


@both
def test_shapes_that_broadcast_silently(rule: Any) -> None:
    _refuses(rule(mlp(6, 5, 1), nn.MSELoss()), torch.zeros(4, 6), torch.zeros(4), r"y has shape \(4,\).*equal shapes")


@both
@pytest.mark.parametrize(
    ("model", "loss", "kind", "message"),
    [
        ([nn.Linear(6, 5), nn.Linear(5, 3)], CE, TypeError, "model must be a torch.nn.Module, got list"),
        (mlp(6, 5, 3), "cross_entropy", TypeError, "loss must be callable .*got str"),
        (mlp(6, 5, 3), nn.CrossEntropyLoss(reduction="none"), ValueError, "reduction='mean' or 'sum', got .*'none'"),
        (mlp(6, 5, 3).requires_grad_(False), CE, ValueError, "[Nn]o parameter.*requires a gradient|nothing to train"),
    ],
)
def test_models_and_losses(rule: Any, model: Any, loss: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        rule(model, loss)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"code_solver": "newton"}, "'line_search', 'gradient', 'cg', 'exact', got 'newton'"),
        ({"cuts": "layers"}, "cuts must be 'linear', 'block'.*got 'layers'"),
        ({"cuts": ["0", "9"]}, "cuts names '9'"),
        ({"mu": 0}, "mu must be a finite number > 0, got 0"),
        ({"mu": -1.0}, "mu must be a finite number > 0, got -1.0"),
        ({"damping": -0.5}, "damping must be a finite number >= 0, got -0.5"),
        ({"damping": float("inf")}, "damping must be a finite number >= 0, got inf"),
        ({"code_l1": -1}, "l1 must be a finite number >= 0, got -1"),
        ({"weight_inputs": "latest"}, "weight_inputs must be one of 'old', 'new', got 'latest'"),
        ({"nonfinite": "ignore"}, "nonfinite must be one of 'raise', 'deferred', got 'ignore'"),
    ],
)
def test_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AltMin(mlp(6, 5, 3), CE, **arguments)


@pytest.mark.parametrize("solver", [Descent, Memory])
def test_tied_weights(solver: Any) -> None:
    shared = nn.Linear(6, 6)
    with pytest.raises(UnsupportedModelError, match="Stages '0' and '2' share a parameter"):
        AltMin(nn.Sequential(shared, nn.ReLU(), shared, nn.Linear(6, 3)), CE, solver())


def test_one_sample_and_normalisation_over_the_batch() -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3))
    rule = AltMin(model, CE)
    x, y = blobs(1)
    _refuses(rule, x, y, "Stage '0' normalises over the batch.*1 value for each channel: 2 or more.*model.eval")
    model.eval()
    rule.step(x, y)
    frozen = AltMin(mlp(6, 5, 4, 3, norm=True), CE)
    frozen.model[0].requires_grad_(False)  # type: ignore[index]
    frozen.model[1].requires_grad_(False)  # type: ignore[index]
    _refuses(AltMin(frozen.model, CE), x, y, "more than 1 value per channel|2 or more")


def test_exact_where_it_cannot_be() -> None:
    rule = AltMin(mlp(6, 9, 3), CE, code_solver=code_solvers.exact(limit=8))
    _refuses(rule, *blobs(4), "Stage '2' maps 9 to 3 units, over the limit of 8 for solver='exact': use 'cg'")
    rule = AltMin(mlp(6, 9, 8, 3, norm=True), CE, code_solver="exact")
    _refuses(rule, *blobs(4), "Stage '3' normalises over the batch.*use solver='cg'")
    rule.model.eval()
    rule.step(*blobs(4))


def test_one_credit_and_one_solver_serve_one_rule() -> None:
    solver = Descent(SGD)
    LocalRule(mlp(6, 5, 3), CE, Codes(), solver)
    with pytest.raises((ValueError, RuntimeError), match="one rule"):
        LocalRule(mlp(6, 5, 3), CE, Codes(), solver)


class _NoBatch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Any:
        return self.linear(x).sum(0)


class _Two(_NoBatch):
    def forward(self, x: Tensor) -> Any:
        return self.linear(x), x


@pytest.mark.parametrize("block", [_NoBatch(), _Two()], ids=["no_batch", "tuple"])
def test_a_stage_returns_one_tensor_of_the_batch(block: nn.Module) -> None:
    rule = AltMin(nn.Sequential(nn.Linear(6, 6), block, nn.Linear(6, 3)), CE)
    _refuses(rule, *blobs(4), "Stage '1.*' maps a batch of 4 to .*one tensor whose first dimension is the batch")


@pytest.mark.parametrize(
    ("spec", "shape", "message"),
    [
        ("mlp", (4,), "must be WIDTHxDEPTH"),
        ("vgg:16", (4,), "net must be one of .*got 'vgg:16'"),
        ("mlp:100x", (4,), "'100x' must be WIDTHxDEPTH"),
        ("mlp:0x2", (4,), "both >= 1"),
        ("mlp:5x2:swish", (4,), "unknown option 'swish'; accepted: relu"),
        ("mlp:5x2:dropout=1", (4,), r"dropout must be in \[0, 1\), got '1'"),
        ("mlp:5x2:dropout=x", (4,), r"dropout must be in \[0, 1\)"),
        ("lenet5", (1, 8, 8), "lenet5 needs images of 16x16 or more, got 8x8"),
        ("conv:4x2", (4,), r"takes images \(C, H, W\)"),
    ],
)
def test_names_of_nets(spec: str, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(spec, shape, 3)


@pytest.mark.parametrize(
    ("spec", "shape"),
    [
        ("mlp:7x2", (4,)),
        ("mlp:7x2:tanh:bn:dropout=0.2", (1, 3, 3)),
        ("lenet5", (1, 28, 28)),
        ("conv:3x4:gelu:bn", (1, 8, 8)),
    ],
)
def test_nets_train(spec: str, shape: tuple[int, ...]) -> None:
    rule = AltMin(build(spec, shape, 3), CE)
    result = rule.step(torch.randn(4, *shape), torch.tensor([0, 1, 2, 0]))
    assert result.output.shape == (4, 3)
