"""The run directory: what a comparison writes as it goes, and goes on from after it was killed.

    config.toml               the settings, with what was tuned
    env.json                  versions, hardware, commit
    metrics.jsonl             one row a line, as it comes
    checkpoints/RULE.seedN.safetensors
    figures/, report.html     made from the files above at the end, or by `beyondprop report`

A row of kind finished or failed ends the training of one rule with one seed; it is not trained again.
"""

from __future__ import annotations

import json
import os
import tomllib
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import tomli_w

from beyondprop.lab.runs.checkpoint import load_checkpoint, save_checkpoint
from beyondprop.lab.runs.environment import now
from beyondprop.lab.runs.files import write_atomically

Row = dict[str, Any]
_ENDS = ("finished", "failed")


class RunDirectory:
    """A run directory that is being written; one process at a time.

    Attributes:
        path: the directory.
        config: what `config.toml` holds.
        rows: what `metrics.jsonl` holds.
    """

    def __init__(self, path: Path, config: dict[str, Any], rows: list[Row]) -> None:
        self.path, self.config, self.rows = path, config, rows
        self._lock = _lock(path)
        self._ended = {(r.get("rule"), r.get("seed")) for r in rows if r.get("kind") in _ENDS}
        self._metrics = open(path / "metrics.jsonl", "a", encoding="utf-8")  # noqa: SIM115

    @classmethod
    def create(cls, path: Path, config: dict[str, Any], env: Mapping[str, Any]) -> RunDirectory:
        """Make a new run directory.

        Raises:
            FileExistsError: if there is something at `path` already.
        """
        check_free(path)
        (path / "checkpoints").mkdir(parents=True, exist_ok=True)
        write_atomically(path / "env.json", (json.dumps(env, indent=2, ensure_ascii=False) + "\n").encode())
        write_atomically(path / "metrics.jsonl", b"")
        write_atomically(path / "config.toml", tomli_w.dumps(config).encode())
        return cls(path, config, [])

    @classmethod
    def open(cls, path: Path) -> RunDirectory:
        """Open a run directory to go on with it: what its unfinished trainings wrote after their checkpoints is dropped.

        Raises:
            FileNotFoundError: if it is none; the message names what is missing.
            ValueError: if a file in it is damaged; the message names it.
            RuntimeError: if another process is writing it.
        """
        config = read_config(path)
        run = cls(path, config, [])
        try:
            run._resume()
        except BaseException:
            run.close()
            raise
        return run

    def append(self, row: Row) -> None:
        """Write a row; it is in the file when this returns."""
        self._metrics.write(_line(row))
        self._metrics.flush()
        self.rows.append(row)
        if row.get("kind") in _ENDS:
            self._ended.add((row["rule"], row["seed"]))

    def ended(self, rule: str, seed: int) -> bool:
        """Return whether this training finished or failed."""
        return (rule, seed) in self._ended

    def checkpoint(self, rule: str, seed: int) -> Path:
        """Return the path of a training's checkpoint, the trained weights at its end."""
        return self.path / "checkpoints" / f"{rule}.seed{seed}.safetensors"

    def save(self, rule: str, seed: int, state: Any) -> None:
        """Write a checkpoint; all rows before it are on the disk then, too."""
        os.fsync(self._metrics.fileno())
        save_checkpoint(self.checkpoint(rule, seed), state)

    def load(self, rule: str, seed: int) -> Any | None:
        """Return the state in a training's checkpoint, or None where there is none yet."""
        path = self.checkpoint(rule, seed)
        return load_checkpoint(path) if path.is_file() else None

    def write_config(self) -> None:
        """Write `config` anew."""
        write_atomically(self.path / "config.toml", tomli_w.dumps(self.config).encode())

    def close(self) -> None:
        """Close the files and let others write."""
        self._metrics.close()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def __enter__(self) -> RunDirectory:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _resume(self) -> None:
        rows = _read_rows(self.path / "metrics.jsonl")
        self._ended = {(r.get("rule"), r.get("seed")) for r in rows if r.get("kind") in _ENDS}
        kept_until: dict[tuple[str, int], int] = {}

        def keep(row: Row) -> bool:
            if "seed" not in row or row.get("kind") == "tuning" or self.ended(row["rule"], row["seed"]):
                return True
            key = row["rule"], row["seed"]
            if key not in kept_until:
                state = self.load(*key)
                kept_until[key] = -1 if state is None else state["step"]
            return row.get("step", 0) <= kept_until[key]

        self.rows = [row for row in rows if keep(row)]
        self._metrics.close()
        write_atomically(self.path / "metrics.jsonl", "".join(map(_line, self.rows)).encode())
        self._metrics = open(self.path / "metrics.jsonl", "a", encoding="utf-8")  # noqa: SIM115
        env = json.loads((self.path / "env.json").read_text(encoding="utf-8"))
        env["resumed"] = [*env.get("resumed", []), now()]
        write_atomically(self.path / "env.json", (json.dumps(env, indent=2, ensure_ascii=False) + "\n").encode())


def read_config(path: Path) -> dict[str, Any]:
    """Return the settings of a run directory.

    Raises:
        FileNotFoundError: if it is none; the message names what is missing.
        ValueError: if `config.toml` is damaged.
    """
    missing = [name for name in ("config.toml", "env.json", "metrics.jsonl") if not (path / name).is_file()]
    if missing:
        raise FileNotFoundError(f"{str(path)!r} is no run directory: {', '.join(missing)} missing.")
    try:
        return tomllib.loads((path / "config.toml").read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{str(path / 'config.toml')!r} is damaged: {error}.") from error


def default_path(data: str, net: str, parent: Path = Path("runs")) -> Path:
    """Return a free path such as `runs/20260131-174502-digits-mlp-100x2`."""
    stem = "-".join([datetime.now().strftime("%Y%m%d-%H%M%S"), data, *net.replace("=", "").split(":")])
    paths = (parent / (stem if n == 1 else f"{stem}-{n}") for n in range(1, 1000))
    return next(path for path in paths if not path.exists())


def check_free(path: Path) -> None:
    """Raise `FileExistsError` unless `path` is free, or an empty directory."""
    if (path / "config.toml").is_file() and (path / "metrics.jsonl").is_file():
        raise FileExistsError(
            f"{str(path)!r} holds a run already; go on with it by --resume, or choose another directory."
        )
    if path.exists() and not (path.is_dir() and _holds_nothing(path)):
        raise FileExistsError(f"{str(path)!r} is there already and no empty directory; choose another.")


def _holds_nothing(path: Path) -> bool:
    # A run that was killed before its config was written leaves these behind, and nothing in them was trained.
    begun = {path / "env.json", path / "metrics.jsonl", path / "checkpoints"}
    return all(p in begun and (p.name != "metrics.jsonl" or not p.stat().st_size) for p in path.rglob("*"))


def _line(row: Row) -> str:
    return json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n"


def _read_rows(path: Path) -> list[Row]:
    lines = path.read_bytes().split(b"\n")
    rows = []
    for number, line in enumerate(lines[:-1], 1):  # after the last newline is nothing, or half a row of a killed run
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise ValueError(f"{str(path)!r}, line {number}, is no JSON: {error}.") from error
    return rows


def _lock(path: Path) -> int | None:
    """Lock the directory for this process; the system takes the lock back when the process ends, however it ends."""
    try:
        import fcntl
    except ImportError:  # no such locks on this system
        return None
    handle = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(handle)
        raise RuntimeError(f"{str(path)!r} is being written by another process; wait for it, or stop it.") from error
    return handle
