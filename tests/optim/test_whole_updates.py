"""An update of LocoProp is whole or nothing; AffineProjection knows rounding from a change of the gradient."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from cases import blobs, difference, equal, mlp, state
from torch import Tensor, nn
from torch.optim import SGD, Adam

from beyondprop import AffineProjection, LocoProp, UnsupportedModelError, data
from beyondprop.optim.affine_projection import _scale

CE = nn.CrossEntropyLoss()
X, Y = blobs(12)


class Net(nn.Module):
    """Layers, and a norm that is the base optimizer's."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.norm(torch.tanh(self.a(x))))


class Failing(SGD):
    """Runs out of memory at its `at`-th step."""

    def __init__(self, params: Any, lr: float, at: int) -> None:
        super().__init__(params, lr=lr, momentum=0.9)
        self.left = at

    def step(self, closure: Any = None) -> Any:
        self.left -= 1
        loss = super().step(closure)
        if self.left == 0:
            raise torch.OutOfMemoryError("out of memory")
        return loss


def _second(count: int, at: int) -> Callable[..., torch.optim.Optimizer]:
    """Return a factory whose `count`-th optimizer fails at its step `at`."""
    made = []

    def build(params: Any, lr: float = 0.1) -> torch.optim.Optimizer:
        made.append(params)
        return Failing(params, lr, at if len(made) == count else 10**6)

    return build


