"""Parts of a chain that update as soon as their deltas have come: equal to one process with the staleness that is stated."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable, Iterable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from cases import CE, Attention, Residual
from torch import Tensor, nn

from beyondprop import Codes, Credit, Credited, FeedbackAlignment
from beyondprop.credit import AsynchronousPipeline

RANKS = 3
EPOCHS = ((6, 6, 6, 6, 6, 3), (6, 9, 6), (6,))
"""Sizes of the batches between two drains: a short last one, a larger one, fewer than may be in flight."""
# fmt: off
NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (lambda: nn.Sequential(
        nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 5),
    ), (6,)),
    "conv": (lambda: nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 6, 3, bias=False), nn.BatchNorm2d(6),
        nn.ReLU(), nn.Conv2d(6, 6, 2), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(24, 5),
    ), (1, 12, 12)),
    # By autograd inside the stage, which saves weights and asks whether they were written.
    "blocks": (lambda: nn.Sequential(
        nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU(), Residual(8), nn.Unflatten(1, (1, 8)), Attention(8, fused=False),
        nn.Flatten(), nn.Linear(8, 5),
    ), (8,)),
}
# fmt: on
CREDITS: dict[str, Callable[[], Credit]] = {
    "line_search": lambda: Codes("line_search"),
    "fitted": lambda: Codes("fitted"),
    "cg": lambda: Codes("cg"),
    "fa": FeedbackAlignment,
}
OPTIMIZERS: dict[str, Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]] = {
    "momentum": partial(torch.optim.SGD, lr=0.03, momentum=0.9),
    "adam": partial(torch.optim.Adam, lr=3e-3),
}


class Case(NamedTuple):
    """One training: `cuts` are the first stages of all parts, and the number of stages."""

    net: str
    credit: str
    optimizer: str
    cuts: tuple[int, ...]
    in_flight: int | None
    frozen: tuple[int, ...] = ()


TWO, THREE = (0, 2, 4), (0, 1, 2, 4)
CASES = [
    *(Case(net, "line_search", "adam", TWO, s) for net in NETS for s in (1, 2)),
    *(Case(net, "fa", "momentum", TWO, 2) for net in NETS),
    Case("mlp", "fitted", "adam", TWO, 2),
    Case("blocks", "cg", "momentum", TWO, 2),
    *(Case("mlp", "line_search", "momentum", THREE, s) for s in (1, 2, 3, 7, None)),
    Case("conv", "line_search", "adam", THREE, None),
    Case("blocks", "fa", "adam", THREE, None),
    *(Case("mlp", "line_search", "adam", THREE, None, frozen) for frozen in ((0,), (1,), (2, 3), (0, 1))),
    Case("mlp", "line_search", "adam", (0, 4), None),
]


def _model(case: Case) -> Credited:
    torch.manual_seed(2)
    model = Credited(NETS[case.net][0]().double(), CREDITS[case.credit](), CE)
    for index in case.frozen:
        for p in model.chain[index].parameters:
            p.requires_grad_(False)
    return model


def _epochs(net: str) -> list[list[tuple[Tensor, Tensor]]]:
    torch.manual_seed(3)
    shape = NETS[net][1]
    return [[(torch.randn(n, *shape, dtype=torch.float64), torch.arange(n) % 5) for n in sizes] for sizes in EPOCHS]


def _optimizer(case: Case, part: nn.Module) -> torch.optim.Optimizer | None:
    trained = [p for p in part.parameters() if p.requires_grad]
    return OPTIMIZERS[case.optimizer](trained) if trained else None


def _weights(part: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in part.parameters()]


@torch.no_grad()
def _put(part: nn.Module, weights: list[Tensor]) -> None:
    for p, value in zip(part.parameters(), weights, strict=True):
        p.copy_(value)


def _in_one_process(case: Case, in_flight: int) -> dict[str, Tensor]:
    """Train with gradients at weights as old as the law says: each part's past is kept, and nothing else."""
    model, ranks = _model(case), len(case.cuts) - 1
    parts = [model.part(first, end) for first, end in pairwise(case.cuts)]
    optimizers = [_optimizer(case, part) for part in parts]
    past = [[_weights(part)] for part in parts]  # after 0, 1, ... updates
    for batches in _epochs(case.net):
        drained = len(past[0]) - 1
        for t, (x, y) in enumerate(batches):
            for r, part in enumerate(parts):
                _put(part, past[r][drained + max(0, t - min(in_flight, ranks - r) + 1)])
            model.zero_grad()
            CE(model(x), y).backward()
            for part, optimizer, own in zip(parts, optimizers, past, strict=True):
                _put(part, own[-1])
                if optimizer is not None:
                    optimizer.step()
                own.append(_weights(part))
    return dict(model.model.state_dict())


