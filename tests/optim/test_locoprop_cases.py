"""Cases that a drop-in optimizer meets in real models: views, checkpoints, shared and frozen parts, odd settings."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import difference, relative
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from beyondprop import AffineProjection, LocoProp
from beyondprop.optim._capture import Capture
from beyondprop.optim.matching import transfer
from beyondprop.optim.projection import moments, solve_primal

D = torch.float64
SGD = torch.optim.SGD


@pytest.mark.parametrize("shape", [(2, 5, 4), (4,)])
def test_in_place_activations_after_outputs_that_are_views(shape: tuple[int, ...]) -> None:
    models = []
    for inplace in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(inplace), nn.Linear(6, 3)).double()
        optimizer = LocoProp(model, 0.01, local_optimizer=SGD)
        model(torch.ones(shape, dtype=D)).sin().sum().backward()
        optimizer.step()
        assert optimizer.transfers["0"] == "relu"
        models.append(model)
    assert difference(models[0].parameters(), models[1].parameters()) < 1e-14


def test_leaky_relu_in_place_is_found() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.LeakyReLU(0.2, inplace=True), nn.Linear(5, 2))
    optimizer = LocoProp(model)
    model(torch.randn(6, 4)).sum().backward()
    assert optimizer.transfers["0"] == "leaky_relu"


@pytest.mark.parametrize("early", [True, False])
@pytest.mark.parametrize("shared", [True, False])
def test_recomputation_loses_no_calls(shared: bool, early: bool) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def block(self, x: Tensor) -> Tensor:
            last = self.a if shared else self.b
            return last(torch.tanh(self.a(x)))

        def forward(self, x: Tensor) -> Any:
            with set_checkpoint_early_stop(early):
                return checkpoint(self.block, x, use_reentrant=False)

    model = Net().double()
    capture = Capture(model)
    capture.attach()
    model(torch.randn(5, 4, dtype=D)).sin().sum().backward()
    assert [len(unit.calls) for unit in capture.units] == ([2, 0] if shared else [1, 1])


def test_a_group_without_inputs_leaves_the_damping_of_the_others() -> None:
    rows, deltas = torch.randn(2, 9, 4, dtype=D), torch.randn(2, 9, 3, dtype=D)
    rows[1] = 0
    damping = rows.square().sum(-1).mean(-1)  # as AffineProjection does: 0 for the group without inputs
    both, _ = solve_primal(deltas.mT @ rows, None, moments(rows), damping)
    alone, _ = solve_primal(deltas[:1].mT @ rows[:1], None, moments(rows[:1]), damping[:1])
    assert relative(both[:1], alone) < 1e-12


def test_layers_that_share_a_bias_alone_are_refused_or_both_projected() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)).double()
    model[2].bias = model[0].bias  # type: ignore[assignment]
    try:
        projection = AffineProjection(model)
    except ValueError:
        return
    model(torch.randn(9, 4, dtype=D)).square().mean().backward()
    before = model[2].weight.grad.clone()  # type: ignore[union-attr, operator]
    projection.step()
    assert not torch.equal(before, model[2].weight.grad)  # type: ignore[arg-type]


def test_convolutions_that_share_weights_under_other_paddings() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv1d(2, 2, 3), nn.Conv1d(2, 2, 3, padding=2, stride=2)
            self.b.weight, self.b.bias = self.a.weight, self.a.bias

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([self.a(x).flatten(1), self.b(x).flatten(1)], 1)

    model, x = Net().double(), torch.randn(4, 2, 9, dtype=D)
    found = []
    for side in ("inputs", "samples"):
        twin = copy.deepcopy(model)
        projection = AffineProjection(twin, side=side)
        twin(x).sin().mean().backward()
        projection.step()
        found.append([p.grad for p in twin.parameters()])
    assert difference(*found) < 1e-12  # type: ignore[arg-type]


def test_an_embedding_counts_all_rows() -> None:
    layer = nn.Embedding(6, 3)
    projection = AffineProjection(layer, damping=0.0, rows=1)
    layer(torch.tensor([[0], [1], [2]])).sum().backward()
    projection.step()
    assert float(layer.weight.grad.abs().max()) < 4  # type: ignore[union-attr]


@pytest.mark.parametrize("loss", ["matching", "squared"])
def test_the_padding_row_of_a_tied_embedding(loss: str) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.out = nn.Embedding(6, 4, padding_idx=0), nn.Linear(4, 6, bias=False)
            self.out.weight = self.embed.weight
            nn.init.normal_(self.embed.weight)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(torch.tanh(self.embed(x)))

    model, x = Net().double(), torch.tensor([[0, 1, 2], [3, 0, 5]])
    start = model.embed.weight.detach().clone()
    optimizer = LocoProp(
        model,
        0.1,
        target_lr=1.0,
        local_steps=2,
        loss=loss,
        local_optimizer=SGD,
        local_schedule="constant",
        transfer={"embed": "identity", "out": "identity"},
    )
    model(x).sin().sum().backward()
    gradient = model.embed.weight.grad.clone()  # type: ignore[union-attr]
    optimizer.step()
    h, v = torch.tanh(F.embedding(x, start)).flatten(0, 1), start.clone()
    for _ in range(2):
        v.requires_grad_()
        inside = F.embedding(x, v, padding_idx=0) - F.embedding(x, start)
        value = (gradient * v).sum() + inside.square().sum() / 2 + (h @ (v - start).T).square().sum() / 2
        v = v.detach() - 0.1 * torch.autograd.grad(value, v)[0]
    assert difference([model.embed.weight], [v]) < 1e-12


@pytest.mark.parametrize("slope", [0.01, 0.3])
def test_the_slope_of_leaky_relu_in_double_precision(slope: float) -> None:
    f, z = transfer("leaky_relu", negative_slope=slope), -torch.ones(1, 1, dtype=D)
    assert float(f.slope(z, -1)) == slope
    assert float(f.value(z, -1)) == -slope


def test_the_threshold_of_softplus_is_in_its_value_and_slope() -> None:
    f = transfer("softplus", beta=2.0, threshold=3.0)  # found in nets: nn.Softplus(2, 3)
    z = torch.linspace(-3, 4, 100, dtype=D).unsqueeze(-1).requires_grad_()
    expected = F.softplus(z, beta=2.0, threshold=3.0)
    (slope,) = torch.autograd.grad(expected.sum(), z)
    assert torch.equal(f.value(z, -1), expected)
    assert float((f.slope(z.detach(), -1) - slope).abs().max()) < 1e-14
    assert bool((f.slope(z.detach(), -1)[z.detach() > 1.5] == 1).all())


def test_settings_that_a_transfer_does_not_have_are_refused() -> None:
    with pytest.raises(ValueError, match="gelu"):
        transfer("gelu", approximate="tanh")
    with pytest.raises(ValueError, match="slope"):
        transfer("leaky_relu", slope=0.1)


def test_a_local_optimizer_with_several_groups_works_or_is_refused_by_name() -> None:
    def split(ps: list[nn.Parameter], lr: float) -> SGD:
        return SGD([{"params": [p], "weight_decay": 0.1 * (p.ndim > 1)} for p in ps], lr=lr)

    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    try:
        optimizer = LocoProp(model, local_optimizer=split)
    except (TypeError, ValueError):
        return
    model(torch.randn(5, 4)).sum().backward()
    optimizer.step()


def test_softmax_over_a_width_that_is_the_number_of_channels() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.Softmax(-1))
    optimizer = LocoProp(model)
    model(torch.randn(2, 1, 4, 4))[..., 0].sum().backward()
    assert optimizer.transfers == {"0": "identity"}


def test_trust_lets_zero_weights_move_or_says_so() -> None:
    layer = nn.Linear(4, 3)
    for p in layer.parameters():
        nn.init.zeros_(p)
    optimizer = LocoProp(layer, 0.1, trust=0.1, local_optimizer=partial(SGD))
    (layer(torch.randn(5, 4)) - 1).square().sum().backward()
    optimizer.step()
    assert bool(layer.weight.any())


def test_a_loss_that_is_set_in_a_group_later() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)).double()
    twin, x = copy.deepcopy(model), torch.randn(5, 4, dtype=D)
    optimizers = [LocoProp(model, 0.1, local_optimizer=SGD), LocoProp(twin, 0.1, local_optimizer=SGD, loss="squared")]
    for group in optimizers[1].param_groups:
        group["loss"] = "matching"
    for net, optimizer in zip((model, twin), optimizers, strict=True):
        net(x).sin().sum().backward()
        optimizer.step()
    assert difference(model.parameters(), twin.parameters()) < 1e-14
