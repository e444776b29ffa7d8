"""Race optimizers on one problem: by equal CPU time or by equal epochs, learning rates tuned alike, several seeds.

Equal time is turned into steps once: the cost of every contender's step is measured in one process where contenders take
turns, and each then runs as many steps as fit into the time of the pacemaker's epochs. So a run is repeatable on any
machine load. Every finished run is a line of a JSON lines file, and is not done again.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from contenders import CONTENDERS, Contender
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from beyondprop import NonFiniteError

WARM_UP = 0.05  # of a run's steps
HIGHEST_LOSS = 1000.0  # a loss above it, or not a number, ends the run as failed
BLOCK = 20  # steps timed together: a multiple of the period of every preconditioner in CONTENDERS
POINTS = 25  # of a curve

Record = dict[str, Any]


@dataclass(frozen=True)
class Problem:
    """What is raced on.

    Attributes:
        name: Identifies the problem in the file of results: data, network, activation.
        build: Draws a new model from torch's global generator.
        loss: `loss(output, target)`, a mean over the batch.
        x: Training inputs `(N, ...)`.
        y: Training targets `(N, ...)`.
        scored: Inputs and targets that runs are scored on; None for the training rows.
        measure: What is scored, like `loss`; None for the loss.
        label: What figures call the score.
        batch: Rows of a batch; the remainder of an epoch is dropped.
        pacemaker: The contender whose epochs are the unit of time.
        reference: The contender that step times are quoted against; None for the pacemaker.
        curve_rows: Scored rows that a curve's points are taken on.
    """

    name: str
    build: Callable[[], nn.Module]
    loss: Callable[[Tensor, Tensor], Tensor]
    x: Tensor
    y: Tensor
    scored: tuple[Tensor, Tensor] | None = None
    measure: Callable[[Tensor, Tensor], Tensor] | None = None
    label: str = "loss"
    batch: int = 1000
    pacemaker: str = "rmsprop"
    reference: str | None = None
    curve_rows: int = 10_000

    @property
    def epoch(self) -> int:
        """Steps of an epoch."""
        return len(self.x) // self.batch

    def hold_out(self, count: int) -> Problem:
        """Return the same problem without `count` drawn training rows, scored on them."""
        order = torch.randperm(len(self.x), generator=torch.Generator().manual_seed(0))
        held, kept = order[:count].sort().values, order[count:].sort().values
        return replace(self, x=self.x[kept], y=self.y[kept], scored=(self.x[held], self.y[held]))

    def batches(self, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield batches without end, shuffled anew in each epoch; equal seeds give equal batches."""
        generator = torch.Generator().manual_seed(seed)
        while True:
            order = torch.randperm(len(self.x), generator=generator)
            for rows in order[: self.epoch * self.batch].split(self.batch):
                yield self.x[rows], self.y[rows]

    @torch.no_grad()
    def score(self, model: nn.Module, rows: int | None = None) -> float:
        """Return the mean score over the first `rows` scored rows, all where None; the model is in evaluation mode."""
        x, y = self.scored or (self.x, self.y)
        measure, total = self.measure or self.loss, 0.0
        model.eval()  # also tells preconditioners that these inputs are not for them
        for a, b in zip(x[:rows].split(2 * self.batch), y[:rows].split(2 * self.batch), strict=True):
            total += measure(model(a), b).item() * len(a)
        model.train()
        return total / len(x[:rows])


def factor(step: int, steps: int) -> float:
    """Return the learning rate's factor in a step, from 0: linear warm-up over 5 % of the steps, then linear to 0."""
    warm = max(1, round(WARM_UP * steps))
    return min((step + 1) / warm, max(0.0, (steps - step) / max(1, steps - warm)))


class Trainer:
    """One contender on one model: `step(x, y)` trains, and adds to the CPU seconds that training took."""

    def __init__(self, problem: Problem, contender: Contender, lr: float, seed: int, steps: int) -> None:
        torch.manual_seed(seed)
        self.model = problem.build()
        self.loss = problem.loss
        self.optimizer, self.preconditioner = contender.build(self.model, lr)
        self.scheduler = LambdaLR(self.optimizer, lambda step: factor(step, steps))
        self.seconds = 0.0

    def step(self, x: Tensor, y: Tensor) -> float:
        """Train on a batch and return its loss before."""
        start = time.process_time()
        self.optimizer.zero_grad()
        loss = self.loss(self.model(x), y)
        loss.backward()
        if self.preconditioner is not None:
            self.preconditioner.step()
        self.optimizer.step()
        self.scheduler.step()
        value = loss.item()
        self.seconds += time.process_time() - start
        return value


