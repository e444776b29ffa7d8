"""How far a probe goes: from the precision of the box's numbers, or from its noise and curvature."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from beyondprop import _checks

DIFFERENCES = ("central", "forward")

_POINTS = 8
_LEVELS = (3, 4, 5)
_WIDENINGS = 3
_COARSE = 0.25
_SECOND = ((0.0, 1.0, -2.0, 1.0, 0.0), 2)
_THIRD = ((-0.5, 1.0, 0.0, -1.0, 0.5), 3)
_SAMPLES = 4

Evaluate = Callable[[Tensor, Tensor], Tensor]
"""`evaluate(points (G, B, n), samples (B,)) -> (G, B, m)`, float64, of set-up."""


@dataclass(frozen=True)
class StepSettings:
    """How far probes go.

    Attributes:
        difference: `"central"`, two calls a probe, or `"forward"`, one.
        step: `"auto"`; a number > 0, how far a probe moves the inputs that it moves (r.m.s.), in units of `x_scale`; or one for
            each input, `(n,)`.
        noise: standard deviation of each output; None: none beyond rounding; `"estimate"`: measured at the first backward pass.
        x_scale: typical size of each input, `(n,)` or a number; None: 1.
        bounds: `(low, high)`, numbers, `(n,)` or None for no bound: probes stay between them.
    """

    difference: str = "central"
    step: Any = "auto"
    noise: Any = None
    x_scale: Any = None
    bounds: Any = None

    def __post_init__(self) -> None:
        _checks.one_of("difference", self.difference, DIFFERENCES)
        if isinstance(self.step, str):
            _checks.one_of("step", self.step, ("auto",))
        elif isinstance(self.step, int | float):
            _checks.positive("step", self.step)
        if isinstance(self.noise, str):
            _checks.one_of("noise", self.noise, ("estimate",))
        elif self.noise is not None:
            _checks.non_negative("noise", self.noise)
        for name, value in (("step", self.step), ("x_scale", self.x_scale)):
            if (name == "x_scale" and isinstance(value, str)) or (
                value is not None and not isinstance(value, str) and not bool((as_tensor(value) > 0).all())
            ):
                raise ValueError(f"{name} must be > 0 for every input, got {value!r}.")
        if self.bounds is not None:
            if not isinstance(self.bounds, tuple | list) or len(self.bounds) != 2:
                raise ValueError(
                    f"bounds must be (low, high), numbers, one for each input or None, got {self.bounds!r}."
                )
            low, high = (math.inf if end is None else end for end in self.bounds)
            object.__setattr__(self, "bounds", (-math.inf if self.bounds[0] is None else low, high))
            low, high = (as_tensor(value) for value in self.bounds)
            if not bool((low < high).all()):
                raise ValueError(f"bounds must be (low, high) with low < high for every input, got {self.bounds!r}.")

    def check(self, inputs: int) -> None:
        """Raise `ValueError` unless what is given for each input is given for all of them."""
        for name, values in (("step", (self.step,)), ("x_scale", (self.x_scale,)), ("bounds", self.bounds or ())):
            for value in values:
                if value is None or isinstance(value, str):
                    continue
                if as_tensor(value).ndim and as_tensor(value).numel() != inputs:
                    raise ValueError(
                        f"{name} must be one number or {inputs}, one for each input, got {as_tensor(value).numel()}."
                    )


def as_tensor(value: Any) -> Tensor:
    """Return numbers as a float64 tensor on the CPU."""
    return torch.as_tensor(value, dtype=torch.float64, device="cpu").detach()


def bounds_of(settings: StepSettings, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Return the bounds as float64, rounded as the inputs are: what float32 rounds up bounds float32 inputs there."""
    if settings.bounds is None:
        return None, None
    low, high = (as_tensor(bound).to(x.dtype).to(torch.float64) for bound in settings.bounds)
    return low, high


@dataclass
class Step:
    """How far probes go, as it was found.

    Attributes:
        size: the distance, in units of each input's scale.
        noise: standard deviation of the outputs.
        curvature: size of the third derivative along a probe with central differences, of the second with forward ones;
            None: not measured.
    """

    size: float
    noise: float
    curvature: float | None = None

    def blur(self, sides: int) -> float:
        """Return the standard deviation of a directional derivative of so many calls, 1 or 2."""
        return self.noise * math.sqrt(2.0) / (sides * self.size)

    def bend(self, sides: int) -> float:
        """Return by how much curvature, where it was measured, moves a directional derivative of so many calls."""
        return (self.curvature or 0.0) * (self.size**2 / 6 if sides == 2 else self.size / 2)


