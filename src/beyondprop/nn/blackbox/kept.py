"""What a `BlackBox` keeps in a state dict: the pattern that it found, the noise that it measured, the calls that it made."""

from __future__ import annotations

from dataclasses import fields

import torch
from torch import Tensor

from beyondprop.func.sensing.calls import Counts
from beyondprop.func.sensing.discovery import Detection
from beyondprop.func.sensing.patterns import Pattern
from beyondprop.func.sensing.sensor import Sensor
from beyondprop.func.sensing.steps import Step

_VERSION = 1
_COUNTS = tuple(field.name for field in fields(Counts))
_STEP = 4
_HEAD = 1 + len(_COUNTS) + _STEP + 5


def packed(counts: Counts, sensor: Sensor) -> Tensor:
    """Return all of it as one float64 tensor, in which whole numbers are exact up to 2^53: a checkpoint of tensors holds it."""
    step = sensor.measured_step
    own = (
        [0.0] * _STEP
        if step is None
        else [1.0 + sensor.flat, step.size, step.noise, -1.0 if step.curvature is None else step.curvature]
    )
    head = [_VERSION, *(getattr(counts, name) for name in _COUNTS), *own]
    found = sensor.detection
    if found is None:
        return torch.tensor([*head, 0, 0, 0, 0, 0], dtype=torch.float64)
    pattern = found.pattern
    sizes = [*pattern.shape, pattern.nnz, found.probes, sensor.unconfirmed]
    parts = [torch.tensor([*head, *sizes], dtype=torch.float64), pattern.rows, pattern.columns, found.residual]
    return torch.cat([part.to(torch.float64) for part in parts])


def unpacked(state: Tensor, counts: Counts, sensor: Sensor) -> None:
    """Take it back. Calls that were made stay made: the larger of both numbers counts.

    Raises:
        ValueError: if the state is not one of a `BlackBox`.
    """
    if not isinstance(state, Tensor) or state.ndim != 1 or len(state) < _HEAD or int(state[0]) != _VERSION:
        raise ValueError(
            "The state of a BlackBox must be the float64 tensor that its state_dict() has under '_extra_state'."
        )
    values = state.detach().to("cpu", torch.float64)
    own = dict(zip(_COUNTS, values[1 : 1 + len(_COUNTS)].tolist(), strict=True))
    has_step, size, noise, curvature = values[1 + len(_COUNTS) : 1 + len(_COUNTS) + _STEP].tolist()
    m, n, nnz, probes, unconfirmed = (int(value) for value in values[_HEAD - 5 : _HEAD].tolist())
    if len(values) != _HEAD + 2 * nnz + m:
        raise ValueError("The state of a BlackBox is cut short.")
    for name, value in own.items():
        setattr(counts, name, max(getattr(counts, name), int(value)))
    if has_step:
        sensor.flat = int(has_step) - 1
        sensor.measured_step = Step(size, noise, None if curvature < 0 else curvature)
    if not m or sensor.wanted.pattern != "discover":  # a pattern that is given holds
        return
    rows, columns, residual = values[_HEAD:].split([nnz, nnz, m])
    sensor.detection = Detection(
        Pattern.of_entries(rows, columns, (m, n)), probes, residual, torch.empty(0, dtype=torch.int64)
    )
    sensor.plan, sensor.unconfirmed = None, unconfirmed
