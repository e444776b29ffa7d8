"""LocoProp and AffineProjection under DistributedDataParallel, torch.compile, autocast and GradScaler."""

from __future__ import annotations

import copy
import datetime
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from cases import Branch, Functional, blobs, convnet, difference, equal, images, mixed, mlp, relative, state
from torch import Tensor, nn
from torch._C._dynamo.eval_frame import get_eval_frame_callback
from torch.multiprocessing import get_context
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD

from beyondprop import AffineProjection, LocoProp, UnsupportedModelError
from beyondprop.optim._capture import Capture

CE = nn.CrossEntropyLoss()
LOCAL: dict[str, dict[str, Any]] = {
    "matching": {"gram": True},
    "gram": {"loss": "squared", "gram": True},
    "direct": {"loss": "squared", "gram": False},
    "quadratic": {"loss": "quadratic", "gram": False},
}


def _loco(model: nn.Module, lr: float = 1e-3, **settings: Any) -> Callable[[], None]:
    optimizer = LocoProp(model, lr=lr, local_optimizer=SGD, **settings)

    def update() -> None:
        optimizer.step()
        optimizer.zero_grad()

    return update


def _affine(model: nn.Module, **settings: Any) -> Callable[[], None]:
    optimizer, projection = SGD(model.parameters(), lr=0.05, momentum=0.9), AffineProjection(model, **settings)

    def update() -> None:
        projection.step()
        optimizer.step()
        optimizer.zero_grad()

    return update


def _update(kind: str, model: nn.Module) -> Callable[[], None]:
    if kind == "affine":
        return _affine(model, side="inputs")
    if kind == "named":  # a rank sees only its own way
        return _loco(model, transfer={"inner": "tanh", "left": "softmax", "right": "softmax"})
    return _affine(model, forgetting=0.5, refresh=2) if kind == "memory" else _loco(model, **LOCAL[kind])


RANKS = 2
# How the 24 samples of a step fall to them.
SPLITS = {"even": 12, "uneven": 17, "one_sample": 23}
CASES = [(kind, split) for kind in (*LOCAL, "affine", "memory") for split in SPLITS]


