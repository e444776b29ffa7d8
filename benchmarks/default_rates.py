"""Whether every default contender of `compare` trains at its default learning rate, whatever the batch size and the data.

    BEYONDPROP_DATA=... python benchmarks/default_rates.py [--data mnist ...] [--batch 1 ...] [--net mlp:100x2] [--json FILE]

A short comparison for each data set and batch size, one seed: the first metric on the test rows, accuracy in percent (of
numbers R squared), before training and after it, with a constant rate and with one that falls to 0; `stopped@n` where a
training failed. It exits with 1 where a contender stopped, or with the falling rate, `compare`'s own, is no better than before.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch

from beyondprop.lab import Settings, compare, tasks
from beyondprop.lab.runs import Run, read_run

DATA = ("digits", "mnist", "fashion-mnist", "cifar10", "diabetes", "higgs")
STEPS = {1: 300, 10: 200, 50: 100, 200: 60, 1000: 20}


def settings(data: str, rows: int, batch: int, **own: Any) -> Settings:
    """Return those of a comparison of so many steps as the batch size has in `STEPS`, on `rows` rows."""
    steps = STEPS.get(batch, 100)
    epochs = steps / -(-rows // batch)
    return Settings(
        data=data, batch_size=batch, epochs=epochs, seeds=(0,), evaluate_every=steps, alignment=False, **own
    )  # fmt: skip


def ends(run: Run, rule: str) -> tuple[float, float | str]:
    """Return a contender's first metric before training and after it, or the step that it stopped at."""
    key = run.metrics[0].key
    rows = run.of("eval", rule, 0)
    failed = run.of("failed", rule, 0)
    return rows[0][key], f"stopped@{failed[0]['step']}" if failed else rows[-1][key]


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
    found, wrong = [], 0
    for data in options.data:
        count = len(tasks.load(data).x_train)
        for batch in options.batch:
            with tempfile.TemporaryDirectory() as out:
                runs = [
                    read_run(compare(
                        settings(data, count, batch, rules=tuple(options.rule), nets=(options.net,), schedule=schedule),
                        out=Path(out) / schedule,
                    ))
                    for schedule in ("constant", "linear")
                ]  # fmt: skip
            for name in options.rule:
                (before, constant), (_, linear) = (ends(run, name) for run in runs)
                after = [constant, linear]
                fine = isinstance(constant, float) and isinstance(linear, float) and linear > before
                wrong += not fine
                found.append({"data": data, "rule": name, "batch": batch, "before": before, "after": after})
                shown = [f"{100 * v:.1f}" if isinstance(v, float) else v for v in (before, *after)]
                line = f"{data:14} {name:16} batch {batch:4}, {STEPS.get(batch, 100):3} steps: {shown[0]:>7} ->"
                print(line, *shown[1:], "" if fine else "  FAILS", flush=True)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
