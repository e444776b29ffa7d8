"""LocoProp on a pipeline: each rank holds its layers and their inputs, so that its local steps need no communication at all.

    python benchmarks/pipeline.py [--layers 8] [--width 1500] [--batch 256] [--local-steps 9] [--rounds 5] [--out FILE]

Measures a step by the wall in one process and on two ranks (`torch.distributed.pipelining`, GPipe), one thread each, and
compares the losses. Prints beside it what the law says, and what a simulation of the schedule with the measured times says,
for two ranks and for more.

The law: with F the time of forward and backward pass of the whole net (three products a layer), L that of the local work (two
products a step), K ranks and M micro-batches, the efficiency is

    (F + L) / (F (1 + (K - 1) / M) + L)

as only the passes wait for each other. Data parallelism would exchange gradients or moments at every local step.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe
from torch.nn.functional import mse_loss

from beyondprop import LocoProp


def net(layers: int, width: int) -> nn.Sequential:
    """Return a deep tanh net, the same in every process."""
    torch.manual_seed(0)
    parts = [part for _ in range(layers) for part in (nn.Linear(width, width), nn.Tanh())]
    return nn.Sequential(*parts[:-1])


def problem(options: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """Return one batch."""
    torch.manual_seed(1)
    return torch.randn(options.batch, options.width), torch.randn(options.batch, options.width)


def optimizer(model: nn.Module, options: argparse.Namespace) -> LocoProp:
    """Return LocoProp-M; a rank's last layer has its function behind the cut, so all are named."""
    return LocoProp(model, lr=1e-6, local_steps=options.local_steps, transfer={"*": "tanh"}, pipelined=True)


def alone(options: argparse.Namespace) -> tuple[list[float], list[float], list[float]]:
    """Return the seconds of the passes and of the local work, and the losses, step by step, in one process."""
    torch.set_num_threads(1)
    model, (x, y) = net(options.layers, options.width), problem(options)
    trainer, passes, local, losses = optimizer(model, options), [], [], []
    for _ in range(options.rounds + 1):
        start = time.perf_counter()
        trainer.zero_grad()
        loss = mse_loss(model(x), y)
        loss.backward()
        middle = time.perf_counter()
        trainer.step()
        passes.append(middle - start)
        local.append(time.perf_counter() - middle)
        losses.append(loss.item())
    return passes, local, losses


def _rank(rank: int, folder: str, options: argparse.Namespace, pieces: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    model, (x, y) = net(options.layers, options.width), problem(options)
    half = options.layers // 2 * 2
    part = model[:half] if rank == 0 else model[half:]
    trainer, seconds, losses = optimizer(part, options), [], []
    schedule = ScheduleGPipe(PipelineStage(part, rank, 2, torch.device("cpu")), n_microbatches=pieces, loss_fn=mse_loss)
    for _ in range(options.rounds + 1):
        dist.barrier()
        start = time.perf_counter()
        trainer.zero_grad()
        found: list[Tensor] = []
        if rank == 0:
            schedule.step(x)
        else:
            schedule.step(target=y, losses=found)
        trainer.step()
        dist.barrier()
        seconds.append(time.perf_counter() - start)
        losses.append(sum(loss.item() for loss in found) / max(len(found), 1))
    if rank:
        torch.save((seconds, losses), f"{folder}/found.pt")
    dist.destroy_process_group()


def on_two_ranks(options: argparse.Namespace, pieces: int) -> tuple[list[float], list[float]]:
    """Return the seconds of the steps on two ranks, and the losses."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_rank, args=(folder, options, pieces), nprocs=2)  # pyright: ignore[reportPrivateImportUsage]
        return torch.load(f"{folder}/found.pt")


def law(passes: float, local: float, ranks: int, pieces: int) -> float:
    """Return the speed-up that the law allows."""
    return ranks * (passes + local) / (passes * (1 + (ranks - 1) / pieces) + local)


def simulated(passes: float, local: float, ranks: int, pieces: int, hop: float = 0.0) -> float:
    """Return the speed-up of a GPipe step, event by event: a third of a pass is forward, `hop` seconds go by between ranks."""
    forward, backward = passes / 3 / ranks / pieces, passes * 2 / 3 / ranks / pieces
    free, arrived = [0.0] * ranks, [0.0] * pieces
    for rank in range(ranks):
        for piece in range(pieces):
            free[rank] = max(free[rank], arrived[piece]) + forward
            arrived[piece] = free[rank] + hop
    arrived = [0.0] * pieces
    for rank in reversed(range(ranks)):
        for piece in reversed(range(pieces)):
            free[rank] = max(free[rank], arrived[piece]) + backward
            arrived[piece] = free[rank] + hop
    return (passes + local) / (max(free) + local / ranks)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("layers", 8), ("width", 1500), ("batch", 256), ("local-steps", 9), ("rounds", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--out", type=Path)
    options: Any = parser.parse_args()
    passes, local, expected = alone(options)
    f, w = median(passes[1:]), median(local[1:])
    lines = [
        f"{options.layers} layers of {options.width}, batch {options.batch}, T = {options.local_steps}, one thread a process",
        f"one process: {f + w:.3f} s a step, {f:.3f} of it the passes",
    ]
    for pieces in (1, 4):
        seconds, losses = on_two_ranks(options, pieces)
        apart = max(abs(a - b) / abs(b) for a, b in zip(losses, expected, strict=True))
        measured = median(seconds[1:])
        lines.append(
            f"two ranks, {pieces} micro-batches: {measured:.3f} s, {(f + w) / measured:.2f} times as fast; law "
            f"{law(f, w, 2, pieces):.2f}, simulated {simulated(f, w, 2, pieces):.2f}; losses apart by {apart:.0e}"
        )
    lines.append("ranks, efficiency by law / simulated without and with 1 ms between ranks, 4 micro-batches a rank:")
    for ranks in (2, 8, 64, 1000):
        # A net that grows with the ranks: as many layers on each as here on one of eight.
        one, two = f * ranks / 8, w * ranks / 8
        shown = [law(one, two, ranks, 4 * ranks), *(simulated(one, two, ranks, 4 * ranks, hop) for hop in (0.0, 1e-3))]
        lines.append(f"  {ranks:5}: " + " / ".join(f"{speed / ranks:.2f}" for speed in shown))
    print("\n".join(lines))
    if options.out:
        options.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