class Shared(nn.Module):
    """A strided convolution, linear layers one of which is called twice and two of which share a weight, and a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 3, stride=2)
        self.middle = nn.Linear(18, 18)
        self.down = nn.Linear(18, 4)
        self.norm = nn.LayerNorm(4)
        self.across = nn.Linear(4, 4)
        self.again = nn.Linear(4, 4)
        self.again.weight, self.again.bias = self.across.weight, self.across.bias
        self.out = nn.Linear(4, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.conv(x)).flatten(1)
        h = torch.tanh(self.middle(torch.tanh(self.middle(h))))
        h = self.norm(self.down(h))
        return self.out(self.again(torch.tanh(self.across(h)) + h))


def _model() -> nn.Module:
    torch.manual_seed(1)
    return Shared().double()


def _batches() -> list[tuple[Tensor, Tensor]]:
    x, y = images(72, torch.float64)
    return list(zip(x.split(24), y.split(24), strict=True))


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.out = nn.Embedding(5, 4), nn.Linear(4, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.out(torch.tanh(self.table(tokens).mean(1)))


# One step each: how the update is built, of which model.
SINGLE: dict[str, tuple[str, Callable[[], nn.Module]]] = {
    "words gram": ("gram", Words),
    "words direct": ("direct", Words),
    "words affine": ("affine", Words),
    "branches matching": ("named", Branch),
    "branches gram": ("gram", Branch),
    "branches direct": ("direct", Branch),
    "branches affine": ("affine", Branch),
    "compiled direct": ("direct", partial(mlp, 6, 8, 3, activation="tanh")),
    "compiled affine": ("affine", partial(mlp, 6, 8, 3, activation="tanh")),
}


def _single(case: str) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    torch.manual_seed(2)
    x, y = blobs(24, dtype=torch.float64)
    model = SINGLE[case][1]().double()
    return model, (torch.arange(72).view(24, 3) % 7 % 5 if isinstance(model, Words) else x, y)


def _rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", f"file://{folder}/meet", datetime.timedelta(seconds=90), rank=rank, world_size=RANKS
    )
    try:
        torch.save(_results(rank), f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


def _results(rank: int) -> dict[tuple[str, str], Any]:
    results = {}
    for kind, split in CASES:
        model = _model()
        wrapped = DistributedDataParallel(model)
        update = _update(kind, wrapped)
        for x, y in _batches():
            own = slice(0, SPLITS[split]) if rank == 0 else slice(SPLITS[split], 24)
            CE(wrapped(x[own]), y[own]).backward()
            update()
        results[kind, split] = state(model)
    model = _model()
    wrapped = DistributedDataParallel(model)
    update = _update("matching", wrapped)
    for x, y in _batches():
        (x, *more), (y, *others) = x.split(6)[2 * rank :], y.split(6)[2 * rank :]
        with wrapped.no_sync():
            (CE(wrapped(x), y) / 2).backward()
        (CE(wrapped(more[0]), others[0]) / 2).backward()
        update()
    results["accumulated", "even"] = state(model)
    for case, (kind, _) in SINGLE.items():
        model, (x, y) = _single(case)
        if isinstance(model, Branch):
            model.way = ("left", "right")[rank]
        run: Any = DistributedDataParallel(model, find_unused_parameters=isinstance(model, Branch))
        if case.startswith("compiled"):
            run = torch.compile(run, backend="eager")
        update = _update(kind, run)
        CE(run(x[12 * rank :][:12]), y[12 * rank :][:12]).backward()
        update()
        results[case, "single"] = state(model)
    results["refusal", ""] = _refusal(DistributedDataParallel(mlp(6, 5, 3)), rank)
    torch.manual_seed(3)
    model = DistributedDataParallel(mlp(6, 5, 3).double())
    results["doubt", ""] = _doubt(model, rank, None)
    results["samples", ""] = _doubt(model, rank, 6 - 2 * rank)
    return results


def _doubt(model: nn.Module, rank: int, samples: float | None) -> Any:
    """A loss over some of the rows on one rank: refused on all, or trained with the samples that each gives."""
    projection = AffineProjection(model, side="inputs")
    x, y = blobs(6, dtype=torch.float64)
    own = slice(0, 6 - 2 * rank)
    model.zero_grad()
    CE(model(x)[own], y[own]).backward()
    before = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    try:
        projection.step(samples)
    except UnsupportedModelError as error:
        same = all(
            torch.equal(p.grad, g) for p, g in zip(model.parameters(), before, strict=True) if p.grad is not None
        )
        return "loss averages over 4" in str(error), "on another rank" in str(error), same
    return {str(index): p.grad for index, p in enumerate(model.parameters())}


def _refusal(model: nn.Module, rank: int) -> Any:
    """A NaN on one rank is every rank's."""
    optimizer = LocoProp(model)
    before = state(model)
    x, y = blobs(6)
    if rank == 1:
        x[2, 3] = float("nan")
    CE(model(x), y).backward()
    try:
        optimizer.step()
    except RuntimeError as error:
        return type(error).__name__, equal(before, state(model))
    return "none", False