@pytest.mark.parametrize("at", [1, 3, 8])
@pytest.mark.parametrize("where", ["a", "b", "base"])
def test_an_error_anywhere_leaves_every_weight(where: str, at: int) -> None:
    torch.manual_seed(0)
    model = Net()
    locals_ = _second({"a": 1, "b": 2, "base": 3}[where], at)
    base = partial(Failing, lr=0.1, at=(at + 4) // 5) if where == "base" else partial(SGD, lr=0.1)
    optimizer = LocoProp(model, lr=1e-3, local_optimizer=locals_, base=base)
    before = state(model)
    for _ in range(2):  # five local steps a step
        optimizer.zero_grad()
        before = state(model)
        CE(model(X), Y).backward()
        gradients = [p.grad for p in model.parameters()]
        try:
            optimizer.step()
        except torch.OutOfMemoryError as error:
            notes = error.__notes__
            break
        assert not equal(before, state(model))
    else:
        pytest.fail("nothing failed")
    assert "No weight was changed" in notes[0]
    assert equal(before, state(model))
    assert all(p.grad is g for p, g in zip(model.parameters(), gradients, strict=True))
    optimizer.zero_grad()
    CE(model(X), Y).backward()
    optimizer.step()  # and training goes on
    assert all(not torch.equal(p, before[n]) for n, p in model.named_parameters())


@pytest.mark.parametrize("build", [LocoProp, AffineProjection])
def test_a_sparse_input_is_refused_by_name(build: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    run = build(model)
    before = state(model)
    CE(model(X.to_sparse()), Y).backward()
    with pytest.raises(UnsupportedModelError, match=r"The input of layer '0' has the layout torch\.sparse_coo"):
        run.step()
    assert equal(before, state(model))


@pytest.mark.parametrize("lr", [1e38, float("inf")])
def test_a_base_step_that_is_not_finite_is_taken_back(lr: float) -> None:
    torch.manual_seed(0)
    model = Net()
    optimizer = LocoProp(model, lr=1e-4, base=partial(SGD, lr=lr))
    before = state(model.norm)
    (1e5 * CE(model(X), Y)).backward()
    with pytest.warns(UserWarning, match="'base optimizer' were not finite"):
        optimizer.step()
    assert equal(before, state(model.norm))


def test_running_averages_that_overflow_do_not_freeze_a_layer() -> None:
    """Squares of gradients of 1e20 are beyond float32: the steps would be 0 for ever."""
    torch.manual_seed(0)
    model = mlp(6, 8, 3, activation="tanh")
    optimizer = LocoProp(model, lr=1e-3, loss="squared")
    before = state(model)
    (1e21 * CE(model(X), Y)).backward()
    with pytest.warns(UserWarning, match="'0', '2' were not finite"):
        optimizer.step()
    assert equal(before, state(model))
    optimizer.zero_grad()
    CE(model(X), Y).backward()
    optimizer.step()
    assert all(not torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert all(bool(t.isfinite().all()) for s in optimizer.state.values() for t in s.values() if isinstance(t, Tensor))


def test_sums_of_half_precision_do_not_overflow() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(300, 300, bias=False)).to(torch.float16)
    with torch.no_grad():
        model[0].weight.fill_(1.0)  # type: ignore[union-attr]
    optimizer = LocoProp(model, lr=1e-2, local_optimizer=SGD, loss="squared", local_steps=1)
    model(torch.ones(4, 300, dtype=torch.float16)).float().sum().mul(0.5).backward()
    optimizer.step()  # gradients of 2, whose sum is 180000
    assert not bool((model[0].weight == 1).any())  # type: ignore[operator]


# ---- rounding, and changes of the gradient -------------------------------------------------------------------------------


def test_a_combination_that_cancels_is_not_the_only_one_asked() -> None:
    """The deltas sum to 0 with the fixed signs, as those of a softmax do with equal ones."""
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(2, (4,), generator=generator).double() * 2 - 1
    torch.manual_seed(1)
    rows, deltas = torch.randn(1, 7, 5, dtype=torch.float64), torch.randint(-5, 5, (1, 7, 4)).double()
    deltas[..., 3] = -signs[3] * (deltas[..., :3] @ signs[:3])
    assert not bool((deltas @ signs).any())
    factor = _scale("layer", 3 * deltas.mT @ rows, rows, deltas, torch.finfo(torch.float64).eps)
    assert float(factor) == pytest.approx(3, rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("classes", [1, 2, 3, 10, 50])
def test_the_factor_is_found_in_every_precision(dtype: torch.dtype, classes: int) -> None:
    eps = torch.finfo(dtype).eps
    for seed in range(20):
        torch.manual_seed(seed)
        rows, z = torch.randn(1, 32, 20, dtype=torch.float64), 4 * torch.randn(1, 32, classes, dtype=torch.float64)
        exact = z.softmax(-1) - torch.eye(classes, dtype=torch.float64)[torch.randint(classes, (1, 32))]
        if classes == 1:
            exact = z
        gradient = (exact.mT @ rows).to(dtype)
        rounded = [t.to(dtype).float() for t in (gradient, rows, exact)]
        factor = _scale("layer", 0.1 * rounded[0], rounded[1], rounded[2], eps)
        assert float(factor) == pytest.approx(0.1, rel=max(4 * eps, 1e-5))


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("classes", [2, 10])
def test_autocast_takes_the_steps_of_full_precision_and_refuses_what_it_refuses(
    dtype: torch.dtype | None, classes: int
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 32), nn.Tanh(), nn.Linear(32, classes))
    projection, optimizer = AffineProjection(model, side="samples"), SGD(model.parameters(), lr=0.1, momentum=0.9)

    def loss() -> Tensor:
        x = torch.randn(16, 20)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype is not None):
            return CE(model(x), x[:, :classes].argmax(1))

    for step in range(200):  # to where gradients are small sums of large terms
        torch.manual_seed(step % 3)
        optimizer.zero_grad()
        loss().backward()
        projection.step()
        optimizer.step()
    torch.manual_seed(9)
    optimizer.zero_grad()
    loss().backward()
    largest = max(float(p.grad.abs().max()) for p in model.parameters() if p.grad is not None)
    nn.utils.clip_grad_value_(model.parameters(), largest / 20)
    with pytest.raises(UnsupportedModelError, match="is not a multiple of what its backward pass gave"):
        projection.step()


def test_adam_as_a_local_optimizer_is_not_disturbed() -> None:
    """Step counts and other state that is no average are finite, too."""
    model = mlp(6, 8, 3, activation="tanh")
    optimizer = LocoProp(model, lr=1e-3, local_optimizer=partial(Adam, amsgrad=True))
    before = state(model)
    for _ in range(3):
        optimizer.zero_grad()
        CE(model(X), Y).backward()
        optimizer.step()
    assert difference(before.values(), model.parameters()) > 1e-3


def test_digits_are_learnt_under_autocast() -> None:
    digits = data.load("digits")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10))
    optimizer, projection = SGD(model.parameters(), lr=0.1, momentum=0.9), AffineProjection(model)
    for _ in range(150):
        rows = torch.randint(len(digits.x_train), (50,))
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = CE(model(digits.x_train[rows]), digits.y_train[rows])
        loss.backward()
        projection.step()
        optimizer.step()
    assert float((model(digits.x_test).argmax(1) == digits.y_test).double().mean()) > 0.9
