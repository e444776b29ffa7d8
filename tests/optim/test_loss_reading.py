"""Losses over graphs, or over some of the rows: read from the autograd graph, and refused where the samples are doubtful."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from cases import difference, projected
from torch import Tensor, nn

from beyondprop import AffineProjection, UnsupportedModelError
from beyondprop.optim import _samples

D = torch.float64


def rand(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=D, generator=torch.Generator().manual_seed(1))


class Graphs(nn.Module):
    """Nodes of all graphs in a row, the mean over each graph's."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.inner, self.head = nn.Linear(6, 8).double(), nn.Linear(8, 3).double()

    def forward(self, nodes: Tensor, graph: Tensor | None = None) -> Tensor:
        h = self.inner(nodes).tanh()
        if graph is None:
            return self.head(h)
        count = int(graph.max()) + 1
        sums = h.new_zeros(count, h.shape[1]).index_add_(0, graph, h)
        return self.head(sums / graph.bincount().unsqueeze(1))


def test_graphs_are_refused_by_name_and_trained_with_their_number() -> None:
    model, graph = Graphs(), torch.arange(3).repeat_interleave(4)
    nodes, labels = rand(12, 6), torch.arange(3)
    with pytest.raises(UnsupportedModelError, match=r"called with 12 and its output has the shape \(3, 3\)"):
        projected(model, lambda: F.cross_entropy(model(nodes, graph), labels))
    model.zero_grad()
    twin = copy.deepcopy(model)
    found = projected(model, lambda: F.cross_entropy(model(nodes, graph), labels), samples=3)
    projection = AffineProjection(twin, reduction="sum")
    (F.cross_entropy(twin(nodes, graph), labels, reduction="sum")).backward()
    projection.step()
    assert (
        max(difference(p.grad, g) for p, g in zip(twin.parameters(), found, strict=True) if p.grad is not None) < 1e-12
    )


LOSSES: dict[str, Callable[[Tensor], Tensor]] = {
    "cross entropy": lambda z: F.cross_entropy(z, torch.arange(len(z)) % 3),
    "over positions": lambda z: F.cross_entropy(z.t().unsqueeze(0), torch.arange(len(z)).unsqueeze(0) % 3),
    "mse": lambda z: F.mse_loss(z, torch.zeros_like(z)),
    "mse of swapped arguments": lambda z: F.mse_loss(torch.zeros_like(z), z),
    "bce": lambda z: F.binary_cross_entropy(z.sigmoid(), torch.ones_like(z)),
    "bce with logits": lambda z: F.binary_cross_entropy_with_logits(z, torch.ones_like(z)),
    "smooth l1": lambda z: F.smooth_l1_loss(z, torch.zeros_like(z)),
    "huber": lambda z: F.huber_loss(z, torch.zeros_like(z)),
    "l1": lambda z: F.l1_loss(z, torch.zeros_like(z)),
    "poisson": lambda z: F.poisson_nll_loss(z, torch.ones_like(z)),
    "of single losses": lambda z: F.cross_entropy(z, torch.arange(len(z)) % 3, reduction="none").mean(),
    "weighed": lambda z: 0.5 * F.cross_entropy(z, torch.arange(len(z)) % 3) / 3 - -F.mse_loss(z, z.detach()),
    "stacked": lambda z: torch.stack([F.mse_loss(z, z.detach() + 1), z.square().mean()]).mean(),
    "in half precision": lambda z: F.cross_entropy(z.bfloat16(), torch.arange(len(z)) % 3).double(),
}


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_over_some_of_the_rows_is_refused_by_name(name: str) -> None:
    model, nodes = Graphs(), rand(11, 6)
    chosen = torch.arange(11) % 4 == 0
    with pytest.raises(UnsupportedModelError, match=r"called with 11 and its loss averages over (3|9)\b"):
        projected(model, lambda: LOSSES[name](model(nodes)[chosen]))
    projected(model, lambda: LOSSES[name](model(nodes)))  # over all of them it is not


def test_a_skipped_pass_says_nothing_of_the_next() -> None:
    model, nodes = Graphs(), rand(11, 6)
    projection = AffineProjection(model)
    F.mse_loss(model(nodes)[:3], rand(3, 3)).backward()
    model.zero_grad()
    F.mse_loss(model(nodes), rand(11, 3)).backward()
    projection.step()


def test_the_reading_of_a_loss_takes_what_it_knows() -> None:
    z = rand(6, 3).requires_grad_()
    y = torch.arange(6) % 3
    cases = {
        F.cross_entropy(z, y): [[6]],
        F.mse_loss(z, z.detach()) + z.abs().mean(): [[18]],
        z.abs().mean() + z[:2].square().mean(): [[18, 6]],
        F.cross_entropy(z, y, reduction="sum"): [],
        z.abs().mean() + z.sum(): [],
        z.norm(dim=1).mean(): [],
    }
    for loss, wanted in cases.items():
        assert sorted(map(sorted, _samples.averaged([loss.grad_fn]))) == sorted(map(sorted, wanted))
