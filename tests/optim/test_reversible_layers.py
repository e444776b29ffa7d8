"""Layers inside what is run again in the backward pass: refused when an optimizer is built, trained where it is stored."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from beyondprop import AffineProjection, LocoProp, UnsupportedModelError
from beyondprop.nn import AdditiveCoupling, Recomputed, ReversibleSequential


def _net(mode: str) -> nn.Sequential:
    chain = ReversibleSequential(*(AdditiveCoupling(nn.Linear(4, 4), nn.Linear(4, 4)) for _ in range(2)), mode=mode)
    kept = "store" if mode == "store" else "checkpoint"
    return nn.Sequential(Recomputed(nn.Linear(8, 8), mode=kept), nn.Tanh(), chain, nn.Linear(8, 3))


@pytest.mark.parametrize("kind", [LocoProp, AffineProjection])
@pytest.mark.parametrize("mode", ["inverse", "checkpoint"])
def test_what_runs_without_a_graph_is_refused_by_name(kind: type[LocoProp] | type[AffineProjection], mode: str) -> None:
    model = _net(mode)
    with pytest.raises(UnsupportedModelError, match=r"Layer '0\.module' is inside a Recomputed.*mode=\"store\""):
        kind(model)
    with pytest.raises(UnsupportedModelError, match=r"Layer '2\.0\.f' is inside a ReversibleSequential"):
        kind(model, exclude=["0.*"])
    kind(model, exclude=["0.*", "2.*"])
    model[0].requires_grad_(False)
    model[2].requires_grad_(False)
    kind(model)


def test_what_is_stored_is_trained() -> None:
    torch.manual_seed(0)
    model = _net("store")
    optimizer = LocoProp(model)
    x, y = torch.randn(20, 8), torch.arange(20) % 3
    before = [p.detach().clone() for p in model.parameters()]
    nn.functional.cross_entropy(model(x), y).backward()
    optimizer.step()
    assert all(not torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
