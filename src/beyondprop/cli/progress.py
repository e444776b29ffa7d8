"""How a comparison goes, on the terminal: live bars where there is one, else a line now and then."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.text import Text

from beyondprop.cli.usage import say
from beyondprop.lab.comparing.member import Member, Observer
from beyondprop.lab.runs.recorded import Row
from beyondprop.lab.runs.text import clipped

if TYPE_CHECKING:
    from rich.console import Console

_PAUSE = 10.0  # seconds between two lines of a training that goes on, where there is no live display


class Lines(Observer):
    """An observer that writes few lines, for logs; with `quiet`, only warnings and failures.

    Attributes:
        path: the run directory, once there is one.
    """

    def __init__(self, console: Console, *, quiet: bool = False) -> None:
        self.console, self.quiet = console, quiet
        self.path: Path | None = None
        self._count = self._done = self._width = 0
        self._last: Row = {}
        self._printed = 0.0

    def note(self, text: str, style: str = "yellow") -> None:
        """Print a line that matters even in quiet mode."""
        # A log keeps its lines; a terminal would break them inside words.
        self.console.print(Text(text, style=style), soft_wrap=not self.console.is_terminal)

    def command(self, why: str, command: str) -> None:
        """Print what to run next, in a line of its own that can be copied."""
        self.note(why)
        say(self.console, "  " + command)

    def stop(self) -> None:
        """Nothing is to be displayed any longer."""

    def start(self, path: Path, members: Sequence[Member]) -> None:
        self.path, self._count = path, len(members)
        self._width = max((len(_name(member)) for member in members), default=0)
        count = f"{len(members)} training{'s' * (len(members) > 1)} to do" if members else "Nothing is left to train"
        self._say(f"{count}, recorded in {path}")

    def begin(self, member: Member) -> None:
        self._last, self._printed = {}, time.monotonic()

    def progress(self, member: Member, step: int, steps: int) -> None:
        if self._last and time.monotonic() - self._printed > _PAUSE:
            self._printed = time.monotonic()
            self._say(f"{self._padded(member)}  {step / steps:4.0%}  {_result(self._last)}")

    def row(self, member: Member, row: Row) -> None:
        if row["kind"] == "failed" or (row.get("message") and row["kind"] == "tuning"):
            self.note(f"{_name(member)} failed: {row['message']}", style="red")
        if row["kind"] in ("eval", "tuning", "failed"):
            self._last = row if row["kind"] != "failed" else {}

    def end(self, member: Member) -> None:
        self._done += 1
        if self._last:
            seconds = self._last.get("seconds")
            took = "" if seconds is None else f"  {seconds:.1f} s"
            place = f"{self._done:{len(str(self._count))}}/{self._count}"
            self._say(f"{place}  {self._padded(member)}  {_result(self._last)}{took}")

    def _padded(self, member: Member) -> str:
        return _name(member).ljust(self._width)

    def _say(self, text: str) -> None:
        if not self.quiet:
            say(self.console, text)


class Bars(Lines):
    """The same with two bars below the lines: all trainings, and the one that is going on."""

    def __init__(self, console: Console) -> None:
        super().__init__(console)
        # Room is left at the right: the ^C that a terminal echoes there would move the bars by a line.
        self._bars = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=max(8, min(40, console.width - 62))),
            TaskProgressColumn(),
            TextColumn("{task.fields[result]}", markup=False),
            TimeRemainingColumn(compact=True),
            console=console,
            transient=True,
        )
        self._epochs = 0.0

    def start(self, path: Path, members: Sequence[Member]) -> None:
        super().start(path, members)
        total = sum(member.epochs for member in members)
        self._all = self._bars.add_task("all".ljust(self._width), total=total, result=f"0/{self._count}")
        self._one = self._bars.add_task("", total=1.0, result="", visible=False)
        self._bars.start()

    def begin(self, member: Member) -> None:
        super().begin(member)
        self._bars.reset(self._one, total=1.0, description=self._padded(member), result="", visible=True)

    def progress(self, member: Member, step: int, steps: int) -> None:
        result = _result(self._last) if self._last else ""
        self._bars.update(self._one, completed=step / steps, result=result)
        self._bars.update(self._all, completed=self._epochs + member.epochs * step / steps)

    def end(self, member: Member) -> None:
        super().end(member)
        self._epochs += member.epochs
        self._bars.update(self._all, completed=self._epochs, result=f"{self._done}/{self._count}")

    def stop(self) -> None:
        self._bars.stop()


def _name(member: Member) -> str:
    what = f"tune {member.lr:g}" if member.tuning else f"seed {member.seed}"
    return f"{clipped(member.contender.name, 80)} " + (f"warm start, {what}" if member.warm_start else what)


def _result(row: Row) -> str:
    """Return an evaluation in words: accuracy, loss, or whatever came first."""
    skipped = {"lr", "seed", "epochs", "step", "epoch", "samples", "work", "seconds", "train_loss"}
    found = {key: v for key, v in row.items() if isinstance(v, int | float) and key not in skipped}
    parts = [f"acc. {found.pop('accuracy'):7.2%}"] if "accuracy" in found else []
    parts += [f"{key.replace('_', ' ')} {value:#6.4g}" for key, value in list(found.items())[: 2 - len(parts)]]
    return "  ".join(parts) if parts else "not finite"
