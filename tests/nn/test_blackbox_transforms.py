"""Transforms of torch.func, second derivatives, torch.compile: equal to the twin that autograd sees, or refused by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from boxes import Counted, Noisy, Smooth, far, points, random_pattern
from torch import Tensor, nn
from torch.func import functional_call, grad, jacfwd, jacrev, jvp, vjp, vmap

from beyondprop.nn import BlackBox

MASK = random_pattern(6, 7, 3)
SMOOTH = Smooth(MASK)
X = points(4, 7)
# Forward mode brings torch's own decompositions, scripted.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
both = pytest.mark.parametrize("difference", ["central", "forward"])


def _near(found: Tensor, wanted: Tensor, difference: str) -> bool:
    return found.shape == wanted.shape and far(found, wanted) <= (1e-7 if difference == "central" else 1e-4)


def _layer(difference: str = "central", **options: Any) -> BlackBox:
    return BlackBox(options.pop("box", SMOOTH), pattern=MASK, difference=difference, **options)


def _one(f: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda row: f(row[None])[0]


@both
def test_vmap(difference: str) -> None:
    layer = _layer(difference)
    x = torch.stack([X, X + 1, X - 1])
    assert _near(vmap(layer)(x), vmap(SMOOTH.torch)(x), difference)
    assert _near(vmap(layer, in_dims=1)(x), vmap(SMOOTH.torch, in_dims=1)(x), difference)
    assert _near(vmap(vmap(_one(layer)))(x), vmap(vmap(_one(SMOOTH.torch)))(x), difference)
    assert _near(vmap(_one(layer), out_dims=1)(X), SMOOTH.torch(X).T, difference)


@both
def test_vmap_of_gradients(difference: str) -> None:
    layer = _layer(difference)

    def value(f: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda row: torch.sin(f(row[None])).sum()

    assert _near(vmap(grad(value(layer)))(X), vmap(grad(value(SMOOTH.torch)))(X), difference)
    assert _near(
        grad(lambda x: torch.sin(layer(x)).sum())(X), grad(lambda x: torch.sin(SMOOTH.torch(x)).sum())(X), difference
    )


@both
def test_gradients_of_single_samples_of_a_model(difference: str) -> None:
    """What differential privacy takes: `vmap(grad(functional_call))` over the samples."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), _layer(difference), nn.Linear(6, 2)).double()
    parameters = {n: p.detach() for n, p in model.named_parameters()}
    x, y = points(4, 5), torch.arange(4) % 2

    def loss(p: dict[str, Tensor], row: Tensor, label: Tensor) -> Tensor:
        return nn.functional.cross_entropy(functional_call(model, p, (row[None],)), label[None])

    found = vmap(grad(loss), in_dims=(None, 0, 0))(parameters, x, y)
    for i in range(4):
        model.zero_grad()
        nn.functional.cross_entropy(model(x[i : i + 1]), y[i : i + 1]).backward()
        for name, p in model.named_parameters():
            assert p.grad is not None
            assert far(found[name][i], p.grad) <= (1e-7 if difference == "central" else 1e-4)


@both
def test_whole_jacobians(difference: str) -> None:
    layer = _layer(difference)
    right = SMOOTH.jacobian(X)
    assert _near(jacrev(_one(layer))(X[0]), right[0], difference)
    assert _near(jacfwd(_one(layer))(X[0]), right[0], difference)
    assert _near(vmap(jacrev(_one(layer)))(X), right, difference)
    assert _near(vmap(jacfwd(_one(layer)))(X), right, difference)
    whole: Any = torch.autograd.functional.jacobian(layer, X)
    assert _near(torch.stack([whole[i, :, i] for i in range(4)]), right, difference)


def test_batched_cotangents_of_the_engine_are_refused_by_name() -> None:
    """`vectorize=True` hands tensors to the backward pass whose numbers nobody can read; torch.func has a way for it."""
    with pytest.raises(RuntimeError, match=r"torch\.func"):
        torch.autograd.functional.jacobian(_layer(), X, vectorize=True)
    x = X.clone().requires_grad_()
    with pytest.raises(RuntimeError, match=r"torch\.func"):
        torch.autograd.grad(_layer()(x), x, points(12, 6).reshape(2, 6, 6)[:, :4], is_grads_batched=True)


@both
def test_products(difference: str) -> None:
    layer, right = _layer(difference), SMOOTH.jacobian(X)
    u, v = points(4, 7, 1), points(4, 6, 2)
    value, tangent = jvp(layer, (X,), (u,))[:2]
    assert _near(value, SMOOTH.torch(X), difference)
    assert _near(tangent, torch.einsum("bmn,bn->bm", right, u), difference)
    pull = vjp(layer, X)[1]
    assert _near(pull(v)[0], torch.einsum("bmn,bm->bn", right, v), difference)
    with torch.autograd.forward_ad.dual_level():
        dual = layer(torch.autograd.forward_ad.make_dual(X, u))
        moved = torch.autograd.forward_ad.unpack_dual(dual).tangent
        assert moved is not None
        assert _near(moved, tangent, difference)


@pytest.mark.parametrize("chunk", [1, 3, None])
def test_a_batch_of_cotangents_is_sensed_once(chunk: int | None) -> None:
    box = Counted(SMOOTH)
    layer = _layer(box=box)
    jacrev(_one(layer), chunk_size=chunk)(X[0])
    assert layer.plan is not None
    assert box.rows == 1 + layer.plan.calls


# ---- second derivatives --------------------------------------------------------------------------------------------------