# torch's compiler says what it leaves out of its graphs.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
def test_two_ranks_are_one_process(tmp_path: Path) -> None:
    if not (dist.is_available() and dist.is_gloo_available()):
        pytest.skip("this torch has no gloo backend")
    # The first rank is this process, so that the second is the only one that has to start.
    other = get_context("spawn").Process(target=_rank, args=(1, str(tmp_path)), daemon=True)
    other.start()
    try:
        torch.compiler.reset()
        _rank(0, str(tmp_path))
        other.join(60)
        assert other.exitcode == 0
    finally:
        other.kill()
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(RANKS)]
    assert [rank.pop(("doubt", "")) for rank in ranks] == [(False, True, True), (True, False, True)]
    # Replicas stay the same to the last bit.
    assert [case for case, weights in ranks[0].items() if not equal(weights, ranks[1][case])] == []
    assert ranks[0].pop(("refusal", "")) == ("NonFiniteError", True)
    torch.manual_seed(3)
    model, (x, y) = mlp(6, 5, 3).double(), blobs(6, dtype=torch.float64)
    projection = AffineProjection(model, side="inputs")
    for own in (slice(0, 6), slice(0, 4)):
        (CE(model(x)[own], y[own]) / 2).backward()
    projection.step(10)
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    assert difference(grads, ranks[0].pop(("samples", "")).values()) < 1e-12
    accumulated = ranks[0].pop(("accumulated", "even")).values()
    assert difference(accumulated, ranks[0]["matching", "even"].values()) < 1e-11
    for case, (kind, _) in SINGLE.items():
        weights = ranks[0].pop((case, "single"))
        model, (x, y) = _single(case)
        start = state(model)
        update = _update(kind, model)
        for way, own in (("left", slice(0, 12)), ("right", slice(12, 24))):
            if isinstance(model, Branch):
                model.way = way
            (CE(model(x[own]), y[own]) / 2).backward()
        update()
        assert difference(state(model).values(), start.values()) > 1e-4, case
        assert difference(state(model).values(), weights.values()) < 1e-11, case
    assert list(ranks[0]) == CASES
    for (kind, split), weights in ranks[0].items():
        model = _model()
        start = state(model)
        update = _update(kind, model)
        for x, y in _batches():
            # DistributedDataParallel averages over ranks, however many samples each has.
            parts = [slice(0, 24)] if split == "even" else [slice(0, SPLITS[split]), slice(SPLITS[split], 24)]
            for own in parts:
                (CE(model(x[own]), y[own]) / len(parts)).backward()
            update()
        assert difference(state(model).values(), start.values()) > 1e-3
        assert difference(state(model).values(), weights.values()) < 1e-11, (kind, split)


COMPILED = [
    ("modules", "eager", "before"),
    ("modules", "eager", "after"),
    ("modules", "eager", "in_place"),
    ("modules", "aot_eager", "after"),
    ("functional", "eager", "after"),
]


