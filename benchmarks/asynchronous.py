"""Asynchronous alternating minimization on two ranks against one process: accuracy and samples a second.

    python benchmarks/asynchronous.py [--data mnist] [--net mlp:500x4] [--batch 50 200] [--epochs 3] [--seeds 5] [--out FILE]

One process trains by `Credited(net, "am")` and fused Adam in the plain loop, then two ranks train the same net on the same
batches by `AsynchronousPipeline`, with two batches in flight on the lower rank, whose weights are one update old. The learning
rate falls to 0 over the training. One thread a process. Both ways take turns, seed by seed, and the clock stands still during
evaluation. The cut is the one whose slower part is fastest, by the measured time of each part's step alone. Beside the clock on
the wall stands the processor time of the process, on ranks of the busier one, on which other programs have less influence.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from beyondprop import Credited, data
from beyondprop.credit import AsynchronousPipeline
from beyondprop.lab import nets
from beyondprop.optim import adam

LOSS = nn.CrossEntropyLoss()


@dataclass(slots=True)
class Run:
    """One training: the test accuracy after each epoch, seconds by the wall and of the processor, and their samples."""

    accuracies: list[float]
    seconds: float
    busy: float
    samples: int


def model(options: argparse.Namespace, rows: data.Dataset, seed: int) -> Credited:
    """Return the net, the same on every rank."""
    torch.manual_seed(seed)
    net = nets.build(options.net, tuple(rows.x_train.shape[1:]), int(rows.y_train.max()) + 1)
    return Credited(net, "am", loss=LOSS)


def batches(rows: data.Dataset, size: int, seed: int, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield an epoch's batches, the same in every process."""
    order = torch.randperm(len(rows.x_train), generator=torch.Generator().manual_seed(1000 * seed + epoch))
    for index in order.split(size):
        yield rows.x_train[index], rows.y_train[index]


def trainer(options: argparse.Namespace, rows: data.Dataset, size: int, part: nn.Module) -> torch.optim.Optimizer:
    """Return Adam whose learning rate falls by each of its own steps, which on ranks come later than the batches."""
    optimizer = adam(options.lr)(part.parameters())
    steps = options.epochs * math.ceil(len(rows.x_train) / size)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 1.0 / steps, steps - 1)
    optimizer.register_step_post_hook(lambda *_: schedule.step())
    return optimizer


@torch.no_grad()
def accuracy(net: nn.Module, rows: data.Dataset) -> float:
    """Return the share of the test rows that are right, in percent."""
    return 100 * (net(rows.x_test).argmax(1) == rows.y_test).double().mean().item()


def in_one_process(options: argparse.Namespace, rows: data.Dataset, size: int, seed: int) -> Run:
    """Train by the plain loop."""
    net, run = model(options, rows, seed), Run([], 0.0, 0.0, options.epochs * len(rows.x_train))
    optimizer = trainer(options, rows, size, net)
    for epoch in range(options.epochs):
        with clocks(run):
            for x, y in batches(rows, size, seed, epoch):
                optimizer.zero_grad()
                LOSS(net(x), y).backward()
                optimizer.step()
        run.accuracies.append(accuracy(net, rows))
    return run


def on_ranks(options: argparse.Namespace, rows: data.Dataset, size: int, seed: int, cut: int, rank: int) -> Run:
    """Train a rank's part."""
    net, run = model(options, rows, seed), Run([], 0.0, 0.0, options.epochs * len(rows.x_train))
    part = net.part(0, cut) if rank == 0 else net.part(cut, len(net.chain))
    pipeline = AsynchronousPipeline(part, trainer(options, rows, size, part))
    for epoch in range(options.epochs):
        dist.barrier()
        with clocks(run):
            for x, y in batches(rows, size, seed, epoch):
                pipeline.step(x, y)
            pipeline.drain()
        pipeline.share()
        run.accuracies.append(accuracy(net, rows) if rank == 0 else 0.0)
    busy: list[Any] = [None, None]
    dist.all_gather_object(busy, run.busy)
    run.busy = max(busy)
    return run


@contextlib.contextmanager
def clocks(run: Run) -> Iterator[None]:
    """Add the time that a context takes."""
    seconds, busy = time.perf_counter(), time.process_time()
    yield
    run.seconds += time.perf_counter() - seconds
    run.busy += time.process_time() - busy


