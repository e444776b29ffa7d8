"""Peak memory of a training step beyond the model and optimizer state, against plain backpropagation's.

    python benchmarks/memory.py [--batch 200] [--net mlp:100x2 ...]

Counts the bytes that torch's allocator hands out (the profiler's memory events on a CPU, the allocator's own peak on CUDA), so
neither Python's memory nor the C library's fragmentation is in the figure. `step` is the peak over one step above what stands
before it (weights, optimizer state, the batch); `all` includes weights and optimizer state, which is what a machine must hold.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from beyondprop import AltMin, Backprop, LearningRule
from beyondprop.lab import nets


def peak(step: Callable[[], object]) -> int:
    """Return the most bytes that stood allocated at once during `step`, beyond those before it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, record_shapes=False) as profiler:
        step()
    events: list[Any] = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]  # type: ignore[union-attr]
    events.sort(key=lambda e: e.start_ns())
    standing = highest = 0
    for event in events:
        standing += event.nbytes()
        highest = max(highest, standing)
    return highest


def resident(rule: LearningRule) -> int:
    """Return the bytes of weights, buffers and optimizer state."""
    tensors = [*rule.model.parameters(), *rule.model.buffers()]
    for optimizer in rule.optimizers:
        tensors += [v for s in optimizer.state.values() for v in s.values() if isinstance(v, torch.Tensor)]
    return sum(t.numel() * t.element_size() for t in tensors)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--net", nargs="+", default=["mlp:100x2", "mlp:500x2", "mlp:100x8", "lenet5", "conv:32x4:bn"])
    parser.add_argument("--batch", type=int, default=200)
    arguments = parser.parse_args()
    adam = partial(torch.optim.Adam, lr=1e-3)
    for net in arguments.net:
        torch.manual_seed(0)
        model = nets.build(net, (1, 28, 28), 10)
        x, y = torch.randn(arguments.batch, 1, 28, 28), torch.randint(10, (arguments.batch,))
        rules: dict[str, LearningRule] = {"Backprop": Backprop(copy.deepcopy(model), nn.CrossEntropyLoss(), adam)}
        for solver in ("gradient", "line_search", "cg"):
            rules[f"AltMin {solver}"] = AltMin(copy.deepcopy(model), nn.CrossEntropyLoss(), adam, code_solver=solver)
        print(f"\n{net}, batch {arguments.batch}")
        base: tuple[int, int] | None = None
        for name, rule in rules.items():
            for _ in range(3):
                rule.step(x, y)
            step = peak(partial(rule.step, x, y))
            whole = step + resident(rule)
            base = base or (step, whole)
            print(
                f"  {name:20} step {step / 2**20:7.2f} MiB ({step / base[0]:.2f})   all {whole / 2**20:7.2f} MiB "
                f"({whole / base[1]:.2f})"
            )


if __name__ == "__main__":
    main()