# torch's compiler looks at tensors between two pieces of a graph, and warns itself of it.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
@pytest.mark.parametrize(("net", "backend", "order"), COMPILED)
def test_a_compiled_model_takes_the_same_steps(net: str, backend: str, order: str) -> None:
    torch.compiler.reset()
    model = (mlp(6, 8, 3, activation="tanh") if net == "modules" else Functional()).double()
    twin: Any = copy.deepcopy(model)
    x, y = blobs(12, dtype=torch.float64)
    if order == "before":
        optimizer = LocoProp(twin, lr=1e-3)
        twin = torch.compile(twin, backend=backend)
    elif order == "after":
        twin = torch.compile(twin, backend=backend)
        optimizer = LocoProp(twin, lr=1e-3)
    else:
        twin.compile(backend=backend)
        optimizer = LocoProp(twin, lr=1e-3)
    reference = LocoProp(model, lr=1e-3)
    for _ in range(3):
        for run, own in ((twin, optimizer), (model, reference)):
            own.zero_grad()
            CE(run(x), y).backward()
            own.step()
    assert optimizer.transfers == reference.transfers
    assert list(optimizer.transfers.values()) == ["tanh", "softmax"]
    assert difference(model.parameters(), twin.parameters()) < 1e-12


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
def test_the_compiler_does_not_look_inside_hooks(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.compiler.reset()
    record, compilers = Capture.record, []

    def watched(*arguments: Any) -> Any:
        compilers.append(get_eval_frame_callback())
        return record(*arguments)

    monkeypatch.setattr(Capture, "record", watched)
    model = mlp(6, 8, 3)
    optimizer = LocoProp(model)
    run = torch.compile(model, backend="eager")
    x, y = blobs(12)
    for _ in range(2):
        CE(run(x), y).backward()
        optimizer.step()
    assert compilers == [None] * 4  # two layers, two passes


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
@pytest.mark.parametrize("kind", ["matching", "affine"])
def test_a_model_that_was_compiled_before_the_hooks_is_refused(kind: str) -> None:
    torch.compiler.reset()
    model = mlp(6, 8, 3, activation="tanh")
    compiled: Any = torch.compile(model, backend="eager")
    x, y = blobs(12)
    CE(compiled(x), y).backward()
    update = _update(kind, compiled)
    CE(compiled(x), y).backward()
    before = state(model)
    with pytest.raises(UnsupportedModelError, match="or the model was compiled before the hooks were there"):
        update()
    assert equal(before, state(model))


@pytest.mark.parametrize("kind", list(LOCAL))
def test_a_scaled_loss_gives_the_same_step(kind: str) -> None:
    plain, scaled = mixed(dropout=0.0), mixed(dropout=0.0)
    scaled.load_state_dict(plain.state_dict())
    optimizers = [LocoProp(m, lr=1e-3, local_optimizer=SGD, **LOCAL[kind]) for m in (plain, scaled)]
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    x, y = blobs(12)
    for _ in range(3):
        CE(plain(x), y).backward()
        optimizers[0].step()
        scaler.scale(CE(scaled(x), y)).backward()
        scaler.step(optimizers[1])
        scaler.update()
        for optimizer in optimizers:
            optimizer.zero_grad()
    assert equal(state(plain), state(scaled))  # powers of two scale without rounding


@pytest.mark.parametrize("unscale", [True, False])
def test_a_scaled_loss_gives_the_same_projection(unscale: bool) -> None:
    plain, scaled = mixed(dropout=0.0), mixed(dropout=0.0)
    scaled.load_state_dict(plain.state_dict())
    update = _affine(plain)
    optimizer, projection = SGD(scaled.parameters(), lr=0.05, momentum=0.9), AffineProjection(scaled)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    x, y = blobs(12)
    for _ in range(3):
        CE(plain(x), y).backward()
        update()
        optimizer.zero_grad()
        scaler.scale(CE(scaled(x), y)).backward()
        if unscale:
            scaler.unscale_(optimizer)
        projection.step()
        scaler.step(optimizer)
        scaler.update()
    for p, q in zip(plain.parameters(), scaled.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("clear", ["optimizer", "model"])
def test_a_step_that_the_scaler_skips_leaves_nothing(clear: str) -> None:
    plain = mixed(dropout=0.0).eval()  # running statistics would take every batch
    scaled = copy.deepcopy(plain)
    optimizers = [LocoProp(m, lr=1e-4) for m in (plain, scaled)]
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    xs, ys = blobs(48)
    for number, (x, y) in enumerate(zip(xs.split(12), ys.split(12), strict=True)):
        loss = scaler.scale(CE(scaled(x), y))
        (loss * float("inf") if number == 1 else loss).backward()
        before = copy.deepcopy((state(scaled), optimizers[1].state_dict()))
        scaler.step(optimizers[1])
        scaler.update()
        assert equal(before, (state(scaled), optimizers[1].state_dict())) == (number == 1)
        (optimizers[1] if clear == "optimizer" else scaled).zero_grad()
        if number != 1:
            CE(plain(x), y).backward()
            optimizers[0].step()
            optimizers[0].zero_grad()
    assert equal(state(plain), state(scaled))


@pytest.mark.parametrize("kind", list(LOCAL))
def test_corrections_under_autocast_are_those_of_whole_precision(kind: str) -> None:
    """What two steps do beyond twice one step is the correction: small, and lost if outputs were kept in half precision."""
    start = mlp(6, 32, 32, 3, activation="tanh")
    x, y = blobs(48)
    corrections = []
    for half in (True, False):
        moved = []
        for steps in (1, 2):
            model = copy.deepcopy(start)
            settings: dict[str, Any] = {"local_steps": steps, "local_schedule": "constant", **LOCAL[kind]}
            update = _loco(model, 2e-4, **settings)
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                loss = CE(model(x), y)
            loss.backward()
            update()
            assert all(p.dtype is torch.float32 for p in model.parameters())
            pairs = zip(model.parameters(), start.parameters(), strict=True)
            moved.append([p.detach().double() - q.detach() for p, q in pairs])
        corrections.append([two - 2 * one for one, two in zip(*moved, strict=True)])
    for ours, theirs in zip(*corrections, strict=True):
        assert relative(ours, theirs) < 0.2


def test_training_under_autocast_with_a_scaler() -> None:
    model = convnet(norm=True)
    optimizer = LocoProp(model, lr=1e-4)
    scaler = torch.amp.GradScaler("cpu")
    x, y = images(48)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = CE(model(x), y)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        scaler.step(optimizer)
        scaler.update()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.3 * losses[0]