def _loop(case: Case) -> dict[str, Tensor]:
    """Train by the plain loop."""
    model = _model(case)
    optimizer = OPTIMIZERS[case.optimizer](p for p in model.parameters() if p.requires_grad)
    for x, y in (batch for batches in _epochs(case.net) for batch in batches):
        optimizer.zero_grad()
        CE(model(x), y).backward()
        optimizer.step()
    return dict(model.model.state_dict())


def _pipeline(case: Case, rank: int, group: Any, model: Credited) -> AsynchronousPipeline:
    part = model.part(*case.cuts[rank : rank + 2])
    return AsynchronousPipeline(part, _optimizer(case, part), in_flight=case.in_flight, group=group)


def _on_ranks(case: Case, rank: int, group: Any) -> dict[str, Any]:
    """Train one rank's part, and return what `share` makes of the whole model."""
    model = _model(case)
    pipeline = _pipeline(case, rank, group, model)
    losses = []
    for batches in _epochs(case.net):
        for x, y in batches:
            losses.append(pipeline.step(x if rank == 0 else None, y if rank == len(case.cuts) - 2 else None))
        pipeline.drain()
    pipeline.share()
    return {"state": dict(model.model.state_dict()), "losses": losses, "in flight": pipeline.in_flight}


def _resumed(rank: int, group: Any) -> dict[str, Tensor]:
    """Train as `_on_ranks`, each epoch by fresh objects that know only the last one's checkpoint."""
    case = CASES[1]
    state: Any = None
    found: dict[str, Tensor] = {}
    for batches in _epochs(case.net):
        model = _model(case)
        pipeline = _pipeline(case, rank, group, model)
        assert pipeline.optimizer is not None
        if state is not None:
            pipeline.part.load_state_dict(state[0])
            pipeline.optimizer.load_state_dict(state[1])
        for x, y in batches:
            pipeline.step(x, y)
        pipeline.drain()
        state = pipeline.part.state_dict(), pipeline.optimizer.state_dict()
        pipeline.share()
        found = dict(model.model.state_dict())
    return found


def _written_between(rank: int, group: Any) -> list[list[Tensor | None]]:
    """Return a rank's gradients without and with weights that are written while batches are in flight."""
    case = Case("blocks", "line_search", "momentum", TWO, 2)
    found = []
    for writes in (False, True):
        pipeline = _pipeline(case, rank, group, _model(case))
        (x, y), *_ = _epochs(case.net)[0]
        pipeline.step(x, y)
        if writes and rank == 0:
            with torch.no_grad():
                for p in pipeline.part.parameters():
                    p.zero_()
                    p.data.add_(1.0)
        pipeline.drain()
        found.append([p.grad for p in pipeline.part.parameters()])
    return found


def _penalty(rank: int, group: Any) -> str:
    """Return what autograd says to a graph that was made before an update, and goes back after it."""
    case = Case("mlp", "line_search", "momentum", TWO, 2)
    pipeline = _pipeline(case, rank, group, _model(case))
    (x, y), *_ = _epochs(case.net)[0]
    penalty = torch.zeros(())
    for _ in range(3):
        penalty = next(pipeline.part.parameters()).square().sum()
        pipeline.step(x, y)
    said = ""
    try:
        penalty.backward()
    except RuntimeError as error:
        said = str(error)
    pipeline.drain()
    return said


