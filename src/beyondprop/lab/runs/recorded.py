"""A recorded run in memory: configuration, environment and rows, as reports, recipes and resumed comparisons read them.

`config.toml` has `data` or `name`, `nets`, `[[metrics]]` (the first decides), `[[contenders]]` and `[warm_start_rule]`; the
files of `metrics/`, one a training, are joined by their names.

Older runs have one `metrics.jsonl`, `net` and `[[rules]]`, and are read as if they had been written today.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from beyondprop.lab.runs.config import is_of, read_config, read_env
from beyondprop.lab.runs.sums import check_rows, is_training, read_sums, rows_before_checkpoints
from beyondprop.lab.runs.text import clean, cleaned, clipped

if TYPE_CHECKING:
    from beyondprop.lab.tasks.base import Metric

Row: TypeAlias = dict[str, Any]
"""One record; `fit` makes it without the names of contender and seed."""

WARM_START = "warm-start="
"""What comes before the name in the rows of a warm start."""

# What a row of a known kind must have to be placed; rows of other kinds are kept and never looked at.
_NEEDED = {
    "eval": ("contender", "seed", "step", "epoch"),
    "alignment": ("contender", "seed", "step", "epoch", "stages"),
    "tuning": ("contender", "seed", "lr"),
    "warning": ("contender", "message"),
    "failed": ("contender", "seed", "message"),
    "finished": ("contender", "seed"),
}
_TYPES = {
    "contender": str, "seed": int, "step": int, "epoch": int | float, "lr": int | float, "stages": dict, "message": str,
}  # fmt: skip
_MEND = "Mend the line, or delete the file, and its checkpoint: --resume makes it again from the beginning."
_LONGEST = 120  # characters of a title that is shown
_OLD = {f"{split}_{key}": key for split in ("test", "validation") for key in ("accuracy", "loss")} | {
    "rule": "contender"
}


def number(row: Mapping[str, Any], key: str) -> float:
    """Return the number at `key`, a field or a counter; NaN where it is null, absent or not a number."""
    counters = row.get("counters")
    value = row[key] if key in row else counters.get(key) if isinstance(counters, dict) else None
    return float(value) if value is not None and is_of(value, int | float) else math.nan


@dataclass(frozen=True)
class ContenderInfo:
    """One contender, a net with a rule, as the configuration describes it.

    Attributes:
        name: what its rows go by.
        title: the name for people, with the net where there are several.
        summary: one line on what the rule does, or `""`.
        rule: the rule's name.
        net: the net's form, or `""`.
        settings: as recorded.
    """

    name: str
    title: str
    summary: str = ""
    rule: str = ""
    net: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, name: str, entry: Mapping[str, Any], title: str) -> ContenderInfo:
        """Return what a table of the configuration says."""
        rule, net, settings = entry.get("rule") or name, entry.get("net", ""), dict(entry.get("settings", {}))
        return cls(name, title, str(entry.get("summary", "")), str(rule), str(net), settings)


@dataclass(frozen=True)
class Run:
    """A run directory's content.

    Attributes:
        path: the directory.
        config: what `read_config` returns.
        env: `env.json` as read.
        rows: all rows in order; of those that a resumed run wrote twice, the last.
        notes: what a reader of the numbers must know about the files, for instance a half-written last line.
    """

    path: Path
    config: dict[str, Any]
    env: dict[str, Any]
    rows: list[Row]
    notes: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The directory's own name, without the way to it."""
        return clean(self.path.resolve().name)

    @property
    def task(self) -> str:
        """The task's name for titles."""
        return str(self.config.get("name") or self.config["data"])

    @cached_property
    def metrics(self) -> tuple[Metric, ...]:
        """What models were judged by; where the configuration has none, accuracy (where a row has it), then loss."""
        from beyondprop.lab.tasks.base import ACCURACY, LOSS, Metric

        found = [
            Metric(
                e["key"],
                clipped(e.get("label", e["key"]), _LONGEST),
                float(e.get("scale", 1)),
                e.get("higher_is_better", True),
            )
            for e in self.config.get("metrics", [])
        ]
        old = (ACCURACY, LOSS) if any("accuracy" in row for row in self._kind("eval")) else (LOSS,)
        return tuple(found) or old

    @property
    def metric(self) -> Metric:
        """The metric that decides."""
        return self.metrics[0]

    @cached_property
    def counters(self) -> tuple[str, ...]:
        """The names of all that the models counted."""
        return tuple(dict.fromkeys(name for row in self._kind("eval") for name in row.get("counters", {})))

    @cached_property
    def contenders(self) -> tuple[ContenderInfo, ...]:
        """The contenders in the configuration's order, then those that only rows know."""
        several, found = len(self.config["nets"]) > 1, {}
        for entry in self.config["contenders"]:
            title, net = str(entry.get("title") or entry["name"]), str(entry.get("net", ""))
            title += f", {net}" if several and net not in re.split(r"[\s,()]+", title) else ""
            found[entry["name"]] = ContenderInfo.of(entry["name"], entry, clipped(title, _LONGEST))
        for name in self._names:
            found.setdefault(name, ContenderInfo(name, clipped(name, _LONGEST), rule=name))
        return tuple(info for name, info in found.items() if not name.startswith(WARM_START))

    @cached_property
    def warm_starts(self) -> tuple[ContenderInfo, ...]:
        """What the contenders started with, by the names that its rows have; empty where they started from the beginning."""
        entry = self.config.get("warm_start_rule")
        if not isinstance(entry, dict) or "name" not in entry:
            return ()
        names = [name for name in self._names if name.startswith(WARM_START)] or [f"{WARM_START}{entry['name']}"]
        title = f"{clipped(str(entry.get('title') or entry['name']), _LONGEST)}, warm start"
        which = " ({})" if len(names) > 1 else ""
        return tuple(ContenderInfo.of(n, entry, title + which.format(n.removeprefix(WARM_START))) for n in names)

    def title(self, contender: str) -> str:
        """Return the name for people of the contender that a row is of."""
        known = (*self.contenders, *self.warm_starts)
        return next((info.title for info in known if info.name == contender), clipped(contender, _LONGEST))

    @property
    def split(self) -> str:
        """What the held-out rows are: `"validation"` or `"test"`."""
        return "validation" if self.config.get("validation") else "test"

    @property
    def warnings(self) -> list[Row]:
        """The recorded warnings, in order."""
        return self._kind("warning")

    @property
    def failures(self) -> list[Row]:
        """The recorded failures, in order: each stopped one contender with one seed."""
        return self._kind("failed")

    def of(self, kind: str, contender: str, seed: int) -> list[Row]:
        """Return the rows of one kind (`"eval"` or `"alignment"`), contender and seed, by rising step."""
        return self._index.get((kind, contender, seed), [])

    def seeds(self, contender: str) -> dict[str, tuple[int, ...]]:
        """Return the contender's seeds by how they ended: `"done"`, `"failed"` and `"unfinished"`.

        A seed is done when it is recorded as finished, which an early stop is, too, or when nothing stopped it and
        its last evaluation is at the configured epochs or at most one step short of them; a seed that was never started
        is unfinished.
        """
        failed = {row["seed"] for row in self.failures if row["contender"] == contender}
        finished = {row["seed"] for row in self._kind("finished") if row["contender"] == contender}
        seen = {seed for kind, name, seed in self._index if name == contender and kind == "eval"}
        ended: dict[str, tuple[int, ...]] = {"done": (), "failed": (), "unfinished": ()}
        for seed in sorted(failed | seen | set(self.config.get("seeds", []))):
            done = seed in finished & seen or self._at_end(self.of("eval", contender, seed))
            ended["failed" if seed in failed else "done" if done else "unfinished"] += (seed,)
        return ended

    def counted(self, contender: str) -> tuple[int, ...]:
        """Return the seeds that means are over: the done ones, else the unfinished ones with rows."""
        seeds = self.seeds(contender)
        return seeds["done"] or tuple(s for s in seeds["unfinished"] if self.of("eval", contender, s))

    def _at_end(self, rows: list[Row]) -> bool:
        if not rows or rows[-1]["step"] == 0:
            return False
        last, epochs = rows[-1], number(self.config, "epochs")
        one_step = last["epoch"] / last["step"]
        return math.isnan(epochs) or last["epoch"] + one_step >= epochs * (1 - 1e-6)

    def _kind(self, kind: str) -> list[Row]:
        return [row for row in self.rows if row.get("kind") == kind]

    @cached_property
    def _names(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(row["contender"] for row in self.rows if str(row.get("kind")) in _NEEDED))

    @cached_property
    def _index(self) -> dict[tuple[str, str, int], list[Row]]:
        index: dict[tuple[str, str, int], list[Row]] = {}
        for row in self.rows:
            if row.get("kind") in ("eval", "alignment"):
                index.setdefault((row["kind"], row["contender"], row["seed"]), []).append(row)
        for rows in index.values():
            rows.sort(key=lambda row: row["step"])
        return index


