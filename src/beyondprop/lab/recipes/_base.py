"""What a recipe is, and what running one gives."""

from __future__ import annotations

import json
import math
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from beyondprop.lab.runs.environment import environment
from beyondprop.lab.runs.files import write_atomically
from beyondprop.lab.runs.sums import sealed, unsealed
from beyondprop.lab.runs.text import cleaned

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
        content = json.dumps(sealed(values), indent=1, ensure_ascii=False) + "\n"
        return write_atomically(path, content.encode("utf-8", "backslashreplace"))

    @classmethod
    def read(cls, path: Path) -> Result:
        """Read what `write` wrote.

        Raises:
            ValueError: if the file is damaged; the message names it. Without a checksum, as in older versions, it is a warning.
        """
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(values, dict):
                raise TypeError(f"an object is needed, got {type(values).__name__}")
            is_sealed = unsealed(values)
            values = cleaned(values)
            rows = []
            for row in values["rows"]:
                measured = tuple(math.nan if v is None else _number(v) for v in row["measured"])
                rows.append(Row(**row | {"measured": measured}))
                _of_types(row, dict.fromkeys(("label", "unit", "published", "note"), str) | {"digits": int})
                for key in ("at_least", "at_most"):
                    if row.get(key) is not None:
                        _number(row[key])
                if not 0 <= row.get("digits", 2) <= 20:
                    raise ValueError(f"digits must be 0 to 20, got {row['digits']}")
                _ = rows[-1].verdict, rows[-1].shown  # raise where numbers are too large
            _of_types(values, {"recipe": str, "quick": bool, "settings": dict, "date": str, "environment": dict})
            _number(values.get("seconds", 0.0))
            for part in values.get("settings", {}).values():
                if isinstance(part, dict) and "lr" in part:
                    _of_types(part, {"lr": dict, "at_edge": list})
                    _ = [_number(lr) for lr in part["lr"].values() if lr is not None]
            result = cls(**values | {"rows": tuple(rows)})
        except (KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
            raise ValueError(
                f"{str(path)!r} is no recorded result: {type(error).__name__}: {error}. Put the original back, or delete it: "
                "`beyondprop reproduce` makes it again. Where it was edited on purpose, delete its checksum."
            ) from error
        if not is_sealed:
            warnings.warn(
                f"{str(path)!r} has no checksum, as those of older versions: what was changed in it is not noticed.",
                stacklevel=2,
            )
        return result


def _of_types(values: dict[str, Any], kinds: dict[str, type]) -> None:
    for key, kind in kinds.items():
        if key in values and type(values[key]) is not kind:
            raise TypeError(f"{key} must be {kind.__name__}, got {values[key]!r}")


def told(error: Exception) -> str:
    """Return what is wrong with a file, in words; a missing key alone is none."""
    return f"{error} is missing" if isinstance(error, KeyError) else str(error)


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(found := float(value)):
        raise TypeError(f"a finite number is needed, got {value!r}")
    return found


@dataclass(frozen=True)
class Context:
    """Where and how a recipe runs.

    Attributes:
        out: its directory; a recipe that was stopped goes on from what is there.
        quick: the short version is wanted.
        say: told in one line how it goes.
        workers: who trains where the recipe is made of comparisons, as `compare` takes it.
    """

    out: Path
    quick: bool
    say: Callable[[str], None]
    workers: int | str | None = None


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
            write_atomically(context.out / "parts.json", json.dumps(sealed(parts)).encode())
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
    if not path.is_file():
        return {"seconds": 0.0, "commits": []}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict) or not isinstance(found.get("commits"), list):
            raise TypeError("an object with seconds and commits is needed")
        unsealed(found)
        _number(found["seconds"])
        _ = [_of_types({"commit": commit}, {"commit": str}) for commit in found["commits"]]
    except (KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
        raise ValueError(
            f"{str(path)!r} is damaged: {told(error)}. Remove it; what was measured is kept elsewhere."
        ) from error
    return found


def _short(found: dict[str, Any]) -> dict[str, Any]:
    return {key: found[key] for key in ("torch", "beyondprop", "commit", "cpu", "python") if found.get(key)}
