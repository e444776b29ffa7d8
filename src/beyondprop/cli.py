"""The command line: `beyondprop compare`, `report`, `list`, `reproduce` and `ledger`.

Whatever imports torch is imported when a command runs: help is there at once.
"""

from __future__ import annotations

import dataclasses
import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from tyro.conf import FlagCreatePairsOff, Positional, UseAppendAction, arg, subcommand

from beyondprop._usage import UsageError, usage, warnings_to, write_json
from beyondprop.settings import Settings

if TYPE_CHECKING:
    from rich.console import Console

    from beyondprop._progress import Lines
    from beyondprop.comparison import Plan

Flag = Annotated[FlagCreatePairsOff[bool], arg(help_behavior_hint="")]
Count = Annotated[int | None, arg(metavar="N", help_behavior_hint="")]
Amount = Annotated[float | None, arg(metavar="N", help_behavior_hint="")]
Folder = Annotated[Path | None, arg(metavar="DIR", help_behavior_hint="")]


@dataclass(frozen=True, kw_only=True)
class Compare:
    """Train a network by several rules on the same batches, and report how they do."""

    data: Annotated[str, arg(metavar="NAME")] = Settings.data
    """Data set; `beyondprop list` shows them."""
    net: Annotated[str, arg(metavar="NET")] = Settings.net
    """Network, such as mlp:100x2 or mlp:256x3:tanh:bn; `beyondprop list` shows the forms."""
    rule: Annotated[UseAppendAction[tuple[str, ...]], arg(metavar="NAME", help_behavior_hint="(repeatable)")] = ()
    """Learning rule. Default: am-adam, am-mem, sgd and adam."""
    epochs: Annotated[float, arg(metavar="N")] = Settings.epochs
    """Passes over the training rows; 0.5 is half a pass."""
    seeds: Annotated[int, arg(metavar="N")] = len(Settings.seeds)
    """How many seeds, counted from 0."""
    batch_size: Annotated[int, arg(metavar="N")] = Settings.batch_size
    """Rows in a batch."""
    schedule: Annotated[str, arg(metavar="NAME")] = Settings.schedule
    """Of the learning rates: constant, linear, cosine or halve:N (epochs). A rule may bring its own."""
    warm_start: Annotated[str | None, arg(metavar="RULE:EPOCHS", help_behavior_hint="")] = Settings.warm_start
    """Train by RULE first: every rule starts from the weights it has after so many of the epochs."""
    lr: Annotated[UseAppendAction[tuple[str, ...]], arg(metavar="RULE=LR", help_behavior_hint="(repeatable)")] = ()
    """Learning rate of a rule, such as adam=0.001."""
    tune: Flag = Settings.tune
    """Choose each rule's learning rate from its grid, on rows held out of the training rows."""
    tune_epochs: Amount = Settings.tune_epochs
    """Epochs of a training in tuning. Default: those of the run."""
    validation: Flag = Settings.validation
    """Evaluate on rows held out of the training rows; the test rows stay unseen."""
    evaluate_every: Count = Settings.evaluate_every
    """Steps between two evaluations. Default: an epoch."""
    early_stop: Count = Settings.early_stop
    """Stop a training after so many evaluations without improvement."""
    alignment: bool = Settings.alignment
    """Record how every stage's update agrees with the gradient."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; auto takes cuda where there is one."""
    threads: Annotated[int, arg(metavar="N")] = Settings.threads
    """CPU threads; more pay for wide nets on an idle machine."""
    out: Folder = None
    """Run directory, new or empty. Default: one in runs/, named by time, data and net."""
    resume: Folder = None
    """Go on with a run that was stopped, with the settings recorded there."""
    plugin: Annotated[UseAppendAction[tuple[str, ...]], arg(metavar="FILE", help_behavior_hint="(repeatable)")] = ()
    """Python file or module that registers rules of your own."""
    json: Flag = False
    """Print the results as JSON; progress goes to the error stream."""
    quiet: Flag = False
    """No progress."""
    debug: Flag = False
    """Show where an error comes from."""

    def run(self) -> int:
        """Do it; return the exit code."""
        settings = self._settings()
        from rich.console import Console

        from beyondprop._progress import Bars, Lines

        console = Console(stderr=self.json)
        live = console.is_terminal and not self.quiet
        observer = Bars(console) if live else Lines(console, quiet=self.quiet)
        with warnings_to(lambda text: observer.note(text)):
            path: Path | None = None
            try:
                path = self._train(settings, observer)
                observer.stop()
                return _show([path], None, as_json=self.json, console=console)
            except KeyboardInterrupt:
                observer.stop()
                if path is not None:
                    command = shlex.join(["beyondprop", "report", str(path)])
                    observer.command("Stopped; all is trained, the report is missing. Make it by:", command)
                elif observer.path is not None:
                    command = shlex.join(["beyondprop", "compare", "--resume", str(observer.path)])
                    observer.command("Stopped; the state is saved. Go on with:", command)
                raise
            finally:
                observer.stop()

    def _train(self, settings: Settings, observer: Lines) -> Path:
        from beyondprop import comparison
        from beyondprop.runs import check_free

        if self.resume is not None:
            plan = self._plan(settings, observer)
            return comparison.go_on(plan, self.resume, observer)
        with usage():
            if self.out is not None:
                check_free(self.out)
        return comparison.run(self._plan(settings, observer), self.out, observer)

    def _plan(self, settings: Settings, observer: Lines) -> Plan:
        from beyondprop import comparison

        said: set[str] = set()

        def progress(done: int, total: int | None, name: str) -> None:
            if name not in said and not observer.quiet:
                said.add(name)
                observer.note(f"Downloading {name}" + (f" ({total / 1e6:.0f} MB)" if total else ""), style="dim")

        with usage():
            return comparison.prepare(settings, progress=progress)

    def _settings(self) -> Settings:
        with usage():
            if self.resume is not None:
                return self._recorded(self.resume)
            if self.seeds < 1:
                raise ValueError(f"seeds must be >= 1, got {self.seeds}.")
            given = {f.name: getattr(self, f.name) for f in dataclasses.fields(Settings) if hasattr(self, f.name)}
            given["seeds"] = tuple(range(self.seeds))
            if self.tune_epochs is not None and not self.tune:
                raise ValueError("--tune-epochs is for the trainings of --tune; give both, or neither.")
            rates = [_rule_and_rate(text) for text in self.lr]
            given["lr"] = dict(rates)
            if len(given["lr"]) < len(rates):
                raise ValueError(f"--lr must name each rule once, got {', '.join(self.lr)}.")
            return Settings(**given, rules=self.rule or Settings.rules, plugins=self.plugin)

    def _recorded(self, path: Path) -> Settings:
        from beyondprop.runs import read_config

        free = ("resume", "plugin", "json", "quiet", "debug")
        changed = [
            f.name for f in dataclasses.fields(self) if f.name not in free and getattr(self, f.name) != f.default
        ]
        if changed:
            flags = ", ".join("--" + name.replace("_", "-") for name in changed)
            raise ValueError(f"--resume goes on with the recorded settings; leave out {flags}.")
        settings = Settings.from_config(read_config(path))
        return dataclasses.replace(settings, plugins=self.plugin) if self.plugin else settings


