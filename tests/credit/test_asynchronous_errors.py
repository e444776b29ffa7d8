"""Pipelines that cannot be, and pipelines that end in an error: named on all ranks."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from cases import CE
from torch import nn

from beyondprop import Credited
from beyondprop.credit import AsynchronousPipeline

RANKS = 3
CUTS = (0, 1, 2, 4)


def _model() -> Credited:
    torch.manual_seed(2)
    layers = (nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 5))
    return Credited(nn.Sequential(*layers).double(), "am", CE)


REFUSED: dict[str, tuple[Callable[[Credited, nn.Module, int], Any], str]] = {
    "part": (lambda model, part, rank: AsynchronousPipeline(nn.Linear(2, 2), None), "part must be one of Credited.part"),
    "optimizer": (
        lambda model, part, rank: AsynchronousPipeline(part, torch.optim.SGD(model.parameters(), lr=0.1)),
        r"optimizer has '\d.(weight|bias)', which is not of the part",
    ),
    "left out": (
        lambda model, part, rank: AsynchronousPipeline(part, torch.optim.SGD([*part.parameters()][:1], lr=0.1)),
        r"optimizer has not '\d.(weight|bias)' of the part",
    ),
    "no optimizer": (lambda model, part, rank: AsynchronousPipeline(part, None), "optimizer has not"),
    "in_flight": (lambda model, part, rank: _made(part, in_flight=0), "in_flight must be an integer >= 1, got 0"),
    "depths": (lambda model, part, rank: _made(part, in_flight=1 + rank), "in_flight must be the same on all ranks, got 1, 2"),
    "ranks": (
        lambda model, part, rank: _made(model.part(*(0, 2, 4)[min(rank, 1) :][:2])),
        "one chain of 4 stages, one part a rank, from the first to the last; the 3 ranks have 0 to 2, 2 to 4, 2 to 4",
    ),
    "loss": (
        lambda model, part, rank: _made(Credited(nn.Sequential(*model.model.children()), "fa").part(*CUTS[rank : rank + 2])),
        "last rank needs loss=",
    ),
    "backend": (lambda model, part, rank: _without_cpu(part), "backend is 'gloo', which CPUs cannot use"),
    "one rank": (lambda model, part, rank: _made(part, in_flight="2" if rank == 1 else 2), "in_flight must be an integer >= 1"),
}  # fmt: skip
BROKEN: dict[str, tuple[Callable[[AsynchronousPipeline, int], Any], Sequence[str]]] = {
    "target": (
        lambda pipeline, rank: _steps(pipeline, 6, bad=2 if rank == 2 else None),
        ["Rank 2 failed in batch 2", "Rank 2 failed in batch 2", "y of shape (3, 2)"],
    ),
    "input": (
        lambda pipeline, rank: _steps(pipeline, 4, bad=3 if rank == 0 else None),
        ["The first rank needs x", "Rank 0 failed in batch 3", "Rank 0 failed in batch 3"],
    ),
    "interrupt": (
        lambda pipeline, rank: _steps(pipeline, 4, interrupt=rank == 1),
        ["Rank 1 failed in batch 2", "KeyboardInterrupt", "Rank 1 failed in batch 2"],
    ),
    "too many": (
        lambda pipeline, rank: (_steps(pipeline, 4 + (rank == 2)), pipeline.drain()),
        [
            "Rank 2 failed in batch 4",
            "Rank 2 failed in batch 4",
            "Rank 2 makes a step after 4 batches, while rank 1 drains",
        ],
    ),
    "too few": (
        lambda pipeline, rank: (_steps(pipeline, 4 - (rank == 2)), pipeline.drain()),
        [
            "Rank 2 failed in batch 3",
            "Rank 2 failed in batch 3",
            "Rank 2 drains after 3 batches, while rank 1 has sent another",
        ],
    ),
    "thawed": (
        lambda pipeline, rank: _steps(pipeline, 4) if rank else _thawed(pipeline),
        ["A parameter of this part was thawed", "Rank 0 failed in batch 0", "Rank 0 failed in batch 0"],
    ),
    "no_grad": (
        lambda pipeline, rank: torch.set_grad_enabled(rank > 0)(_steps)(pipeline, 4),
        ["outside torch.no_grad", "Rank 0 failed in batch 0", "Rank 0 failed in batch 0"],
    ),
}


def _made(part: nn.Module, **options: Any) -> AsynchronousPipeline:
    return AsynchronousPipeline(part, torch.optim.SGD(part.parameters(), lr=0.1), **options)


def _without_cpu(part: nn.Module) -> None:
    with mock.patch.object(dist, "get_backend_config", return_value="cuda:nccl"):
        _made(part)


def _thawed(pipeline: AsynchronousPipeline) -> None:
    pipeline.optimizer = None  # as of a part that was frozen when the pipeline was built
    _steps(pipeline, 1)


def _steps(pipeline: AsynchronousPipeline, count: int, bad: int | None = None, interrupt: bool = False) -> None:
    if interrupt:

        def stop(*_: Any) -> None:
            if pipeline.batches == 2:
                raise KeyboardInterrupt

        pipeline.part.register_forward_pre_hook(stop)
    for index in range(count):
        (x, y) = (None, torch.zeros(3, 2)) if index == bad else (torch.ones(6, 6).double(), torch.arange(6) % 5)
        pipeline.step(x, y)


def _message(act: Callable[[], Any]) -> str:
    try:
        act()
    except BaseException as error:
        return "\n".join([type(error).__name__, str(error), *getattr(error, "__notes__", [])])
    return "nothing was raised"


def _rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=RANKS)
    found: dict[str, Any] = {}
    for name, (act, _) in REFUSED.items():
        model = _model()
        found[name] = _message(partial(act, model, model.part(*CUTS[rank : rank + 2]), rank))
    for name, (act, _) in BROKEN.items():
        pipeline = _made(_model().part(*CUTS[rank : rank + 2]))
        found[name] = _message(partial(act, pipeline, rank)), _message(pipeline.drain)
    pipeline = _made(_model().part(*CUTS[rank : rank + 2]))
    pipeline.step(torch.ones(2, 6).double(), torch.ones(2).long())
    found["share"] = _message(pipeline.share)
    pipeline.drain()
    if rank < 2:
        found["gone"] = _message(partial(_steps, pipeline, 4))
    torch.save(found, f"{folder}/{rank}.pt")
    os._exit(0)  # the last rank goes while the others wait for it


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(_rank, args=(str(folder),), nprocs=RANKS)  # pyright: ignore[reportPrivateImportUsage]
    return [torch.load(folder / f"{rank}.pt") for rank in range(RANKS)]


@pytest.mark.parametrize("name", REFUSED)
def test_refused_on_all_ranks(ranks: list[dict[str, Any]], name: str) -> None:
    for found in ranks:
        assert re.search(REFUSED[name][1], found[name]), found[name]


@pytest.mark.parametrize("name", BROKEN)
def test_an_error_on_one_rank_is_named_on_all(ranks: list[dict[str, Any]], name: str) -> None:
    for rank, (found, message) in enumerate(zip(ranks, BROKEN[name][1], strict=True)):
        first, later = found[name]
        assert message in first
        assert f"Rank {rank} of 3, batch " in first
        assert "This pipeline cannot go on, as rank " in later


def test_a_rank_that_goes_is_named(ranks: list[dict[str, Any]]) -> None:
    assert "Rank 1 failed in batch" in ranks[0]["gone"]
    assert "Rank 2 has gone" in ranks[1]["gone"]
    assert all("Batches are in flight: call drain()" in found["share"] for found in ranks)


def test_without_a_process_group() -> None:
    part = _model().part(0, 4)
    with pytest.raises(RuntimeError, match=r"There is no process group: call torch.distributed.init_process_group"):
        AsynchronousPipeline(part, torch.optim.SGD(part.parameters(), lr=0.1))
