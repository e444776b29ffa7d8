"""Credit behind a backward pass in two processes: data parallel and cut over ranks, equal to one process."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from cases import CE
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe
from torch.nn.parallel import DistributedDataParallel

from beyondprop import (
    AffineProjection,
    Codes,
    Credit,
    Credited,
    DifferenceTargetPropagation,
    DirectFeedbackAlignment,
    FeedbackAlignment,
    LocoProp,
    RelativeDamping,
    UnsupportedModelError,
)

CREDITS: dict[str, Callable[[], Credit]] = {
    "line_search": Codes,
    "unnormalized": lambda: Codes(normalize=False),
    "relative": lambda: Codes(damping=RelativeDamping(2.0)),
    "fitted": lambda: Codes("fitted"),
    "cg": lambda: Codes("cg"),
    "exact": lambda: Codes("exact"),
    "sparse": lambda: Codes(l1=1e-3),
    "fa": FeedbackAlignment,
    "dfa": DirectFeedbackAlignment,
    "dtp": lambda: DifferenceTargetPropagation(noise=0.0),
}
# The first step of a schedule makes a pass of its own to learn shapes, which a solver with a memory of passes would count.
CUT = [name for name in CREDITS if name not in ("dfa", "dtp", "sparse", "fitted")]
SCHEDULES: dict[str, Any] = {"gpipe": ScheduleGPipe, "1f1b": Schedule1F1B}
STEPS = 4


def _model(seed: int = 2) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 5)
    ).double()  # fmt: skip


def _batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(24, 6, generator=generator, dtype=torch.float64), torch.arange(24) % 5


def _vector(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def _trained(credit: str, rows: slice, wrap: bool, seed: int = 2) -> Tensor:
    model, (x, y) = Credited(_model(seed), CREDITS[credit](), CE), _batch()
    called = DistributedDataParallel(model) if wrap else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(STEPS):
        optimizer.zero_grad()
        CE(called(x[rows]), y[rows]).backward()
        optimizer.step()
    assert not set(copy.deepcopy(model).parameters()) & set(model.parameters())
    return _vector(model)


def _data_parallel(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    # The wrapper gives all ranks the weights of the first; what a credit draws must not depend on their own before.
    found = {name: _trained(name, slice(rank, None, 2), wrap=True, seed=2 + rank) for name in CREDITS}
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_data_parallel_equals_one_process_on_the_joint_batch(tmp_path: Path) -> None:
    mp.spawn(_data_parallel, args=(str(tmp_path),), nprocs=2)  # pyright: ignore[reportPrivateImportUsage]
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    for name in CREDITS:
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], _trained(name, slice(None), wrap=False), rtol=0, atol=1e-12, msg=name)


def _in_parts(credit: str, pieces: int) -> Tensor:
    """Train in one process, the batch in pieces whose gradients are accumulated."""
    model, (x, y) = Credited(_model(), CREDITS[credit](), CE), _batch()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(STEPS):
        optimizer.zero_grad()
        for rows, labels in zip(x.chunk(pieces), y.chunk(pieces), strict=True):
            (CE(model(rows), labels) / pieces).backward()
        optimizer.step()
    return _vector(model.model)


def _cut(credit: str, schedule: str, pieces: int, rank: int) -> dict[str, Tensor]:
    model, (x, y) = Credited(_model(), CREDITS[credit](), CE), _batch()
    part = model.part(0, 2) if rank == 0 else model.part(2, 4)
    stage = PipelineStage(part, rank, 2, torch.device("cpu"))
    runs = SCHEDULES[schedule](stage, n_microbatches=pieces, loss_fn=CE)
    optimizer = torch.optim.SGD(part.parameters(), lr=0.1)
    for _ in range(STEPS):
        optimizer.zero_grad()
        if rank == 0:
            runs.step(x)
        else:
            runs.step(target=y, losses=[])
        optimizer.step()
    own = set(part.parameters())
    return {name: p.detach() for name, p in model.model.named_parameters() if p in own}


def _pipeline(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    found = {
        (credit, schedule, pieces): _cut(credit, schedule, pieces, rank)
        for credit in CUT
        for schedule in SCHEDULES
        for pieces in (1, 4)
        if schedule == "gpipe" or pieces > 1  # 1F1B asks for at least as many as stages
    }
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_a_chain_cut_over_ranks_equals_one_process(tmp_path: Path) -> None:
    mp.spawn(_pipeline, args=(str(tmp_path),), nprocs=2)  # pyright: ignore[reportPrivateImportUsage]
    below, above = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    names = [name for name, _ in _model().named_parameters()]
    assert len(below) == 3 * len(CUT)
    for case in below:
        joined = below[case] | above[case]
        assert list(joined) == names
        found = torch.cat([p.flatten() for p in joined.values()])
        torch.testing.assert_close(found, _in_parts(case[0], case[2]), rtol=0, atol=1e-12, msg=str(case))


def test_parts_that_cannot_be() -> None:
    model = Credited(_model(), "dfa", CE)
    with pytest.raises(UnsupportedModelError, match="DirectFeedbackAlignment keeps more than deltas"):
        model.part(0, 2)
    with pytest.raises(ValueError, match="part must be of stages from 0 to 4, got 3 to 3"):
        Credited(_model(), "fa").part(3, 3)


def _layers(kind: str, rank: int, pieces: int) -> dict[str, Tensor]:
    """Train a rank's half of the model by a layer-local optimizer; `rank` None: all of it, in pieces, in one process."""
    model, (x, y) = _model(), _batch()
    part = model if rank < 0 else nn.Sequential(*list(model)[:4] if rank == 0 else list(model)[4:])
    projection = AffineProjection(part, pipelined=True) if kind == "projection" else None
    transfer = {"*": "tanh"}
    optimizer: Any = torch.optim.SGD(part.parameters(), lr=0.1)
    if projection is None:
        optimizer = LocoProp(part, lr=1e-3, target_lr=1.0, local_steps=4, transfer=transfer, pipelined=rank >= 0)
    runs: Any = None
    if rank >= 0:
        runs = ScheduleGPipe(PipelineStage(part, rank, 2, torch.device("cpu")), n_microbatches=pieces, loss_fn=CE)
    for _ in range(STEPS):
        optimizer.zero_grad()
        if rank == 0:
            runs.step(x)
        elif rank > 0:
            runs.step(target=y, losses=[])
        else:
            for rows, labels in zip(x.chunk(pieces), y.chunk(pieces), strict=True):
                (CE(part(rows), labels) / pieces).backward()
        if projection is not None:
            projection.step()
        optimizer.step()
    own = set(part.parameters())
    return {name: p.detach() for name, p in model.named_parameters() if p in own}


def _pipelined(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    found = {(kind, n): _layers(kind, rank, n) for kind in ("locoprop", "projection") for n in (1, 4)}
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_local_steps_on_a_pipeline_are_those_of_one_process(tmp_path: Path) -> None:
    mp.spawn(_pipelined, args=(str(tmp_path),), nprocs=2)  # pyright: ignore[reportPrivateImportUsage]
    below, above = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    for kind, pieces in below:
        joined = below[kind, pieces] | above[kind, pieces]
        for name, expected in _layers(kind, -1, pieces).items():
            torch.testing.assert_close(joined[name], expected, rtol=0, atol=1e-12, msg=f"{kind}, {pieces}, {name}")
