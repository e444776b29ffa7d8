"""Models in half precision: sums, factorisations and states are float32."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from cases import blobs, equal, mlp, relative, state
from torch import Tensor, nn

from beyondprop import AffineProjection, LocoProp
from beyondprop.optim.projection import moments, solve_dual, solve_primal
from beyondprop.optim.rmsprop import RMSProp

half = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])


@half
@pytest.mark.parametrize("damping", [0.0, 0.1])
@pytest.mark.parametrize("bias", [False, True])
def test_both_sides_are_those_of_the_same_numbers_in_float32(dtype: torch.dtype, damping: float, bias: bool) -> None:
    torch.manual_seed(0)
    rows, deltas = 100 * torch.randn(1, 40, 6).to(dtype), torch.randn(1, 40, 3).to(dtype)  # a sum of squares is 400,000
    weight, column = (deltas.float().mT @ rows.float()).to(dtype), deltas.sum(-2) if bias else None
    wide = [None if t is None else t.float() for t in (weight, column)]
    found = (
        solve_primal(weight, column, moments(rows), damping),
        solve_dual(rows, deltas, damping, bias=bias),
    )
    right = (
        solve_primal(wide[0], wide[1], moments(rows.float()), damping),  # type: ignore[arg-type]
        solve_dual(rows.float(), deltas.float(), damping, bias=bias),
    )
    for own, other in zip(found, right, strict=True):
        for a, b in zip(own, other, strict=True):
            assert (a is None) is (b is None)
            if a is not None and b is not None:
                assert a.dtype is torch.float32
                assert torch.equal(a, b)


@half
@pytest.mark.parametrize("side", ["inputs", "samples"])
@pytest.mark.parametrize("forgetting", [1.0, 0.5])
def test_a_projection_is_near_that_in_float32(dtype: torch.dtype, side: str, forgetting: float) -> None:
    if side == "samples" and forgetting < 1:
        pytest.skip("has no running moments")
    torch.manual_seed(0)
    model = mlp(6, 20, 3).to(dtype)
    wide = copy.deepcopy(model).float()
    x, y = blobs(40)
    x = 40 * x.to(dtype)  # its sums of squares are above 65504
    for m in (model, wide):
        projection = AffineProjection(m, damping=1.0, side=side, forgetting=forgetting)
        nn.functional.cross_entropy(m(x.to(next(m.parameters()).dtype)).float(), y).backward()
        projection.step()
    for p, q in zip(model.parameters(), wide.parameters(), strict=True):
        assert relative(p.grad.float(), q.grad) < 0.1  # type: ignore[union-attr, arg-type]


@half
@pytest.mark.parametrize("centered", [False, True])
def test_rmsprops_momentum_decays(dtype: torch.dtype, centered: bool) -> None:
    p = nn.Parameter(torch.zeros(3, dtype=dtype))
    optimizer = RMSProp([p], lr=1e-3, centered=centered)
    p.grad = torch.full_like(p, 300)  # its square is above 65504
    optimizer.step()
    before = optimizer.state[p]["momentum_buffer"].clone()
    assert bool(before.isfinite().all())
    p.grad.zero_()
    for _ in range(2000):
        optimizer.step()
    left = optimizer.state[p]["momentum_buffer"] / before
    torch.testing.assert_close(left, torch.full((3,), 0.999**2000), rtol=1e-3, atol=0)


@half
def test_a_restored_rmsprop_goes_on_to_the_last_bit(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    p, q = (nn.Parameter(torch.ones(5, dtype=dtype)) for _ in range(2))
    first, second = RMSProp([p], lr=0.01), RMSProp([q], lr=0.01)

    def run(optimizer: RMSProp, parameter: nn.Parameter, gradients: Tensor) -> None:
        for gradient in gradients:
            parameter.grad = gradient.clone()
            optimizer.step()

    before, after = torch.randn(2, 7, 5).to(dtype)
    run(first, p, before)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    q.data.copy_(p.data)
    assert second.state[q]["square_avg"].dtype is torch.float32
    for optimizer, parameter in ((first, p), (second, q)):
        run(optimizer, parameter, after)
    assert torch.equal(p, q)
    assert equal(first.state[p], second.state[q])


@half
@pytest.mark.parametrize("kind", ["squared", "matching"])
@pytest.mark.parametrize("gram", [True, False])
def test_local_steps_move_as_those_in_float32(dtype: torch.dtype, kind: str, gram: bool) -> None:
    torch.manual_seed(0)
    model = mlp(6, 20, 3).to(dtype)
    wide = copy.deepcopy(model).float()
    x, y = blobs(60)
    x = 30 * x.to(dtype)
    moved = []
    for m in (model, wide):
        before = state(m)
        optimizer = LocoProp(m, lr=1e-2, loss=kind, local_steps=3, gram=gram)
        optimizer.zero_grad()
        nn.functional.cross_entropy(m(x.to(next(m.parameters()).dtype)).float(), y).backward()
        optimizer.step()
        moved.append({name: (value - before[name]).float() for name, value in state(m).items()})
    for name, change in moved[0].items():
        assert relative(change, moved[1][name]) < 0.25, name


@half
def test_tokens_are_counted_beyond_what_half_precision_counts(dtype: torch.dtype) -> None:
    from beyondprop.optim._maps import layer_map

    embedding: Any = nn.Embedding(3, 2).to(dtype)
    counts = layer_map(embedding).moments(torch.cat([torch.zeros(70_001), torch.ones(257)]).long())
    assert counts.inner.tolist() == [[70_001, 257, 0]]
    assert float(counts.rows) == 70_258
