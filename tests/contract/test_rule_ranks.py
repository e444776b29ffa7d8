"""Rules in two processes, each with a part of every batch: the step of the joint batch, or refused by name."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from cases import CE, SGD, mlp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from beyondprop import (
    AltMin,
    Codes,
    Descent,
    DifferenceTargetProp,
    DirectFeedbackAlignment,
    FeedbackAlignment,
    LearningRule,
    LocalRule,
    Memory,
    NonFiniteError,
    OfflineAltMin,
    OnlineEWC,
    RelativeDamping,
    Solver,
    UnsupportedModelError,
)

# fmt: off
RULES: dict[str, Callable[..., LearningRule]] = {
    "am": lambda model, **own: AltMin(model, CE, SGD, **own),
    "am_fitted": lambda model, **own: AltMin(model, CE, SGD, code_solver="fitted", **own),
    "am_relative": lambda model, **own: AltMin(model, CE, SGD, damping=RelativeDamping(2.0), code_solver="cg", **own),
    "am_new_inputs": lambda model, **own: AltMin.paper_fc(model, CE, weight_solver=SGD, mu=1.0, **own),
    "am_local_steps": lambda model, **own: AltMin(model, CE, Descent(SGD, local_steps=3), **own),
    "am_mem": lambda model, **own: AltMin(model, CE, Memory(refresh=3), **own),
    "am_mem_bcd": lambda model, **own: AltMin(model, CE, Memory("bcd", block=4, damping=0.5, output_lr=0.05), **own),
    "fa": lambda model, **own: LocalRule(model, CE, FeedbackAlignment(), Descent(SGD), **own),
    "dfa": lambda model, **own: LocalRule(model, CE, DirectFeedbackAlignment(), Descent(SGD), **own),
    "dtp": lambda model, **own: DifferenceTargetProp(model, CE, SGD, noise=0.0, **own),
    "ewc": lambda model, **own: OnlineEWC(model, CE, SGD, **own),
}
# fmt: on
PARTS = (slice(0, 10), slice(10, 24))  # of unequal length


def _model(seed: int = 2) -> nn.Sequential:
    torch.manual_seed(seed)
    return mlp(6, 9, 8, 3, activation="tanh").double()


def _batch() -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(3)
    return torch.randn(24, 6, generator=g, dtype=torch.float64), torch.arange(24) % 3


def _likeliest(p: Tensor, count: int) -> Tensor:
    """Stands for a draw, which no two processes make as one does."""
    return p.argmax(1, keepdim=True)


def _trained(name: str, model: nn.Module, rows: slice, **own: Any) -> list[Tensor]:
    torch.multinomial = _likeliest  # type: ignore[assignment]
    x, y = _batch()
    rule = RULES[name](model, **own)
    for step in range(6):
        if step == 3:
            rule.end_task()
        if step == 4:  # two batches for one update
            rule.backward(x[rows], y[rows], scale=0.5)
            rule.backward(x[rows].flip(0), y[rows].flip(0), scale=0.5)
            rule.update()
        else:
            rule.step(x[rows], y[rows])
    copied = copy.deepcopy(rule)
    assert copied.model is not rule.model
    return [p.detach() for p in rule.model.parameters()]


class _OwnSolver(Solver):
    def bind(self, chain: Any) -> None:
        pass

    def collect(self, assignment: Any, factor: float) -> None:
        pass


def _refusals(rank: int) -> None:
    x, y = _batch()
    own = PARTS[rank]
    rule = RULES["am"](_model(), group=dist.group.WORLD)
    before = [p.detach().clone() for p in rule.model.parameters()]
    bad = x[own].clone()
    if rank:
        bad[0, 0] = torch.nan
    with pytest.raises(NonFiniteError):  # in both, so that nobody waits for the other
        rule.step(bad, y[own])
    assert all(torch.equal(p, q) for p, q in zip(rule.model.parameters(), before, strict=True))
    rule.step(x[own], y[own])
    with pytest.raises(UnsupportedModelError, match="The ranks' models are not the same"):
        RULES["am"](mlp(6, 9 + rank, 3), group=dist.group.WORLD)
    with pytest.raises(UnsupportedModelError, match="_OwnSolver does not say what it sums over ranks"):
        LocalRule(_model(), CE, Codes(), _OwnSolver(), group=dist.group.WORLD)
    with pytest.raises(UnsupportedModelError, match="OfflineAltMin trains in 2 processes"):
        OfflineAltMin(_model(), CE).step(x[own], y[own])


def _two_processes(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    found: dict[tuple[str, str], list[Tensor]] = {}
    for name in RULES:
        found[name, "wrapper"] = _trained(name, DistributedDataParallel(_model()), PARTS[rank])
        found[name, "group"] = _trained(name, _model(2 + rank), PARTS[rank], group=dist.group.WORLD)
    _refusals(rank)
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_all_ranks_make_the_step_of_the_joint_batch(tmp_path: Path) -> None:
    mp.spawn(_two_processes, args=(str(tmp_path),), nprocs=2)  # pyright: ignore[reportPrivateImportUsage]
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    drawn = torch.multinomial
    try:
        for name, how in first:
            for p, q, r in zip(first[name, how], second[name, how], _trained(name, _model(), slice(None)), strict=True):
                assert torch.equal(p, q), (name, how)
                torch.testing.assert_close(p, r, rtol=0, atol=1e-12, msg=f"{name}, {how}")
    finally:
        torch.multinomial = drawn
