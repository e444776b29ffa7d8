"""LocoProp and AffineProjection in the loops that people have: schedulers, clipping, accumulation, AMP, checkpoints."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from cases import blobs, convnet, difference, equal, images, mixed, mlp, rule_state, state, train
from torch import Tensor, nn
from torch.optim import SGD, Adam, lr_scheduler

from beyondprop import AffineProjection, Backprop, LocoProp, NonFiniteError, UnsupportedModelError
from beyondprop.data import load
from beyondprop.lab.nets.forms import build
from beyondprop.lab.registry import rules
from beyondprop.lab.training import fit

CE = nn.CrossEntropyLoss()
LOCAL: dict[str, dict[str, Any]] = {
    "matching": {},
    "gram": {"loss": "squared", "gram": True},
    "direct": {"loss": "squared", "gram": False},
    "quadratic": {"loss": "quadratic"},
}


class Loop:
    """An optimizer, and a projection where there is one, around a model."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, projection: AffineProjection | None) -> None:
        self.model, self.optimizer, self.projection = model, optimizer, projection

    def step(self, x: Tensor, y: Tensor) -> float:
        self.optimizer.zero_grad()
        loss = CE(self.model(x), y)
        loss.backward()
        self.update()
        return float(loss.detach())

    def update(self) -> None:
        if self.projection is not None:
            self.projection.step()
        self.optimizer.step()

    def state_dict(self) -> dict[str, Any]:
        own = {} if self.projection is None else self.projection.state_dict()
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "projection": own}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        if self.projection is not None:
            self.projection.load_state_dict(saved["projection"])


def _loco(**settings: Any) -> Callable[[nn.Module], Loop]:
    return lambda model: Loop(model, LocoProp(model, **settings), None)


def _affine(**settings: Any) -> Callable[[nn.Module], Loop]:
    return lambda model: Loop(
        model, SGD(model.parameters(), lr=0.05, momentum=0.9), AffineProjection(model, **settings)
    )


LOOPS: dict[str, Callable[[nn.Module], Loop]] = {
    "rmsprop": _loco(lr=1e-4),
    "adam": _loco(lr=1e-3, local_optimizer=Adam),
    "base": _loco(lr=1e-4, loss="squared", base=partial(Adam, lr=0.01, amsgrad=True)),
    "rows": _loco(lr=1e-4, loss="quadratic", rows=0.5, trust=0.1, prox=0.1),
    "affine": _affine(),
    "inputs": _affine(side="inputs", damping=0.5),
    "memory": _affine(forgetting=0.5, refresh=2),
}
every_loop = pytest.mark.parametrize("kind", list(LOOPS))


def _batches(count: int = 8, rows: int = 12, dtype: torch.dtype = torch.float32) -> list[tuple[Tensor, Tensor]]:
    x, y = blobs(count * rows, dtype=dtype)
    return list(zip(x.split(rows), y.split(rows), strict=True))


def _pair(kind: str) -> tuple[Loop, Loop]:
    model = mixed(dropout=0.0)
    return LOOPS[kind](model), LOOPS[kind](copy.deepcopy(model))


@every_loop
@pytest.mark.parametrize("how", ["copied", "file"])
def test_a_restored_loop_goes_on_to_the_last_bit(kind: str, how: str) -> None:
    loop, other = _pair(kind)
    batches = _batches()
    for batch in batches[:3]:
        loop.step(*batch)
    saved = copy.deepcopy(loop.state_dict())
    if how == "file":
        file = io.BytesIO()
        torch.save(saved, file)
        file.seek(0)
        saved = torch.load(file, weights_only=True)
    other.load_state_dict(saved)
    for batch in batches[3:]:
        assert loop.step(*batch) == other.step(*batch)
    assert equal(loop.state_dict(), other.state_dict())


def test_states_of_other_models_are_refused() -> None:
    optimizer = LocoProp(mlp(6, 5, 3))
    with pytest.raises(
        ValueError, match=r"This state has the groups \['0', '2', '4'\], this optimizer has \['0', '2'\]"
    ):
        optimizer.load_state_dict(LocoProp(mlp(6, 5, 4, 3)).state_dict())
    with pytest.raises(ValueError, match=r"moments of layers \['9'\], this model has the layers \['0', '2'\]"):
        AffineProjection(mlp(6, 5, 3), forgetting=0.5).load_state_dict({"9": {}})


