"""How a comparison goes, on the terminal: live bars where there is one, else a line now and then."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeRemainingColumn
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
        self._last: dict[Member, Row] = {}  # of the trainings that go on
        self._printed: dict[Member, float] = {}

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

    def said(self, text: str) -> None:
        self._say(text)

    def begin(self, member: Member) -> None:
        self._last[member], self._printed[member] = {}, time.monotonic()

    def progress(self, member: Member, step: int, steps: int) -> None:
        if self._last.get(member) and time.monotonic() - self._printed[member] > _PAUSE:
            self._printed[member] = time.monotonic()
            self._say(f"{self._padded(member)}  {step / steps:4.0%}  {_result(self._last[member])}")

    def row(self, member: Member, row: Row) -> None:
        if row["kind"] == "failed" or (row.get("message") and row["kind"] == "tuning"):
            self.note(f"{_name(member)} failed: {row['message']}", style="red")
        if row["kind"] in ("eval", "tuning", "failed"):
            self._last[member] = row if row["kind"] != "failed" else {}

    def end(self, member: Member) -> None:
        self._done += 1
        self._printed.pop(member, None)
        if last := self._last.pop(member, {}):
            seconds = last.get("seconds")
            took = "" if seconds is None else f"  {seconds:.1f} s"
            place = f"{self._done:{len(str(self._count))}}/{self._count}"
            self._say(f"{place}  {self._padded(member)}  {_result(last)}{took}")

    def _padded(self, member: Member) -> str:
        return _name(member).ljust(self._width)

    def _say(self, text: str) -> None:
        if not self.quiet:
            say(self.console, text)


class Bars(Lines):
    """The same with bars below the lines: of all trainings, and of each that is going on."""

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
        self._of: dict[Member, TaskID] = {}
        self._shares: dict[Member, float] = {}  # done of the trainings that go on

    def start(self, path: Path, members: Sequence[Member]) -> None:
        super().start(path, members)
        total = sum(member.epochs for member in members)
        self._all = self._bars.add_task("all".ljust(self._width), total=total, result=f"0/{self._count}")
        self._bars.start()

    def begin(self, member: Member) -> None:
        super().begin(member)
        if member not in self._of:
            self._of[member] = self._bars.add_task("", total=1.0, result="")
        self._bars.reset(self._of[member], total=1.0, description=self._padded(member), result="")

    def progress(self, member: Member, step: int, steps: int) -> None:
        last = self._last.get(member)
        self._shares[member] = member.epochs * step / steps
        self._bars.update(self._of[member], completed=step / steps, result=_result(last) if last else "")
        self._bars.update(self._all, completed=self._epochs + sum(self._shares.values()))

    def end(self, member: Member) -> None:
        super().end(member)
        self._epochs += member.epochs
        self._shares.pop(member, None)
        if member in self._of:
            self._bars.remove_task(self._of.pop(member))
        self._bars.update(
            self._all, completed=self._epochs + sum(self._shares.values()), result=f"{self._done}/{self._count}"
        )

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
