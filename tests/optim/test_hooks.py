"""Hooks go with their optimizer, at once, and leave the model as if the optimizer never was."""

from __future__ import annotations

import copy
import gc
import io
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from cases import CE, mlp
from torch import Tensor, nn

from beyondprop import AffineProjection, AltMin, Backprop, LocoProp
from beyondprop.rules import LearningRule

X, Y = torch.randn(12, 6, generator=torch.Generator().manual_seed(1)), torch.arange(12) % 3
OWNERS: dict[str, Callable[[nn.Module], Any]] = {
    "locoprop": LocoProp,
    "squared": partial(LocoProp, loss="squared", base=partial(torch.optim.SGD, lr=0.1)),
    "projection": AffineProjection,
}
owners = pytest.mark.parametrize("name", OWNERS)


@pytest.fixture(autouse=True)
def no_collector() -> Iterator[None]:
    """What is in a circle stays, but for what torch leaves behind when its first optimizer loads the compiler."""
    torch.optim.SGD([nn.Parameter(torch.zeros(1))])
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return mlp(6, 5, 3)


def hooks(model: nn.Module) -> int:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs")
    return sum(len(getattr(m, kind)) for m in model.modules() for kind in kinds)


def used(name: str, model: nn.Module) -> Any:
    owner = OWNERS[name](model)
    CE(model(X), Y).backward()
    owner.step()
    model.zero_grad()
    return owner


@owners
def test_hooks_go_with_their_owner(name: str) -> None:
    model = net()
    owner = used(name, model)
    assert hooks(model)
    del owner
    assert not hooks(model)


def test_hooks_go_with_an_owner_that_a_schedule_knew() -> None:
    model = net()
    optimizer = LocoProp(model)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-3, total_steps=9)
    CE(model(X), Y).backward()
    optimizer.step()
    schedule.step()
    del optimizer, schedule
    gc.collect()  # a schedule's own circles
    assert not hooks(model)


@owners
def test_hooks_of_others_stay(name: str) -> None:
    model, seen = net(), []
    model[0].register_forward_hook(lambda module, x, z: seen.append(1))
    first, second = used(name, model), AffineProjection(model)
    of_second = hooks(model)
    del first
    assert 0 < hooks(model) < of_second
    CE(model(X), Y).backward()
    second.step()
    assert len(seen) == 2
    del second
    assert hooks(model) == 1


@owners
def test_a_second_owner_is_as_if_the_first_never_was(name: str) -> None:
    model, fresh = net(), net()
    owner = OWNERS[name](model)
    CE(model(X), Y).backward()  # with calls that are never used
    model.zero_grad()
    del owner
    for one in (model, fresh):
        owner = used(name, one)
        del owner
    assert all(map(torch.equal, model.state_dict().values(), fresh.state_dict().values()))


@owners
def test_a_rule_on_the_model_is_as_if_the_optimizer_never_was(name: str) -> None:
    model, fresh = net(), net()
    used(name, fresh)  # goes at once
    fresh.load_state_dict(model.state_dict())
    for one in (model, fresh):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            AltMin(one, CE).step(X, Y)
    assert all(map(torch.equal, model.state_dict().values(), fresh.state_dict().values()))


@owners
def test_a_copy_of_the_model_alone_has_no_hooks_that_a_rule_or_optimizer_knows(name: str) -> None:
    model = net()
    owner = OWNERS[name](model)
    twin, other = copy.deepcopy(model), copy.deepcopy(model)
    rule: LearningRule = AltMin(twin, CE)
    assert not hooks(twin)
    rule.step(X, Y)
    for _ in range(2):
        second = used(name, other)
        assert hooks(other) == hooks(model)
        del second
    assert not hooks(other)
    assert hooks(model)
    del owner


@owners
def test_the_hooks_of_a_copy_go_with_the_copy(name: str) -> None:
    model = net()
    owner = OWNERS[name](model)
    twin, copied = copy.deepcopy((model, owner))
    assert hooks(twin) == hooks(model)
    CE(twin(X), Y).backward()
    grads = [p.grad.clone() for p in twin.parameters() if p.grad is not None]
    weights = [p.detach().clone() for p in twin.parameters()]
    copied.step()
    now = [p.grad for p in twin.parameters() if p.grad is not None] if name == "projection" else list(twin.parameters())
    assert not any(map(torch.equal, grads if name == "projection" else weights, now))
    del copied
    assert not hooks(twin)
    assert hooks(model)
    del owner
    assert not hooks(model)


def test_the_hooks_of_a_copied_rule_go_with_it() -> None:
    model = net()
    rule = Backprop(model, CE, LocoProp(model))
    twin = copy.deepcopy(rule)
    twin.step(X, Y)
    copied = twin.model
    del twin
    assert not hooks(copied)
    rule.step(X, Y)
    assert hooks(model)


def test_a_copy_watches_for_itself() -> None:
    model = net()
    optimizer = LocoProp(model)
    twin, copied = copy.deepcopy((model, optimizer))
    del optimizer, model
    CE(twin(X), Y).backward()
    copied.step()
    assert copied.transfers == {"0": "relu", "2": "softmax"}


def test_a_copy_sees_that_its_settings_change() -> None:
    twin, copied = copy.deepcopy(((model := net()), LocoProp(model, loss="squared")))
    copied.param_groups[0]["loss"] = "matching"
    CE(twin(X), Y).backward()
    copied.step()
    assert copied.transfers == {"0": "relu"}


class _OverTime(nn.Module):
    """Which looks at how long its input is."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.LSTM(6, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.inner(x)[0])


@pytest.mark.filterwarnings(
    "ignore::torch.jit.TracerWarning", "ignore:`torch.jit.trace", "ignore:.* in no layer that is captured"
)
@owners
def test_outputs_are_copied_saved_and_traced_as_without_hooks(name: str) -> None:
    model = net()
    owner = used(name, model)
    output = model(X)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of hooks that are not saved
        copied = copy.copy(output)
        torch.save(output, file := io.BytesIO())
    file.seek(0)
    assert torch.equal(torch.load(file), output)
    assert torch.equal(copied, output)
    for traced, x in ((model, X), (_OverTime(), torch.randn(2, 3, 6))):
        own = owner if traced is model else OWNERS[name](traced)
        graph: Any = torch.jit.trace(traced, x)  # which compares several passes
        assert torch.equal(graph(x), traced(x))
        del own
    CE(model(X), Y).backward()
    owner.step()
