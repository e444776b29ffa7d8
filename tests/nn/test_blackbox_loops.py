"""Other people's training loops around a black box: in any order the same gradients as its twin that autograd sees."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from boxes import Counted, Smooth, far, points, random_pattern
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

from beyondprop.errors import BlackBoxError
from beyondprop.nn import BlackBox

MASK = random_pattern(7, 8, 3)
SMOOTH = Smooth(MASK)


class Twin(nn.Module):
    """The same function, as autograd sees it."""

    def forward(self, x: Tensor) -> Tensor:
        return SMOOTH.torch(x)


def net(twin: bool = False, box: Callable[..., Any] = SMOOTH, **options: Any) -> nn.Sequential:
    """Return a net with a box in the middle, or its twin; the same weights."""
    torch.manual_seed(0)
    middle = Twin() if twin else BlackBox(box, **{"pattern": MASK, **options})
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), middle, nn.Linear(7, 3)).double()


def gradients(model: nn.Module) -> Tensor:
    """Return all of them in one."""
    return torch.cat([
        torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in model.parameters()
    ])


def weights(model: nn.Module) -> Tensor:
    """Return all of them in one."""
    return torch.cat([p.detach().flatten() for p in model.parameters()])


X, Y = points(12, 5), torch.arange(12) % 3
LOSS = nn.CrossEntropyLoss()


def _plain(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for low in (0, 5, 10):  # a short last batch
        optimizer.zero_grad()
        LOSS(model(X[low : low + 5]), Y[low : low + 5]).backward()
        optimizer.step()


def _zero_between(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for _ in range(3):
        loss = LOSS(model(X), Y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def _accumulated(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for _ in range(2):
        for low in (0, 4, 8):
            (LOSS(model(X[low : low + 4]), Y[low : low + 4]) / 3).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)


def _forwards_first(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    losses = [LOSS(model(X[low : low + 6]), Y[low : low + 6]) for low in (0, 6)]
    optimizer.zero_grad()
    for loss in reversed(losses):
        loss.backward()
    optimizer.step()


def _two_losses(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    out = model(X)
    optimizer.zero_grad()
    LOSS(out, Y).backward(retain_graph=True)
    (0.1 * out.square().mean()).backward()
    optimizer.step()


def _kept_twice(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    loss = LOSS(model(X), Y)
    for _ in range(3):
        loss.backward(retain_graph=True)
    optimizer.step()


def _looks(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    loss = LOSS(model(X), Y)
    parameters = list(model.parameters())
    torch.autograd.grad(loss, parameters, retain_graph=True)
    torch.autograd.grad(loss, parameters[-1:], retain_graph=True)
    grads = torch.autograd.grad(loss, parameters)
    for p, g in zip(parameters, grads, strict=True):
        p.grad = g
    optimizer.step()


def _closure(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    def closure() -> float:
        optimizer.zero_grad()
        loss = LOSS(model(X), Y)
        loss.backward()
        return loss.item()

    for _ in range(2):
        optimizer.step(closure)


def _sharpness(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """SAM: a step up, a gradient there, and back."""
    LOSS(model(X), Y).backward()
    with torch.no_grad():
        moves = [0.05 * p.grad / p.grad.norm() for p in model.parameters() if p.grad is not None]
        for p, move in zip(model.parameters(), moves, strict=True):
            p += move
    optimizer.zero_grad()
    LOSS(model(X), Y).backward()
    with torch.no_grad():
        for p, move in zip(model.parameters(), moves, strict=True):
            p -= move
    optimizer.step()


def _masked(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    each = nn.functional.cross_entropy(model(X), Y, reduction="none")
    optimizer.zero_grad()
    (each * (torch.arange(12) % 4 == 1)).sum().backward()
    optimizer.step()


def _clipped(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    LOSS(model(X), Y).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 0.01)
    optimizer.step()


def _evaluated_between(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    loss = LOSS(model(X), Y)
    model.eval()
    with torch.no_grad():
        model(X[:3])
    with torch.inference_mode():
        model(X[:2])
    model.train()
    loss.backward()
    optimizer.step()


def _anomaly(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    with torch.autograd.set_detect_anomaly(True):
        LOSS(model(X), Y).backward()
    optimizer.step()


def _one_row(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for i in range(4):
        optimizer.zero_grad()
        LOSS(model(X[i : i + 1]), Y[i : i + 1]).backward()
        optimizer.step()


LOOPS = (
    _plain,
    _zero_between,
    _accumulated,
    _forwards_first,
    _two_losses,
    _kept_twice,
    _looks,
    _closure,
    _sharpness,
    _masked,
    _clipped,
    _evaluated_between,
    _anomaly,
    _one_row,
)


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("difference", ["central", "forward"])
@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled")
def test_a_loop_ends_where_it_does_with_the_twin(loop: Callable[..., None], difference: str) -> None:
    found = []
    for twin in (False, True):
        model = net(twin, difference=difference)
        loop(model, torch.optim.SGD(model.parameters(), 0.5, momentum=0.9))
        found.append(weights(model))
    assert not torch.equal(found[0], weights(net()))
    assert far(*found) <= (1e-7 if difference == "central" else 1e-4)


@pytest.mark.parametrize("steps", [20])
def test_trajectories_are_those_of_autograd(steps: int) -> None:
    found = []
    for twin in (False, True):
        model = net(twin)
        optimizer = torch.optim.Adam(model.parameters(), 1e-2)
        for _ in range(steps):
            optimizer.zero_grad()
            LOSS(model(X), Y).backward()
            optimizer.step()
        found.append(weights(model))
    assert float((found[0] - found[1]).abs().max()) <= 1e-6


# ---- around the model ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("whole", [True, False])
def test_checkpointing(reentrant: bool, whole: bool) -> None:
    box = Counted(SMOOTH)
    model, twin = net(box=box), net(True)

    def run(x: Tensor) -> Tensor:
        if whole:
            return checkpoint(model, x, use_reentrant=reentrant)
        return model[3](checkpoint(model[2], model[:2](x), use_reentrant=reentrant))

    LOSS(run(X.clone().requires_grad_()), Y).backward()
    LOSS(twin(X), Y).backward()
    assert far(gradients(model), gradients(twin)) <= 1e-7
    layer = model[2]
    assert isinstance(layer, BlackBox)
    assert layer.plan is not None
    assert box.rows == layer.stats.total == 12 * (2 + layer.plan.calls)  # what is thrown away is called again


def test_a_moving_average_of_the_model() -> None:
    model = net()
    layer = model[2]
    average: Any = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(3):
        optimizer.zero_grad()
        LOSS(model(X), Y).backward()
        optimizer.step()
        average.update_parameters(model)
    with torch.no_grad():
        assert bool(average(X).isfinite().all())
    assert isinstance(layer, BlackBox)
    assert average.module[2].stats.total == layer.stats.total  # one box
    buffered: Any = AveragedModel(model, use_buffers=True)
    buffered.update_parameters(model)
    assert torch.equal(buffered.module[2].get_extra_state(), layer.get_extra_state())


def test_hooks_of_the_layer() -> None:
    model, seen = net(), []
    model[2].register_forward_pre_hook(lambda *_: seen.append("before"))
    model[2].register_forward_hook(lambda *_: seen.append("after"))
    model[2].register_full_backward_hook(lambda *_: seen.append("backward"))
    model[2].register_full_backward_pre_hook(lambda *_: seen.append("backward pre"))
    LOSS(model(X), Y).backward()
    assert seen == ["before", "after", "backward pre", "backward"]
    twin = net(True)
    LOSS(twin(X), Y).backward()
    assert far(gradients(model), gradients(twin)) <= 1e-7


@pytest.mark.parametrize("where", ["first", "last", "twice"])
def test_the_box_anywhere_in_a_net(where: str) -> None:
    square = Smooth(random_pattern(6, 6, 2))

    class Seen(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return square.torch(x)

    def built(make: Callable[[], nn.Module]) -> nn.Sequential:
        torch.manual_seed(0)
        one = make()
        modules = {
            "first": [one, nn.Linear(6, 2)],
            "last": [nn.Linear(6, 6), one],
            "twice": [nn.Linear(6, 6), one, nn.Tanh(), one, nn.Linear(6, 2)],
        }[where]
        return nn.Sequential(*modules).double()

    x = points(5, 6)
    model, twin = built(lambda: BlackBox(square, pattern=square.mask)), built(Seen)
    model(x).square().sum().backward()
    twin(x).square().sum().backward()
    assert far(gradients(model), gradients(twin)) <= 1e-7
    layer = next(m for m in model if isinstance(m, BlackBox))
    backward = 0 if layer.plan is None or where == "first" else layer.plan.calls
    times = 2 if where == "twice" else 1
    assert layer.stats.total == 5 * times * (1 + backward)


def test_an_input_that_is_changed_in_place_after_the_pass_is_complained_of() -> None:
    layer = BlackBox(SMOOTH, pattern=MASK)
    x = points(3, 8).requires_grad_()
    h = x * 1.0
    y = layer(h)
    h.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
    # The output may be changed: the box does not need it.
    y = layer(x * 1.0)
    y.mul_(2)
    y.sum().backward()
    assert x.grad is not None
    assert far(x.grad, 2 * SMOOTH.jacobian(x.detach()).sum(1)) <= 1e-7


def test_a_rollout_through_one_box() -> None:
    """Model-based control: the same simulator step after step, the gradient through all of them."""
    square = Smooth(random_pattern(6, 6, 2))
    layer = BlackBox(square, pattern=square.mask)
    found = []
    for step in (layer, square.torch):
        start = points(2, 6).requires_grad_()
        state = start
        for _ in range(6):
            state = state + 0.1 * step(state)
        state.square().sum().backward()
        found.append(start.grad)
    assert far(found[0], found[1]) <= 1e-8  # type: ignore[arg-type]
    assert layer.plan is not None
    assert layer.stats.total == 2 * 6 * (1 + layer.plan.calls)


def test_a_cotangent_that_is_no_number_is_passed_on() -> None:
    layer = BlackBox(SMOOTH, pattern=MASK)
    x = points(3, 8).requires_grad_()
    y = layer(x)
    v = torch.ones_like(y)
    v[1] = float("nan")
    y.backward(v)
    assert x.grad is not None
    assert bool(x.grad[[0, 2]].isfinite().all())
    assert bool(x.grad[1, MASK.any(0)].isnan().all())


# ---- what is raised inside -----------------------------------------------------------------------------------------------


class Interrupting:
    """A box that raises at some of its calls."""

    def __init__(self, error: type[BaseException]) -> None:
        self.error, self.at, self.made = error, -1, 0

    def __call__(self, x: np.ndarray) -> np.ndarray:
        self.made += 1
        if self.made == self.at:
            raise self.error("stopped")
        return SMOOTH(x)


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, ValueError, MemoryError])
@pytest.mark.parametrize("at", [1, 2], ids=["forward", "backward"])
def test_a_step_after_one_that_was_broken_off(error: type[BaseException], at: int) -> None:
    box = Interrupting(error)
    model, untouched = net(box=box), net()
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    box.at = at
    before = copy.deepcopy(weights(model))
    raised = error if not issubclass(error, Exception) else BlackBoxError
    with pytest.raises(raised, match="stopped"):
        LOSS(model(X), Y).backward()
    assert torch.equal(weights(model), before)
    optimizer.zero_grad()
    LOSS(model(X), Y).backward()
    LOSS(untouched(X), Y).backward()
    assert far(gradients(model), gradients(untouched)) <= 1e-12


def test_a_graph_that_is_thrown_away_frees_what_it_holds() -> None:
    import gc
    import weakref

    layer = BlackBox(SMOOTH, pattern=MASK)
    x = points(3, 8).requires_grad_()
    y = layer(x * 1.0)
    grad_fn = weakref.ref(y.grad_fn)
    torch.autograd.grad(y.sum(), x, retain_graph=True)
    del y
    gc.collect()
    assert grad_fn() is None
    kept = weakref.ref(layer)
    del layer
    gc.collect()
    assert kept() is None
