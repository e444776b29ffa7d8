"""Races: comparisons by equal CPU time or by equal epochs, learning rates tuned alike, several seeds.

Equal time is turned into steps once: the cost of every contender's step is measured in one process where contenders take
turns, and each then trains for as many steps as fit into the time of the pacemaker's epochs. So a run is repeatable on any
machine load. The rest is `beyondprop.lab.compare`: a race is a run directory, goes on where it was stopped, and
`beyondprop report` draws it.

Older results, `results/autoencoder.jsonl`, `modern.jsonl` and `locoprop_choices.jsonl`, are JSON lines: of kind `cost`, a
contender's step in steps of the pacemaker; of kind `run`, one training with its `phase` (`tune`: on held-out training rows),
`budget`, `lr`, `seed`, `steps`, `final` (null where it failed, `reason` says how), CPU `seconds` and `curve` of
`[steps done, seconds, score on the first rows]`. Contenders go by their names without `-raced` there. `muon-inside` of
`modern.jsonl` never cleared the gradients of its matrices, so that they added up over the steps.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import chain, count, islice
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from beyondprop import NonFiniteError
from beyondprop.cli.progress import Lines
from beyondprop.lab import Metric, RuleSpec, Settings, compare, registry, resume
from beyondprop.lab.report import Run, read_run, write_report
from beyondprop.lab.runs.files import write_atomically
from beyondprop.lab.training import schedules
from beyondprop.nn.functional import evaluation_mode
from beyondprop.stages.losses import LossFunction

SCHEDULE = "warmup:0.05"  # up over 5 % of the steps, then linearly to 0
HIGHEST_LOSS = 1000.0  # a loss above it, or not a number, ends a training as failed
BLOCK = 20  # steps timed together: a multiple of the period of every preconditioner in contenders.py
TUNING_SEED = 100
PLUGIN = str(Path(__file__).with_name("contenders.py"))


@dataclass(frozen=True, kw_only=True, eq=False)
class Problem:
    """What is raced on: a task whose epochs drop the remainder of a batch.

    Attributes:
        name: identifies the problem: data, network, activation.
        form: what the network is called.
        build: draws a new model from torch's global generator.
        criterion: `criterion(output, target)`, a mean over the batch.
        x_train: training inputs `(N, ...)`.
        y_train: training targets `(N, ...)`.
        scored: inputs and targets that models are scored on; None for the training rows.
        measure: what is scored, like `criterion`; None for the criterion.
        label: what tables and figures call the score.
        batch: rows of a batch.
        held: training rows that tuning holds out.
        points: scores that are taken during the pacemaker's epochs.
        pacemaker: the contender whose epochs are the unit of time.
        reference: the contender that step times are quoted against.
    """

    name: str
    form: str
    build: Callable[[], nn.Module]
    criterion: Callable[[Tensor, Tensor], Tensor]
    x_train: Tensor
    y_train: Tensor
    scored: tuple[Tensor, Tensor] | None = None
    measure: Callable[[Tensor, Tensor], Tensor] | None = None
    label: str = "loss"
    batch: int = 1000
    held: int = 10_000
    points: int = 25
    pacemaker: str = "rmsprop"
    reference: str = "rmsprop"
    sample: str = "row"

    @property
    def epoch(self) -> int:
        """Steps of an epoch."""
        return len(self.x_train) // self.batch

    @property
    def epoch_rows(self) -> tuple[int]:
        """Rows of an epoch."""
        return (self.epoch * self.batch,)

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """The score."""
        return (Metric("score", self.label, higher_is_better=False),)

    @property
    def loss(self) -> LossFunction:
        """The criterion; one above `HIGHEST_LOSS` ends the training."""
        criterion = self.criterion

        # A function, no method: rules are copied with their loss, and a method would take all rows along.
        def bounded(output: Tensor, y: Tensor) -> Tensor:
            value = criterion(output, y)
            if not value.item() <= HIGHEST_LOSS:  # also where it is not a number
                raise NonFiniteError(
                    f"The loss of a batch is {value.item():.4g}, not {HIGHEST_LOSS:g} or less.", "loss"
                )
            return value

        return bounded

    def net(self, form: str) -> nn.Module:
        """See `Task.net`; there is one network."""
        del form
        return self.build()

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Return the mean score over all scored rows; NaN, which is a failure, above `HIGHEST_LOSS`."""
        x, y = self.scored or (self.x_train, self.y_train)
        measure, total = self.measure or self.criterion, 0.0
        with evaluation_mode(model):  # also tells preconditioners that these inputs are not for them
            for a, b in zip(x.split(2 * self.batch), y.split(2 * self.batch), strict=True):
                total += measure(model(a), b).item() * len(a)
        score = total / len(x)
        return {"score": score if score <= HIGHEST_LOSS else math.nan}

    def held_out(self, share: float = 0.0) -> Problem:
        """Return the same problem without `held` drawn training rows, scored on them, whatever the share."""
        del share
        order = torch.randperm(len(self.x_train), generator=torch.Generator().manual_seed(0))
        held, kept = order[: self.held].sort().values, order[self.held :].sort().values
        rows = (self.x_train[held], self.y_train[held])
        return replace(self, x_train=self.x_train[kept], y_train=self.y_train[kept], scored=rows)

    def to(self, device: str) -> Problem:
        """See `Task.to`."""
        x, y = self.x_train.to(device), self.y_train.to(device)
        scored = self.scored and (self.scored[0].to(device), self.scored[1].to(device))
        return replace(self, x_train=x, y_train=y, scored=scored)

    def batches(self, epoch: int, batch_size: int, seed: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield an epoch's batches; one generator draws the orders of all epochs, one after the other."""
        generator = torch.Generator().manual_seed(seed)
        orders = (torch.randperm(len(self.x_train), generator=generator) for _ in count())
        order = next(islice(orders, epoch, None)).to(self.x_train.device)
        for rows in order[: self.epoch * batch_size].split(batch_size)[start:]:
            yield self.x_train[rows], self.y_train[rows]


def contenders(names: Sequence[str], problem: Problem) -> list[RuleSpec]:
    """Return registered rules, those of contenders.py among them; what is not installed is said, and left out."""
    registry.load_plugins((PLUGIN,))
    found = []
    for spec in map(registry.rules.get, names):
        try:
            spec.build(problem.build(), problem.loss, spec.lr)
        except ModuleNotFoundError as error:
            print(f"skipping {spec.name}: {error}")
        else:
            found.append(spec)
    return found


def step_costs(problem: Problem, specs: Sequence[RuleSpec], rounds: int) -> dict[str, float]:
    """Return every contender's CPU seconds of a step, as multiples of the first one's.

    Contenders take turns in one process, a block of 20 steps each, so that what happens every 10th or 20th step is in
    every block; the ratio is the median over rounds of the ratio within a round, and a first round warms up.
    """
    trained = {}
    for spec in specs:
        torch.manual_seed(0)
        rule = spec.build(problem.build(), problem.loss, min(spec.grid))
        trained[spec.name] = rule, schedules.attach(rule.optimizers, SCHEDULE, 20 * BLOCK * rounds, problem.epoch)
    epochs = (problem.batches(epoch, problem.batch, 0) for epoch in count())
    batches = list(islice(chain.from_iterable(epochs), BLOCK))
    blocks: dict[str, list[float]] = {name: [] for name in trained}
    for turn in range(-1, rounds):
        for name, (rule, schedulers) in trained.items():
            start = time.process_time()
            for x, y in batches:
                rule.step(x, y)
                for scheduler in schedulers:
                    scheduler.step()
            if turn >= 0:
                blocks[name].append((time.process_time() - start) / BLOCK)
    pace = blocks[specs[0].name]
    print(f"step of {specs[0].name}: {1e3 * statistics.median(pace):.3g} ms of CPU time", flush=True)
    return {n: round(statistics.median(a / b for a, b in zip(blocks[n], pace, strict=True)), 4) for n in blocks}


def costs(problem: Problem, specs: Sequence[RuleSpec], file: Path, rounds: int = 5) -> dict[str, float]:
    """Return the costs of steps in the pacemaker's, measuring, and adding to the file, those that it lacks.

    Args:
        problem: what is trained.
        specs: the contenders, pacemaker and reference of the problem among them or registered.
        file: JSON, kept so that a race that goes on has the same numbers of steps.
        rounds: of the measurement.

    Raises:
        ValueError: if the file has the costs on another problem.
    """
    kept = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {"problem": problem.name, "costs": {}}
    if kept["problem"] != problem.name:
        raise ValueError(f"{str(file)!r} is of {kept['problem']!r}, not of {problem.name!r}; choose another --out.")
    own = {spec.name: spec for spec in specs}
    wanted = dict.fromkeys((problem.pacemaker, problem.reference, *own))
    if missing := [name for name in wanted if name not in kept["costs"]]:
        measured = [own.get(name) or registry.rules.get(name) for name in dict.fromkeys((problem.pacemaker, *missing))]
        kept["costs"] = step_costs(problem, measured, rounds) | kept["costs"]
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, json.dumps(kept, indent=1).encode())
    return kept["costs"]


