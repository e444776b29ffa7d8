"""Settings and environment of a run directory, read and checked: `config.toml` and `env.json`."""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any

from beyondprop.lab.runs.files import is_part
from beyondprop.lab.runs.sums import SUMS, read_sums

_LARGEST = 2**63  # of a whole number
_NUMBER = int | float
# Types of the settings; of lists, those of their items.
_SETTINGS: dict[str, Any] = {
    **dict.fromkeys(("data", "task", "name", "sample", "schedule", "warm_start", "device"), str),
    **dict.fromkeys(("batch_size", "evaluate_every", "early_stop", "threads"), int),
    **dict.fromkeys(("tune", "validation", "alignment"), bool),
    **dict.fromkeys(("epochs", "tune_epochs"), _NUMBER),
    **dict.fromkeys(("lr", "warm_start_rule"), dict),
}
_LISTS = {"nets": str, "seeds": int, "tune_seeds": int, "plugins": str}
# Tables of the configuration: the key that each must have, and the types of the others.
_TABLES: dict[str, tuple[str, dict[str, Any]]] = {
    "contenders": ("name", {"title": str, "summary": str, "rule": str, "net": str, "settings": dict}),
    "metrics": ("key", {"label": str, "scale": _NUMBER, "higher_is_better": bool}),
}


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Name the file that settings come from in what is wrong with them, where the message does not."""
    try:
        yield
    except ValueError as error:
        if type(error) is not ValueError or str(path) in str(error):
            raise
        raise ValueError(f"{str(path / 'config.toml')!r}: {error}") from error


def is_of(value: Any, kind: Any) -> bool:
    """Return whether a value is of a type; no truth value is a number, and no whole number is beyond 64 bits."""
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        return False
    return not isinstance(value, int) or -_LARGEST <= value < _LARGEST


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
        hint = " Choose another, or put back what is missing."
        hint = " Nothing was trained in it: begin it, or begin it again, by --out." if is_blank(path) else hint
        hint = (
            " A file env.json with {} will do: what the run ran on is forgotten." if missing == ["env.json"] else hint
        )
        raise FileNotFoundError(f"{str(path)!r} is no run directory: {', '.join(missing)} missing.{hint}")
    try:
        config = tomllib.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{str(file)!r} is damaged: {error}. Put the original back: it has the settings.") from error
    read_sums(path).check(config, file)
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
    for key, (needed, kinds) in _TABLES.items():
        if not _are_tables(config.get(key, []), needed):
            raise ValueError(f"{str(file)!r}: {key} must be tables [[{key}]] with {needed}, got {config[key]!r}.")
        for entry, (name, kind) in product(config.get(key, []), kinds.items()):
            if name in entry and not is_of(entry[name], kind):
                accepted = getattr(kind, "__name__", "a number")
                of = f"{name} of {entry[needed]!r} in {key}"
                raise ValueError(f"{str(file)!r}: {of} must be {accepted}, got {entry[name]!r}.")
    for key, kind in _SETTINGS.items():
        if key in config and not is_of(config[key], kind):
            accepted = getattr(kind, "__name__", "a number")
            raise ValueError(f"{str(file)!r}: {key} must be {accepted}, got {config[key]!r}.")
    of_contenders = {e["name"]: e["settings"]["lr"] for e in config["contenders"] if "lr" in e.get("settings", {})}
    for name, lr in (*config.get("lr", {}).items(), *of_contenders.items()):
        if not is_of(lr, _NUMBER) or not 0 < lr < math.inf:
            raise ValueError(f"{str(file)!r}: lr of {name!r} must be a finite number > 0, got {lr!r}.")
    for key, kind in _LISTS.items():
        values = config.get(key, [])
        if not isinstance(values, list) or not all(is_of(value, kind) for value in values):
            raise ValueError(f"{str(file)!r}: {key} must be a list of {kind.__name__}, got {values!r}.")
    return config


def read_env(path: Path) -> dict[str, Any]:
    """Return what `env.json` of a run directory has.

    Raises:
        ValueError: it is damaged; the message names it.
    """
    file = path / "env.json"
    remedy = " Put {} in its place: what the run ran on is forgotten then, its numbers stay."
    try:
        env = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{str(file)!r} is no JSON: {error}.{remedy}") from error
    if not isinstance(env, dict):
        raise ValueError(f"{str(file)!r} must hold one JSON object, got {type(env).__name__}.{remedy}")
    read_sums(path).check(env, file)
    if not isinstance(env.get("resumed", []), list):
        raise ValueError(f"{str(file)!r}: resumed must be a list, got {env['resumed']!r}.")
    return env


def is_blank(path: Path) -> bool:
    """Return whether a directory is empty, or has only what a run killed before its configuration was there leaves."""
    left = {path / name for name in ("env.json", "metrics", "checkpoints", SUMS)}
    return path.is_dir() and all(found in left or is_part(found) for found in path.rglob("*"))


def _are_tables(value: Any, needed: str) -> bool:
    return isinstance(value, list) and all(isinstance(e, dict) and isinstance(e.get(needed), str) for e in value)
