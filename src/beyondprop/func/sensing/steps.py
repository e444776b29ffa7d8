"""How far a probe goes: from the precision of the box's numbers, or from its noise and curvature."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from beyondprop import _checks
from beyondprop.func.sensing.designs import general

DIFFERENCES = ("central", "forward")
Stencil = tuple[tuple[float, ...], int]

_POINTS = 8
_LEVELS = (3, 4, 5)
_WIDENINGS = 3
_UNLIKE, _STEPS, _RESPONSE = 4.0, 80, 7.0
_WIDTHS = (0.25, 0.125, 0.0625)
_SECOND: Stencil = ((0.0, 1.0, -2.0, 1.0, 0.0), 2)
_THIRD: Stencil = ((-0.5, 1.0, 0.0, -1.0, 0.5), 3)
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
        x_scale: typical size of each input, `(n,)` or a number; None: 1, and more for inputs that are larger.
        bounds: `(low, high)`, numbers, `(n,)` or None for no bound: probes stay between them.
    """

    difference: str = "central"
    step: Any = "auto"
    noise: Any = None
    x_scale: Any = None
    bounds: Any = None

    @property
    def sides(self) -> int:
        """Calls a probe."""
        return 2 if self.difference == "central" else 1

    def __post_init__(self) -> None:
        _checks.one_of("difference", self.difference, DIFFERENCES)
        for name in ("step", "noise"):  # numbers of NumPy and torch, too
            value = getattr(self, name)
            if isinstance(value, np.generic) or (isinstance(value, Tensor | np.ndarray) and value.ndim == 0):
                object.__setattr__(self, name, value.item())
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


LONGEST = 2 * _WIDTHS[0]
"""The longest step: twice the width at which curvature is measured."""


@dataclass
class Step:
    """How far probes go, as it was found.

    Attributes:
        size: the distance, in units of each input's scale.
        noise: standard deviation of the outputs, r.m.s. over these.
        curvature: size of the third derivative along a probe with central differences, of the second with forward ones;
            None: not measured.
        shares: noise of each output in units of `noise`, `(m,)`; None: all alike.
    """

    size: float
    noise: float
    curvature: float | None = None
    shares: Tensor | None = None

    def blur(self, sides: int) -> float:
        """Return the standard deviation of a directional derivative of so many calls, 1 or 2."""
        return self.noise * math.sqrt(2.0) / (sides * self.size)

    def error(self, sides: int) -> Tensor | float:
        """Return the error of each output's directional derivative by noise and curvature, `(m,)`, or one for all."""
        found = self.blur(sides) + self.bend(sides)
        return found if self.shares is None else found * self.shares

    def bend(self, sides: int) -> float:
        """Return by how much curvature, where it was measured, moves a directional derivative of so many calls."""
        return (self.curvature or 0.0) * (self.size**2 / 6 if sides == 2 else self.size / 2)


def base_scales(settings: StepSettings, inputs: int) -> Tensor:
    """Return the scale of every input, `(n,)` float64, before any sample is looked at."""
    unit = torch.ones(inputs, dtype=torch.float64)
    for value in (settings.x_scale, None if isinstance(settings.step, str) else settings.step):
        unit = unit if value is None else unit * as_tensor(value)
    return unit


def scales(settings: StepSettings, x: Tensor, *, shared: bool) -> Tensor:
    """Return the scale of every input of every sample, `(B, n)` float64.

    Args:
        settings: with the inputs' typical size; where there is none, `step="auto"` follows inputs that are larger than 1.
        x: inputs `(B, n)`.
        shared: whether all inputs of a sample must have their scales in proportion, as those of tied entries.
    """
    unit = base_scales(settings, x.shape[1])
    if not isinstance(settings.step, str):
        return unit.expand(x.shape)
    if settings.x_scale is not None:
        return unit.expand(x.shape)
    # With the root of an input's size the error is bounded for functions that change with it (angles) and with its logarithm
    # (sizes) alike. With the size itself, as is common, a step of float32 would be 0.5 at 100.
    relative = x.abs().to(torch.float64).clamp(min=1.0).sqrt()
    return relative.amax(1, keepdim=True).expand(x.shape) if shared else relative


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

    def at(places: Tensor, direction: Tensor = direction) -> Tensor:
        points = x + places[:, None, None] * direction
        return evaluate(points if low is None else torch.clamp(points, low, high), samples)

    default = default_size(settings, precision)
    noise = settings.noise
    if noise == "estimate":
        # Along inputs by themselves most outputs would not move at all, and seem to have none.
        full = general(_SAMPLES, x.shape[1], None) * scales(settings, x, shared=shared)
        noise = _noise(lambda places: at(places, full), precision)
    each = noise if isinstance(noise, Tensor) else None
    if each is not None and float(each.max()) < _UNLIKE * float(each.min()):
        noise, each = each.square().mean().sqrt(), None  # alike but for the error of an estimate
    size = float(noise or 0.0) if each is None else float(each.square().mean().sqrt())
    shares = None if each is None or size == 0.0 else each / size
    if not isinstance(settings.step, str) or size == 0.0:
        return Step(default, size, None, shares)
    if is_corrupted:
        return Step(min(max((3 * size) ** (1 / 3), default), LONGEST), size)
    places = [side * width * reach for width in _WIDTHS for reach in (1, 2) for side in (-1, 1)]
    places = sorted({0.0, *places})
    seen = at(torch.tensor(places, dtype=torch.float64))
    central = settings.difference == "central"
    if each is not None:
        size_of, bend = _balanced(dict(zip(places, seen, strict=True)), each, default, central=central)
        return Step(size_of, size, bend, shares)
    # Along single inputs most outputs may not move at all, and say nothing of those that do.
    responds = (seen[-1] - seen[0]).abs() > _RESPONSE * size
    seen = seen[:, responds] if int(responds.sum()) >= _SAMPLES else seen
    values = dict(zip(places, seen / size, strict=True))
    second, third = (
        max(float(_derivative(values, w, stencil, None)) for w in _WIDTHS) for stencil in (_SECOND, _THIRD)
    )
    if third == 0.0 and settings.bounds is not None:
        third = 1.0 / size  # cut short, points may show nothing: then it is taken for 1
    by_third = math.inf if third == 0.0 else (3 / third) ** (1 / 3)
    if central:
        return Step(min(max(by_third, default), LONGEST), size, size * third, shares)
    by_second = math.inf if second == 0.0 else 2 / second**0.5
    # A function that is odd around a point has no second derivative there; then the third one bends it.
    return Step(min(max(min(by_second, by_third), default), LONGEST), size, size * second, shares)


