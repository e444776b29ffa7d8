"""Step time of a rule against autograd with foreach Adam, on the same network, interleaved in one process.

    python benchmarks/step_time.py [--threads 1] [--rounds 20] [--net mlp:100x2 ...]

Prints the median process CPU time of a step, and ratios of medians. `autograd` is what a user writes by hand:
`zero_grad`, `loss.backward()`, foreach Adam, no finite check; `autograd, fused` is the same with the fused kernel that
`AltMin` takes by default, so that both effects can be told apart. `floor` is the ratio of floating-point operations alone.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from beyondprop import AltMin, Backprop, data, nets

Step = Callable[[torch.Tensor, torch.Tensor], object]

ADAM = {"foreach": {"foreach": True}, "fused": {"fused": True}}


def by_hand(model: nn.Module, optimizer: torch.optim.Optimizer) -> Step:
    """Return the step that a user writes."""
    loss_function = nn.CrossEntropyLoss()

    def step(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        optimizer.zero_grad(set_to_none=True)
        loss = loss_function(model(x), y)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def contenders(model: nn.Module) -> dict[str, Step]:
    """Return the steps to compare, each on its own copy of the model."""
    steps: dict[str, Step] = {}
    for kind, options in ADAM.items():
        adam = partial(torch.optim.Adam, lr=1e-3, **options)
        own = copy.deepcopy(model)
        steps[f"autograd, {kind}"] = by_hand(own, adam(own.parameters()))
        steps[f"Backprop, {kind}"] = Backprop(copy.deepcopy(model), nn.CrossEntropyLoss(), adam).step
        for solver in ("gradient", "line_search", "cg"):
            rule = AltMin(copy.deepcopy(model), nn.CrossEntropyLoss(), adam, code_solver=solver)
            steps[f"AltMin {solver}, {kind}"] = rule.step
    return steps


def measure(steps: dict[str, Step], batches: list[tuple[torch.Tensor, torch.Tensor]], rounds: int) -> dict[str, float]:
    """Return the median CPU seconds of every step; contenders take turns, a block of steps each, so that caches are warm."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(-1, rounds):  # the first round warms up
        for name, step in steps.items():
            for x, y in batches:
                start = time.process_time()
                step(x, y)
                if turn >= 0:
                    times[name].append(time.process_time() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def operations(step: Step, x: torch.Tensor, y: torch.Tensor) -> int:
    """Return the floating-point operations of one step's products."""
    with FlopCounterMode(display=False) as counter:
        step(x, y)
    return counter.get_total_flops()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--net", nargs="+", default=["mlp:100x2", "mlp:500x2", "mlp:100x8"])
    parser.add_argument("--batch", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    mnist = data.load("mnist", download=False)
    for net in arguments.net:
        torch.manual_seed(0)
        model = nets.build(net, (1, 28, 28), 10)
        batches = list(
            itertools.islice(data.batches(mnist.x_train, mnist.y_train, arguments.batch, generator=None), 10)
        )
        steps = contenders(model)
        seconds = measure(steps, batches, arguments.rounds)
        base = seconds["autograd, foreach"]
        work = {name: operations(step, *batches[0]) for name, step in steps.items()}
        print(f"\n{net}, batch {arguments.batch}, {arguments.threads} thread(s): {base * 1e3:.2f} ms")
        print(f"  {'':32} {'/ autograd foreach':>20} {'/ autograd, same Adam':>22} {'floor':>7}")
        for name, value in seconds.items():
            same = seconds["autograd, " + name.rsplit(", ", 1)[1]]
            floor = work[name] / work["autograd, foreach"]
            print(f"  {name:32} {value / base:>20.3f} {value / same:>22.3f} {floor:>7.3f}")


if __name__ == "__main__":
    main()
