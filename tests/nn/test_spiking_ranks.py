"""Spiking nets in two processes: the gradients of the joint batch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from beyondprop.nn import CubaLIF, SpikeCountLoss, SpikeCounts, SpikingLayer

RULES = ("hm2bp", "surrogate")


def _net(rule: str) -> nn.Sequential:
    torch.manual_seed(0)
    sizes = ((20, 30), (30, 10))
    layers = [SpikingLayer(nn.Linear(a, b, bias=False), CubaLIF(threshold=0.5), rule=rule) for a, b in sizes]
    return nn.Sequential(*layers, SpikeCounts()).double()


def _batch() -> tuple[Tensor, Tensor]:
    x = torch.rand(8, 40, 20, generator=torch.Generator().manual_seed(1)) < 0.4
    return x.double(), torch.arange(8)


def _gradients(model: nn.Module, x: Tensor, y: Tensor) -> list[Tensor]:
    SpikeCountLoss()(model(x), y).backward()
    return [p.grad for p in model.parameters() if p.grad is not None]


def _on_a_rank(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    x, y = _batch()
    own = slice(4 * rank, 4 * rank + 4)
    found = {rule: _gradients(DistributedDataParallel(_net(rule)), x[own], y[own]) for rule in RULES}
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks_have_the_gradients_of_the_joint_batch(tmp_path: Path) -> None:
    mp.spawn(_on_a_rank, args=(str(tmp_path),), nprocs=2)  # pyright: ignore[reportPrivateImportUsage]
    for rule in RULES:
        expected = _gradients(_net(rule), *_batch())
        assert len(expected) == 2
        assert all(bool(one.any()) for one in expected)
        for rank in range(2):
            for one, other in zip(torch.load(tmp_path / f"{rank}.pt")[rule], expected, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rule", RULES)
def test_a_loop_that_clears_gradients_between_the_passes(rule: str) -> None:
    model, (x, y) = _net(rule), _batch()
    expected = [one.clone() for one in _gradients(model, x, y)]
    loss = SpikeCountLoss()(model(x), y)
    model.zero_grad()  # after the forward pass
    loss.backward()
    parts = _net(rule)
    for own in (slice(0, 3), slice(3, 8)):  # accumulation, the last one of another size
        (SpikeCountLoss()(parts(x[own]), y[own]) * len(y[own]) / 8).backward()
    for one, other, third in zip(expected, model.parameters(), parts.parameters(), strict=True):
        assert other.grad is not None
        assert third.grad is not None
        torch.testing.assert_close(other.grad, one, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(third.grad, one, rtol=1e-12, atol=1e-12)