@dataclass(frozen=True, kw_only=True)
class Report:
    """Make the figures and the report of recorded runs again, several runs side by side."""

    runs: Positional[tuple[Path, ...]]
    """Run directories."""
    output: Annotated[Path | None, arg(metavar="FILE", help_behavior_hint="")] = None
    """The HTML file. Default: report.html in the first run directory."""
    json: Flag = False
    """Print the results as JSON."""
    debug: Flag = False
    """Show where an error comes from."""

    def run(self) -> int:
        """Do it; return the exit code."""
        from rich.console import Console

        if not self.runs:
            raise UsageError(
                "report needs a run directory, such as: beyondprop report runs/20260131-174502-digits-mlp-100x2"
            )
        _show(self.runs, self.output, as_json=self.json, console=Console(stderr=self.json))
        return 0


@dataclass(frozen=True, kw_only=True)
class Reproduce:
    """Run a published experiment again, and show published and measured side by side.

    The exit status says whether it ran. Whether what is asked for was reached stands in the table's and the JSON's verdicts.
    """

    recipe: Positional[tuple[str, ...]] = ()
    """Recipes by id; without one, they are listed."""
    quick: Flag = False
    """The short version: it shows that all works; its numbers are no reproduction."""
    out: Annotated[Path, arg(metavar="DIR", help_behavior_hint="")] = Path("runs/reproduce")
    """Where each recipe has its directory; one that was stopped goes on from what is there."""
    record: Folder = None
    """Copy results and figures to this directory, as the ledger wants them."""
    json: Flag = False
    """Print the results as JSON; progress goes to the error stream."""
    quiet: Flag = False
    """No progress."""
    debug: Flag = False
    """Show where an error comes from."""

    def run(self) -> int:
        """Do it; return the exit code."""
        from rich.console import Console

        from beyondprop import _reproduction

        if self.quick and self.record is not None:
            raise UsageError("--record keeps results of full runs; leave out --quick or --record.")
        console = Console(stderr=self.json)
        if not self.recipe:
            if self.json:
                write_json(_reproduction.inventory())
            else:
                _reproduction.show_recipes(console)
            return 0
        with usage():
            chosen = _reproduction.chosen(self.recipe)
        results = []
        with warnings_to(lambda text: _reproduction.say(console, text)):
            _reproduction.load_data(chosen, console)
            for name, recipe in chosen:
                try:
                    result, page = _reproduction.reproduce(
                        name, recipe, self.out, quick=self.quick, record=self.record, console=console, quiet=self.quiet
                    )
                except KeyboardInterrupt:
                    rest = ["--quick"] * self.quick + ["--out", str(self.out)]
                    rest += [] if self.record is None else ["--record", str(self.record)]
                    _reproduction.say(console, "Stopped; what was measured is kept. Go on with:")
                    left = self.recipe[self.recipe.index(name) :]
                    _reproduction.say(console, shlex.join(["beyondprop", "reproduce", *left, *rest]))
                    raise
                results.append(json.loads(page.read_text(encoding="utf-8")))
                for row, measured in zip(results[-1]["rows"], result.rows, strict=True):
                    row["verdict"] = measured.verdict
                _reproduction.show(result, recipe, page, console)
        if self.json:
            write_json(results)
        return 0