def train(problem: Problem, contender: Contender, lr: float, seed: int, steps: int) -> Record:
    """Train and return `final` (None where the run failed, `reason` says how), `seconds` and `curve`.

    The curve holds `[steps done, CPU seconds, score of the first problem.curve_rows]`; scoring is outside the clock.
    """
    trainer = Trainer(problem, contender, lr, seed, steps)
    marks = {round(steps * k / POINTS) for k in range(1, POINTS + 1)}
    curve: list[list[float]] = []
    reason = None
    for done, (x, y) in enumerate(problem.batches(seed), start=1):
        try:
            loss = trainer.step(x, y)
        except (NonFiniteError, torch.linalg.LinAlgError) as error:  # pyright: ignore[reportPrivateImportUsage]
            loss, reason = math.nan, f"{type(error).__name__}: {error}"
        if not loss <= HIGHEST_LOSS:  # also where it is not a number
            reason = reason or f"loss {loss:.4g}"
            break
        if done in marks:
            curve.append([done, round(trainer.seconds, 2), round(problem.score(trainer.model, problem.curve_rows), 3)])
        if done == steps:
            break
    final = math.nan if reason else problem.score(trainer.model)
    if reason is None and not final <= HIGHEST_LOSS:
        reason = f"final score {final:.4g}"
    return {
        "final": None if reason else round(final, 4),
        "reason": reason,
        "seconds": round(trainer.seconds, 2),
        "curve": curve,
    }


def step_costs(problem: Problem, names: Sequence[str], rounds: int = 5) -> dict[str, float]:
    """Return every contender's CPU seconds of a step, as multiples of the pacemaker's.

    Contenders take turns in one process, a block of 20 steps each, so that what happens every 10th or 20th step is in
    every block; the ratio is the median over rounds of the ratio within a round, and a first round warms up.
    """
    names = list(dict.fromkeys((problem.pacemaker, *names)))
    trainers = {n: Trainer(problem, CONTENDERS[n], CONTENDERS[n].grid[0], 0, 20 * BLOCK * rounds) for n in names}
    batches = [batch for batch, _ in zip(problem.batches(0), range(BLOCK), strict=False)]
    blocks: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(-1, rounds):
        for name, trainer in trainers.items():
            trainer.seconds = 0.0
            for x, y in batches:
                trainer.step(x, y)
            if turn >= 0:
                blocks[name].append(trainer.seconds / BLOCK)
    pace = blocks[problem.pacemaker]
    print(f"step of {problem.pacemaker}: {1e3 * statistics.median(pace):.0f} ms of CPU time", flush=True)
    return {n: statistics.median(a / b for a, b in zip(blocks[n], pace, strict=True)) for n in names}


class Results:
    """A file of JSON lines: a `cost` line for every contender's step, a `run` line for every finished run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.records: list[Record] = []
        if path.exists():
            text = path.read_text()
            *whole, cut_off = text.split("\n")
            self.records = [json.loads(line) for line in whole]
            if cut_off:  # the last line lacks its end: writing was interrupted
                path.write_text(text.removesuffix(cut_off))

    def add(self, record: Record) -> Record:
        """Append a record to the file."""
        self.records.append(record)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")
        return record

    def find(self, **fields: object) -> list[Record]:
        """Return the records that have all these fields."""
        return [r for r in self.records if all(r.get(key) == value for key, value in fields.items())]

    def costs(self, problem: Problem, names: Sequence[str], rounds: int = 5) -> dict[str, float]:
        """Return the costs of steps in the pacemaker's, measuring those of contenders that the file lacks."""
        known = {r["contender"]: r["cost"] for r in self.find(kind="cost", problem=problem.name)}
        missing = [name for name in (problem.reference or problem.pacemaker, *names) if name not in known]
        if missing:
            for name, cost in step_costs(problem, missing, rounds).items():
                if name not in known:
                    self.add({"kind": "cost", "problem": problem.name, "contender": name, "cost": round(cost, 4)})
                    known[name] = round(cost, 4)
        return known

    def run(
        self, problem: Problem, name: str, *, phase: str, budget: str, lr: float, seed: int, steps: int, cost: float
    ) -> Record:
        """Return a run's record, from the file where it was finished before."""
        key = {"kind": "run", "problem": problem.name, "phase": phase, "budget": budget, "contender": name}
        key |= {"lr": lr, "seed": seed, "steps": steps}
        if found := self.find(**key):
            return found[-1]
        result = train(problem, CONTENDERS[name], lr, seed, steps)
        record = self.add({**key, "epochs": round(steps / problem.epoch, 3), "cost": cost, **result})
        shown = record["reason"] or f"{record['final']:.2f}"
        print(f"  {phase} {name} lr {lr:g} seed {seed}: {shown} ({record['seconds']:.0f} s, {steps} steps)", flush=True)
        return record


