"""What goes in and comes out of a black box: several tensors, any shape, half precision; gradients only where they belong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from boxes import Counted, Smooth, far, points, random_pattern
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from beyondprop.func.sensing import Pattern
from beyondprop.nn import BlackBox

MASK = random_pattern(6, 8, 3)
SMOOTH = Smooth(MASK)


# ---- shapes --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 2, 5])
@pytest.mark.parametrize("difference", ["central", "forward"])
def test_images(rows: int, difference: str) -> None:
    """`(N, C, H, W)` in and out: each pixel of a blur has five inputs; the pattern is flat."""

    def blur(x: np.ndarray) -> np.ndarray:
        assert x.ndim == 4
        near = [np.roll(x, shift, axis) for shift in (-1, 1) for axis in (2, 3)]
        return np.tanh(x + 0.3 * sum(near))

    def seen(x: Tensor) -> Tensor:
        return torch.tanh(x + 0.3 * sum(x.roll(s, a) for s in (-1, 1) for a in (2, 3)))

    pattern = torch.func.jacrev(lambda a: seen(a[None]).flatten())(torch.zeros(2, 5, 5)).reshape(50, 50) != 0
    layer = BlackBox(blur, pattern=pattern, difference=difference)
    x = points(rows, 50).reshape(rows, 2, 5, 5).requires_grad_()
    twin = x.detach().clone().requires_grad_()
    weight = points(rows, 50, 3).reshape(rows, 2, 5, 5)
    y = layer(x)
    assert y.shape == x.shape
    (y * weight).sum().backward()
    (seen(twin) * weight).sum().backward()
    assert x.grad is not None
    assert twin.grad is not None
    assert far(x.grad, twin.grad) <= (1e-7 if difference == "central" else 1e-4)
    assert layer.plan is not None
    assert layer.plan.probes <= 8


@pytest.mark.parametrize("arrays", ["numpy", "torch"])
@pytest.mark.parametrize("vectorized", [True, False])
def test_what_the_box_is_given(arrays: str, vectorized: bool) -> None:
    seen: list[Any] = []

    def box(x: Any) -> Any:
        seen.append(x)
        return x * 2

    layer = BlackBox(box, arrays=arrays, vectorized=vectorized)
    x = points(3, 8).reshape(3, 2, 4).requires_grad_()
    layer(x).sum().backward()
    assert {type(each) for each in seen} == {np.ndarray if arrays == "numpy" else Tensor}
    assert all(each.shape[-2:] == (2, 4) and each.ndim == (3 if vectorized else 2) for each in seen)
    assert not any(isinstance(each, Tensor) and each.requires_grad for each in seen)
    assert len(seen) == (2 if vectorized else 3 + 3 * 16)
    assert x.grad is not None
    assert far(x.grad, torch.full_like(x, 2.0)) <= 1e-8


@pytest.mark.parametrize("shape", [(3,), (3, 1), (3, 4, 1), (1, 1)])
def test_rows_of_one_number_and_of_odd_shapes(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, dtype=torch.float64).requires_grad_()
    y = BlackBox(np.sin)(x)
    assert y.shape == shape
    y.sum().backward()
    assert x.grad is not None
    assert far(x.grad, torch.cos(x)) <= 1e-8


def test_one_number_a_row() -> None:
    x = points(4, 8).requires_grad_()
    y = BlackBox(lambda a: (a**2).sum(1), method="dense")(x)
    assert y.shape == (4,)
    y.sum().backward()
    assert x.grad is not None
    assert far(x.grad, 2 * x) <= 1e-8


@pytest.mark.parametrize(
    "change", [lambda x: x.T.contiguous().T, lambda x: x[:, ::2].repeat(1, 2), lambda x: x.expand(4, 8)]
)
def test_views_and_expanded_inputs(change: Callable[[Tensor], Tensor]) -> None:
    start = points(4, 8) if change is not test_views_and_expanded_inputs else None
    assert start is not None
    leaf = (points(1, 8) if "expand" in change.__code__.co_names else start).requires_grad_()
    twin = leaf.detach().clone().requires_grad_()
    BlackBox(SMOOTH, pattern=MASK)(change(leaf)).square().sum().backward()
    SMOOTH.torch(change(twin)).square().sum().backward()
    assert leaf.grad is not None
    assert twin.grad is not None
    assert far(leaf.grad, twin.grad) <= 1e-7


# ---- several inputs and outputs ------------------------------------------------------------------------------------------


class Pair(NamedTuple):
    """Two results."""

    place: Any
    speed: Any


def _parts(form: str, a: Any, b: Any) -> Any:
    return {
        "tuple": (a, b),
        "list": [a, b],
        "dict": {"a": a, "b": b},
        "named": Pair(a, b),
        "nested": {"inner": (a, [b])},
    }[form]


@pytest.mark.parametrize("form", ["tuple", "list", "dict", "named", "nested"])
@pytest.mark.parametrize("executor", [False, True])
@pytest.mark.parametrize("vectorized", [False, True])
def test_several_outputs(form: str, executor: bool, vectorized: bool) -> None:
    from concurrent.futures import ThreadPoolExecutor

    def box(x: np.ndarray) -> Any:
        return _parts(form, np.sin(x), (x**2).sum(-1, keepdims=True))

    with ThreadPoolExecutor(2) as pool:
        layer = BlackBox(box, vectorized=vectorized, executor=pool if executor else None)
        x = points(3, 4).requires_grad_()
        found = layer(x)
        a, b = tree_leaves(found)
        assert type(found) is type(_parts(form, 0, 0))
        assert (a.shape, b.shape) == ((3, 4), (3, 1))
        (a.sum() + 3 * b.sum()).backward()
        assert x.grad is not None
        assert far(x.grad, torch.cos(x) + 6 * x) <= 1e-8
        x.grad = None
        tree_leaves(layer(x))[1].sum().backward()  # one of them alone
        assert far(x.grad, 2 * x) <= 1e-8  # type: ignore[arg-type]


def test_several_inputs_of_unlike_shapes() -> None:
    box = Counted(lambda a, b: np.einsum("nij,nj->ni", a, b) ** 2)
    layer = BlackBox(box, out_features=3)
    a, b = points(4, 6).reshape(4, 3, 2).requires_grad_(), points(4, 2, 1).requires_grad_()
    layer(a, b).sum().backward()
    product = torch.einsum("nij,nj->ni", a, b).detach()
    assert a.grad is not None
    assert b.grad is not None
    assert far(a.grad, 2 * product[..., None] * b.detach()[:, None]) <= 1e-7
    assert far(b.grad, torch.einsum("ni,nij->nj", 2 * product, a.detach())) <= 1e-7
    assert box.rows == 4 * (1 + 2 * 8)


@pytest.mark.parametrize("argnums", [0, 1, (1,), (0, 1), None])
def test_only_the_named_inputs_are_differentiated(argnums: Any) -> None:
    box = Counted(lambda a, b: a * b)
    layer = BlackBox(box, argnums=argnums)
    a, b = points(4, 3).requires_grad_(), points(4, 3, 1).requires_grad_()
    layer(a, b).sum().backward()
    named = (0, 1) if argnums is None else (argnums,) if isinstance(argnums, int) else argnums
    assert (a.grad is not None) == (0 in named)
    assert (b.grad is not None) == (1 in named)
    if a.grad is not None:
        assert far(a.grad, b) <= 1e-8
    if b.grad is not None:
        assert far(b.grad, a) <= 1e-8
    assert box.rows == 4 * (1 + 2 * 3 * len(named))


def test_integers_beside_floats() -> None:
    table = np.arange(10.0)
    layer = BlackBox(lambda a, index: a * table[index])
    a, index = points(4, 3).requires_grad_(), torch.tensor([[1, 2, 3]] * 4)
    layer(a, index).sum().backward()
    assert a.grad is not None
    assert far(a.grad, index.double()) <= 1e-8
    with pytest.raises(TypeError, match=r"Input 1 of the black box is int64.* argnums"):
        BlackBox(lambda a, index: a, argnums=(0, 1))(a, index)
    with pytest.raises(TypeError, match="Input 1 of the black box must be a tensor, got int"):
        layer(a, 3)


def test_trainable_parameters_of_the_box_itself() -> None:
    """A box with parameters is one with more inputs: expanded over the batch, their gradient is summed."""
    scale = torch.nn.Parameter(torch.tensor([2.0, 3.0], dtype=torch.float64))
    layer = BlackBox(lambda a, s: np.tanh(a * s))
    x = points(5, 2)
    layer(x, scale.expand(5, 2)).sum().backward()
    twin = scale.detach().clone().requires_grad_()
    torch.tanh(x * twin).sum().backward()
    assert scale.grad is not None
    assert twin.grad is not None
    assert far(scale.grad, twin.grad) <= 1e-8


def test_inputs_of_unlike_precision() -> None:
    box = lambda a, b: a.astype(np.float64) * b  # noqa: E731
    a, b = points(4, 3, dtype=torch.float32).requires_grad_(), points(4, 3, 1).requires_grad_()
    y = BlackBox(box)(a, b)
    assert y.dtype == torch.float32  # as the first
    y.sum().backward()
    assert a.grad is not None
    assert b.grad is not None
    assert (a.grad.dtype, b.grad.dtype) == (torch.float32, torch.float64)
    assert far(a.grad, b) <= 2e-4
    assert far(b.grad, a) <= 2e-4


def test_unlike_numbers_of_rows_and_no_rows() -> None:
    layer = BlackBox(lambda a, b: a + b)
    with pytest.raises(ValueError, match=r"equally many rows, got 4 and 1.* expand\(\)"):
        layer(points(4, 3), points(1, 3))
    with pytest.raises(ValueError, match=r"batch is empty: the black box got the shape \(0, 3\)"):
        BlackBox(np.sin)(torch.zeros(0, 3))
    with pytest.raises(ValueError, match="first dimension, got a scalar"):
        BlackBox(np.sin)(torch.tensor(1.0))
    with pytest.raises(TypeError, match="must be a tensor, got ndarray"):
        BlackBox(np.sin)(np.zeros((2, 3)))


def test_a_flat_pattern_of_several_inputs() -> None:
    pattern = torch.cat([torch.eye(4), torch.eye(4), torch.zeros(4, 2)], 1)
    layer = BlackBox(lambda a, b, c: a * b + 0 * c.sum(1, keepdims=True), pattern=pattern)
    leaves = [points(3, n, n).requires_grad_() for n in (4, 4, 2)]
    layer(*leaves).sum().backward()
    assert layer.plan is not None
    assert layer.plan.probes == 2
    assert layer.pattern == Pattern(pattern)
    assert far(leaves[0].grad, leaves[1]) <= 1e-8  # type: ignore[arg-type]
    assert far(leaves[1].grad, leaves[0]) <= 1e-8  # type: ignore[arg-type]
    assert leaves[2].grad is not None
    assert not bool(leaves[2].grad.any())


# ---- precision -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("way", ["model", "autocast", "scaled"])
@pytest.mark.parametrize("arrays", ["numpy", "torch"])
def test_half_precision(dtype: torch.dtype, way: str, arrays: str) -> None:
    """The box computes in float32, whatever is around it, and so does its Jacobian."""
    kinds = set()

    def box(x: Any) -> Any:
        kinds.add(x.dtype)
        return SMOOTH(x) if arrays == "numpy" else SMOOTH.torch(x)

    torch.manual_seed(0)
    layer = BlackBox(box, pattern=MASK, arrays=arrays)
    model = nn.Sequential(nn.Linear(5, 8), layer, nn.Linear(6, 2))
    twin = nn.Sequential(nn.Linear(5, 8), nn.Identity(), nn.Linear(6, 2))
    twin.load_state_dict(model.state_dict(), strict=False)
    x = points(6, 5, dtype=torch.float32)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0, enabled=way == "scaled")
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    if way == "model":
        model.to(dtype)
        loss = model(x.to(dtype)).float().square().mean()
    else:
        with torch.autocast("cpu", dtype=dtype):
            loss = model(x).float().square().mean()
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer) if way == "scaled" else None
    twin[2](SMOOTH.torch(twin[0](x))).square().mean().backward()
    for mine, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert mine.grad is not None
        assert other.grad is not None
        assert far(mine.grad, other.grad) <= 0.05
    assert kinds == {np.dtype("float32") if arrays == "numpy" else torch.float32}
    assert layer.info.step is not None
    assert layer.info.step < 0.02  # that of float32, not of eight bits


@pytest.mark.parametrize("difference", ["central", "forward"])
def test_a_torch_box_under_autocast_is_sensed_as_it_is_evaluated(difference: str) -> None:
    weight = torch.randn(6, 8) / 3
    layer = BlackBox(lambda a: torch.tanh(a @ weight.T), arrays="torch", method="dense", difference=difference)
    x = points(6, 8, dtype=torch.float32).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    y.sum().backward()
    twin = x.detach().clone().requires_grad_()
    torch.tanh(twin @ weight.T).sum().backward()
    assert x.grad is not None
    assert twin.grad is not None
    assert far(x.grad, twin.grad) <= (1e-3 if difference == "central" else 1e-2)


def test_inputs_without_gradient_and_mixed() -> None:
    box = Counted(lambda a, b: a * b)
    layer = BlackBox(box)
    a, b = points(4, 3), points(4, 3, 1).requires_grad_()
    layer(a, b).sum().backward()
    assert b.grad is not None
    assert far(b.grad, a) <= 1e-8
    assert a.grad is None


@pytest.mark.cuda
@pytest.mark.parametrize("arrays", ["numpy", "torch"])
@pytest.mark.parametrize("method", ["coloring", "regression", "dense", "spsa"])
def test_inputs_on_a_cuda_device(method: str, arrays: str) -> None:
    """The box gets arrays of the host, or tensors where they are; outputs and gradients are on the input's device."""
    devices = set()

    def box(x: Any) -> Any:
        devices.add(str(getattr(x, "device", "cpu")).split(":")[0])
        return SMOOTH(x) if arrays == "numpy" else SMOOTH.torch(x.cpu()).to(x.device)

    layer = BlackBox(box, pattern=None if method == "spsa" else MASK, method=method, arrays=arrays)
    x = points(4, 8).cuda().requires_grad_()
    y = layer(x)
    assert y.is_cuda
    y.square().sum().backward()
    assert x.grad is not None
    assert x.grad.is_cuda
    if method != "spsa":
        twin = points(4, 8).requires_grad_()
        SMOOTH.torch(twin).square().sum().backward()
        assert twin.grad is not None
        assert far(x.grad.cpu(), twin.grad) <= 1e-7
    assert devices == {"cuda" if arrays == "torch" else "cpu"}
