"""What a recipe is, and what running one gives."""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from beyondprop.lab.runs.environment import environment
from beyondprop.lab.runs.files import write_atomically

REACHED, MISSED, SHOWN = "reached", "missed", "shown"


@dataclass(frozen=True, slots=True)
class Row:
    """One line of a recipe's table: what was published, what was measured, and whether that is good.

    Attributes:
        label: what is measured, of which contender, after how long.
        measured: one number a seed; NaN where a training failed.
        unit: such as `"%"`; shown behind the numbers.
        published: what the paper or its code has, as text; empty where there is none.
        at_least, at_most: what the mean must keep to; both None: the row is shown and not judged.
        digits: behind the point.
        note: what a reader must know.
    """

    label: str
    measured: tuple[float, ...]
    unit: str = ""
    published: str = ""
    at_least: float | None = None
    at_most: float | None = None
    digits: int = 2
    note: str = ""

    @classmethod
    def lead(cls, label: str, ours: Sequence[float], theirs: Sequence[float], **own: Any) -> Row:
        """Return the row of a difference, seed by seed, in points."""
        return cls(label, tuple(a - b for a, b in zip(ours, theirs, strict=True)), "points", **own)

    @property
    def mean(self) -> float:
        """Mean over seeds, NaN where one failed or overflowed."""
        return statistics.fmean(self.measured) if self.measured and all(map(math.isfinite, self.measured)) else math.nan

    @property
    def verdict(self) -> str:
        """`"reached"`, `"missed"`, or `"shown"` where nothing is asked for."""
        if self.at_least is None and self.at_most is None:
            return SHOWN
        low = -math.inf if self.at_least is None else self.at_least
        high = math.inf if self.at_most is None else self.at_most
        return REACHED if low <= self.mean <= high else MISSED

    @property
    def asked(self) -> str:
        """What is asked for, as text."""
        bounds = [(">=", self.at_least), ("<=", self.at_most)]
        return ", ".join(f"{sign} {bound:g}{self._unit}" for sign, bound in bounds if bound is not None)

    @property
    def shown(self) -> str:
        """The mean, and the range over several seeds, as text."""
        if math.isnan(self.mean):
            failed = sum(not math.isfinite(value) for value in self.measured)
            return f"failed ({failed} of {len(self.measured)})" if self.measured else "not run"
        mean, low, high = (
            f"{round(value, self.digits) + 0.0:.{self.digits}f}"  # no -0.00
            for value in (self.mean, min(self.measured), max(self.measured))
        )
        spread = f" ({low} to {high}, {len(self.measured)} seeds)" if len(self.measured) > 1 else ""
        return f"{mean}{self._unit}{spread}"

    @property
    def _unit(self) -> str:
        return f" {self.unit}" if self.unit else ""


@dataclass(frozen=True, slots=True)
class Result:
    """A recipe that was run.

    Attributes:
        recipe: its id.
        quick: whether it was the short version, whose numbers are no reproduction.
        rows: the table.
        settings: what was trained how, for the ledger.
        seconds: that it took.
        date: when it ended, UTC.
        environment: versions and hardware.
    """

    recipe: str
    quick: bool
    rows: tuple[Row, ...]
    settings: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    date: str = ""
    environment: dict[str, Any] = field(default_factory=dict)

    def write(self, path: Path) -> Path:
        """Write the result as JSON."""
        values = asdict(self)
        for row, own in zip(values["rows"], self.rows, strict=True):
            row["measured"] = [v if math.isfinite(v) else None for v in own.measured]  # JSON has neither NaN nor Inf
        return write_atomically(path, (json.dumps(values, indent=1, ensure_ascii=False) + "\n").encode())

    @classmethod
    def read(cls, path: Path) -> Result:
        """Read what `write` wrote.

        Raises:
            ValueError: if the file is damaged; the message names it.
        """
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            rows = []
            for row in values["rows"]:
                measured = tuple(math.nan if v is None else float(v) for v in row["measured"])
                rows.append(Row(**row | {"measured": measured}))
                if not all(isinstance(row.get(key, ""), str) for key in ("label", "unit", "published", "note")):
                    raise TypeError(f"a row's texts must be strings, got {row}")
                _ = rows[-1].asked, rows[-1].verdict, rows[-1].shown  # raise where numbers are none
            return cls(**values | {"rows": tuple(rows)})
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{str(path)!r} is no recorded result: {type(error).__name__}: {error}.") from error


@dataclass(frozen=True)
class Context:
    """Where and how a recipe runs.

    Attributes:
        out: its directory; a recipe that was stopped goes on from what is there.
        quick: the short version is wanted.
        say: told in one line how it goes.
    """

    out: Path
    quick: bool
    say: Callable[[str], None]


@dataclass(frozen=True)
class Recipe:
    """A published experiment.

    Attributes:
        title: one line.
        source: paper, with the figure or table.
        about: what is trained, what was tuned, and on what; a few sentences for the ledger.
        measure: trains, draws `figure.png` into the directory, and returns the rows and the settings.
        minutes: that the full version takes on two CPU cores, roughly.
        needs: data sets that must be at hand.
    """

    title: str
    source: str
    about: str
    measure: Callable[[Context], tuple[Sequence[Row], dict[str, Any]]]
    minutes: float
    needs: tuple[str, ...] = ()

    def run(self, name: str, context: Context) -> Result:
        """Run the recipe, in as many parts as it takes, and write `result.json` into its directory; one that is there is read.

        Raises:
            ValueError: if what is in the directory is damaged.
        """
        file = context.out / "result.json"
        if file.is_file():
            context.say(f"was finished before; remove {str(file)!r} to make its table and figure again")
            return Result.read(file)
        context.out.mkdir(parents=True, exist_ok=True)
        made = _short(environment("cpu"))
        parts = _parts(context.out / "parts.json")
        began = time.perf_counter()
        try:
            rows, settings = self.measure(context)
        finally:
            parts["seconds"] = round(parts["seconds"] + (time.perf_counter() - began), 1)
            if made.get("commit") not in (None, *parts["commits"]):
                parts["commits"].append(made["commit"])
            write_atomically(context.out / "parts.json", json.dumps(parts).encode())
        if context.quick:  # nothing to judge
            rows = [replace(row, at_least=None, at_most=None) for row in rows]
        result = Result(
            recipe=name,
            quick=context.quick,
            rows=tuple(rows),
            settings=settings,
            seconds=parts["seconds"],
            date=datetime.now(UTC).strftime("%Y-%m-%d"),
            environment=made | ({"commit": ", ".join(parts["commits"])} if parts["commits"] else {}),
        )
        result.write(file)
        return result


def _parts(path: Path) -> dict[str, Any]:
    """Return the time that all parts of a recipe took so far, and the commits that they ran at."""
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"seconds": 0.0, "commits": []}
    except ValueError as error:
        raise ValueError(
            f"{str(path)!r} is damaged: {error}. Remove it; what was measured is kept elsewhere."
        ) from error


def _short(found: dict[str, Any]) -> dict[str, Any]:
    return {key: found[key] for key in ("torch", "beyondprop", "commit", "cpu", "python") if found.get(key)}
