"""The run directory: what a comparison writes as it goes, and goes on from after it was killed.

    config.toml               the settings, with what was tuned
    env.json                  versions, hardware, commit
    metrics/NAME.seedN.jsonl  one file a training, one row a line, as it comes; joined when read
    checksums.txt             of these files, see `sums`
    checkpoints/NAME.seedN.safetensors
    figures/, report.html     made from the files above at the end, or by `beyondprop report`

A row of kind finished or failed ends the training of one contender with one seed; it is not trained again.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import warnings
from collections.abc import Mapping
from datetime import datetime
from itertools import takewhile
from pathlib import Path
from typing import Any

import tomli_w

from beyondprop.lab.runs.checkpoint import load_checkpoint, save_checkpoint
from beyondprop.lab.runs.config import is_blank, is_of, read_config, read_env
from beyondprop.lab.runs.environment import now
from beyondprop.lab.runs.files import append, remove_parts, synced, write_atomically
from beyondprop.lab.runs.recorded import Row, read_rows
from beyondprop.lab.runs.sums import (
    SUMS,
    append_sum,
    is_training,
    read_sums,
    rows_before_checkpoints,
    rows_line,
    values_line,
)
from beyondprop.lab.runs.text import cleaned, encodable

_LONGEST = 190  # bytes of a name in a file's name; systems take 255, and more stands around it


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
        self._sums: dict[Path, tuple[int, Any]] = {}  # of the files in `metrics/`: bytes and running checksum
        self._lock = _lock(path)

    @classmethod
    def create(cls, path: Path, config: dict[str, Any], env: Mapping[str, Any]) -> RunDirectory:
        """Make a new run directory.

        Raises:
            FileExistsError: if there is something at `path` already.
            RuntimeError: if another process is making it.
        """
        check_free(path)
        path.mkdir(parents=True, exist_ok=True)
        run = cls(path, config)
        try:
            check_free(path)  # locked now: nobody else has begun it in between
            _remove_parts(path)
            (path / SUMS).unlink(missing_ok=True)  # of a run that was killed before it began: its last line may be half
            for folder in ("checkpoints", "metrics"):
                (path / folder).mkdir(exist_ok=True)
            _write_env(path, env)
            run.write_config()
        except BaseException:
            run.close()
            raise
        return run

    @classmethod
    def open(cls, path: Path) -> RunDirectory:
        """Open a run directory to go on with it: what its unfinished trainings wrote after their checkpoints is dropped.

        Raises:
            FileNotFoundError: if it is none; the message names what is missing.
            ValueError: if a file in it is damaged; the message names it.
            RuntimeError: if another process is writing it.
        """
        if not path.is_dir():
            read_config(path)  # says what is missing
        run = cls(path, {})
        try:
            run._resume()
        except BaseException:
            run.close()
            raise
        return run

    def append(self, row: Row) -> None:
        """Write a row; it is in its training's file when this returns."""
        file, line = self._file(row), _line(row)
        size, checksum = self._sum(file)
        append(file, line)
        checksum.update(line)
        self._sums[file] = size + len(line), checksum
        if _ends(row):
            append_sum(self.path, self._sum_line(file))
        self.rows.append(row)

    def _sum_line(self, file: Path) -> bytes:
        size, checksum = self._sum(file)
        return rows_line(size, checksum.hexdigest(), file.name)

    def _sum(self, file: Path) -> tuple[int, Any]:
        if file not in self._sums:
            content = file.read_bytes() if file.is_file() else b""
            self._sums[file] = len(content), hashlib.sha256(content)
        return self._sums[file]

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
            synced(file)
        size, checksum = self._sum(file)
        save_checkpoint(self.checkpoint(contender, seed), state, rows=f"{size}:{checksum.hexdigest()}")

    def load(self, contender: str, seed: int) -> Any | None:
        """Return the state in a training's checkpoint, or None where there is none yet.

        Raises:
            ValueError: if it is damaged; the message says what to delete, and what that does.
        """
        path = self.checkpoint(contender, seed)
        try:
            return load_checkpoint(path) if path.is_file() else None
        except ValueError as error:
            rows = self._file({"contender": contender, "seed": seed})
            also = f" and {str(rows)!r}" if self.ended(contender, seed) else ""
            raise ValueError(
                f"{error} Delete it{also}: --resume trains {contender} with seed {seed} again from its beginning, and leaves "
                "the others as they are."
            ) from error

    def rewind(self, contender: str, seed: int) -> None:
        """Drop what a training wrote after its last checkpoint, as `open` does: the process that trained it was killed."""
        state, file = self.load(contender, seed), self._file({"contender": contender, "seed": seed})
        content = file.read_bytes() if file.is_file() else b""
        before, _ = rows_before_checkpoints(self.path)
        until = 0 if state is None else before.get(file.stem, _size_until(content, state.get("step", 0)))
        if until < len(content):
            write_atomically(file, content[:until])
            self._sums.pop(file, None)
            kept = [json.loads(line) for line in content[:until].split(b"\n")[:-1]]
            by = ("tuning", contender, seed)  # rows of tuning have the same names, and files of their own
            others = [r for r in self.rows if r.get("kind") == by[0] or (r.get("contender"), r.get("seed")) != by[1:]]
            self.rows = [*others, *kept]

    def write_config(self) -> None:
        """Write `config` anew."""
        config = cleaned(self.config, encodable)
        append_sum(self.path, values_line(config, "config.toml"))
        write_atomically(self.path / "config.toml", tomli_w.dumps(config).encode())

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
        self.config, env, sums = read_config(self.path), read_env(self.path), read_sums(self.path)
        for note in sums.lacking():
            warnings.warn(f"{note} {str(self.path)!r} is gone on with as it stands.", stacklevel=4)
        _remove_parts(self.path)
        self.rows, _ = read_rows(self.path, placed=True)
        if (old := self.path / "metrics.jsonl").is_file():  # of an older run
            files: dict[Path, bytes] = {}
            for row in self.rows:
                files[self._file(row)] = files.get(self._file(row), b"") + _line(row)
            for file, lines in files.items():
                write_atomically(file, lines)
            old.unlink()
        before, _ = rows_before_checkpoints(self.path)
        ended = {self._file(row) for row in self.rows if row.get("kind") in ("finished", "failed")}
        trained = {self._file(row): (row["contender"], row["seed"]) for row in self.rows if "seed" in row}
        done = []
        for file in sorted((self.path / "metrics").glob("*.jsonl")):
            content = file.read_bytes()
            until = content.rfind(b"\n") + 1  # what follows is half-written
            # What came after the last state, and of others after the last checksum, comes again. Older runs have none.
            covered = sums.rows.get(file.name, (0, ""))[0] if sums.found and not is_training(file) else until
            if is_training(file) and file not in ended:
                state = self.load(*trained[file]) if file in trained else None
                until = 0 if state is None else before.get(file.stem, _size_until(content, state.get("step", 0)))
            else:
                until = min(until, covered)
                done.append(file)
            if until < len(content):
                write_atomically(file, content[:until])
        for saved in (self.path / "checkpoints").glob("*.safetensors"):
            file = self.path / "metrics" / f"{saved.stem}.jsonl"
            if not (file.is_file() and file.stat().st_size):  # newer checkpoints say so themselves
                raise ValueError(
                    f"{str(file)!r}, the rows before {str(saved)!r}, is missing or empty. Delete the checkpoint: --resume "
                    "trains this one again from its beginning."
                )
        lines = [values_line(env, "env.json"), values_line(self.config, "config.toml"), *map(self._sum_line, done)]
        write_atomically(self.path / SUMS, *lines)
        self.rows, _ = read_rows(self.path)
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
    if path.exists() and not is_blank(path):
        raise FileExistsError(f"{str(path)!r} is there already and no empty directory; choose another.")


