"""Learning-rate schedules by name: a factor on every optimizer's own learning rate, step by step."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Iterable
from itertools import pairwise

import torch
from torch.optim.lr_scheduler import LambdaLR

from beyondprop import _checks
from beyondprop.lab.runs.text import clipped

FORMS: dict[str, str] = {
    "constant": "the learning rate as it is",
    "linear": "falls to 0 over the run, a little every step",
    "cosine": "falls to 0 over the run, along half a cosine",
    "halve:N": "halved every N epochs",
    "tenth:S[,S]": "a tenth from each of these shares of the run on, such as 0.5,0.75",
    "warmup:S": "rises over a share S of the run, such as 0.05, then falls linearly to 0",
}
"""What `factor` accepts, for help texts."""


_MOST = 10**9  # epochs: nobody lives to see more
_MOST_DROPS = 30  # a rate of 1e-30 trains nothing


def factor(schedule: str, steps: int, steps_per_epoch: int) -> Callable[[int], float]:
    """Return the function from the number of steps done to the factor on the learning rate.

    Args:
        schedule: one of `FORMS`, such as `"linear"` or `"halve:8"`.
        steps: steps of the whole run.
        steps_per_epoch: steps of one epoch.

    Raises:
        ValueError: if `schedule` is none of the accepted forms.
    """
    kind, _, number = schedule.partition(":")
    if schedule == "constant":
        return lambda step: 1.0
    if schedule == "linear":
        return lambda step: max(0.0, 1.0 - step / steps)
    if schedule == "cosine":
        return lambda step: 0.5 * (1.0 + math.cos(math.pi * min(step, steps) / steps))
    if kind == "halve" and number.isdecimal() and len(number) <= 10 and 0 < int(number) <= _MOST:
        period = int(number) * steps_per_epoch
        return lambda step: 0.5 ** (step // period)
    if kind == "tenth" and (drops := _rising_shares(number)) is not None:
        starts = [round(share * steps) for share in drops]
        return lambda step: 10.0 ** -bisect_right(starts, step)
    if kind == "warmup" and _is_share(number):
        warm = max(1, round(float(number) * steps))
        return lambda step: min((step + 1) / warm, max(0.0, (steps - step) / max(1, steps - warm)))
    kinds = [form.partition(":")[0] for form in FORMS]
    hint = "" if kind in kinds else _checks.hint(kind, kinds)
    raise ValueError(
        f"schedule must be one of {', '.join(FORMS)} (N a whole number of epochs from 1 to {_MOST:,}, S in (0, 1), "
        f"several of them rising), got {clipped(schedule, 100)!r}{hint}."
    )


def _rising_shares(text: str) -> list[float] | None:
    parts = text.split(",")
    if len(parts) > _MOST_DROPS or not all(map(_is_share, parts)):
        return None
    found = [float(part) for part in parts]
    return found if all(a < b for a, b in pairwise(found)) else None


def _is_share(text: str) -> bool:
    try:
        return 0 < float(text) < 1
    except ValueError:
        return False


def attach(
    optimizers: Iterable[torch.optim.Optimizer], schedule: str, steps: int, steps_per_epoch: int, start: int = 0
) -> list[LambdaLR]:
    """Attach a scheduler to every optimizer; `scheduler.step()` belongs after every training step.

    `start` is the number of steps that were done before, by another rule: the schedule is in its middle then.

    Returns:
        The schedulers, none for `"constant"`.

    Raises:
        ValueError: if `schedule` is none of the accepted forms.
    """
    function = factor(schedule, steps, steps_per_epoch)
    if schedule == "constant":
        return []
    return [LambdaLR(optimizer, lambda step: function(start + step)) for optimizer in optimizers]
