"""Networks by name: recurrent nets, transformers and residual nets under local rules, and what is refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from cases import SGD
from torch import Tensor, nn

from beyondprop import AltMin, Backprop
from beyondprop.lab import nets
from beyondprop.nn import Patches, Positions, Sign
from beyondprop.stages.block import BlockStage
from beyondprop.stages.pipeline import PipelineStage
from beyondprop.stages.recurrent import RecurrentStage

NETS = {
    "rnn:5": [RecurrentStage, "AffineStage", "AffineStage"],
    "rnn:6:relu:rows": [RecurrentStage, "AffineStage"],
    "rnn:6:rows:gru": [RecurrentStage, "AffineStage"],
    "rnn:4:lstm:pixels": [RecurrentStage, "AffineStage", "AffineStage"],
    "transformer:32x2:patch=4": ["BlockStage", BlockStage, BlockStage, BlockStage, "BlockStage"],
    "resnet8": [PipelineStage] * 5,
    "lenet5": [*["AffineStage"] * 1, PipelineStage, PipelineStage, "AffineStage", "AffineStage"],
}


def _batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(6, 1, 16, 16, generator=generator, dtype=torch.float64), torch.arange(6) % 4


@pytest.mark.parametrize("spec", list(NETS))
def test_the_gradient_limit_is_backpropagation(spec: str) -> None:
    torch.manual_seed(0)
    model: Any = nets.build(spec, (1, 16, 16), 4).double()
    twin = copy.deepcopy(model)
    rule = AltMin(model, nn.CrossEntropyLoss(), SGD, code_solver="gradient")
    kinds = [kind if isinstance(kind, str) else kind.__name__ for kind in NETS[spec]]
    assert [type(stage).__name__ for stage in rule.chain] == kinds
    plain = Backprop(twin, nn.CrossEntropyLoss(), SGD)
    for _ in range(2):
        rule.step(*_batch())
        plain.step(*_batch())
    for p, q in zip(model.state_dict().values(), twin.state_dict().values(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("spec", list(NETS))
def test_every_stage_moves_under_line_search(spec: str) -> None:
    torch.manual_seed(0)
    model: Any = nets.build(spec, (1, 16, 16), 4).double()
    before = copy.deepcopy(model.state_dict())
    rule = AltMin(model, nn.CrossEntropyLoss(), SGD, code_solver="line_search")
    losses = [float(rule.step(*_batch()).loss) for _ in range(12)]
    assert losses[-1] < losses[0]
    for name, parameters in rule.stage_parameters().items():
        names = [n for n, p in model.named_parameters() if any(p is q for q in parameters)]
        assert any(bool((model.state_dict()[n] != before[n]).any()) for n in names), name


@pytest.mark.parametrize("spec", ["rnn:15", "rnn:15:gru", "rnn:15:lstm", "rnn:15:relu"])
def test_an_output_for_every_pixel_starts_alive_and_rises_with_ink(spec: str) -> None:
    """Seen through a ReLU, units with signs at random are silent for every pixel in about a third of the nets."""
    ink = torch.rand(8, 1, 12, 12, generator=torch.Generator().manual_seed(0)) < 0.2
    x = torch.where(ink, 2.8, -0.42)  # as MNIST standardized
    for seed in range(30):
        torch.manual_seed(seed)
        model: Any = nets.build(spec, (1, 12, 12), 10)
        with torch.no_grad():
            seen = model[:-1](x)
        assert float((seen > 0).float().mean()) > 0.1
        assert float(seen[ink.flatten(1)].mean()) > 1.1 * float(seen[~ink.flatten(1)].mean())


def test_a_resnets_blocks_are_those_of_the_paper() -> None:
    model: Any = nets.build("resnet20", (3, 32, 32), 10)
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert len(convolutions) == 19
    assert sum(p.numel() for p in model.parameters()) == 269_722  # He et al.: 0.27 million
    shapes = [model[: i + 1](torch.zeros(2, 3, 32, 32)).shape[1:] for i in (2, 5, 6, 8, 9, 11)]
    assert [tuple(s) for s in shapes] == [(16, 32, 32)] * 2 + [(32, 16, 16)] * 2 + [(64, 8, 8)] * 2


@pytest.mark.parametrize(
    ("spec", "shape", "message"),
    [
        ("rnn:\u00b2", (1, 8, 8), "must be the number of units"),
        ("rnn:5:relu:gru", (1, 8, 8), "a gru cell has activations of its own"),
        ("rnn:5:pixels:rows", (1, 8, 8), "'pixels' and 'rows' are given; take one of them"),
        ("mlp:8x2:relu:tanh", (1, 8, 8), "'relu' and 'tanh' are given"),
        ("mlp:8x2:dropout=0.2:dropout=0.9", (1, 8, 8), "'dropout=0.2' and 'dropout=0.9' are given"),
        ("binary:8x2:rule=hinge:rule=tanh", (1, 8, 8), "'rule=hinge' and 'rule=tanh' are given"),
        ("rnn:0", (1, 8, 8), "'0' must be the number of units"),
        ("rnn:5:columns", (1, 8, 8), "unknown option 'columns'; accepted: relu"),
        ("rnn:5", (3, 8, 8), "reads grey images as sequences, got 3 channels"),
        ("rnn:5", (28,), "takes images"),
        ("transformer:64", (1, 8, 8), "'64' must be WIDTHxDEPTH"),
        ("transformer:64x2:patch=9", (1, 8, 8), r"accepted is patch=SIZE with 1 <= SIZE <= 8, got 'patch=9'"),
        ("transformer:65x2", (1, 8, 8), "the width must be a multiple of its 2 heads of 32 features, got 65"),
        ("resnet21", (3, 32, 32), "the depth must be 6 n"),
    ],
)
def test_what_is_no_net_is_refused(spec: str, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        nets.build(spec, shape, 10)


def test_layers_without_size_are_refused() -> None:
    for sizes in ((0, 3), (3, 0), (-1, 3)):
        with pytest.raises(ValueError, match=r"(count|width) must be an integer >= 1"):
            Positions(*sizes)
    with pytest.raises(ValueError, match="size must be an integer >= 1, got 0"):
        Patches(0)


def test_binary_nets_send_signs_in_all_hidden_layers_or_in_the_first() -> None:
    model: Any = nets.build("binary:20x3:rule=tanh:dropout=0.2", (1, 4, 4), 10)
    assert [type(m).__name__ for m in model][1:5] == ["Linear", "BatchNorm1d", "Dropout", "Sign"]
    assert sum(isinstance(m, Sign) and m.target_rule == "tanh" for m in model) == 3
    model: Any = nets.build("binary:20x3:first", (1, 4, 4), 10)
    assert [type(m).__name__ for m in model if isinstance(m, Sign | nn.Tanh)] == ["Sign", "Tanh", "Tanh"]
    with pytest.raises(ValueError, match="unknown option 'tanh'; accepted: first, dropout=P, rule=hardtanh"):
        nets.build("binary:20x3:tanh", (1, 4, 4), 10)


@pytest.mark.parametrize(
    ("form", "said"),
    [
        ("mlp:4x100000", "the depth must be at most 2,000, got 100000"),
        ("mlp:100001x1", "the width must be at most 100,000, got 100001"),
        ("mlp:" + "9" * 5000 + "x1", r"the width must be at most 100,000, got 9{20}\.\.\."),
        ("mlp:100000x2", "has 10,000,000,000 weights or more; at most 1,000,000,000 are accepted"),
        ("binary:4x3000", "the depth must be at most"),
        ("conv:100000x1:bn:dropout=0.5", None),
        ("conv:8000x9", "weights or more"),
        ("resnet20000", "the depth must be at most"),
        ("rnn:40000", "has 1,600,000,000 weights or more"),
        ("rnn:20000:gru", "has 1,200,000,000 weights or more"),
        ("transformer:32000x1", "weights or more"),
        ("mlp:\u0663x1", "must be WIDTHxDEPTH"),
    ],
)
def test_what_no_machine_holds_is_said_before_anything_is_made(form: str, said: str | None) -> None:
    with torch.device("meta"):  # what is made takes no memory, and no time
        if said is None:
            nets.build(form, (1, 8, 8), 10)
            return
        before = torch.get_rng_state()
        with pytest.raises(ValueError, match=said):
            nets.build(form, (1, 8, 8), 10)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_width_alone_is_one_hidden_layer() -> None:
    torch.manual_seed(0)
    one = nets.build("mlp:7:tanh", (1, 2, 3), 4)
    torch.manual_seed(0)
    other = nets.build("mlp:7x1:tanh", (1, 2, 3), 4)
    assert str(one) == str(other)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
