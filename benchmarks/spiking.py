"""Spiking nets on 10,000 images of MNIST: HM2-BP beside surrogate gradients at the same budget.

    python benchmarks/spiking.py [--seeds 3] [--epochs 5] [--workers 2] > benchmarks/results/spiking.txt

784-100-10, T = 50, Poisson trains, batches of 50, Adam with a rate that falls with the root of the epoch, neurons with time
constants of 16 and 2 steps and thresholds of 5 and 2, refractory 2, weights uniform in +-0.3. Each contender has its rate from
the same grid, by 2,000 further training images and one seed; then come the seeds, at that rate, on all test images. Contenders:

    hm2bp             SpikeCountLoss (10, 1, 1), ten spikes injected into a silent neuron of the label
    hm2bp lateral     the same, read-outs inhibiting each other by 0.3
    surrogate         SpikeCountLoss
    surrogate, CE     cross-entropy of the counts

Seconds are of the process, for an epoch of training.
"""

from __future__ import annotations

import argparse
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context

import torch
from torch import Tensor, nn

from beyondprop import data
from beyondprop.nn import CubaLIF, PoissonEncoder, SpikeCountLoss, SpikeCounts, SpikingLayer

CONTENDERS = {
    "hm2bp": ("hm2bp", 0.0, True),
    "hm2bp lateral": ("hm2bp", 0.3, True),
    "surrogate": ("surrogate", 0.0, True),
    "surrogate, CE": ("surrogate", 0.0, False),
}
RATES = (0.003, 0.01, 0.03)
STEPS, BATCH, IMAGES, HELD_OUT = 50, 50, 10_000, 2_000


@dataclass(frozen=True)
class Run:
    """One training: what is asked for, picklable."""

    name: str
    rate: float
    seed: int
    epochs: int
    tuning: bool


@dataclass(frozen=True)
class Found:
    """Accuracy on what was asked for and on its first 2,000, seconds an epoch, spikes of the hidden layer an image."""

    accuracy: float
    first: float
    seconds: float
    spikes: float


def net(rule: str, lateral: float) -> nn.Sequential:
    """Return the network of a contender."""

    def layer(inputs: int, units: int, threshold: float, lateral: float = 0.0, injected: int = 0) -> SpikingLayer:
        op = nn.Linear(inputs, units, bias=False)
        nn.init.uniform_(op.weight, -0.3, 0.3)
        return SpikingLayer(op, CubaLIF(16, 2, threshold, 2), rule=rule, lateral=lateral, injected=injected)

    return nn.Sequential(PoissonEncoder(STEPS), layer(784, 100, 5.0), layer(100, 10, 2.0, lateral, 10), SpikeCounts())


def trained(run: Run) -> Found:
    """Train and test; on held-out training images when tuning."""
    torch.set_num_threads(1)
    torch.manual_seed(run.seed)
    mnist = data.load("mnist", standardize=False)
    x, y = mnist.x_train.flatten(1), mnist.y_train
    test_x, test_y = mnist.x_test.flatten(1), mnist.y_test
    if run.tuning:
        test_x, test_y = x[IMAGES : IMAGES + HELD_OUT], y[IMAGES : IMAGES + HELD_OUT]
    x, y = x[:IMAGES], y[:IMAGES]
    rule, lateral, of_counts = CONTENDERS[run.name]
    model = net(rule, lateral)
    loss: nn.Module = SpikeCountLoss(10, 1, 1) if of_counts else nn.CrossEntropyLoss()
    optimizer = torch.optim.Adam(model.parameters(), run.rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: (1 + epoch) ** -0.5)
    start = time.process_time()
    for _ in range(run.epochs):
        for rows in torch.randperm(len(x)).split(BATCH):
            optimizer.zero_grad()
            loss(model(x[rows]), y[rows]).backward()
            optimizer.step()
        schedule.step()
    seconds = (time.process_time() - start) / run.epochs
    with torch.no_grad():
        right = torch.cat([model(part).argmax(1) for part in test_x.split(500)]) == test_y
        spikes: Tensor = model[1](model[0](test_x[:500]))
    return Found(
        100 * float(right.double().mean()),
        100 * float(right[:2000].double().mean()),
        seconds,
        float(spikes.sum()) / 500,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    with ProcessPoolExecutor(args.workers, mp_context=get_context("spawn")) as pool:
        tuning = [Run(name, rate, 100, args.epochs, True) for name in CONTENDERS for rate in RATES]
        scores = dict(zip(tuning, pool.map(trained, tuning), strict=True))
        best: dict[str, float] = {}
        print("tuning: % of 2,000 held-out training images, one seed", flush=True)
        for name in CONTENDERS:
            mine = {run.rate: found.accuracy for run, found in scores.items() if run.name == name}
            best[name] = max(mine, key=mine.__getitem__)
            print(f"  {name:15} " + "  ".join(f"{rate:g}: {score:.2f}" for rate, score in mine.items()), flush=True)
        runs = [Run(name, best[name], seed, args.epochs, False) for name in CONTENDERS for seed in range(args.seeds)]
        found = dict(zip(runs, pool.map(trained, runs), strict=True))
    print(f"\n{'':15} {'rate':>6} {'test %':>16} {'first 2,000':>12} {'s an epoch':>11} {'hidden spikes':>14}")
    for name in CONTENDERS:
        mine = [one for run, one in found.items() if run.name == name]
        scores_of = [one.accuracy for one in mine]
        spread = statistics.stdev(scores_of) if len(scores_of) > 1 else 0.0
        accuracy = f"{statistics.mean(scores_of):.2f} +- {spread:.2f}"
        first = statistics.mean(one.first for one in mine)
        seconds, spikes = (statistics.median(getattr(one, key) for one in mine) for key in ("seconds", "spikes"))
        print(f"{name:15} {best[name]:6g} {accuracy:>16} {first:12.2f} {seconds:11.1f} {spikes:14.0f}")


if __name__ == "__main__":
    main()
