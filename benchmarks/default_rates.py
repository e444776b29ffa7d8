"""Whether every default contender of `compare` trains at its default learning rate, whatever the batch size and the data.

    BEYONDPROP_DATA=... python benchmarks/default_rates.py [--data mnist ...] [--batch 1 ...] [--net mlp:100x2] [--json FILE]

A short run of each contender: accuracy in percent (of numbers R squared), before training and after it, with a constant rate
and with one that falls to 0, as `compare` has it; `stopped@n` where a step was refused. It exits with 1 where a contender
stopped or is no better than before.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import torch

from beyondprop import NonFiniteError
from beyondprop.lab import Settings, registry, tasks

DATA = ("digits", "mnist", "fashion-mnist", "cifar10", "diabetes", "higgs")
STEPS = {1: 300, 10: 200, 50: 100, 200: 60, 1000: 20}
ROWS = 2000
"""Of the test rows, so that looking takes less time than training."""


def trained(
    task: tasks.RowsTask, net: str, rule: registry.RuleSpec, batch: int, steps: int, decay: bool
) -> str | float:
    """Return the task's first metric after a short run, or where the run stopped."""
    torch.manual_seed(0)
    model = task.net(net)
    learner = rule.build(model, task.loss, rule.lr)
    rates = [(group, group["lr"]) for optimizer in learner.optimizers for group in optimizer.param_groups]
    generator = torch.Generator().manual_seed(0)
    for step in range(steps):
        rows = torch.randint(len(task.x_train), (min(batch, len(task.x_train)),), generator=generator)
        for group, lr in rates:
            group["lr"] = lr * (1 - step / steps if decay else 1)
        try:
            learner.step(task.x_train[rows], task.y_train[rows])
        except NonFiniteError:
            return f"stopped@{step}"
    return judged(task, model)


def judged(task: tasks.RowsTask, model: torch.nn.Module) -> float:
    """Return the task's first metric in evaluation mode."""
    return task.evaluate(model)[task.metrics[0].key]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", default=DATA)
    parser.add_argument("--batch", nargs="+", type=int, default=[b for b in STEPS if b < 1000])
    parser.add_argument("--rule", nargs="+", default=Settings().rules)
    parser.add_argument("--net", default="mlp:100x2")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    found, failed = [], 0
    for data in options.data:
        task = tasks.load(data)
        assert isinstance(task, tasks.RowsTask)
        assert task.x_test is not None
        assert task.y_test is not None
        task = replace(task, x_test=task.x_test[:ROWS], y_test=task.y_test[:ROWS])
        torch.manual_seed(0)
        before = judged(task, task.net(options.net))
        for name in options.rule:
            rule = registry.rules.get(name)
            for batch in options.batch:
                steps = STEPS.get(batch, 100)
                after = [trained(task, options.net, rule, batch, steps, decay) for decay in (False, True)]
                fine = all(isinstance(value, float) and value > before for value in after)
                failed += not fine
                found.append({
                    "data": data,
                    "rule": name,
                    "batch": batch,
                    "steps": steps,
                    "before": before,
                    "after": after,
                })
                shown = [f"{100 * v:.1f}" if isinstance(v, float) else v for v in (before, *after)]
                print(
                    f"{data:14} {name:10} batch {batch:4}, {steps:3} steps: {shown[0]:>7} ->",
                    *shown[1:],
                    "" if fine else "  FAILS",
                    flush=True,
                )
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