def steps_within(epochs: float, epoch: int, cost: float | None) -> int:
    """Return the steps of a run: these epochs, or, given the cost of a step, their time's worth of it."""
    return max(1, math.floor(epochs * epoch / (1.0 if cost is None else cost)))


def tune(
    results: Results,
    problem: Problem,
    names: Sequence[str],
    *,
    epochs: float,
    timed: bool,
    share: float = 1 / 3,
    held_out: int = 10_000,
) -> dict[str, float]:
    """Return every contender's best learning rate of its four: a share of the budget, seed 100, held-out training rows.

    Where all four fail, lower rates follow, each a third of the one before; a contender that fails at three of those,
    too, is left out.
    """
    costs = results.costs(problem, names)
    held = problem.hold_out(held_out)
    best = {}
    for name in names:
        contender = CONTENDERS[name]
        budget = f"{epochs:g} {'pacemaker epochs' if timed else 'epochs'}"
        # A share of the steps of a whole run; an epoch of the rows that are left is shorter.
        steps = max(1, math.floor(share * steps_within(epochs, problem.epoch, costs[name] if timed else None)))
        scores: dict[float, float] = {}
        lower = [min(contender.grid) / 3**k for k in (1, 2, 3)]
        for lr in (*contender.grid, *lower):
            if lr in lower and min(scores.values()) < math.inf:
                break
            run = results.run(held, name, phase="tune", budget=budget, lr=lr, seed=100, steps=steps, cost=costs[name])
            scores[lr] = math.inf if run["final"] is None else run["final"]
        lr = min(scores, key=lambda rate: scores[rate])
        if scores[lr] == math.inf:
            print(f"{name}: failed at every learning rate")
            continue
        best[name] = lr
        edge = ", at the edge of the grid" if lr in {min(scores), max(scores)} else ""
        print(f"{name}: lr {lr:g}{edge}; " + ", ".join(f"{r:g}: {s:.2f}" for r, s in scores.items()), flush=True)
    return best


def race(
    results: Results, problem: Problem, rates: dict[str, float], *, epochs: float, timed: bool, seeds: Sequence[int]
) -> list[Record]:
    """Train every contender at its learning rate over the seeds, on all training rows; return the runs."""
    costs = results.costs(problem, list(rates))
    budget = f"{epochs:g} {'pacemaker epochs' if timed else 'epochs'}"
    runs = []
    for name, lr in rates.items():
        steps = steps_within(epochs, problem.epoch, costs[name] if timed else None)
        key: Record = {"phase": "final", "budget": budget, "lr": lr, "steps": steps, "cost": costs[name]}
        runs += [results.run(problem, name, seed=seed, **key) for seed in seeds]
    return runs


def table(runs: Sequence[Record], costs: dict[str, float], problem: Problem) -> str:
    """Return a text table of final runs, best mean first."""
    reference = problem.reference or problem.pacemaker
    lines = [f"{'':34} {'lr':>7} {'step':>6} {'epochs':>7} {'time':>6} {'final':>9}  {'lowest to highest':17}"]
    ranked = []
    for name in dict.fromkeys(run["contender"] for run in runs):
        own = [run for run in runs if run["contender"] == name]
        finals = [math.inf if run["final"] is None else run["final"] for run in own]
        epochs = own[0]["epochs"]
        start = f"{CONTENDERS[name].title:34} {own[0]['lr']:>7g} {costs[name] / costs[reference]:>6.2f} {epochs:>7.2f} "
        start += f"{epochs * costs[name]:>6.1f} "
        if math.inf in finals:
            end = f"failed: {sum(f == math.inf for f in finals)} of {len(finals)} seeds"
        else:
            end = f"{statistics.mean(finals):>9.2f}  {min(finals):.2f} to {max(finals):.2f}"
        ranked.append((statistics.mean(finals), start + end))
    lines += [line for _, line in sorted(ranked)]
    step, unit = CONTENDERS[reference].title, CONTENDERS[problem.pacemaker].title
    return "\n".join([
        *lines,
        "",
        f"step: CPU time in steps of {step}; time: in epochs of {unit}; final: mean over seeds",
    ])


