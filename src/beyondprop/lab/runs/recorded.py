"""A recorded run in memory: configuration, environment and rows, as reports, recipes and resumed comparisons read them.

`config.toml` has `data` or `name`, `nets`, `[[metrics]]` (the first decides), `[[contenders]]` and `[warm_start_rule]`; the
files of `metrics/`, one a training, are joined by their names.

Older runs have one `metrics.jsonl`, `net` and `[[rules]]`, and are read as if they had been written today.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from beyondprop.lab.runs.checkpoint import load_checkpoint, read_notes
from beyondprop.lab.runs.files import is_part

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
    "tuning": ("contender", "seed"),
    "warning": ("contender", "message"),
    "failed": ("contender", "seed", "message"),
    "finished": ("contender", "seed"),
}
_TYPES = {"contender": str, "seed": int, "step": int, "epoch": int | float, "stages": dict, "message": str}
_OLD = {f"{split}_{key}": key for split in ("test", "validation") for key in ("accuracy", "loss")} | {
    "rule": "contender"
}


def number(row: Mapping[str, Any], key: str) -> float:
    """Return the number at `key`, a field or a counter; NaN where it is null, absent or not a number."""
    counters = row.get("counters")
    value = row[key] if key in row else counters.get(key) if isinstance(counters, dict) else None
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan


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
        return self.path.resolve().name

    @property
    def task(self) -> str:
        """The task's name for titles."""
        return str(self.config.get("name") or self.config["data"])

    @cached_property
    def metrics(self) -> tuple[Metric, ...]:
        """What models were judged by; where the configuration has none, accuracy (where a row has it), then loss."""
        from beyondprop.lab.tasks.base import ACCURACY, LOSS, Metric

        found = [
            Metric(e["key"], str(e.get("label", e["key"])), float(e.get("scale", 1)), e.get("higher_is_better", True))
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
            found[entry["name"]] = ContenderInfo.of(entry["name"], entry, title)
        for name in self._names:
            found.setdefault(name, ContenderInfo(name, name, rule=name))
        return tuple(info for name, info in found.items() if not name.startswith(WARM_START))

    @cached_property
    def warm_starts(self) -> tuple[ContenderInfo, ...]:
        """What the contenders started with, by the names that its rows have; empty where they started from the beginning."""
        entry = self.config.get("warm_start_rule")
        if not isinstance(entry, dict) or "name" not in entry:
            return ()
        names = [name for name in self._names if name.startswith(WARM_START)] or [f"{WARM_START}{entry['name']}"]
        title = f"{entry.get('title') or entry['name']}, warm start"
        which = " ({})" if len(names) > 1 else ""
        return tuple(ContenderInfo.of(n, entry, title + which.format(n.removeprefix(WARM_START))) for n in names)

    def title(self, contender: str) -> str:
        """Return the name for people of the contender that a row is of."""
        known = (*self.contenders, *self.warm_starts)
        return next((info.title for info in known if info.name == contender), contender)

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
            done = seed in finished or self._at_end(self.of("eval", contender, seed))
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
    config, file = read_config(path), path / "env.json"
    try:
        env = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{str(file)!r} is no JSON: {error}.") from error
    if not isinstance(env, dict):
        raise ValueError(f"{str(file)!r} must hold one JSON object, got {type(env).__name__}.")
    return Run(path, config, env, *read_rows(path))


def read_config(path: str | Path) -> dict[str, Any]:
    """Return the configuration of a run directory; an older one in today's terms.

    Raises:
        FileNotFoundError: it is none; the message names what is missing.
        ValueError: `config.toml` is damaged; the message names what is wrong.
    """
    path, file = Path(path), Path(path) / "config.toml"
    missing = [name for name in ("config.toml", "env.json") if not (path / name).is_file()]
    missing += [] if (path / "metrics").is_dir() or (path / "metrics.jsonl").is_file() else ["metrics"]
    if missing:
        hint = " Nothing was trained in it: begin it, or begin it again, by --out." if is_blank(path) else ""
        raise FileNotFoundError(f"{str(path)!r} is no run directory: {', '.join(missing)} missing.{hint}")
    try:
        config = tomllib.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{str(file)!r} is damaged: {error}.") from error
    if "net" in config:
        config["nets"] = [config.pop("net")]
    if "rules" in config:
        config["contenders"] = config.pop("rules")
        for entry in config["contenders"] if _are_tables(config["contenders"], "name") else ():
            entry |= {"rule": entry["name"], "net": config.get("nets", [""])[0]}
    lacking = [] if "data" in config or "name" in config else ["data"]
    lacking += [key for key in ("nets", "contenders") if key not in config]
    if lacking:
        raise ValueError(f"{str(file)!r} lacks {', '.join(lacking)}; data or name, nets and [[contenders]] are needed.")
    for key, needed in (("contenders", "name"), ("metrics", "key")):
        if not _are_tables(config.get(key, []), needed):
            raise ValueError(f"{str(file)!r}: {key} must be tables [[{key}]] with {needed}, got {config[key]!r}.")
    for key, kind in (("nets", str), ("seeds", int)):
        values = config.get(key, [])
        if not isinstance(values, list) or not all(isinstance(value, kind) for value in values):
            raise ValueError(f"{str(file)!r}: {key} must be a list of {kind.__name__}, got {values!r}.")
    return config


def is_blank(path: Path) -> bool:
    """Return whether a directory is empty, or has only what a run killed before its configuration was there leaves."""
    left = {path / "env.json", path / "metrics", path / "checkpoints"}
    return path.is_dir() and all(found in left or is_part(found) for found in path.rglob("*"))


def _are_tables(value: Any, needed: str) -> bool:
    return isinstance(value, list) and all(isinstance(e, dict) and isinstance(e.get(needed), str) for e in value)


def read_rows(path: Path) -> tuple[list[Row], tuple[str, ...]]:
    """Return the rows of a run directory, or of one file of it, and notes on last lines that were half-written.

    Of evaluations that were written twice, after a resume from a checkpoint, the later ones count.

    Raises:
        ValueError: a file is damaged; the message names the file, line and field, or what its checkpoint says of it.
    """
    files, notes = [path], []
    if path.is_dir():
        _, notes = rows_before_checkpoints(path)
        old = path / "metrics.jsonl"  # where it is beside the others, those are not complete
        files = [old] if old.is_file() else sorted((path / "metrics").glob("*.jsonl"))
    rows: dict[object, Row] = {}
    for file in files:
        # Split as bytes: a cut can fall inside a character, and only "\n" ends a line of JSON Lines.
        lines = file.read_bytes().split(b"\n")
        for i, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row: Row = json.loads(line)
            except ValueError as error:
                if i < len(lines):  # after the last newline is nothing, or what a killed run left
                    raise ValueError(f"{str(file)!r}, line {i}, is no JSON: {error}.") from error
                notes.append(f"Line {i}, the last of {file.name}, is half-written and was left out.")
                continue
            if not isinstance(row, dict):
                raise ValueError(f"{str(file)!r}, line {i}, must be a JSON object, got {type(row).__name__}.")
            if file.name == "metrics.jsonl":
                row = {_OLD.get(key, key): value for key, value in row.items()}
            _check(row, f"{str(file)!r}, line {i}")
            placed = row.get("kind") in ("eval", "alignment")
            key = (row["kind"], row["contender"], row["seed"], row["step"]) if placed else (line,)
            rows.pop(key, None)
            rows[key] = row
    return list(rows.values()), tuple(notes)


def rows_before_checkpoints(path: Path) -> tuple[dict[str, int], list[str]]:
    """Return the bytes of rows that each training's checkpoint was saved after, by the name of both, and what is unreadable.

    Raises:
        ValueError: if these bytes are no longer there as they were; the message says what to delete, and what that does.
    """
    found: dict[str, int] = {}
    notes: list[str] = []
    for checkpoint in sorted((path / "checkpoints").glob("*.safetensors")):
        file = path / "metrics" / f"{checkpoint.stem}.jsonl"
        try:
            size, _, checksum = read_notes(checkpoint).get("rows", "").partition(":")
        except ValueError:
            notes.append(f"{checkpoint.name} is damaged, so that {file.name} could not be checked against it.")
            continue
        if not size:  # of an older version
            continue
        content = file.read_bytes()[: int(size)] if file.is_file() else b""
        if hashlib.sha256(content).hexdigest() != checksum:
            load_checkpoint(checkpoint)  # is it that which is damaged?
            kept = f"{len(content)} of {size} bytes are left" if len(content) < int(size) else "its rows were changed"
            raise ValueError(
                f"{str(file)!r} is damaged: {kept}, by what {str(checkpoint)!r} says. Delete both: --resume trains this one "
                "again from its beginning, and leaves the others as they are."
            )
        found[checkpoint.stem] = int(size)
    return found, notes


def _check(row: Row, where: str) -> None:
    kind = row.get("kind")
    for key in _NEEDED.get(kind, ()) if isinstance(kind, str) else ():
        if not isinstance(row.get(key), _TYPES[key]):
            accepted = getattr(_TYPES[key], "__name__", "number")
            raise ValueError(f"{where}: a row of kind {kind!r} needs {key} ({accepted}), got {row.get(key)!r}.")
    if kind == "eval" and not isinstance(row.get("counters", {}), dict):
        raise ValueError(f"{where}: counters must be an object, got {row['counters']!r}.")