@dataclass(frozen=True, kw_only=True)
class Ledger:
    """Write the table of published and measured numbers from recorded results."""

    recorded: Annotated[Path, arg(metavar="DIR", help_behavior_hint="")] = Path("reproduction")
    """Where the results are."""
    output: Annotated[Path, arg(metavar="FILE", help_behavior_hint="")] = Path("docs/reproduction.md")
    """The Markdown file."""
    debug: Flag = False
    """Show where an error comes from."""

    def run(self) -> int:
        """Do it; return the exit code."""
        from beyondprop._files import write_atomically
        from beyondprop.recipes._ledger import ledger

        with usage():
            text = ledger(self.recorded, self.output)
        sys.stdout.write(f"{write_atomically(self.output, text.encode())}\n")
        return 0


@dataclass(frozen=True, kw_only=True)
class List:
    """Show the rules, networks and data sets that there are."""

    plugin: Annotated[UseAppendAction[tuple[str, ...]], arg(metavar="FILE", help_behavior_hint="(repeatable)")] = ()
    """Python file or module that registers rules of your own."""
    json: Flag = False
    """Print it as JSON."""
    debug: Flag = False
    """Show where an error comes from."""

    def run(self) -> int:
        """Do it; return the exit code."""
        from rich.console import Console

        from beyondprop import _listing

        with usage():
            found = _listing.inventory(self.plugin)
        if self.json:
            write_json(found)
        else:
            _listing.show(found, Console())
        return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: 0 done, 1 failed, 2 wrong usage, 130 interrupted."""
    commands = (
        Annotated[Compare, subcommand("compare")]
        | Annotated[Report, subcommand("report")]
        | Annotated[List, subcommand("list")]
        | Annotated[Reproduce, subcommand("reproduce")]
        | Annotated[Ledger, subcommand("ledger")]
    )
    try:
        command: Any = tyro.cli(
            commands,
            prog="beyondprop",
            args=argv,
            description="Train networks by what comes after plain backpropagation, side by side with it.",
        )
    except SystemExit as done:  # help, or what tyro has explained
        return done.code if isinstance(done.code, int) else int(done.code is not None)
    try:
        return command.run()
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader of our output is gone, as in `beyondprop list | head`; nothing is left to say.
        sys.stdout = None  # type: ignore[assignment]
        return 1
    except Exception as error:
        if command.debug:
            raise
        known = isinstance(error, UsageError | OSError | ValueError | RuntimeError)
        text = str(error) if known and str(error) else f"{type(error).__name__}: {error}"
        hint = "" if known else "\n--debug shows where it comes from."
        sys.stderr.write(f"beyondprop: {text}{hint}\n")
        return 2 if isinstance(error, UsageError) else 1


def _show(paths: Sequence[Path], output: Path | None, *, as_json: bool, console: Console) -> int:
    """Write the report, show the results; return 1 where every training failed."""
    from beyondprop import report

    with usage():
        runs = [report.read_run(path) for path in paths]
    page = report.write_report(*paths, output=output)
    if as_json:
        found = [
            {**report.to_json(run), "path": str(path), "report": str(page)}
            for run, path in zip(runs, paths, strict=True)
        ]
        write_json(found[0] if len(found) == 1 else found)
    else:
        for run in runs:
            console.print(report.table(run))
        figures = page.parent / "figures"
        curves = [figures / f"{run.metric.removeprefix('test_')}.png" for run in runs if output is None]
        for file in [*(curve for curve in curves[:1] if curve.is_file()), page]:
            console.print(str(file), soft_wrap=True, markup=False, highlight=False)
    seeds = [run.seeds(rule.name) for run in runs for rule in run.rules]
    return int(all(not s["done"] and not s["unfinished"] for s in seeds))


def _rule_and_rate(text: str) -> tuple[str, float]:
    name, equals, number = text.partition("=")
    try:
        rate = float(number)
    except ValueError:
        rate = None
    if not name or not equals or rate is None:
        raise ValueError(f"--lr takes RULE=LR, such as adam=0.001, got {text!r}.")
    return name, rate


if __name__ == "__main__":
    sys.exit(main())
