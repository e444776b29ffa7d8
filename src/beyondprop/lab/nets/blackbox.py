"""Nets with a simulator in the middle, which autograd cannot see, and the ways to differentiate it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from scipy import sparse
from torch import Tensor, nn

from beyondprop.lab.nets.options import (
    MOST_UNITS,
    bounded,
    check_weights,
    image_shape,
    initialise,
    is_count,
    options_of,
)
from beyondprop.nn.blackbox import BlackBox

SENSED = ("auto", "dense", "coloring", "regression", "spsa", "robust", "rainbow", "discover")
METHODS = (*SENSED, "exact", "stopped")
"""Ways to the gradient through the box: sensed; autograd's of its twin in torch; none."""

PROBED = ("coloring", "regression", "spsa", "robust", "rainbow")
"""Methods that may be told their number of probes."""

COUPLING = 0.5
_LEAST = 3  # units of a ring in which every one has two neighbours


class Oscillators:
    """A ring of coupled oscillators, a step of time later, in NumPy: from phases `(rows, n)` to phases `(rows, n)`.

    Each phase depends on itself and its two neighbours. Every call has noise of its own, from torch's global random state.

    Args:
        noise: standard deviation of what is added to every output.

    Source: Kuramoto, "Chemical Oscillations, Waves, and Turbulence" (1984); here with neighbours alone, and one Euler step.
    """

    def __init__(self, noise: float = 0.0) -> None:
        self.noise = noise

    def __call__(self, phases: np.ndarray) -> np.ndarray:
        pull = np.sin(np.roll(phases, 1, -1) - phases) + np.sin(np.roll(phases, -1, -1) - phases)
        found = phases + COUPLING * pull
        if self.noise:
            found = found + self.noise * torch.randn_like(torch.from_numpy(found)).numpy()
        return found

    @staticmethod
    def pattern(units: int) -> sparse.coo_array:
        """Return which phases depend on which, `(units, units)`."""
        rows = np.arange(units)
        columns = np.concatenate([(rows + shift) % units for shift in (-1, 0, 1)])
        return sparse.coo_array((np.ones(3 * units, dtype=bool), (np.tile(rows, 3), columns)), shape=(units, units))


class TorchOscillators(nn.Module):
    """`Oscillators` as autograd sees them; rows are counted as a `BlackBox` counts its calls.

    Args:
        noise: standard deviation of what is added to every output.
    """

    costly = True  # as the box that it stands for

    def __init__(self, noise: float = 0.0) -> None:
        super().__init__()
        self.noise = noise
        self.counters = {"calls": 0, "evaluation_calls": 0}

    def forward(self, phases: Tensor) -> Tensor:
        self.counters["calls" if self.training else "evaluation_calls"] += len(phases)
        found = phases + COUPLING * sum(torch.sin(phases.roll(shift, -1) - phases) for shift in (1, -1))
        return found + self.noise * torch.randn_like(found) if self.noise else found

    def extra_repr(self) -> str:
        return f"noise={self.noise:g}"

    def get_extra_state(self) -> Tensor:
        return torch.tensor([float(count) for count in self.counters.values()], dtype=torch.float64)

    def set_extra_state(self, state: Tensor) -> None:
        self.counters = dict(zip(self.counters, map(int, state.tolist()), strict=True))


class Stopped(nn.Module):
    """A module through which a gradient of 0 goes: what is below it stays as it is under backpropagation."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, z: Tensor) -> Tensor:
        return _Cut.apply(z, self.inner(z.detach()))


class _Cut(torch.autograd.Function):
    """A value that is said to depend on an input, with a derivative of 0: rules look for a way down."""

    @staticmethod
    def forward(z: Tensor, found: Tensor) -> Tensor:
        return found.view_as(found)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return torch.zeros_like(ctx.saved_tensors[0]), None


def blackbox(spec: str, input_shape: Sequence[int], outputs: int) -> nn.Sequential:
    """Build `blackbox:WIDTH[:METHOD][:noise=S][:probes=K][:conv]`.

    The box draws nothing from the global random state, so that all methods start from the same weights.
    """
    text = [*spec.split(":"), ""][1]
    width = bounded(spec, "width", text, MOST_UNITS) if is_count(text) else 0
    if width < _LEAST:
        raise ValueError(f"{spec!r}: WIDTH must be a whole number >= {_LEAST}, such as blackbox:64, got {text!r}.")
    method, noise, probes, conv = options_of(spec, METHODS, ("noise=S",), ("probes=K",), ("conv",))
    box = _box(spec, width, method or "auto", _noise(spec, noise), _probes(spec, method, probes))
    stem, inputs = _stem(spec, input_shape) if conv else ([nn.Flatten()], math.prod(input_shape))
    check_weights(spec, width * inputs)
    return initialise(nn.Sequential(*stem, nn.Linear(inputs, width), box, nn.Linear(width, outputs)))


def _box(spec: str, width: int, method: str, noise: float, probes: int | None) -> nn.Module:
    if method == "exact":
        return TorchOscillators(noise)
    known: dict[str, Any] = {"pattern": Oscillators.pattern(width), "method": method}
    if method in ("dense", "spsa"):
        known["pattern"] = None  # what they are without
    elif method == "discover":
        known = {"pattern": "discover"}
    elif method == "stopped":
        known["method"] = "auto"  # never asked for
    found = BlackBox(Oscillators(noise), width, probes=probes, noise=noise or None, **known)
    try:
        _ = found.plan if probes else None  # raises where they are too few
    except ValueError as error:
        raise ValueError(f"{spec!r}: {error}") from error
    return Stopped(found) if method == "stopped" else found


def _stem(spec: str, input_shape: Sequence[int]) -> tuple[list[nn.Module], int]:
    """Return LeNet-5's convolutions, with a frame so that small images have room, and the features that they return."""
    channels, height, breadth = image_shape(spec, input_shape)
    if min(height, breadth) < 4:
        raise ValueError(f"{spec!r}: 'conv' takes images of 4x4 or more, got {height}x{breadth}.")
    layers: list[nn.Module] = []
    for inputs, units in ((channels, 6), (6, 16)):
        layers += [nn.Conv2d(inputs, units, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)]
    return [*layers, nn.Flatten()], 16 * (height // 4) * (breadth // 4)


def _noise(spec: str, text: str | None) -> float:
    try:
        value = 0.0 if text is None else float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise ValueError(f"{spec!r}: noise must be a number >= 0, the standard deviation of the outputs, got {text!r}.")
    return value


def _probes(spec: str, method: str | None, text: str | None) -> int | None:
    if text is None:
        return None
    if method not in PROBED:
        raise ValueError(f"{spec!r}: probes=K is for {', '.join(PROBED)}; leave it out, or name one of them.")
    if not is_count(text):
        raise ValueError(f"{spec!r}: probes must be a whole number >= 1, got {text!r}.")
    return bounded(spec, "number of probes", text, MOST_UNITS)