def timed(problem: Problem, specs: Sequence[RuleSpec], cost: Mapping[str, float], epochs: float) -> list[RuleSpec]:
    """Return rules that train for the whole steps that fit into the time of these epochs of the pacemaker's."""
    found = []
    for spec in specs:
        steps = max(1, math.floor(epochs * problem.epoch / cost[spec.name]))
        found.append(replace(spec, cost=epochs * problem.epoch / steps))
    return found


def race(
    problem: Problem,
    specs: Sequence[RuleSpec],
    path: Path,
    *,
    epochs: float,
    seeds: Sequence[int],
    share: float | None = None,
    rates: Mapping[str, float] | None = None,
) -> Run:
    """Train every contender over the seeds, on all training rows, or go on with it; return what was recorded.

    Args:
        problem: what is trained.
        specs: the contenders, with their costs.
        path: the run directory.
        epochs: the pacemaker's.
        seeds: of the trainings.
        share: of a run's steps, rounded, after which a rate is chosen of the four: seed 100, held-out training rows. None:
            rules keep their own rates.
        rates: learning rates by hand, which are not tuned.
    """
    steps = epochs * problem.epoch
    settings = Settings(
        nets=(problem.form,),
        rules=tuple(spec.name for spec in specs),
        epochs=epochs,
        seeds=tuple(seeds),
        batch_size=problem.batch,
        schedule=SCHEDULE,
        lr=rates or {},
        tune=share is not None,
        # The epochs of the rows that are left are shorter.
        tune_epochs=None if share is None else share * steps / ((len(problem.x_train) - problem.held) // problem.batch),
        tune_seeds=() if share is None else (TUNING_SEED,),
        evaluate_every=max(1, round(steps / problem.points)),
        alignment=False,
        device="cpu",
    )
    nets = {problem.form: lambda input_shape, outputs: problem.build()}
    return recorded(settings, path, task=problem, nets=nets, rules=specs)


def recorded(settings: Settings, path: Path, **own: Any) -> Run:
    """Return a comparison's recorded run; it is run, or goes on, where it is not done.

    Args:
        settings: what is compared.
        path: the run directory.
        **own: `task`, `nets` and `rules`, as `compare` takes them.

    Raises:
        ValueError: if the directory holds a comparison of other settings.
    """
    observer = Lines(Console())
    if (path / "config.toml").is_file():
        before = Settings.from_config(read_run(path).config)
        own_fields = (f.name for f in fields(settings) if f.name != "device")
        differing = [name for name in own_fields if getattr(before, name) != getattr(settings, name)]
        if differing:
            raise ValueError(
                f"{str(path)!r} holds a run with other {', '.join(differing)}; choose another --out, or remove it."
            )
        resume(path, observer=observer, **own)
    else:
        compare(settings, out=path, observer=observer, **own)
    return read_run(path)


def table(run: Run, problem: Problem, cost: Mapping[str, float]) -> str:
    """Return a text table of a race, best mean first."""
    lines = [f"{'':34} {'lr':>7} {'step':>6} {'epochs':>7} {'time':>6} {'final':>9}  {'lowest to highest':17}"]
    ranked = []
    for one in run.contenders:
        ended = run.seeds(one.name)
        last = [run.of("eval", one.name, seed)[-1] for seed in ended["done"]]
        finals = [row["score"] for row in last if row["score"] is not None]  # null: above the highest loss
        failed = len(ended["failed"]) + len(last) - len(finals)
        epochs = last[0]["epoch"] if last else run.config["epochs"] / one.settings.get("cost", 1.0)
        step = cost[one.name]
        line = f"{one.title:34} {one.settings['lr']:>7.4g} {step / cost[problem.reference]:>6.2f} {epochs:>7.2f} "
        line += f"{epochs * step:>6.1f} "
        if failed or not finals:
            ranked.append((math.inf, f"{line}failed: {failed} of {failed + len(finals)} seeds"))
        else:
            mean = statistics.fmean(finals)
            ranked.append((mean, f"{line}{mean:>9.2f}  {min(finals):.2f} to {max(finals):.2f}"))
    lines += [line for _, line in sorted(ranked)]
    step, unit = (
        registry.rules.get(name).title if name in registry.rules else run.title(name)  # they may be no contenders
        for name in (problem.reference, problem.pacemaker)
    )
    return "\n".join([
        *lines,
        "",
        f"step: CPU time in steps of {step}; time: in epochs of {unit}; final: mean over seeds",
    ])


def show(run: Run, problem: Problem, cost: Mapping[str, float], title: str) -> None:
    """Print the table, and write the report beside it."""
    print(f"\n{problem.name}: {title}\n{table(run, problem, cost)}\n\n{write_report(run.path)}")