def step_seconds(options: argparse.Namespace, rows: data.Dataset, size: int) -> dict[int, tuple[float, float]]:
    """Return the median seconds of a step of the lower and the upper part alone, by the cut."""
    found, (x, y) = {}, next(batches(rows, size, 0, 0))
    for cut in range(1, len(model(options, rows, 0).chain)):
        net = model(options, rows, 0)
        low, high = net.part(0, cut), net.part(cut, len(net.chain))
        middle = low(x).detach()
        cotangent = torch.randn_like(middle) / len(x)

        def below(low: nn.Module = low, cotangent: Tensor = cotangent) -> None:
            low(x).backward(cotangent)

        def above(high: nn.Module = high, middle: Tensor = middle) -> None:
            LOSS(high(middle.requires_grad_()), y).backward()

        found[cut] = (timed(options, low, below), timed(options, high, above))
    return found


def timed(options: argparse.Namespace, part: nn.Module, passes: Callable[[], None]) -> float:
    """Return the median seconds of a step."""
    optimizer, seconds = adam(options.lr)(part.parameters()), []
    for _ in range(25):
        start = time.perf_counter()
        optimizer.zero_grad()
        passes()
        optimizer.step()
        seconds.append(time.perf_counter() - start)
    return median(seconds[5:])


def compare(rank: int, folder: str, options: argparse.Namespace) -> None:
    """Let both ways take turns, and say how far they are; rank 0 alone is the one process."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    rows, lines = data.load(options.data), []
    say: Callable[[str], None] = (lambda line: print(line, flush=True)) if rank == 0 else (lambda line: None)
    for size in options.batch:
        told: list[Any] = [None]
        if rank == 0:
            told = [step_seconds(options, rows, size)]
        dist.broadcast_object_list(told)
        cut, (low, high) = min(told[0].items(), key=lambda each: max(each[1]))
        lines.append(
            f"batch {size}: cut before stage {cut}, a step of the parts alone {1e3 * low:.1f} and {1e3 * high:.1f} ms: at most "
            f"{(low + high) / max(low, high):.2f} times as fast on two ranks"
        )
        say(lines[-1])
        kinds: dict[str, list[Run]] = {"one process": [], "two ranks": []}
        for seed in range(options.seeds):
            dist.barrier()
            if rank == 0:
                kinds["one process"].append(in_one_process(options, rows, size, seed))
            dist.barrier()
            kinds["two ranks"].append(on_ranks(options, rows, size, seed, cut, rank))
            if rank == 0:
                shown = "; ".join(f"{k} {v[-1].accuracies[-1]:.2f} %, {v[-1].seconds:.1f} s" for k, v in kinds.items())
                say(f"  seed {seed}: {shown}")
        lines += summary(kinds) if rank == 0 else []
        say("\n".join(lines[-3:]))
    if rank == 0:
        torch.save(lines, f"{folder}/lines.pt")
    dist.destroy_process_group()


def summary(kinds: dict[str, list[Run]]) -> list[str]:
    """Return the lines of one batch size."""
    lines = []
    for kind, runs in kinds.items():
        final = [run.accuracies[-1] for run in runs]
        course = ", ".join(f"{mean(epoch):.2f}" for epoch in zip(*(run.accuracies for run in runs), strict=True))
        lines.append(
            f"  {kind}: test accuracy {mean(final):.2f} %, standard deviation {stdev(final):.2f} (by epoch {course}); "
            f"{median(run.samples / run.seconds for run in runs):.0f} samples/s"
        )
    pairs = list(zip(*kinds.values(), strict=True))
    apart = [ranks.accuracies[-1] - one.accuracies[-1] for one, ranks in pairs]
    faster = [one.seconds / ranks.seconds for one, ranks in pairs]
    lines.append(
        f"  two ranks: {mean(apart):+.2f} points (seeds {min(apart):+.2f} to {max(apart):+.2f}), {median(faster):.2f} times "
        f"as fast ({min(faster):.2f} to {max(faster):.2f}); by processor time of the busier rank "
        f"{median(one.busy / ranks.busy for one, ranks in pairs):.2f}"
    )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="mnist")
    parser.add_argument("--net", default="mlp:500x4")
    parser.add_argument("--batch", type=int, nargs="+", default=[50, 200])
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--out", type=Path)
    options: Any = parser.parse_args()
    if options.seeds < 2:
        parser.error("--seeds must be 2 or more, for a standard deviation")
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(compare, args=(folder, options), nprocs=2)  # pyright: ignore[reportPrivateImportUsage]
        lines = torch.load(f"{folder}/lines.pt")
    head = (
        f"{options.data}, {options.net}, AM by line search, Adam from {options.lr:g} to 0, {options.epochs} epochs, "
        f"{options.seeds} seeds, one thread a process, two ranks with staleness 1 and 0; load of the machine before: "
        f"{load:.1f} on {os.cpu_count()} cores"
    )
    print(head)
    if options.out:
        options.out.write_text("\n".join([head, *lines]) + "\n")


if __name__ == "__main__":
    main()