def _remove_parts(path: Path) -> None:
    """Delete what a killed process left of files that it was writing; only who has the lock may."""
    for folder in (path, *filter(Path.is_dir, path.iterdir())):
        remove_parts(folder, of_all=True)


def _write_env(path: Path, env: Mapping[str, Any]) -> None:
    append_sum(path, values_line(env, "env.json"))
    content = json.dumps(env, indent=2, ensure_ascii=False) + "\n"
    write_atomically(path / "env.json", content.encode("utf-8", "backslashreplace"))


def _line(row: Row) -> bytes:
    # A lone surrogate is written as JSON has it.
    return (json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n").encode("utf-8", "backslashreplace")


def _ends(row: Row) -> bool:
    """Return whether this is the last row of a training, or of no training of the comparison: its file has a checksum."""
    return row.get("kind") in ("finished", "failed", "tuning") or "seed" not in row


def _size_until(content: bytes, step: int) -> int:
    """Return the bytes of the rows up to a step; the checkpoints of older runs do not say."""

    def is_before(line: bytes) -> bool:
        at = json.loads(line).get("step") if line.strip() else None
        return at is None or not is_of(at, int) or at <= step

    lines = [line + b"\n" for line in content.split(b"\n")[:-1]]
    return sum(map(len, takewhile(is_before, lines)))


def slug(name: str) -> str:
    """Return a name as files have it; of one that is too long for them the beginning, with its checksum."""
    found = re.sub(r"[^\w.=+-]+", "-", name)
    if len(found.encode()) <= _LONGEST:
        return found
    digest = hashlib.sha256(name.encode("utf-8", "backslashreplace")).hexdigest()[:16]
    return f"{found.encode()[: _LONGEST - 17].decode(errors='ignore')}-{digest}"


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
        if isinstance(error, BlockingIOError):
            raise RuntimeError(
                f"{str(path)!r} is being written by another process; wait for it, or stop it."
            ) from error
        if error.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK):
            raise OSError(error.errno, error.strerror, str(path)) from error
        warnings.warn(
            f"{str(path)!r} is on a file system without locks ({error.strerror}): see to it that no other process writes it.",
            stacklevel=2,
        )
        return None
    return handle
