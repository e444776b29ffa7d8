"""Recorded runs as reports read them, made up."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tomli_w

TITLES = {
    "am-adam": "AM-Adam (line search)",
    "am-mem": "AM-mem",
    "adam": "Backpropagation, Adam",
    "sgd": "Backpropagation, SGD",
}
ENV = {
    "python": "3.12.3", "torch": "2.13.0", "beyondprop": "0.1.0",
    "platform": "Linux-6.1-x86_64", "cpu": "A CPU",
    "threads": 1, "device": "cpu", "commit": "0123abc", "started": "2026-03-01T12:00:00+00:00",
}  # fmt: skip


METRICS = {
    "accuracy": {"key": "accuracy", "label": "accuracy (%)", "scale": 100.0, "higher_is_better": True},
    "loss": {"key": "loss", "label": "loss", "scale": 1.0, "higher_is_better": False},
    "r2": {"key": "r2", "label": "R²", "scale": 1.0, "higher_is_better": True},
}
NETS = ("mlp:100x2",)
USUAL = ("accuracy", "loss")


def config(
    rules: dict[str, str],
    seeds: int = 3,
    epochs: float = 10.0,
    *,
    nets: Sequence[str] = NETS,
    metrics: Sequence[str] = USUAL,
) -> dict[str, Any]:
    """A configuration as recorded; a contender is named by its rule, with several nets by net and rule."""
    return {
        "data": "digits", "nets": list(nets), "epochs": epochs, "batch_size": 50, "seeds": list(range(seeds)),
        "schedule": "linear", "validation": False, "threads": 1, "metrics": [METRICS[key] for key in metrics],
        "contenders": [
            {"name": name if len(nets) == 1 else f"{net}/{name}", "title": title, "summary": f"What {title} does.",
             "rule": name, "net": net, "settings": {"lr": 0.003, "steps": 2}}
            for net in nets for name, title in rules.items()
        ],
    }  # fmt: skip


def curves(
    names: Iterable[str], seeds: int = 3, epochs: int = 10, *, metrics: Sequence[str] = USUAL
) -> list[dict[str, Any]]:
    """Rows of learning curves that look like real ones: exponential approach, noise, one clock per seed."""
    rows: list[dict[str, Any]] = []
    for i, name in enumerate(names):
        for seed in range(seeds):
            rng = np.random.default_rng([i, seed])
            pace, top, cost = 0.8 / (1 + 0.5 * i), 0.97 - 0.012 * i, 1.1 if i < 2 else 1.0
            clock = 0.0
            for epoch in range(epochs + 1):
                gone = np.exp(-pace * epoch)
                noise = 1 + 0.03 * rng.standard_normal()
                row = {
                    "kind": "eval", "contender": name, "seed": seed, "step": 30 * epoch, "epoch": float(epoch),
                    "samples": 1500 * epoch, "work": 30 * epoch * cost, "seconds": clock,
                    "train_loss": None if epoch == 0 else (0.02 + 0.01 * i + 2.2 * gone) * noise,
                }  # fmt: skip
                loss = (0.09 + 0.04 * i + 2.2 * gone) * noise
                values = {"loss": loss, "r2": 1 - loss / 2}
                if "accuracy" in metrics:
                    values["accuracy"] = float(top - 0.87 * gone + 0.004 * rng.standard_normal())
                rows.append(row | {key: values[key] for key in metrics})
                clock += (0.04 + 0.015 * (i < 2)) * rng.uniform(0.9, 1.1)
                if epoch:
                    away = 0.25 * (i + 1) / 4 * (1 - gone)
                    stages = {
                        str(2 * k): {
                            "cosine": float(1 - (2 - k) * away - 0.01 * rng.uniform()),
                            "angle": 10.0 * (3 - k), "norm_ratio": 0.7,
                        }
                        for k in range(3)
                    }  # fmt: skip
                    rows.append({
                        "kind": "alignment", "contender": name, "seed": seed, "step": 30 * epoch,
                        "epoch": float(epoch), "stages": stages,
                    })  # fmt: skip
    return rows


def write_run(path: Path, config: dict[str, Any], rows: list[dict[str, Any]], *, old: bool = False) -> Path:
    """Write a run directory, one file of rows a training; `old`: as runs were when they had one net and labels."""
    path.mkdir(parents=True)
    files: dict[object, list[str]] = {}
    if old:
        config = {
            **config,
            "net": config["nets"][0],
            "rules": [_without(c, "rule", "net") for c in config["contenders"]],
        }
        config = _without(config, "nets", "contenders", "metrics")
        keys = {"contender": "rule", "accuracy": "test_accuracy", "loss": "test_loss"}
        rows = [{keys.get(key, key): value for key, value in row.items()} for row in rows]
        files[""] = []
    for row in rows:
        of = "" if old else (row.get("contender"), row.get("seed"))
        files.setdefault(of, []).append(json.dumps(row) + "\n")
    (path / "config.toml").write_text(tomli_w.dumps(config), encoding="utf-8")
    (path / "env.json").write_text(json.dumps(ENV), encoding="utf-8")
    if not old:
        (path / "metrics").mkdir()
    for i, lines in enumerate(files.values()):
        file = path / ("metrics.jsonl" if old else f"metrics/{i:02}.jsonl")
        file.write_text("".join(lines), encoding="utf-8")
    return path


def _without(values: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key not in keys}


def evaluation(contender: str, seed: int, step: int, accuracy: float | None, **more: Any) -> dict[str, Any]:
    """One evaluation row with round numbers: ten steps per epoch."""
    row = {"kind": "eval", "contender": contender, "seed": seed, "step": step, "epoch": step / 10, "samples": 50 * step}
    row |= {"work": 1.1 * step, "seconds": 0.01 * step * (seed + 1), "train_loss": 0.5, "loss": 0.4}
    return row | ({} if accuracy is None else {"accuracy": accuracy}) | more
