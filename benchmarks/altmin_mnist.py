"""Alternating minimization on MNIST beside backpropagation: accuracy, depth, first batches, and whether every stage trains.

    BEYONDPROP_DATA=... python benchmarks/altmin_mnist.py [--rows accuracy depth8 ...] [--out DIR] [--json FILE]

Every contender gets the same grid of learning rates, tuned with one seed on 10,000 of the training rows that are held out;
then three seeds train on all 60,000 with the chosen rate, decayed linearly to 0. Test rows decide nothing. A row is a run
directory, and goes on where it was stopped; `--json` writes what `results/altmin_mnist.json` has: for each row and contender
the rate, the test accuracies of all seeds in percent and, of `memory`, their curves by step; for `stages` each depth's changes.
"""

from __future__ import annotations

import argparse
import json
import warnings
from pathlib import Path
from statistics import fmean

import torch
from race import recorded
from torch import nn

from beyondprop import AltMin, data
from beyondprop.lab import RuleSpec, Settings, nets, registry
from beyondprop.lab.training import fit
from beyondprop.optim.factories import adam

BATCH = 200
ADAM_GRID = (1e-3, 2e-3, 3e-3, 5e-3, 8e-3)
MEMORY_GRID = (0.5, 1.0, 2.0, 4.0)
SEEDS, TUNING_SEED = (0, 1, 2), 100
NEVER = 10**9  # steps: the evaluation at the end is the only one that counts

AM_ADAM, ADAM, AM_MEM = (
    ("am-adam", "AM-Adam", ADAM_GRID),
    ("adam", "Adam", ADAM_GRID),
    ("am-mem", "AM-mem (RLS)", MEMORY_GRID),
)
# The net, whose name with `@torch` keeps torch's own default initialisation; epochs, of 300 steps; contenders; evaluations.
ROWS = {
    "accuracy": ("mlp:100x2", 5.0, (AM_ADAM, ADAM), NEVER),
    "depth8": ("mlp:100x8", 1.0, (AM_ADAM, ADAM), NEVER),
    "depth16": ("mlp:100x16", 1.0, (AM_ADAM, ADAM), NEVER),
    "depth8@torch": ("mlp:100x8@torch", 1.0, (AM_ADAM, ADAM), NEVER),
    "depth16@torch": ("mlp:100x16@torch", 1.0, (AM_ADAM, ADAM), NEVER),
    "memory": ("mlp:100x2", 1.0, (AM_MEM, AM_ADAM, ADAM), 10),
}


def build(net: str) -> nn.Module:
    """Return a freshly drawn network."""
    name, _, initialisation = net.partition("@")
    model = nets.build(name, (1, 28, 28), 10)
    if initialisation:
        for module in model.children():
            if isinstance(module, nn.Linear):
                module.reset_parameters()
    return model


def compared(row: str, path: Path, seeds: tuple[int, ...] = SEEDS, epochs: float | None = None) -> dict:
    """Tune, train over the seeds, print and return test accuracies in percent."""
    net, whole, named, every = ROWS[row]
    epochs = epochs or whole
    print(f"\n{net}, {epochs:.3g} epochs of batch {BATCH}")
    rules = [
        RuleSpec(name, title, "", "", registry.rules.get(name).build, grid[0], grid) for name, title, grid in named
    ]
    settings = Settings(
        data="mnist",
        nets=(net,),
        rules=tuple(rule.name for rule in rules),
        epochs=epochs,
        seeds=seeds,
        batch_size=BATCH,
        tune=True,
        tune_seeds=(TUNING_SEED,),
        evaluate_every=every,
        alignment=False,
        device="cpu",
    )
    run = recorded(settings, path, nets={net: lambda input_shape, outputs: build(net)}, rules=rules)
    results: dict = {"net": net, "epochs": epochs}
    for one in run.contenders:
        finals, curves = [], []
        for seed in seeds:
            found = run.of("eval", one.name, seed)
            finals.append(100 * found[-1]["accuracy"])
            curves.append({e["step"]: round(100 * e["accuracy"], 2) for e in found})
        lr, mean = one.settings["lr"], sum(finals) / len(finals)
        print(f"  {one.title:14} lr {lr:<6g} {mean:.2f} %  ({min(finals):.2f} to {max(finals):.2f})", flush=True)
        results[one.title] = {"lr": lr, "finals": finals, "mean": mean, "curves": curves if every < NEVER else None}
        if every < NEVER:
            shown = [f"{k}: {fmean(c[k] for c in curves):.1f}" for k in (10, 20, 50, 100, 300) if k in curves[0]]
            print(f"  {'':14} after batches " + ", ".join(shown))
    return results


def stages() -> dict:
    """Return every stage's relative weight change after 300 steps, by depth; prints the least and the most mobile."""
    print("\nrelative weight change of every stage after 300 steps, AM-Adam lr 0.002")
    dataset = data.load("mnist")
    results = {}
    for depth in (2, 4, 8, 12, 16):
        torch.manual_seed(0)
        rule = AltMin(build(f"mlp:100x{depth}"), nn.CrossEntropyLoss(), adam(2e-3))
        before = {n: torch.cat([p.detach().flatten() for p in ps]).clone() for n, ps in rule.stage_parameters().items()}
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            fit(rule, dataset, epochs=1.0, batch_size=BATCH, seed=0, evaluate_every=NEVER)
        change = {}
        for name, parameters in rule.stage_parameters().items():
            now = torch.cat([p.detach().flatten() for p in parameters])
            change[name] = float((now - before[name]).norm() / before[name].norm())
        results[depth] = change
        print(f"  depth {depth:2}: least {min(change.values()):.3f}, most {max(change.values()):.3f}", flush=True)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    every = [*list(ROWS)[:3], "stages", *list(ROWS)[3:]]
    parser.add_argument("--rows", nargs="+", choices=every, default=every)
    parser.add_argument("--out", type=Path, default=Path("runs/altmin_mnist"), metavar="DIR")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    results = {}
    for row in arguments.rows:
        results[row] = stages() if row == "stages" else compared(row, arguments.out / row)
        if arguments.json:
            arguments.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
