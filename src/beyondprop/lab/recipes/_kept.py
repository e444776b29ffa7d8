"""What recipes of trainings of their own keep: numbers by key, and a training that goes on where it was stopped."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from beyondprop.lab.comparing.member import seeded
from beyondprop.lab.recipes._base import Context, told
from beyondprop.lab.runs.checkpoint import load_checkpoint, save_checkpoint
from beyondprop.lab.runs.context import deferred_interrupt
from beyondprop.lab.runs.files import write_atomically
from beyondprop.lab.runs.sums import sealed, unsealed
from beyondprop.lab.training.fit import fit
from beyondprop.lab.training.loop import Failed, Row, State
from beyondprop.rules.base import LearningRule


class Kept:
    """Values by key in one JSON file; what it has is not measured again.

    Args:
        path: the file; read where it is there.
        settings: what all its values were measured with.

    Raises:
        ValueError: if the file is damaged, or of other settings.
    """

    def __init__(self, path: Path, settings: Any = None) -> None:
        self.path, self.settings = path, settings
        self.values: dict[str, Any] = {}
        if not path.is_file():
            return
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(found, dict) or not isinstance(found.get("values"), dict):
                raise TypeError("an object with settings and values is needed")
            unsealed(found)
            self.values, recorded = found["values"], found["settings"]
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise ValueError(
                f"{str(path)!r} is damaged: {told(error)}. Remove it: what it has is measured again."
            ) from error
        if recorded != json.loads(json.dumps(settings)):
            raise ValueError(f"{str(path)!r} is of other settings; choose another directory, or remove it.")

    def get(self, key: str, measure: Callable[[], Any]) -> Any:
        """Return the value of a key; one that is new is measured and written."""
        if key not in self.values:
            self.values[key] = measure()
            content = {"settings": self.settings, "values": self.values}
            write_atomically(self.path, (json.dumps(sealed(content), indent=1, allow_nan=False) + "\n").encode())
        return self.values[key]


def trained(
    context: Context,
    name: str,
    build: Callable[[], LearningRule],
    data: Any,
    *,
    seed: int,
    look: Callable[[LearningRule, Row], dict[str, Any]] | None = None,
    every: int = 1,
    **settings: Any,
) -> list[Row]:
    """Train with `fit` and return its evaluations, to where it failed; a training that was stopped goes on.

    Args:
        context: where `NAME.json` is written at the end, and `NAME.safetensors` on the way there.
        name: of the training.
        build: returns the rule; the global random state is seeded.
        data: what it is trained on.
        seed: of the weights and of the batches.
        look: what is added to an evaluation's row.
        every: steps between checkpoints; for rules whose state is large.
        **settings: further arguments of `fit`.

    Raises:
        ValueError: if what is there is damaged, or of other settings.
    """
    kept = Kept(context.out / f"{name}.json", {"seed": seed, **settings})
    file = context.out / f"{name}.safetensors"

    def run() -> list[Row]:
        with seeded(seed, "cpu"), deferred_interrupt() as interrupted:
            rule = build()
            before = load_checkpoint(file) if file.is_file() else {"rows": [], "state": None}
            rows: list[Row] = before["rows"]

            def log(row: Row) -> None:
                if row["kind"] == "eval":
                    rows.append(row | (look(rule, row) if look is not None else {}))
                    context.say(f"{name}: epoch {row['epoch']:g}, accuracy {100 * row['accuracy']:.2f} %")
                elif row["kind"] == "failed":
                    context.say(f"{name}: {row['message']}")

            def save(state: State) -> None:
                if state["step"] % every == 0 or interrupted():
                    save_checkpoint(file, {"rows": rows, "state": state})

            with suppress(*Failed):  # told by then
                fit(
                    rule,
                    data,
                    seed=seed,
                    log=log,
                    save=save,
                    resume=before["state"],
                    interrupted=interrupted,
                    **settings,
                )
        return rows

    rows = kept.get("rows", run)
    file.unlink(missing_ok=True)
    return rows


def accuracy_at(rows: list[Row], epoch: float) -> float:
    """Return the accuracy in percent of the evaluation at an epoch; NaN where the training failed before."""
    found = [row["accuracy"] for row in rows if abs(row["epoch"] - epoch) < 1e-6]
    return 100.0 * found[0] if found else math.nan