@every_loop
def test_a_copied_loop_goes_on_by_itself(kind: str) -> None:
    loop, twin = _pair(kind)
    batches = _batches()
    for batch in batches[:3]:
        loop.step(*batch)
        twin.step(*batch)
    other = copy.deepcopy(loop)
    assert not any(p is q for p, q in zip(loop.model.parameters(), other.model.parameters(), strict=True))
    before = copy.deepcopy(loop.state_dict())
    losses = [other.step(*batch) for batch in batches[3:]]
    assert equal(before, loop.state_dict())
    assert losses == [twin.step(*batch) for batch in batches[3:]]
    assert losses == [loop.step(*batch) for batch in batches[3:]]


@every_loop
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copied_model_is_a_model_like_any_other(kind: str, how: str) -> None:
    loop, twin = _pair(kind)
    batches = _batches()
    for run in (loop, twin):
        run.step(*batches[0])
    if how == "deepcopy":
        model = copy.deepcopy(loop.model)
    else:
        file = io.BytesIO()
        torch.save(loop.model, file)
        file.seek(0)
        model = torch.load(file, weights_only=False)
    x, y = batches[1]
    for run in (loop, twin):
        run.optimizer.zero_grad()
        CE(run.model(x), y).backward()
    for batch in batches[2:4]:  # its passes are nobody's
        CE(model(batch[0]), batch[1]).backward()
    for run in (loop, twin):
        run.update()
    assert equal(state(loop.model), state(twin.model))
    fresh = LOOPS[kind](model)
    reference = LOOPS[kind](mixed(dropout=0.0))
    reference.model.load_state_dict(model.state_dict())
    for batch in batches:
        assert fresh.step(*batch) == reference.step(*batch)


SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda step: 0.5**step),
    "one_cycle": lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.1, total_steps=8, cycle_momentum=False),
    "sequential": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, 1.0, 3), lr_scheduler.ExponentialLR(o, 0.7)], milestones=[3]
    ),
    "plateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0, factor=0.3),
}


def _advance(scheduler: Any) -> None:
    scheduler.step(1.0) if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau) else scheduler.step()


@pytest.mark.parametrize("name", list(SCHEDULERS))
def test_schedulers_reach_every_group(name: str) -> None:
    model = mixed(dropout=0.0)
    optimizer = LocoProp(model, lr=1e-3, local_optimizer=SGD, base=partial(SGD, lr=1e-3))
    plain = SGD(mlp(2, 2, 2).parameters(), lr=1e-3)
    schedulers = SCHEDULERS[name](optimizer), SCHEDULERS[name](plain)
    seen = []
    for x, y in _batches(6):
        seen.append(plain.param_groups[0]["lr"])
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([seen[-1]] * 4)
        CE(model(x), y).backward()
        optimizer.step()
        plain.step()
        for scheduler in schedulers:
            _advance(scheduler)
    assert len(set(seen)) > 2


def test_a_copied_loop_with_a_scheduler_goes_on() -> None:
    loop, twin = _pair("rmsprop")
    schedulers = [SCHEDULERS["lambda"](run.optimizer) for run in (loop, twin)]
    batches = _batches()
    for run, scheduler in zip((loop, twin), schedulers, strict=True):
        for batch in batches[:2]:
            run.step(*batch)
            scheduler.step()
    other, scheduler = copy.deepcopy((loop, schedulers[0]))
    before = state(loop.model)
    for batch in batches[2:]:
        assert other.step(*batch) == twin.step(*batch)
        scheduler.step()
        schedulers[1].step()
    assert equal(before, state(loop.model))
    assert other.optimizer.param_groups[0]["lr"] == twin.optimizer.param_groups[0]["lr"] == 1e-4 * 0.5**8
    assert loop.optimizer.param_groups[0]["lr"] == 1e-4 * 0.5**2


def test_a_learning_rate_of_one_group() -> None:
    model = mixed(dropout=0.0)
    optimizer = LocoProp(model, lr=1e-3, local_optimizer=SGD, base=partial(SGD, lr=1e-3))
    names = [group["name"] for group in optimizer.param_groups]
    assert names == ["0", "3", "6", "base"]
    for still in range(4):
        for index, group in enumerate(optimizer.param_groups):
            group["lr"] = 0.0 if index == still else 1e-3
        before = state(model)
        Loop(model, optimizer, None).step(*_batches()[0])
        moved = {n.split(".")[0] for n, p in model.named_parameters() if not torch.equal(before[n], p)}
        assert moved == {"0", "1", "3", "6"} - {"1" if still == 3 else names[still]}