def _balanced(values: dict[float, Tensor], noise: Tensor, default: float, *, central: bool) -> tuple[float, float]:
    """Return the step at which outputs of unlike noise have the least errors, relative to their own derivatives; and its bend.

    An output that no step serves counts as lost, and has no say. The bend is a derivative, in units of the noise of all.
    """
    first = (values[_WIDTHS[-1]] - values[-_WIDTHS[-1]]).square().mean(0).sqrt() / (2 * _WIDTHS[-1])
    scaled = {place: value / noise.clamp(min=1e-300) for place, value in values.items()}
    stencils = (_THIRD,) if central else (_SECOND, _THIRD)
    curves = [
        noise * torch.stack([_derivative(scaled, width, stencil, 0) for width in _WIDTHS]).amax(0)
        for stencil in stencils
    ]
    steps = torch.logspace(math.log10(default), math.log10(LONGEST), _STEPS, dtype=torch.float64)[:, None]
    error = (
        noise / (math.sqrt(2.0) * steps) + curves[0] * steps**2 / 6
        if central
        else (noise * math.sqrt(2.0) / steps + curves[0] * steps / 2 + curves[1] * steps**2 / 6)
    )
    lost = (error / first.clamp(min=1e-300)).clamp(max=1.0).mean(1)
    best = float(steps[int(lost.argmin()), 0])
    return best, float(curves[0].square().mean().sqrt())


def _derivative(values: dict[float, Tensor], width: float, stencil: Stencil, over: int | None) -> Tensor:
    """Return the size of a derivative from five points, in units of noise, which is taken off: 0 where it may be all.

    Args:
        values: at places, `(S, m)` each, in units of noise.
        width: between two points.
        stencil: weights and order.
        over: 0 for each output's, `(m,)`; None for that of all.
    """
    weights, order = stencil
    seen = sum(weight * values[place * width] for place, weight in zip(range(-2, 3), weights, strict=True) if weight)
    assert isinstance(seen, Tensor)
    spread = sum(w * w for w in weights)
    square = seen.square().mean() if over is None else seen.square().mean(over)
    number = seen.numel() if over is None else len(seen)
    by_chance = spread * (1.0 + 4.0 * math.sqrt(2.0 / number))
    return torch.where(square > by_chance, (square - spread).clamp(min=0.0).sqrt() / width**order, 0.0)


def _noise(at: Callable[[Tensor], Tensor], precision: float) -> Tensor:
    """Return the noise of each output, `(m,)`, from differences of high order between near points.

    Smooth change leaves these alone. Numbers that are rounded to equal ones have a coarser precision than they seem to: they
    are looked at again, farther apart.
    """
    width, result, now = math.sqrt(precision), None, torch.zeros(())
    for _ in range(_WIDENINGS + 1):
        values = at(torch.linspace(-0.5, 0.5, _POINTS, dtype=torch.float64) * width)
        changes = (values[1:] != values[:-1]).double().mean((0, 1)) >= 0.5
        now = _spread_of(values)
        result = now if result is None else torch.where(result > 0, result, now)
        result = torch.where(changes | (result == 0), result, 0.0)
        if bool(changes.all()) or float(changes.double().mean()) >= 0.5:
            break
        width *= 100.0
    assert result is not None
    # What changed now and then alone is known less well, and is no less noisy for that.
    return torch.where(result > 0, result, now)


def _spread_of(values: Tensor) -> Tensor:
    found = []
    for level in range(1, max(_LEVELS) + 1):
        values = values.diff(dim=0)
        if level in _LEVELS:
            share = math.factorial(level) ** 2 / math.factorial(2 * level)
            found.append(share * values.square().mean((0, 1)))
    return torch.stack(found).median(0).values.sqrt()