def test_second_derivatives_by_the_input_are_refused_where_they_are_asked_for() -> None:
    layer = _layer()
    x = X.clone().requires_grad_()
    (first,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    assert far(first, torch.einsum("bmn,bm->bn", SMOOTH.jacobian(X), 2 * SMOOTH.torch(X))) <= 1e-7
    with pytest.raises(RuntimeError, match=r"BlackBox has first derivatives only.*create_graph"):
        first.square().sum().backward()
    with pytest.raises(RuntimeError, match="first derivatives only"):
        torch.autograd.functional.hessian(lambda a: layer(a).square().sum(), X)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        grad(lambda a: grad(lambda b: layer(b).square().sum())(a).sum())(X)


def test_a_second_derivative_by_the_cotangent_is_exact() -> None:
    layer, right = _layer(), SMOOTH.jacobian(X)
    x, v = X.clone().requires_grad_(), points(4, 6, 2).requires_grad_()
    (pulled,) = torch.autograd.grad(layer(x), x, v, create_graph=True)
    (found,) = torch.autograd.grad((pulled * points(4, 7, 3)).sum(), v)
    assert far(found, torch.einsum("bmn,bn->bm", right, points(4, 7, 3))) <= 1e-7


def test_a_penalty_on_weights_behind_the_box_trains_them() -> None:
    """The gradient at the box's input depends on the weights behind it, linearly; that much is known."""
    torch.manual_seed(0)
    head, layer = nn.Linear(6, 1).double(), _layer()
    found = []
    for f in (layer, SMOOTH.torch):
        x = X.clone().requires_grad_()
        (g,) = torch.autograd.grad(head(f(x)).sum(), x, create_graph=True)
        found.append(torch.autograd.grad(g.square().sum(), head.weight)[0])
    assert far(found[0], found[1]) <= 1e-7


# ---- torch.compile -------------------------------------------------------------------------------------------------------


def _compiled(model: nn.Module | Callable[..., Any]) -> Any:
    torch._dynamo.reset()
    return torch.compile(model, fullgraph=True, backend="aot_eager")


@both
def test_compiled_nets_train_as_others(difference: str) -> None:
    def built(middle: nn.Module) -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), middle, nn.Linear(6, 2)).double()

    found, counted = [], []
    for compiled in (True, False):
        box = Counted(SMOOTH)
        model = built(BlackBox(box, 6, pattern=MASK, difference=difference))
        run = _compiled(model) if compiled else model
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        for step in range(3):
            optimizer.zero_grad()
            run(points(4, 5, step)).square().mean().backward()
            optimizer.step()
        found.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
        layer = model[2]
        assert isinstance(layer, BlackBox)
        assert layer.stats.total == box.rows
        counted.append(box.rows)
    assert far(*found) <= 1e-10
    # A compiled pass does not hand its value on to the backward pass: forward differences ask for it again.
    assert counted[0] == counted[1] + (0 if difference == "central" else 12)


def test_compiled_without_out_features() -> None:
    layer = _layer()
    with pytest.raises(Exception, match="give out_features, or call it once before it is compiled"):
        _compiled(layer)(X)
    layer(X)
    assert far(_compiled(layer)(X), SMOOTH.torch(X)) <= 1e-12


def test_compiled_structures_and_several_boxes() -> None:
    first = BlackBox(lambda a, b: {"sum": a + b, "product": a * b}, method="dense")
    second = BlackBox(lambda a: (a**2, a[:, :1]), method="dense")

    def run(a: Tensor, b: Tensor) -> Tensor:
        found = first(a, b)
        square, one = second(found["product"])
        return (found["sum"] * square + one).sum()

    grads = []
    for f in (run, _compiled(run)):
        a, b = points(3, 2).requires_grad_(), points(3, 2, 1).requires_grad_()
        f(a, b).backward()
        grads.append(torch.cat([a.grad, b.grad]))  # type: ignore[list-item]
    assert far(grads[1], grads[0]) <= 1e-9


def test_a_compiled_simulator_keeps_its_seed() -> None:
    noisy = Noisy(SMOOTH, 0.1)
    layer = BlackBox(noisy.seeded, 6, pattern=MASK, seed_kwarg="seed")
    run = _compiled(layer)
    x = X.clone().requires_grad_()
    run(x).sum().backward()
    assert x.grad is not None
    assert far(x.grad, SMOOTH.jacobian(X).sum(1)) <= 1e-4


def test_compiled_in_evaluation() -> None:
    layer = BlackBox(SMOOTH, 6, pattern=MASK).eval()
    with torch.no_grad():
        assert far(_compiled(layer)(X), SMOOTH.torch(X)) <= 1e-12
    assert layer.stats.evaluation == 4


@pytest.mark.parametrize("randomness", ["same", "different"])
def test_a_simulator_with_a_seed_inside_vmap(randomness: str) -> None:
    layer = BlackBox(Noisy(SMOOTH, 0.1).seeded, pattern=MASK, seed_kwarg="seed")
    found = vmap(grad(lambda row: layer(row[None]).sum()), randomness=randomness)(X)
    assert far(found, SMOOTH.jacobian(X).sum(1)) <= 1e-4


def test_compiled_for_batches_of_any_size() -> None:
    torch._dynamo.reset()
    run = torch.compile(BlackBox(SMOOTH, 6, pattern=MASK), fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in (4, 3, 1, 2):
        x = X[:rows].clone().requires_grad_()
        run(x).sum().backward()
        assert x.grad is not None
        assert far(x.grad, SMOOTH.jacobian(X[:rows]).sum(1)) <= 1e-7


def test_saved_tensors_may_be_moved_away() -> None:
    layer, x = _layer(), X.clone().requires_grad_()
    with torch.autograd.graph.save_on_cpu():
        y = layer(x * 1.0)
    y.sum().backward()
    assert x.grad is not None
    assert far(x.grad, SMOOTH.jacobian(X).sum(1)) <= 1e-7
