"""RevNet-38 on CIFAR-10 as it was published: the same training in two modes, from the same weights on the same batches."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from beyondprop.lab import nets, tasks
from beyondprop.lab.comparing.member import seeded
from beyondprop.lab.recipes._base import Context
from beyondprop.lab.recipes._kept import trained
from beyondprop.lab.registry import rules
from beyondprop.lab.training.loop import Row
from beyondprop.nn.reversible import gradient_angle
from beyondprop.rules.base import LearningRule

SOURCE = "Gomez et al., NeurIPS 2017, arXiv 1707.04585"
TASK = "images:cifar10:centered:pad=2:flip"
RULE, RATE, BATCH = "sgd-decay", 0.1, 100
REVERSIBLE, STORED, SHIFTED = "reversible", "stored", "stored, weights moved by rounding"

NET = "revnet38"
SEED = 0
TEST_ROWS = 500


def train(
    context: Context, what: str, steps: int, every: int, dtype: torch.dtype = torch.float32, *, angles: bool = False
) -> list[Row]:
    """Train RevNet-38 at a constant rate and return its evaluations on 500 of the test rows.

    Args:
        context: where it is kept.
        what: `REVERSIBLE`, `STORED`, or `SHIFTED`: stored, with every weight times `1 + 1e-7 n` at first, n normal.
        steps: of the training, whose rows are the first 100 `steps` of the training rows.
        every: steps between two evaluations.
        dtype: of weights and images.
        angles: whether evaluations have `angle`, in degrees, between the gradients of both modes on a fixed batch.
    """
    task: Any = tasks.load(TASK)
    rows = min(len(task.y_train), BATCH * steps)
    x, y = task.x_train[:rows].to(dtype), task.y_train[:rows]
    x_test, y_test = task.x_test[:TEST_ROWS].to(dtype), task.y_test[:TEST_ROWS]
    task = replace(task, x_train=x, y_train=y, x_test=x_test, y_test=y_test)

    def build() -> LearningRule:
        mode = "inverse" if what == REVERSIBLE else "store"
        model = nets.build(f"{NET}:mode={mode}", tuple(x.shape[1:]), 10).to(dtype)
        if what == SHIFTED:
            with torch.no_grad(), seeded(SEED, "cpu"):
                for weight in model.parameters():
                    weight.mul_(1 + 1e-7 * torch.randn_like(weight))
        return rules.get(RULE).build(model, nn.CrossEntropyLoss(), RATE)

    def look(rule: LearningRule, row: Row) -> dict[str, Any]:
        del row
        return {"angle": gradient_angle(rule.model, lambda output: rule.loss(output, y[:BATCH]), x[:BATCH])}

    return trained(
        context,
        f"{what.partition(',')[0]}{'-moved' * (what == SHIFTED)}-{str(dtype).partition('.')[2]}",
        build,
        task,
        seed=SEED,
        look=look if angles else None,
        every=every,
        epochs=steps / -(-rows // BATCH),
        batch_size=BATCH,
        schedule="constant",
        evaluate_every=every,
    )


def gaps(ours: Sequence[Row], theirs: Sequence[Row], key: str = "train_loss") -> list[float]:
    """Return the relative differences of a recorded number; NaN where one training failed before the other."""
    pairs = [[row[key] for row in rows if row.get(key) is not None] for rows in (ours, theirs)]
    if len(pairs[0]) != len(pairs[1]) or not pairs[0]:
        return [math.nan]
    return [abs(a - b) / abs(b) for a, b in zip(*pairs, strict=True)]


_LOOKS: dict[str, dict[str, Any]] = {
    STORED: {"color": "#D55E00", "linestyle": "-", "linewidth": 5.0, "alpha": 0.45},
    SHIFTED: {"color": "#777777", "linestyle": (0, (1.2, 1.2))},
    REVERSIBLE: {"color": "#0072B2", "linestyle": (0, (2, 2))},
}


def draw(axis: Any, found: dict[str, list[Row]], key: str = "train_loss") -> None:
    """Draw a recorded number over the steps; the stored training lies below."""
    for what, look in _LOOKS.items():
        rows = [row for row in found.get(what, ()) if row.get(key) is not None]
        if rows:
            axis.plot([r["step"] for r in rows], [r[key] for r in rows], label=what, marker="o", markersize=3.5, **look)
