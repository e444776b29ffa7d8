"""The run directory: what a comparison writes as it goes, and goes on from after it was killed.

    config.toml               the settings, with what was tuned
    env.json                  versions, hardware, commit
    metrics/NAME.seedN.jsonl  one file a training, one row a line, as it comes; joined when read
    checkpoints/NAME.seedN.safetensors
    figures/, report.html     made from the files above at the end, or by `beyondprop report`

A row of kind finished or failed ends the training of one contender with one seed; it is not trained again.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any

import tomli_w

from beyondprop.lab.runs.checkpoint import load_checkpoint, save_checkpoint
from beyondprop.lab.runs.environment import now
from beyondprop.lab.runs.files import write_atomically
from beyondprop.lab.runs.recorded import Row, read_config, read_rows


class RunDirectory:
    """A run directory that is being written; one process at a time.

    Attributes:
        path: the directory.
        config: what `config.toml` holds.
        rows: what the files in `metrics/` hold.
    """

    def __init__(self, path: Path, config: dict[str, Any]) -> None:
        self.path, self.config = path, config
        self.rows: list[Row] = []
        self._lock = _lock(path)

    @classmethod
    def create(cls, path: Path, config: dict[str, Any], env: Mapping[str, Any]) -> RunDirectory:
        """Make a new run directory.

        Raises:
            FileExistsError: if there is something at `path` already.
        """
        check_free(path)
        for folder in ("checkpoints", "metrics"):
            (path / folder).mkdir(parents=True, exist_ok=True)
        _write_env(path, env)
        write_atomically(path / "config.toml", tomli_w.dumps(config).encode())
        return cls(path, config)

    @classmethod
    def open(cls, path: Path) -> RunDirectory:
        """Open a run directory to go on with it: what its unfinished trainings wrote after their checkpoints is dropped.

        Raises:
            FileNotFoundError: if it is none; the message names what is missing.
            ValueError: if a file in it is damaged; the message names it.
            RuntimeError: if another process is writing it.
        """
        run = cls(path, read_config(path))
        try:
            run._resume()
        except BaseException:
            run.close()
            raise
        return run

    def append(self, row: Row) -> None:
        """Write a row; it is in its training's file when this returns."""
        with open(self._file(row), "a", encoding="utf-8") as file:
            file.write(_line(row))
        self.rows.append(row)

    def _file(self, row: Row) -> Path:
        if row.get("kind") == "tuning":
            name = f"tuning-{slug(row['contender'])}-{row['lr']:g}"
        else:
            name = f"{slug(row['contender'])}.seed{row['seed']}" if "seed" in row else "run"
        return self.path / "metrics" / f"{name}.jsonl"

    def ended(self, contender: str, seed: int) -> bool:
        """Return whether this training finished or failed."""
        ends = (row for row in self.rows if row.get("kind") in ("finished", "failed"))
        return any((row["contender"], row["seed"]) == (contender, seed) for row in ends)

    def checkpoint(self, contender: str, seed: int) -> Path:
        """Return the path of a training's checkpoint, the trained weights at its end."""
        return self.path / "checkpoints" / f"{slug(contender)}.seed{seed}.safetensors"

    def save(self, contender: str, seed: int, state: Any) -> None:
        """Write a checkpoint; all rows before it are on the disk then, too."""
        file = self._file({"contender": contender, "seed": seed})
        if file.is_file():
            with open(file, "rb") as rows:
                os.fsync(rows.fileno())
        save_checkpoint(self.checkpoint(contender, seed), state)

    def load(self, contender: str, seed: int) -> Any | None:
        """Return the state in a training's checkpoint, or None where there is none yet."""
        path = self.checkpoint(contender, seed)
        return load_checkpoint(path) if path.is_file() else None

    def write_config(self) -> None:
        """Write `config` anew."""
        write_atomically(self.path / "config.toml", tomli_w.dumps(self.config).encode())

    def close(self) -> None:
        """Close the files and let others write."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def __enter__(self) -> RunDirectory:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _resume(self) -> None:
        self.rows, _ = read_rows(self.path)

        @cache
        def kept_until(contender: str, seed: int) -> float:
            if self.ended(contender, seed):
                return math.inf
            state = self.load(contender, seed)
            return -1 if state is None else state["step"]

        self.rows = [
            row
            for row in self.rows
            if "seed" not in row
            or row.get("kind") == "tuning"
            or row.get("step", 0) <= kept_until(row["contender"], row["seed"])
        ]
        files: dict[Path, str] = {file: "" for file in (self.path / "metrics").glob("*.jsonl")}
        for row in self.rows:
            files[self._file(row)] = files.get(self._file(row), "") + _line(row)
        for file, lines in files.items():
            write_atomically(file, lines.encode())
        (self.path / "metrics.jsonl").unlink(missing_ok=True)  # of an older run
        env = json.loads((self.path / "env.json").read_text(encoding="utf-8"))
        _write_env(self.path, env | {"resumed": [*env.get("resumed", []), now()]})


def default_path(data: str, net: str, parent: Path = Path("runs")) -> Path:
    """Return a free path such as `runs/20260131-174502-digits-mlp-100x2`."""
    stem = slug("-".join([datetime.now().strftime("%Y%m%d-%H%M%S"), data, *net.replace("=", "").split(":")]))
    paths = (parent / (stem if n == 1 else f"{stem}-{n}") for n in range(1, 1000))
    return next(path for path in paths if not path.exists())


def check_free(path: Path) -> None:
    """Raise `FileExistsError` unless `path` is free, or an empty directory."""
    if (path / "config.toml").is_file():
        raise FileExistsError(
            f"{str(path)!r} holds a run already; go on with it by --resume, or choose another directory."
        )
    # A run that was killed before its config was written leaves these behind, and nothing in them was trained.
    leftovers = {path / "env.json", path / "metrics", path / "checkpoints"}
    if path.exists() and not (path.is_dir() and leftovers.issuperset(path.rglob("*"))):
        raise FileExistsError(f"{str(path)!r} is there already and no empty directory; choose another.")


def _write_env(path: Path, env: Mapping[str, Any]) -> None:
    write_atomically(path / "env.json", (json.dumps(env, indent=2, ensure_ascii=False) + "\n").encode())


def _line(row: Row) -> str:
    return json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n"


def slug(name: str) -> str:
    """Return a name as files have it."""
    return re.sub(r"[^\w.=+-]+", "-", name)


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