# Okabe and Ito's palette and dark tones of Paul Tol's; where a colour comes twice, the line tells.
SOLID, DASHED, DOTTED, MIXED = "-", (0, (5, 1.6)), (0, (1.2, 1.3)), (0, (5, 1.4, 1.2, 1.4))
LOOKS: dict[str, tuple[tuple[tuple[str, Any], ...], float]] = {
    "locoprop": ((("#0072B2", SOLID), ("#D55E00", SOLID), ("#56B4E9", SOLID)), 2.8),
    "projection": ((("#009E73", SOLID), ("#009E73", DASHED), ("#009E73", DOTTED), ("#009E73", MIXED)), 1.8),
    "second": ((("#CC79A7", SOLID), ("#882255", DASHED), ("#332288", DOTTED), ("#E69F00", MIXED)), 1.5),
    "first": (tuple((c, line) for c in ("#a0a0a0", "#222222") for line in (SOLID, DASHED, DOTTED, MIXED)), 1.2),
}


def looks() -> dict[str, dict[str, Any]]:
    """Return matplotlib's settings of every contender's line: the same in every figure."""
    found = {}
    for kind, (pairs, width) in LOOKS.items():
        for i, name in enumerate(name for name, contender in CONTENDERS.items() if contender.kind == kind):
            color, line = pairs[i % len(pairs)]
            found[name] = {"color": color, "linestyle": line, "linewidth": width, "zorder": 2 + width}
    return found


def figure(runs: Sequence[Record], path: Path, title: str, limits: tuple[float, float], problem: Problem) -> None:
    """Draw the score against epochs and against time, means over seeds; the legend is in the order of the results."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    settings: dict[Any, Any] = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True}
    settings |= {"grid.color": "#e6e6e6", "axes.axisbelow": True, "axes.edgecolor": "#444444"}
    look = looks()
    entries = []
    with plt.rc_context(settings):
        canvas, axes = plt.subplots(1, 2, figsize=(12, 5.4), sharey=True, layout="constrained")
        for name in dict.fromkeys(run["contender"] for run in runs):
            own = [run for run in runs if run["contender"] == name and run["final"] is not None]
            if not own:
                continue
            losses = [
                statistics.mean(points) for points in zip(*([p[2] for p in run["curve"]] for run in own), strict=True)
            ]
            share = [point[0] / own[0]["steps"] for point in own[0]["curve"]]
            epochs, final = own[0]["epochs"], statistics.mean(run["final"] for run in own)
            axes[0].plot([epochs * s for s in share], losses, **look[name])
            (line,) = axes[1].plot([epochs * own[0]["cost"] * s for s in share], losses, **look[name])
            entries.append((final, f"{CONTENDERS[name].title}  {final:#.3g}", line))
        for axis, label in zip(
            axes, ("epochs", f"CPU time, in epochs of {CONTENDERS[problem.pacemaker].title}"), strict=True
        ):
            axis.set_xlabel(label)
            axis.set_xlim(left=0)
        axes[0].set_yscale("log")
        axes[0].set_ylim(*limits)
        leading = (1, 1.2, 1.5, 2, 2.5, 3, 3.5, 4, 4.5, 5, 5.5, 6, 7, 8, 9)
        ticks = [t for k in range(-3, 4) for d in leading if limits[0] <= (t := d * 10.0**k) <= limits[1]]
        axes[0].yaxis.set_major_locator(FixedLocator(ticks))
        axes[0].yaxis.set_minor_locator(NullLocator())
        axes[0].yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        rows = len((problem.scored or (problem.x,))[0])
        axes[0].set_ylabel(
            problem.label + (f", first {problem.curve_rows:,} rows" if rows > problem.curve_rows else "")
        )
        entries.sort(key=lambda entry: entry[0])
        canvas.legend(
            [line for *_, line in entries],
            [label for _, label, _ in entries],
            loc="outside right upper",
            title="at the end, on all rows, best first",
            frameon=False,
            handlelength=3.2,
            alignment="left",
        )
        canvas.suptitle(title, fontsize=10)
        path.parent.mkdir(parents=True, exist_ok=True)
        canvas.savefig(path, dpi=150)
        plt.close(canvas)