def _under_autocast(rank: int, group: Any) -> list[dict[str, Tensor]]:
    """Train in one context of autocast, with and without its cache of casts."""
    case = Case("mlp", "line_search", "momentum", TWO, 2)
    found = []
    for is_cached in (True, False):
        model = _model(case)
        model.float()
        pipeline = _pipeline(case, rank, group, model)
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=is_cached):
            for x, y in _epochs(case.net)[0]:
                pipeline.step(x.float(), y)
            pipeline.drain()
        found.append({name: value.clone() for name, value in pipeline.part.state_dict().items()})
    return found


def _rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=RANKS)
    groups: list[Any] = [None, dist.new_group([0]), dist.new_group([0, 1]), None]
    found: dict[Any, Any] = {}
    for number, case in enumerate(CASES):
        if rank < len(case.cuts) - 1:
            found[number] = _on_ranks(case, rank, groups[len(case.cuts) - 1])
    if rank < 2:
        found["resumed"] = _resumed(rank, groups[2])
        found["written"] = _written_between(rank, groups[2])
        found["penalty"] = _penalty(rank, groups[2])
        found["autocast"] = _under_autocast(rank, groups[2])
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()
    os._exit(0)  # threads of gloo that torch leaves behind may abort an interpreter that ends


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(_rank, args=(str(folder),), nprocs=RANKS)  # pyright: ignore[reportPrivateImportUsage]
    return [torch.load(folder / f"{rank}.pt") for rank in range(RANKS)]


def _apart(first: dict[str, Tensor], second: dict[str, Tensor]) -> float:
    assert first.keys() == second.keys()
    return max(float((first[name] - second[name]).abs().max()) for name in first)


@pytest.mark.parametrize("number", range(len(CASES)), ids=lambda n: "-".join(map(str, CASES[n])))
def test_ranks_equal_one_process_with_their_staleness(ranks: list[dict[Any, Any]], number: int) -> None:
    case = CASES[number]
    size = len(case.cuts) - 1
    in_flight = size if case.in_flight is None else case.in_flight
    expected = _in_one_process(case, in_flight)
    for rank in range(size):
        found = ranks[rank][number]
        assert _apart(found["state"], expected) <= 1e-12
        assert found["in flight"] == min(in_flight, size - rank)
        assert [loss is None for loss in found["losses"]] == [rank < size - 1] * sum(map(len, EPOCHS))
    if in_flight == 1:
        assert _apart(expected, _loop(case)) <= 1e-12
    elif size > 1 and not case.frozen:
        # What was compared is no comparison of equals: one update less or more is seen.
        assert _apart(expected, _in_one_process(case, 1)) > 1e-6
        assert size == 2 or _apart(expected, _in_one_process(case, 2)) > 1e-6 or in_flight == 2


def test_a_drained_checkpoint_goes_on_as_if_nothing_had_been(ranks: list[dict[Any, Any]]) -> None:
    for found in ranks[:2]:
        assert _apart(found["resumed"], found[1]["state"]) == 0


def test_what_is_written_between_steps_does_not_reach_batches_in_flight(ranks: list[dict[Any, Any]]) -> None:
    without, written = ranks[0]["written"]
    assert all(map(torch.equal, without, written))


def test_autograd_still_sees_what_is_written(ranks: list[dict[Any, Any]]) -> None:
    for found in ranks[:2]:
        assert "modified by an inplace operation" in found["penalty"]


def test_casts_of_autocast_are_of_the_right_weights(ranks: list[dict[Any, Any]]) -> None:
    for found in ranks[:2]:
        assert _apart(*found["autocast"]) == 0


def test_the_pages_example_as_torchrun_starts_it(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "credited.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"^```python\n(# train\.py.*?)^```$", page, re.MULTILINE | re.DOTALL)
    (tmp_path / "train.py").write_text(code, encoding="utf-8")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    shared = {
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    started = [
        subprocess.Popen(
            [sys.executable, "train.py"], cwd=tmp_path, env=os.environ | shared | {"RANK": str(rank)}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for rank in range(2)
    ]  # fmt: skip
    (first, errors), (second, more) = (process.communicate(timeout=120) for process in started)
    # Not by the exit code: see `_rank`.
    assert "Traceback" not in errors + more
    (found,) = re.findall(r"^test accuracy (\d\.\d+)$", first, re.MULTILINE)
    assert float(found) > 0.9
    assert not second