def read_run(path: str | Path) -> Run:
    """Read a run directory.

    Unknown kinds of rows and unknown fields are left alone.

    Raises:
        FileNotFoundError: the directory or one of its files is missing; the message names all that are.
        ValueError: a file cannot be read as what it should be; the message names the file, line and field.
    """
    path = Path(path)
    config, env, (rows, notes) = read_config(path), read_env(path), read_rows(path)
    notes = tuple(map(clean, (*notes, *read_sums(path).lacking())))
    return Run(path, cleaned(config), cleaned(env), cleaned(rows), notes)


def read_rows(path: Path, *, placed: bool = False) -> tuple[list[Row], tuple[str, ...]]:
    """Return the rows of a run directory, or of one file of it, and notes on last lines that were half-written.

    With `placed`, rows of unknown kinds need kind, contender and seed, too. Of evaluations that were written twice, after a
    resume from a checkpoint, the later ones count.

    Raises:
        ValueError: a file is damaged; the message names the file, line and field, or what its checkpoint says of it.
    """
    files, notes, sums = [path], [], read_sums(path)
    if path.is_dir():
        _, notes = rows_before_checkpoints(path)
        notes += check_rows(path, sums)
        old = path / "metrics.jsonl"  # where it is beside the others, those are not complete
        files = [old] if old.is_file() else sorted((path / "metrics").glob("*.jsonl"))
    rows: dict[object, Row] = {}
    for file in files:
        # Split as bytes: a cut can fall inside a character, and only "\n" ends a line of JSON Lines.
        lines = file.read_bytes().split(b"\n")
        covered = math.inf if not sums.found or is_training(file) else sums.rows.get(file.name, (0, ""))[0]
        at = 0
        for i, line in enumerate(lines, start=1):
            at += len(line) + 1
            if not line.strip():
                continue
            try:
                row: Row = json.loads(line)
            except (ValueError, RecursionError) as error:
                if i < len(lines):  # after the last newline is nothing, or what a killed run left
                    raise ValueError(f"{str(file)!r}, line {i}, is no JSON: {error}. {_MEND}") from error
                notes.append(f"Line {i}, the last of {file.name}, is half-written and was left out.")
                continue
            if not isinstance(row, dict):
                raise ValueError(f"{str(file)!r}, line {i}, must be a JSON object, got {type(row).__name__}. {_MEND}")
            if file.name == "metrics.jsonl":
                row = {_OLD.get(key, key): value for key, value in row.items()}
            _check(row, f"{str(file)!r}, line {i}", placed)
            if at > covered:  # after a kill between a row and its checksum
                notes.append(f"{file.name}, line {i}, has no checksum and was left out.")
                continue
            is_measured = row.get("kind") in ("eval", "alignment")
            key = (row["kind"], row["contender"], row["seed"], row["step"]) if is_measured else (line,)
            rows.pop(key, None)
            rows[key] = row
    return list(rows.values()), tuple(notes)


def _check(row: Row, where: str, placed: bool) -> None:
    kind = row.get("kind")
    by = [kind, row.get("contender", None if "seed" in row else ""), row.get("seed", 0)]
    if placed and not all(map(isinstance, by, (str, str, int))):
        raise ValueError(
            f"{where}: a row needs kind, contender and seed to go by, got {', '.join(map(repr, by))}. {_MEND}"
        )
    for key in _NEEDED.get(kind, ()) if isinstance(kind, str) else ():
        if not is_of(row.get(key), _TYPES[key]) or (key == "epoch" and not math.isfinite(row[key])):
            accepted = getattr(_TYPES[key], "__name__", "number")
            raise ValueError(f"{where}: a row of kind {kind!r} needs {key} ({accepted}), got {row.get(key)!r}. {_MEND}")
    if kind == "eval" and not isinstance(row.get("counters", {}), dict):
        raise ValueError(f"{where}: counters must be an object, got {row['counters']!r}. {_MEND}")
    if kind == "alignment" and not all(isinstance(stage, dict) for stage in row["stages"].values()):
        raise ValueError(f"{where}: stages must be objects of numbers, got {row['stages']!r}. {_MEND}")
