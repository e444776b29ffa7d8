"""Seconds and memory of a training step of spiking nets, beside snnTorch and SpikingJelly, in one process.

    python benchmarks/spiking_speed.py [--steps 25 100] [--rounds 9] --compiled > benchmarks/results/spiking_speed.txt

784-800-10, 50 images of MNIST, Poisson trains drawn once a step for everyone (nobody's time has their drawing), the same fused
Adam, one thread. Contenders take turns; figures are medians of process seconds, and their ratio to the fastest form of
snnTorch. Memory is the peak of a step beyond weights, optimizer state and input trains, by torch's allocator, at T = 200.

    beyondprop hm2bp        two states (current and membrane), refractory 2
    beyondprop surrogate    the same neurons, backpropagation through time
    snnTorch steps          Leaky and Linear called in every step, as its tutorials have it
    snnTorch whole          Linear over all steps at once, Leaky in every step
    SpikingJelly            LIFNode and Linear, step_mode "m" (its torch backend, the one for CPUs)
    SpikingJelly compiled   the same in torch.compile (--compiled: a minute of compilation)
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any

import torch
from memory import peak
from torch import Tensor, nn
from torch.nn import functional as F

from beyondprop import data
from beyondprop.nn import CubaLIF, PoissonEncoder, SpikeCountLoss, SpikeCounts, SpikingLayer

WIDTH, BATCH = 800, 50


def ours(rule: str) -> nn.Module:
    def layer(inputs: int, units: int, threshold: float) -> SpikingLayer:
        return SpikingLayer(nn.Linear(inputs, units, bias=False), CubaLIF(16, 2, threshold, 2), rule=rule)

    return nn.Sequential(layer(784, WIDTH, 0.5), layer(WIDTH, 10, 0.2), SpikeCounts())


class SnnTorch(nn.Module):
    """Two layers of Leaky."""

    def __init__(self, whole: bool) -> None:
        super().__init__()
        leaky = import_module("snntorch").Leaky
        self.whole = whole
        self.hidden, self.out = nn.Linear(784, WIDTH, bias=False), nn.Linear(WIDTH, 10, bias=False)
        self.one, self.two = leaky(beta=0.94), leaky(beta=0.94)

    def forward(self, x: Tensor) -> Tensor:
        """Return counts of spikes `(T, N, 784)`."""
        first, second = self.one.init_leaky(), self.two.init_leaky()
        if not self.whole:
            counts = torch.zeros(x.shape[1], 10)
            for now in x:
                spikes, first = self.one(self.hidden(now), first)
                fired, second = self.two(self.out(spikes), second)
                counts = counts + fired
            return counts
        between = []
        for now in self.hidden(x):
            spikes, first = self.one(now, first)
            between.append(spikes)
        found = []
        for now in self.out(torch.stack(between)):
            fired, second = self.two(now, second)
            found.append(fired)
        return torch.stack(found).sum(0)


class SpikingJelly(nn.Module):
    """Two layers of LIFNode."""

    def __init__(self, compiled: bool) -> None:
        super().__init__()
        nodes, self.functional = (
            import_module(f"spikingjelly.activation_based.{name}") for name in ("neuron", "functional")
        )
        self.net = nn.Sequential(
            nn.Linear(784, WIDTH, bias=False),
            nodes.LIFNode(tau=16.0, step_mode="m"),
            nn.Linear(WIDTH, 10, bias=False),
            nodes.LIFNode(tau=16.0, step_mode="m"),
        )
        self.run: Callable[[Tensor], Tensor] = torch.compile(self.net) if compiled else self.net

    def forward(self, x: Tensor) -> Tensor:
        """Return counts of spikes `(T, N, 784)`."""
        self.functional.reset_net(self.net)
        return self.run(x).sum(0)


def contenders(compiled: bool) -> dict[str, Callable[[], tuple[nn.Module, bool]]]:
    """Return what builds a net, and whether it takes time first."""
    found: dict[str, Callable[[], tuple[nn.Module, bool]]] = {
        "beyondprop hm2bp": lambda: (ours("hm2bp"), False),
        "beyondprop surrogate": lambda: (ours("surrogate"), False),
        "snnTorch steps": lambda: (SnnTorch(False), True),
        "snnTorch whole": lambda: (SnnTorch(True), True),
        "SpikingJelly": lambda: (SpikingJelly(False), True),
    }
    if compiled:
        found["SpikingJelly compiled"] = lambda: (SpikingJelly(True), True)
    return found


class Step:
    """A contender's training step on given trains."""

    def __init__(self, made: tuple[nn.Module, bool]) -> None:
        self.net, self.time_first = made
        self.optimizer = torch.optim.Adam(self.net.parameters(), 1e-3, fused=True)
        self.loss: Any = SpikeCountLoss(10, 1, 1) if not self.time_first else None

    def __call__(self, trains: Tensor, labels: Tensor) -> None:
        """Take one step; trains are `(T, N, 784)`, or `(N, T, 784)`, as this net has them."""
        self.optimizer.zero_grad()
        counts = self.net(trains)
        loss = F.mse_loss(counts, 10.0 * F.one_hot(labels, 10)) if self.loss is None else self.loss(counts, labels)
        loss.backward()
        self.optimizer.step()


def trains_of(images: Tensor, steps: int, rate: float) -> tuple[Tensor, Tensor]:
    """Return the same spikes batch first and time first, each in one piece."""
    first = PoissonEncoder(steps, rate)(images)
    return first, first.transpose(0, 1).contiguous()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, nargs="+", default=[25, 100])
    parser.add_argument("--rates", type=float, nargs="+", default=[1.0, 1 / 5.5])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--memory", type=int, default=200)
    parser.add_argument("--compiled", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    mnist = data.load("mnist", standardize=False)
    images, labels = mnist.x_train.flatten(1), mnist.y_train
    for steps in args.steps:
        for rate in args.rates:
            made = {name: Step(build()) for name, build in contenders(args.compiled).items()}
            seconds: dict[str, list[float]] = {name: [] for name in made}
            for turn in range(args.rounds + 1):
                rows = slice(turn * BATCH, (turn + 1) * BATCH)
                batch_first, time_first = trains_of(images[rows], steps, rate)
                for name, step in made.items():
                    start = time.process_time()
                    step(time_first if step.time_first else batch_first, labels[rows])
                    if turn:  # the first warms up
                        seconds[name].append(time.process_time() - start)
            report(steps, rate, {name: statistics.median(mine) for name, mine in seconds.items()}, "ms", 1e3)
    batch_first, time_first = trains_of(images[:BATCH], args.memory, 1.0)
    peaks = {}
    for name, build in contenders(False).items():
        step = Step(build())
        chosen = time_first if step.time_first else batch_first
        step(chosen, labels[:BATCH])
        peaks[name] = peak(partial(step, chosen, labels[:BATCH]))
    report(args.memory, 1.0, peaks, "MiB", 2**-20)


def report(steps: int, rate: float, figures: dict[str, float], unit: str, scale: float) -> None:
    """Print a table of what was measured, and its ratio to the better of snnTorch."""
    base = min(figure for name, figure in figures.items() if name.startswith("snnTorch"))
    print(f"\nT = {steps}, a white pixel spikes in {rate:.0%} of the steps")
    for name, figure in figures.items():
        print(f"  {name:22} {figure * scale:9.1f} {unit}  {figure / base:5.2f}", flush=True)


if __name__ == "__main__":
    main()