class _Seen(SGD):
    """Notes the learning rate of each step."""

    rates: list[float]

    def __init__(self, params: Any, lr: float, fail: int = 99) -> None:
        super().__init__(params, lr=lr)
        self.rates, self.fail = [], fail

    def step(self, closure: Any = None) -> Any:
        if len(self.rates) == self.fail:
            raise RuntimeError("enough")
        self.rates.append(self.param_groups[0]["lr"])
        return super().step(closure)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("linear", [1.0, 0.8, 0.6, 0.4, 0.25]),
        ("constant", [1.0] * 5),
        (lambda step, steps: (step + 1) / steps, [0.2, 0.4, 0.6, 0.8, 1.0]),
    ],
)
def test_the_local_schedule_gives_the_rate_back(schedule: Any, expected: list[float]) -> None:
    model = mlp(6, 5, 3)
    optimizer = LocoProp(model, lr=0.01, local_optimizer=_Seen, local_schedule=schedule)
    Loop(model, optimizer, None).step(*_batches()[0])
    for own, group in zip(optimizer._locals, optimizer.param_groups, strict=True):
        assert isinstance(own, _Seen)
        assert own.rates == pytest.approx([0.01 * f for f in expected])
        assert group["lr"] == 0.01


def test_a_local_optimizer_that_fails_leaves_rate_and_gradients() -> None:
    model = mlp(6, 5, 3)
    optimizer = LocoProp(model, lr=0.01, local_optimizer=partial(_Seen, fail=2))
    CE(model(_batches()[0][0]), _batches()[0][1]).backward()
    gradients = [p.grad for p in model.parameters()]
    with pytest.raises(RuntimeError, match="enough"):
        optimizer.step()
    assert all(group["lr"] == 0.01 for group in optimizer.param_groups)
    assert all(p.grad is g for p, g in zip(model.parameters(), gradients, strict=True))


@pytest.mark.parametrize("loss", ["matching", "squared", "quadratic"])
def test_clipping_by_norm_scales_the_targets(loss: str) -> None:
    model = mlp(6, 8, 5, 3, activation="tanh").double()
    twin = copy.deepcopy(model)
    x, y = _batches(dtype=torch.float64)[0]
    settings: dict[str, Any] = {"lr": 0.01, "loss": loss, "local_optimizer": SGD}
    CE(model(x), y).backward()
    clipped = LocoProp(twin, target_lr=10.0, **settings)
    CE(twin(x), y).backward()
    coefficient = 0.1 / (float(nn.utils.clip_grad_norm_(twin.parameters(), 0.1)) + 1e-6)
    assert coefficient < 0.9
    clipped.step()
    model.zero_grad()
    scaled = LocoProp(model, target_lr=10.0 * coefficient, **settings)
    CE(model(x), y).backward()
    scaled.step()
    assert difference(model.parameters(), twin.parameters()) < 1e-13


def _accumulating(kind: str, model: nn.Module) -> Loop:
    if kind in LOCAL:
        return _loco(lr=1e-3, local_steps=4, local_optimizer=SGD, **LOCAL[kind])(model)
    return _affine(side=kind)(model)


