"""A recorded run directory in memory: configuration, environment and the rows of its metrics."""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from beyondprop.lab.comparing.settings import WARM_START

Row = dict[str, Any]

# What a row of a known kind must have to be placed; rows of other kinds are kept and never looked at.
_NEEDED = {
    "eval": ("rule", "seed", "step", "epoch"),
    "alignment": ("rule", "seed", "step", "epoch", "stages"),
    "warning": ("rule", "message"),
    "failed": ("rule", "seed", "message"),
}
_TYPES = {"rule": str, "seed": int, "step": int, "epoch": int | float, "stages": dict, "message": str}


def number(row: Mapping[str, Any], key: str) -> float:
    """Return the number at `key`, NaN where it is null, absent or not a number."""
    value = row.get(key)
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan


@dataclass(frozen=True)
class RuleInfo:
    """One compared rule as the configuration describes it.

    Attributes:
        name: The short name that rows use, for instance `"am-adam"`.
        title: The name for people; `name` where the configuration has none.
        summary: One line on what the rule does, or `""`.
        settings: The rule's settings as recorded.
    """

    name: str
    title: str
    summary: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Run:
    """A run directory's content.

    Attributes:
        path: The directory.
        config: `config.toml` as read.
        env: `env.json` as read.
        rows: The objects of `metrics.jsonl` in file order; of rows that a resumed run wrote twice, the last.
        notes: What a reader of the numbers must know about the files, for instance a half-written last line.
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

    @cached_property
    def rules(self) -> tuple[RuleInfo, ...]:
        """The rules in the configuration's order, then those that only rows know."""
        rules = {
            str(entry["name"]): RuleInfo(
                name=str(entry["name"]),
                title=str(entry.get("title") or entry["name"]),
                summary=str(entry.get("summary", "")),
                settings=dict(entry.get("settings", {})),
            )
            for entry in self.config["rules"]
        }
        for row in self.rows:
            kind = row.get("kind")
            if isinstance(kind, str) and kind in _NEEDED and row["rule"] not in rules:
                rules[row["rule"]] = RuleInfo(name=row["rule"], title=row["rule"])
        return tuple(rule for name, rule in rules.items() if not name.startswith(WARM_START))

    @cached_property
    def warm_start(self) -> RuleInfo | None:
        """What every rule started with, by the name that its rows have; None where they started from the beginning."""
        entry = self.config.get("warm_start_rule")
        if not isinstance(entry, dict) or "name" not in entry:
            return None
        title = str(entry.get("title") or entry["name"])
        return RuleInfo(
            name=f"{WARM_START}{entry['name']}",
            title=f"{title}, warm start",
            summary=str(entry.get("summary", "")),
            settings=dict(entry.get("settings", {})),
        )

    def title(self, rule: str) -> str:
        """Return the name for people of the rule that a row is of."""
        known = self.rules if self.warm_start is None else (*self.rules, self.warm_start)
        return next((info.title for info in known if info.name == rule), rule)

    @property
    def metric(self) -> str:
        """`"test_accuracy"` (higher is better) where any row has it, else `"test_loss"` (lower is better)."""
        has = any(math.isfinite(number(r, "test_accuracy")) for r in self.rows if r.get("kind") == "eval")
        return "test_accuracy" if has else "test_loss"

    @property
    def split(self) -> str:
        """What the held-out rows are: `"validation"` or `"test"`."""
        return "validation" if self.config.get("validation") else "test"

    @property
    def warnings(self) -> list[Row]:
        """The recorded warnings, in file order."""
        return [row for row in self.rows if row.get("kind") == "warning"]

    @property
    def failures(self) -> list[Row]:
        """The recorded failures, in file order: each stopped one rule with one seed."""
        return [row for row in self.rows if row.get("kind") == "failed"]

    def of(self, kind: str, rule: str, seed: int) -> list[Row]:
        """Return the rows of one kind (`"eval"` or `"alignment"`), rule and seed, by rising step."""
        return self._index.get((kind, rule, seed), [])

    def seeds(self, rule: str) -> dict[str, tuple[int, ...]]:
        """Return the rule's seeds by how they ended: `"done"`, `"failed"` and `"unfinished"`.

        A seed is done when it is recorded as finished, which an early stop is, too, or when nothing stopped it and
        its last evaluation is at the configured epochs or at most one step short of them; a seed that was never started
        is unfinished.
        """
        failed = {row["seed"] for row in self.failures if row["rule"] == rule}
        finished = {row["seed"] for row in self.rows if row.get("kind") == "finished" and row.get("rule") == rule}
        seen = {seed for kind, name, seed in self._index if name == rule and kind == "eval"}
        ended: dict[str, list[int]] = {"done": [], "failed": [], "unfinished": []}
        for seed in sorted(failed | seen | set(self.config.get("seeds", []))):
            if seed in failed:
                ended["failed"].append(seed)
            else:
                done = seed in finished or self._at_end(self.of("eval", rule, seed))
                ended["done" if done else "unfinished"].append(seed)
        return {how: tuple(seeds) for how, seeds in ended.items()}

    def counted(self, rule: str) -> tuple[int, ...]:
        """Return the seeds that means are over: the done ones, else the unfinished ones with rows."""
        seeds = self.seeds(rule)
        return seeds["done"] or tuple(s for s in seeds["unfinished"] if self.of("eval", rule, s))

    def _at_end(self, rows: list[Row]) -> bool:
        if not rows or rows[-1]["step"] == 0:
            return False
        last, epochs = rows[-1], number(self.config, "epochs")
        one_step = last["epoch"] / last["step"]
        return math.isnan(epochs) or last["epoch"] + one_step >= epochs * (1 - 1e-6)

    @cached_property
    def _index(self) -> dict[tuple[str, str, int], list[Row]]:
        index: dict[tuple[str, str, int], list[Row]] = {}
        for row in self.rows:
            if row.get("kind") == "eval" or row.get("kind") == "alignment":
                index.setdefault((row["kind"], row["rule"], row["seed"]), []).append(row)
        for rows in index.values():
            rows.sort(key=lambda row: row["step"])
        return index