def scales(settings: StepSettings, x: Tensor, *, shared: bool) -> Tensor:
    """Return the scale of every input of every sample, `(B, n)` float64.

    Args:
        settings: with the inputs' typical size; `step="auto"` follows inputs that are larger.
        x: inputs `(B, n)`.
        shared: whether all inputs of a sample must have their scales in proportion, as those of tied entries.
    """
    unit = torch.ones(x.shape[1], dtype=torch.float64)
    if settings.x_scale is not None:
        unit = unit * as_tensor(settings.x_scale)
    if not isinstance(settings.step, str):
        return (unit * as_tensor(settings.step)).expand(x.shape)
    relative = (x.abs().to(torch.float64) / unit).clamp(min=1.0)
    return unit * (relative.amax(1, keepdim=True) if shared else relative)


def default_size(settings: StepSettings, precision: float) -> float:
    """Return the step for a box whose numbers have a precision, without other noise."""
    if not isinstance(settings.step, str):
        return 1.0
    return precision ** (1 / 3 if settings.difference == "central" else 1 / 2)


def measured(
    settings: StepSettings,
    x: Tensor,
    probes: Tensor,
    precision: float,
    evaluate: Evaluate,
    *,
    shared: bool,
    is_corrupted: bool,
) -> Step:
    """Return a step that balances noise and curvature, both measured at some samples along some probes.

    Central `(3 noise / M3)^(1/3)`, forward `2 (noise / M2)^(1/2)`, with M the size of the derivative along a probe.

    Args:
        settings: what is known.
        x: inputs `(B, n)`.
        probes: `(k, n)`.
        precision: of the box's numbers, relative.
        evaluate: calls the box.
        shared: see `scales`.
        is_corrupted: whether calls may be wrong: then curvature cannot be measured, and is taken for 1.

    Source: Moré & Wild, "Estimating derivatives of noisy simulations", ACM TOMS 38 (2012); "Estimating computational noise",
    SIAM J. Sci. Comput. 33 (2011).
    """
    samples = torch.arange(_SAMPLES) % len(x)
    low, high = bounds_of(settings, x)
    x = x[samples].to(torch.float64)
    direction = probes[torch.arange(_SAMPLES) % len(probes)] * scales(settings, x, shared=shared)

    def at(places: Tensor) -> Tensor:
        points = x + places[:, None, None] * direction
        return evaluate(points if low is None else torch.clamp(points, low, high), samples)

    default = default_size(settings, precision)
    noise = settings.noise
    if noise == "estimate":
        noise = _noise(at, precision)
    noise = float(noise or 0.0)
    if not isinstance(settings.step, str) or noise == 0.0:
        return Step(default, noise)
    if is_corrupted:
        return Step(min(max((3 * noise) ** (1 / 3), default), 2 * _COARSE), noise)
    values = at(torch.linspace(-2.0, 2.0, 5, dtype=torch.float64) * _COARSE)
    second, third = (_derivative(values, weights, order, noise) for weights, order in (_SECOND, _THIRD))
    longest = 2 * _COARSE
    by_third = math.inf if third == 0.0 else (3 * noise / third) ** (1 / 3)
    if settings.difference == "central":
        return Step(min(max(by_third, default), longest), noise, third)
    by_second = math.inf if second == 0.0 else 2 * (noise / second) ** 0.5
    # A function that is odd around a point has no second derivative there; then the third one bends it.
    return Step(min(max(min(by_second, by_third), default), longest), noise, second)


def _derivative(values: Tensor, weights: tuple[float, ...], order: int, noise: float) -> float:
    """Return the size of a derivative at five points, with what noise adds to it taken off."""
    seen = torch.einsum("g,gbm->bm", torch.tensor(weights, dtype=torch.float64), values)
    spread = noise**2 * sum(w * w for w in weights)
    return math.sqrt(max(float(seen.square().mean()) - spread, 0.0)) / _COARSE**order


def _noise(at: Callable[[Tensor], Tensor], precision: float) -> float:
    """Return the noise of a box from differences of high order between near points, which smooth change leaves alone."""
    width = math.sqrt(precision)
    for _ in range(_WIDENINGS + 1):
        values = at(torch.linspace(-0.5, 0.5, _POINTS, dtype=torch.float64) * width)
        if float((values[1:] == values[:-1]).double().mean()) < 0.5:
            break
        width *= 100.0  # rounded to equal numbers: the box's own precision is coarser
    else:
        return 0.0
    found = []
    for level in range(1, max(_LEVELS) + 1):
        values = values.diff(dim=0)
        if level in _LEVELS:
            share = math.factorial(level) ** 2 / math.factorial(2 * level)
            found.append(share * float(values.square().mean()))
    return math.sqrt(sorted(found)[len(found) // 2])
