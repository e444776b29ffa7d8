"""`beyondprop compare`: trainings side by side, recorded and reported."""

from __future__ import annotations

import dataclasses
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from tyro.conf import UseAppendAction, arg

from beyondprop.cli.options import Amount, Count, Flag, Folder
from beyondprop.cli.report import show
from beyondprop.cli.usage import usage, warnings_to
from beyondprop.lab.comparing.settings import Settings

if TYPE_CHECKING:
    from beyondprop.cli.progress import Lines
    from beyondprop.lab.comparing.plan import Plan


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

        from beyondprop.cli.progress import Bars, Lines

        console = Console(stderr=self.json)
        live = console.is_terminal and not self.quiet
        observer = Bars(console) if live else Lines(console, quiet=self.quiet)
        with warnings_to(lambda text: observer.note(text)):
            path: Path | None = None
            try:
                path = self._train(settings, observer)
                observer.stop()
                return show([path], None, as_json=self.json, console=console)
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
        from beyondprop.lab.comparing import comparison
        from beyondprop.lab.runs.directory import check_free

        if self.resume is not None:
            plan = self._plan(settings, observer)
            return comparison.go_on(plan, self.resume, observer)
        with usage():
            if self.out is not None:
                check_free(self.out)
        return comparison.run(self._plan(settings, observer), self.out, observer)

    def _plan(self, settings: Settings, observer: Lines) -> Plan:
        from beyondprop.lab.comparing import comparison

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
        from beyondprop.lab.runs.directory import read_config

        free = ("resume", "plugin", "json", "quiet", "debug")
        changed = [
            f.name for f in dataclasses.fields(self) if f.name not in free and getattr(self, f.name) != f.default
        ]
        if changed:
            flags = ", ".join("--" + name.replace("_", "-") for name in changed)
            raise ValueError(f"--resume goes on with the recorded settings; leave out {flags}.")
        settings = Settings.from_config(read_config(path))
        return dataclasses.replace(settings, plugins=self.plugin) if self.plugin else settings


def _rule_and_rate(text: str) -> tuple[str, float]:
    name, equals, number = text.partition("=")
    try:
        rate = float(number)
    except ValueError:
        rate = None
    if not name or not equals or rate is None:
        raise ValueError(f"--lr takes RULE=LR, such as adam=0.001, got {text!r}.")
    return name, rate