def read_run(path: str | Path) -> Run:
    """Read a run directory.

    Unknown kinds of rows and unknown fields are left alone, and a last line that a killed run left
    half-written is dropped with a note in `Run.notes`.

    Raises:
        FileNotFoundError: The directory or one of its files is missing; the message names all that are.
        ValueError: A file cannot be read as what it should be; the message names the file, line and field.
    """
    path = Path(path)
    if not path.is_dir():
        raise FileNotFoundError(f"There is no run directory {str(path)!r}.")
    missing = [name for name in ("config.toml", "env.json", "metrics.jsonl") if not (path / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{str(path)!r} is not a complete run directory: {', '.join(missing)} missing "
            "(config.toml, env.json and metrics.jsonl are needed)."
        )
    try:
        config = tomllib.loads((path / "config.toml").read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path / 'config.toml'} is not valid TOML: {error}") from error
    _check_config(path / "config.toml", config)
    try:
        env = json.loads((path / "env.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path / 'env.json'} is not valid JSON: {error}") from error
    if not isinstance(env, dict):
        raise ValueError(f"{path / 'env.json'} must hold one JSON object, got {type(env).__name__}.")
    rows, notes = _read_rows(path / "metrics.jsonl")
    return Run(path, config, env, rows, notes)


def _check_config(file: Path, config: dict[str, Any]) -> None:
    missing = [key for key in ("data", "net", "rules") if key not in config]
    if missing:
        raise ValueError(f"{file} lacks {', '.join(missing)}; data, net and [[rules]] are needed.")
    rules = config["rules"]
    if not isinstance(rules, list) or not all(isinstance(rule, dict) and "name" in rule for rule in rules):
        raise ValueError(f"{file}: rules must be an array of tables [[rules]], each with a name, got {rules!r}.")
    if not all(isinstance(seed, int) for seed in config.get("seeds", [])):
        raise ValueError(f"{file}: seeds must be a list of integers, got {config['seeds']!r}.")


def _read_rows(file: Path) -> tuple[list[Row], tuple[str, ...]]:
    # Split as bytes: a cut can fall inside a character, and only "\n" ends a line of JSON Lines.
    lines = [(i, line) for i, line in enumerate(file.read_bytes().split(b"\n"), start=1) if line.strip()]
    rows: dict[object, Row] = {}
    notes: tuple[str, ...] = ()
    for i, line in lines:
        try:
            row = json.loads(line.decode("utf-8"))
        except ValueError as error:
            if i == lines[-1][0]:
                notes = (f"Line {i}, the last of {file.name}, is half-written and was left out.",)
                continue
            raise ValueError(f"{file}, line {i} is not valid JSON: {error}") from error
        if not isinstance(row, dict):
            raise ValueError(f"{file}, line {i} must be a JSON object, got {type(row).__name__}.")
        kind = row.get("kind")
        needed = _NEEDED.get(kind, ()) if isinstance(kind, str) else ()
        for key in (key for key in needed if not isinstance(row.get(key), _TYPES[key])):
            accepted = getattr(_TYPES[key], "__name__", "number")
            raise ValueError(
                f"{file}, line {i}: a row of kind {kind!r} needs {key} ({accepted}), got {row.get(key)!r}."
            )
        # A run resumed from a checkpoint writes the rows after it again: the later row counts.
        placed = kind == "eval" or kind == "alignment"
        again = (kind, row["rule"], row["seed"], row["step"]) if placed else (line,)
        rows.pop(again, None)
        rows[again] = row
    return list(rows.values()), notes
