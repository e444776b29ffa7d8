"""Step time of a rule against autograd with foreach Adam, on the same network, interleaved in one process.

    python benchmarks/step_time.py [--threads 1] [--clock cpu] [--rounds 40] [--data mnist] [--net mlp:100x2 ...]

Prints the median time of a step (CPU time of the process, or by the wall), and ratios: medians over rounds of the ratio
within a round. `autograd` is what a user writes by hand: `zero_grad`, `loss.backward()`, foreach Adam, no finite check;
`autograd, fused` is the same with the fused kernel that `AltMin` takes by default, so that both effects can be told apart.
`work` is the ratio of floating-point operations alone.
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

from beyondprop import AltMin, Backprop, Codes, Credited, LearningRule, data
from beyondprop.lab import nets
from beyondprop.lab.training import work_per_step

Step = Callable[[torch.Tensor, torch.Tensor], object]

CLOCKS = {"cpu": time.process_time, "wall": time.perf_counter}
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


def contenders(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> tuple[dict[str, Step], dict[str, float]]:
    """Return the steps to compare, each on its own copy of the model, and the work of each in gradient-equivalents."""
    steps: dict[str, Step] = {}
    work = {}
    for kind, options in ADAM.items():
        adam = partial(torch.optim.Adam, lr=1e-3, **options)
        own = copy.deepcopy(model)
        steps[f"autograd, {kind}"] = by_hand(own, adam(own.parameters()))
        work[f"autograd, {kind}"] = 1.0
        rules: dict[str, LearningRule] = {"Backprop": Backprop(copy.deepcopy(model), nn.CrossEntropyLoss(), adam)}
        for solver in ("gradient", "fitted", "line_search", "cg"):
            rules[f"AltMin {solver}"] = AltMin(copy.deepcopy(model), nn.CrossEntropyLoss(), adam, code_solver=solver)
        for name, rule in rules.items():
            steps[f"{name}, {kind}"] = rule.step
            work[f"{name}, {kind}"] = work_per_step(rule, x, y, steps=1)
        for solver in ("gradient", "fitted", "line_search"):
            credited = Credited(copy.deepcopy(model), Codes(solver), nn.CrossEntropyLoss())
            steps[f"Credited {solver}, {kind}"] = by_hand(credited, adam(credited.parameters()))
            work[f"Credited {solver}, {kind}"] = work[f"AltMin {solver}, {kind}"]
    return steps, work


def measure(
    steps: dict[str, Step], batches: list[tuple[torch.Tensor, torch.Tensor]], rounds: int, clock: Callable[[], float]
) -> dict[str, list[float]]:
    """Return every contender's median seconds of a step in each round.

    Contenders take turns, a block of steps each, so that their caches are warm.
    """
    medians: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(-1, rounds):  # the first round warms up
        for name, step in steps.items():
            times = []
            for x, y in batches:
                start = clock()
                step(x, y)
                times.append(clock() - start)
            if turn >= 0:
                medians[name].append(statistics.median(times))
    return medians


def ratio(seconds: dict[str, list[float]], name: str, base: str) -> float:
    """Return the median over rounds of the ratio within a round: the machine's own ups and downs are in both."""
    return statistics.median(a / b for a, b in zip(seconds[name], seconds[base], strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--net", nargs="+", default=["mlp:100x2", "mlp:500x2", "mlp:100x8"])
    parser.add_argument("--data", default="mnist")
    parser.add_argument("--batch", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--clock", choices=CLOCKS, default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows = data.load(arguments.data, download=False)
    for net in arguments.net:
        torch.manual_seed(0)
        model = nets.build(net, rows.input_shape, rows.num_classes)
        batches = list(itertools.islice(data.batches(rows.x_train, rows.y_train, arguments.batch, generator=None), 10))
        steps, work = contenders(model, *batches[0])
        seconds = measure(steps, batches, arguments.rounds, CLOCKS[arguments.clock])
        milliseconds = statistics.median(seconds["autograd, foreach"]) * 1e3
        print(
            f"\n{net}, batch {arguments.batch}, {arguments.threads} thread(s), {arguments.clock}: {milliseconds:.2f} ms"
        )
        print(f"  {'':32} {'/ autograd foreach':>20} {'/ autograd, same Adam':>22} {'work':>7}")
        for name in seconds:
            same = ratio(seconds, name, "autograd, " + name.rsplit(", ", 1)[1])
            print(f"  {name:32} {ratio(seconds, name, 'autograd, foreach'):>20.3f} {same:>22.3f} {work[name]:>7.3f}")


if __name__ == "__main__":
    main()
