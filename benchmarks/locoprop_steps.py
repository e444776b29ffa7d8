"""Step times of LocoProp and consequentialism against Adam and against the floor of their own products of matrices.

    python benchmarks/locoprop_steps.py [--rounds 15] [--threads 1]

MNIST deep autoencoder 784-1000-500-250-30-250-500-1000-784, tanh, batch 1000. Contenders take turns in one process; figures are
medians over rounds of the ratio within a round, in process CPU time. `Adam` is a loop with `torch.optim.Adam(foreach=True)`.
`floor` runs the products of LocoProp-M alone, T = 5 and all rows, on preallocated memory: forward and backward pass once, then
X V^T and r^T X for each of 4 further local steps.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from beyondprop import AffineProjection, LocoProp, data
from beyondprop.lab import nets

BATCH = 1000
Step = Callable[[], object]


def loop(model: nn.Module, x: Tensor, optimizer: torch.optim.Optimizer, projection: AffineProjection | None) -> Step:
    """Return a training step as a user writes it."""

    def step() -> None:
        optimizer.zero_grad()
        (F.binary_cross_entropy_with_logits(model(x), x, reduction="sum") / len(x)).backward()
        if projection is not None:
            projection.step()
        optimizer.step()

    return step


def floor(sizes: list[int], steps: int) -> Step:
    """Return the products of LocoProp-M alone."""
    x = [torch.randn(BATCH, n) for n in sizes]
    g = [torch.randn(BATCH, n) for n in sizes]
    w = [torch.randn(b, a) for a, b in pairwise(sizes)]
    dw = [torch.empty_like(v) for v in w]

    def run() -> None:
        for layer in range(len(w)):
            torch.mm(x[layer], w[layer].t(), out=g[layer + 1])
        for layer in reversed(range(len(w))):
            torch.mm(g[layer + 1].t(), x[layer], out=dw[layer])
            if layer:
                torch.mm(g[layer + 1], w[layer], out=g[layer])
        for layer in range(len(w)):
            for _ in range(steps - 1):
                torch.mm(x[layer], w[layer].t(), out=g[layer + 1])
                torch.mm(g[layer + 1].t(), x[layer], out=dw[layer])

    return run


def contenders(x: Tensor) -> dict[str, Step]:
    """Return the steps to compare, each on its own copy of the model."""
    torch.manual_seed(0)
    model = nets.build("autoencoder", (784,), 784)
    optimizers: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
        "Adam": lambda m: torch.optim.Adam(m.parameters(), lr=1e-3, foreach=True),
        "LocoProp-M T=5": lambda m: LocoProp(m, local_steps=5),
        "LocoProp-M T=5, 250 rows": lambda m: LocoProp(m, local_steps=5, rows=250),
        "LocoProp-M T=9, 64 rows": lambda m: LocoProp(m, local_steps=9, rows=64),
        "LocoProp-M T=9, 32 rows": lambda m: LocoProp(m, local_steps=9, rows=32),
        "LocoProp quadratic T=5": lambda m: LocoProp(m, local_steps=5, loss="quadratic"),
        "LocoProp-S T=10, Gram": lambda m: LocoProp(m, local_steps=10, loss="squared", gram=True),
        "LocoProp-S T=10, direct": lambda m: LocoProp(m, local_steps=10, loss="squared", gram=False),
    }
    steps = {}
    for name, build in optimizers.items():
        own = copy.deepcopy(model)
        steps[name] = loop(own, x, build(own), None)
    for name, nesterov in (("projection + momentum", False), ("projection + Nesterov", True)):
        own = copy.deepcopy(model)
        sgd = torch.optim.SGD(own.parameters(), lr=0.1, momentum=0.9, nesterov=nesterov)
        steps[name] = loop(own, x, sgd, AffineProjection(own))
    steps["floor"] = floor([784, *(m.out_features for m in model.modules() if isinstance(m, nn.Linear))], 5)
    return steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    images = data.load("mnist", download=False, standardize=False).x_train[:BATCH].flatten(1)
    steps = contenders(images)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(-2, arguments.rounds):  # the first rounds warm up
        for name, step in steps.items():
            start = time.process_time()
            step()
            if turn >= 0:
                seconds[name].append(time.process_time() - start)
    ratio = partial(_ratio, seconds)
    print(f"{arguments.threads} thread(s); Adam {1e3 * statistics.median(seconds['Adam']):.0f} ms a step")
    print(f"{'':28} {'/ Adam':>8}")
    for name in steps:
        print(f"{name:28} {ratio(name, 'Adam'):>8.2f}")
    print(f"LocoProp-M T=5 / floor of its own products: {ratio('LocoProp-M T=5', 'floor'):.2f}")
    print(f"LocoProp-S T=10 direct / Gram: {ratio('LocoProp-S T=10, direct', 'LocoProp-S T=10, Gram'):.2f}")


def _ratio(seconds: dict[str, list[float]], name: str, base: str) -> float:
    return statistics.median(a / b for a, b in zip(seconds[name], seconds[base], strict=True))


if __name__ == "__main__":
    main()
