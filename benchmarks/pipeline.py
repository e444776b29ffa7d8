"""LocoProp on a pipeline: each rank holds its layers and their inputs, so that its local steps need no communication at all.

    python benchmarks/pipeline.py [--layers 8] [--width 1500] [--batch 256] [--local-steps 9] [--rounds 9]
                                  [--schedules gpipe 1f1b] [--pieces 1 2 4] [--out FILE]

Measures a step by the wall in one process and on two ranks of `torch.distributed.pipelining`, one thread each, and compares the
losses. One process and two ranks take turns in every round, so that a change of the machine's speed meets both; a speed-up is
the median of those within a round, and the first round, in which a pipeline finds out its shapes, does not count. How far two
processes slow each other down is measured, too, by half the net in one process and in two at once.

The law: with F the time of forward and backward pass of the whole net (three products a layer), L that of the local work (two
products a step), K ranks and M micro-batches, a step takes

    (F (1 + (K - 1) / M) + L) / K

as only the passes wait for each other. F depends on M, as the weights' gradients of every micro-batch are multiplied and added
by themselves; it is measured. Data parallelism would exchange gradients or moments at every local step.
"""

from __future__ import annotations

import argparse
import os
import resource
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe
from torch.nn.functional import mse_loss

from beyondprop import LocoProp

SCHEDULES: dict[str, Any] = {"gpipe": ScheduleGPipe, "1f1b": Schedule1F1B}
ALONE = 2  # the rank that trains the whole net; 0 and 1 are the pipeline
Step = Callable[[], tuple[float, float]]
"""Makes a training step; returns when its passes were over, and the loss."""


@dataclass
class Times:
    """What a rank measured of one way to train, step by step."""

    wall: list[float] = field(default_factory=list)  # until the last rank was ready
    passes: list[float] = field(default_factory=list)
    local: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)


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


def in_one_process(model: nn.Module, options: argparse.Namespace, pieces: int) -> Step:
    """Return a step of a net, with its batch in micro-batches."""
    trainer, (x, y) = optimizer(model, options), problem(options)

    def step() -> tuple[float, float]:
        trainer.zero_grad()
        total = 0.0
        for rows, targets in zip(x.chunk(pieces), y.chunk(pieces), strict=True):
            loss = mse_loss(model(rows), targets) / pieces
            loss.backward()
            total += loss.item()
        middle = time.perf_counter()
        trainer.step()
        return middle, total

    return step


def on_a_pipeline(rank: int, group: Any, options: argparse.Namespace, schedule: str, pieces: int) -> Step:
    """Return a rank's part in a step on two ranks."""
    model, (x, y) = net(options.layers, options.width), problem(options)
    half = options.layers // 2 * 2
    part = model[:half] if rank == 0 else model[half:]
    trainer = optimizer(part, options)
    stage = PipelineStage(part, rank, 2, torch.device("cpu"), group=group)
    runs = SCHEDULES[schedule](stage, n_microbatches=pieces, loss_fn=mse_loss)

    def step() -> tuple[float, float]:
        trainer.zero_grad()
        found: list[Tensor] = []
        if rank == 0:
            runs.step(x)
        else:
            runs.step(target=y, losses=found)
        middle = time.perf_counter()
        trainer.step()
        return middle, sum(loss.item() for loss in found) / pieces

    return step


def ways(options: argparse.Namespace) -> list[tuple[str, int]]:
    """Return the pipelines, as schedule and number of micro-batches."""
    # 1F1B asks for as many micro-batches as stages at least.
    return [(s, m) for s in options.schedules for m in options.pieces if s != "1f1b" or m > 1]