@pytest.mark.parametrize("none", [True, False])
@pytest.mark.parametrize("kind", [*LOCAL, "smaller", "inputs", "samples"])
def test_two_halves_are_one_batch(kind: str, none: bool) -> None:
    start = nn.Sequential(nn.Conv2d(1, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(108, 5), nn.Tanh(), nn.Linear(5, 3))
    whole, halves = (_accumulating(kind, copy.deepcopy(start).double()) for _ in range(2))
    x, y = images(24, torch.float64)
    for rows in (slice(0, 12), slice(12, 24)):
        whole.optimizer.zero_grad(set_to_none=none)
        CE(whole.model(x[rows]), y[rows]).backward()
        whole.update()
        halves.optimizer.zero_grad(set_to_none=none)
        for x_half, y_half in zip(x[rows].split(6), y[rows].split(6), strict=True):
            (CE(halves.model(x_half), y_half) / 2).backward()
        halves.update()
    assert difference(whole.model.parameters(), start.double().parameters()) > 1e-3
    assert difference(whole.model.parameters(), halves.model.parameters()) < 1e-10


@pytest.mark.parametrize("kind", [*LOCAL, "smaller", "inputs", "samples"])
def test_two_backward_passes_through_one_graph_are_one_of_the_summed_loss(kind: str) -> None:
    model = mlp(6, 8, 3, activation="tanh").double()
    once, twice = (_accumulating(kind, copy.deepcopy(model)) for _ in range(2))
    x, y = _batches(dtype=torch.float64)[0]
    (2 * CE(once.model(x), y)).backward()
    loss = CE(twice.model(x), y)
    loss.backward(retain_graph=True)
    loss.backward()
    for run in (once, twice):
        run.update()
    assert difference(once.model.parameters(), twice.model.parameters()) < 1e-12


def test_a_closure_is_called_once() -> None:
    loop, twin = _pair("rmsprop")
    x, y = _batches()[0]
    called = []

    def closure() -> Tensor:
        called.append(torch.is_grad_enabled())
        loop.optimizer.zero_grad()
        loss = CE(loop.model(x), y)
        loss.backward()
        return loss

    for _ in range(2):
        loss: Any = loop.optimizer.step(closure)  # type: ignore[call-overload]
        assert float(loss.detach()) == twin.step(x, y)
    assert called == [True, True]
    assert equal(loop.state_dict(), twin.state_dict())


@pytest.mark.cuda
@pytest.mark.parametrize("kind", [*LOCAL, "smaller"])
def test_on_a_cuda_device(kind: str) -> None:
    model = convnet(norm=True)
    loops = [_accumulating(kind, copy.deepcopy(model).to(device)) for device in ("cpu", "cuda")]
    x, y = images(24)
    for _ in range(2):
        for loop, device in zip(loops, ("cpu", "cuda"), strict=True):
            loop.step(x.to(device), y.to(device))
    for p, q in zip(loops[0].model.parameters(), loops[1].model.parameters(), strict=True):
        torch.testing.assert_close(q.cpu(), p, rtol=1e-4, atol=1e-4)


def test_removed_hooks_leave_the_model_as_it_was() -> None:
    loop, _ = _pair("rmsprop")
    assert isinstance(loop.optimizer, LocoProp)
    projection = AffineProjection(loop.model)
    loop.step(*_batches()[0])
    loop.optimizer.remove_hooks()
    projection.remove_hooks()
    assert not any({**m._forward_hooks, **m._forward_pre_hooks} for m in loop.model.modules())
    CE(loop.model(_batches()[1][0]), _batches()[1][1]).backward()
    for used in (loop.optimizer, projection):
        with pytest.raises(
            UnsupportedModelError, match="'0' has a gradient, but none of its forward calls was captured"
        ):
            used.step()


def _rules(kind: str) -> tuple[Backprop, Backprop]:
    models = [mixed(dropout=0.0) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    loops = [LOOPS[kind](model) for model in models]
    first, second = (Backprop(run.model, CE, run.optimizer, preconditioner=run.projection) for run in loops)
    return first, second


@every_loop
def test_the_library_takes_the_same_steps(kind: str) -> None:
    rule, other = _rules(kind)
    batches = _batches()
    loop = LOOPS[kind](copy.deepcopy(rule.model))
    assert train(rule, batches[:3]) == [loop.step(*batch) for batch in batches[:3]]
    before = rule_state(rule)
    bad = batches[3][0].clone()
    bad[2, 1] = float("nan")
    with pytest.raises(NonFiniteError, match=r"^x is not finite"):
        rule.step(bad, batches[3][1])
    assert equal(before, rule_state(rule))
    other.model.load_state_dict(rule.model.state_dict())
    other.load_state_dict(copy.deepcopy(rule.state_dict()))
    assert train(rule, batches[4:]) == train(other, batches[4:]) == [loop.step(*batch) for batch in batches[4:]]


def test_a_refusal_by_the_optimizer_leaves_the_rule_as_it_was() -> None:
    model = mlp(6, 5, 3)
    rule = Backprop(model, CE, LocoProp(model))
    before = rule_state(rule)
    hooks = model[2]._forward_hooks.copy()
    model[2]._forward_hooks.clear()  # as if the layer had been called around
    with pytest.raises(UnsupportedModelError, match="'2' has a gradient, but none"):
        rule.step(*_batches()[0])
    assert equal(before, rule_state(rule))
    model[2]._forward_hooks.update(hooks)
    rule.step(*_batches()[0])


@pytest.mark.parametrize("name", ["locoprop-m", "locoprop-m-rows", "locoprop-s", "consequentialism"])
def test_digits_are_learnt_by_name(name: str) -> None:
    data = load("digits")
    model = build("mlp:100x2", data.x_train.shape[1:], len(data.classes))
    rule = rules.get(name).build(model, CE, rules.get(name).lr)
    history = fit(rule, data, epochs=5, batch_size=50, seed=0)
    assert history.evaluations[-1]["accuracy"] > 0.93