def _rank(rank: int, folder: str, options: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=3)
    group = dist.new_group([0, 1])
    steps: dict[Any, Step] = {}
    if rank == ALONE:
        whole = {m: net(options.layers, options.width) for m in sorted({1, *options.pieces})}
        steps = {("one", m): in_one_process(model, options, m) for m, model in whole.items()}
    else:
        steps = {way: on_a_pipeline(rank, group, options, *way) for way in ways(options)}
        half = in_one_process(net(options.layers // 2, options.width), options, 1)
        steps |= {("half", n): half for n in (1, 2) if rank < n}
    order = [*(("one", m) for m in sorted({1, *options.pieces})), *ways(options), ("half", 1), ("half", 2)]
    times = {way: Times() for way in order}
    for _ in range(options.rounds + 1):
        for way, own in times.items():
            dist.barrier()
            start = time.perf_counter()
            if way in steps:
                middle, loss = steps[way]()
                own.passes.append(middle - start)
                own.local.append(time.perf_counter() - middle)
                own.losses.append(loss)
            dist.barrier()
            own.wall.append(time.perf_counter() - start)
    torch.save({way: vars(own) for way, own in times.items()}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def measured(options: argparse.Namespace) -> list[dict[Any, Times]]:
    """Return what every rank measured, by way of training."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_rank, args=(folder, options), nprocs=3)  # pyright: ignore[reportPrivateImportUsage]
        found = [torch.load(f"{folder}/{rank}.pt") for rank in range(3)]
    return [{way: Times(**own) for way, own in each.items()} for each in found]


class Idleness:
    """How much of the machine others took, from here to `text`."""

    def __init__(self) -> None:
        self.start, self.taken, self.load = time.perf_counter(), self._taken(), os.getloadavg()

    @staticmethod
    def _taken() -> tuple[float, float]:
        """Return the seconds of all cores that went to other processes, and to other virtual machines."""
        stat = Path("/proc/stat")
        if not stat.exists():
            return float("nan"), float("nan")
        user, nice, system, _, _, irq, softirq, steal = map(int, stat.read_text().split("\n")[0].split()[1:9])
        used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        tick = os.sysconf("SC_CLK_TCK")
        own = sum(u.ru_utime + u.ru_stime for u in used)
        return (user + nice + system + irq + softirq) / tick - own, steal / tick

    def text(self) -> str:
        """Return a line that says it."""
        cores, seconds = os.cpu_count() or 1, time.perf_counter() - self.start
        others, steal = ((b - a) / (cores * seconds) for a, b in zip(self.taken, self._taken(), strict=True))
        if others != others:
            return f"{cores} cores, load average before {self.load[0]:.2f}; whether they were idle is not known here"
        is_idle = others < _IDLE and steal < _IDLE
        return (
            f"{cores} cores, load average before {self.load[0]:.2f}; other processes took {others:.1%} of them and other "
            f"virtual machines {steal:.1%}: {'idle' if is_idle else 'NOT IDLE, so the times below are not to be relied on'}"
        )


_IDLE = 0.02


def law(passes: float, local: float, ranks: int, pieces: int) -> float:
    """Return the seconds of a step by the law."""
    return (passes * (1 + (ranks - 1) / pieces) + local) / ranks


def simulated(passes: float, local: float, ranks: int, pieces: int, hop: float = 0.0) -> float:
    """Return the seconds of a GPipe step, event by event: a third of a pass is forward, `hop` seconds go by between ranks."""
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
    return max(free) + local / ranks


def typical(times: list[float]) -> float:
    """Return the median of all rounds but the first."""
    return median(times[1:])


def speed_up(before: Times, after: Times) -> list[float]:
    """Return how many times as fast `after` is by the wall, round by round, sorted."""
    return sorted(a / b for a, b in zip(before.wall[1:], after.wall[1:], strict=True))


def report(options: argparse.Namespace, found: list[dict[Any, Times]]) -> list[str]:
    """Return the lines that say what was measured."""
    below, above, alone = found
    lines = [
        f"{options.layers} layers of {options.width}, batch {options.batch}, T = {options.local_steps}, one thread a process, "
        f"medians of {options.rounds} rounds"
    ]
    ones = {m: own for (kind, m), own in alone.items() if kind == "one"}
    passes, local = ({m: typical(getattr(own, what)) for m, own in ones.items()} for what in ("passes", "local"))
    for m, own in ones.items():
        lines.append(
            f"one process, micro-batches: {m}: {typical(own.wall):.3f} s a step, {passes[m]:.3f} of it the passes, "
            f"{local[m]:.3f} local work"
        )
    slower = median(speed_up(below["half", 2], below["half", 1]))
    lines.append(f"half of the net in two processes at once: {slower:.3f} times as long as in one")
    for schedule, m in ways(options):
        own = above[schedule, m]
        ratios, same = speed_up(ones[1], own), median(speed_up(ones[m], own))
        best = min(ones[1].wall[1:]) / min(own.wall[1:])
        apart = max(abs(a - b) / abs(b) for a, b in zip(own.losses, ones[1].losses, strict=True))
        allowed = [(passes[1] + local[1]) / f(passes[m], local[m], 2, m) for f in (law, simulated)]
        each = (
            f"{typical(rank[schedule, m].passes):.3f} + {typical(rank[schedule, m].local):.3f}" for rank in found[:2]
        )
        lines += [
            f"two ranks, {schedule}, micro-batches: {m}: {typical(own.wall):.3f} s, {median(ratios):.2f} times as fast "
            f"({ratios[0]:.2f} to {ratios[-1]:.2f}; fastest step against fastest {best:.2f})",
            f"  law {allowed[0]:.2f}, simulated {allowed[1]:.2f}; against one process with these micro-batches {same:.2f}; "
            f"losses apart by {apart:.0e}; passes with waiting + local work of the ranks {', '.join(each)} s",
        ]
    f, w = passes[1], local[1]
    lines.append("ranks, efficiency by law / simulated without and with 1 ms between ranks, 4 micro-batches a rank:")
    for ranks in (2, 8, 64, 1000):
        # A net that grows with the ranks: as many layers on each as here on one of eight.
        one, two, m = f * ranks / 8, w * ranks / 8, 4 * ranks
        shown = [law(one, two, ranks, m), *(simulated(one, two, ranks, m, hop) for hop in (0.0, 1e-3))]
        lines.append(f"  {ranks:5}: " + " / ".join(f"{(one + two) / seconds / ranks:.2f}" for seconds in shown))
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("layers", 8), ("width", 1500), ("batch", 256), ("local-steps", 9), ("rounds", 9)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--schedules", nargs="+", choices=list(SCHEDULES), default=["gpipe", "1f1b"])
    parser.add_argument("--pieces", nargs="+", type=int, default=[1, 2, 4], help="micro-batches")
    parser.add_argument("--out", type=Path)
    options: Any = parser.parse_args()
    if not ways(options):
        parser.error("1f1b needs 2 micro-batches at least.")
    idleness = Idleness()
    found = measured(options)
    lines = [idleness.text(), *report(options, found)]
    print("\n".join(lines))
    if options.out:
        options.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
