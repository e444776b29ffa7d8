"""Jacobians, products and patterns of a function that autograd cannot see, from its values alone."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from beyondprop import _checks
from beyondprop.errors import SensingWarning
from beyondprop.func.sensing.batch import Batch, flattened
from beyondprop.func.sensing.calls import Caller, CallSettings
from beyondprop.func.sensing.discovery import Detection
from beyondprop.func.sensing.linearised import Linearised
from beyondprop.func.sensing.plan import Wanted
from beyondprop.func.sensing.sensor import Sensor
from beyondprop.func.sensing.steps import StepSettings
from beyondprop.func.sensing.verification import Verification, check

LAYOUTS = ("dense", "coo")


def settings_of(options: dict[str, Any]) -> tuple[Wanted, StepSettings, CallSettings]:
    """Return options by what they are about.

    Raises:
        TypeError: for one that nobody knows.
    """
    kinds = (Wanted, StepSettings, CallSettings)
    known = {field.name: kind for kind in kinds for field in fields(kind) if field.init}
    for name in options:
        if name not in known:
            raise TypeError(f"Unknown option {name!r}{_checks.hint(name, known)}; accepted: {', '.join(known)}.")
    wanted, steps, calls = ({n: v for n, v in options.items() if known[n] is kind} for kind in kinds)
    return Wanted(**wanted), StepSettings(**steps), CallSettings(**calls)


class _Sensed:
    """A function at a batch, and what is needed to differentiate it."""

    def __init__(
        self, fn: Callable[..., Any], x: Tensor, generator: torch.Generator | None, options: dict[str, Any]
    ) -> None:
        wanted, steps, calls = settings_of(options)
        if not isinstance(x, Tensor):
            raise TypeError(f"x must be a tensor, got {type(x).__name__}; torch.from_numpy makes one.")
        if x.ndim not in (1, 2):
            raise ValueError(f"x must have the shape (n,) or (N, n), got {tuple(x.shape)}.")
        if not x.shape[-1]:
            raise ValueError(f"x must have one input or more, got the shape {tuple(x.shape)}.")
        self.is_single = x.ndim == 1
        self.sensor = Sensor(wanted, steps, generator)
        seed = None if calls.seed_kwarg is None else int(torch.randint(2**31 - 1, (), generator=generator))
        self.batch = Batch(Caller(fn, calls), [x[None] if self.is_single else x], [0], seed)
        self.sensor.check_bounds(self.batch.x, self.batch.given[0])

    def start(self) -> tuple[Tensor, float]:
        """Return the value there, and its precision; it costs one call a sample."""
        y = flattened(self.batch.value("forward"))
        return y, self.batch.precision

    def linearise(self, outputs: int | None) -> Linearised:
        """Return the Jacobians; the value is not asked for where the number of outputs is known and nothing starts from it."""
        needs_value = self.sensor.steps.difference == "forward" or outputs is None
        y = flattened(self.batch.value("forward")) if needs_value else None
        number = outputs if y is None else y.shape[1]
        assert number is not None
        precision = self.batch.precision
        found = self.sensor.linearise(self.batch.x, y, precision, number, self.batch.evaluate)
        if self.batch.precision > precision:  # the box returns coarser numbers than it takes, which it has shown by now
            found = self.sensor.linearise(self.batch.x, y, self.batch.precision, number, self.batch.evaluate)
        return found


def _outputs(wanted: Wanted) -> int | None:
    """Return how many outputs what is known of a Jacobian says."""
    if wanted.structure is not None and not isinstance(wanted.structure, str):
        return len(wanted.structure)
    if wanted.pattern is None or isinstance(wanted.pattern, str):
        return None
    return wanted.pattern.shape[0]


def jacobian(
    fn: Callable[..., Any],
    x: Tensor,
    *,
    generator: torch.Generator | None = None,
    layout: str = "dense",
    **options: Any,
) -> Tensor:
    """Return the Jacobian of a black box at a point, or at every one of a batch.

    With a pattern it takes the probes' calls and no other; without one, one more a point, which says how many outputs there
    are. Where `fn` returns float32 for float64, the step must be larger, and all calls are made again.

    Args:
        fn: takes rows `(rows, n)`, as a NumPy array by default, and returns `(rows, m)`.
        x: `(n,)` or `(N, n)`.
        generator: for probe directions; None: always the same ones, and random ones (`method="spsa"`) from torch's global
            state.
        layout: `"dense"`, or `"coo"`, sparse.
        **options: what is known of the Jacobian (`Wanted`: `pattern`, `structure`, `method`, `probes`, `sparsity`), how far
            probes go (`StepSettings`: `difference`, `step`, `noise`, `x_scale`, `bounds`) and how `fn` is called
            (`CallSettings`: `arrays`, `vectorized`, `executor`, `retries`, `max_calls`, `on_nan`, `seed_kwarg`, `debug`).

    Returns:
        `(m, n)`, or `(N, m, n)` for a batch, in the precision of `x`.

    Raises:
        ValueError, TypeError: for bad input; the message says what is accepted.
        NonFiniteError: if `x` is NaN or Inf.
        BlackBoxError, CallBudgetExceededError: as calls fail, or go beyond `max_calls`.

    Source: Choromanski & Sindhwani, NeurIPS 2017; Curtis, Powell & Reid (1974); Newsam & Ramsdell (1983).
    """
    _checks.one_of("layout", layout, LAYOUTS)
    sensed = _Sensed(fn, x, generator, options)
    found = sensed.linearise(_outputs(sensed.sensor.wanted))
    result = (found.dense() if layout == "dense" else found.coo()).to(x.device, x.dtype)
    if not sensed.is_single:
        return result
    return result[0] if layout == "dense" else result[0].coalesce()


def vjp(
    fn: Callable[..., Any], x: Tensor, v: Tensor, *, generator: torch.Generator | None = None, **options: Any
) -> Tensor:
    """Return `J^T v`, the gradient of `<v, fn(x)>`, with the calls that `jacobian` takes.

    Args:
        fn: as for `jacobian`.
        x: `(n,)` or `(N, n)`.
        v: `(m,)`, or `(N, m)` for a batch.
        generator: as for `jacobian`.
        **options: as for `jacobian`.

    Returns:
        The shape of `x`.

    Raises:
        ValueError: if `v` does not have a number for each output; else as `jacobian`.
    """
    sensed = _Sensed(fn, x, generator, options)
    v = v[None] if sensed.is_single and v.ndim == 1 else v
    if v.ndim != 2 or len(v) != len(sensed.batch):
        raise ValueError(f"v must have a row for each of {len(sensed.batch)} points, got the shape {tuple(v.shape)}.")
    known = _outputs(sensed.sensor.wanted)
    if known is not None and known != v.shape[1]:
        raise ValueError(f"v must have {known} numbers a point, one for each output, got {v.shape[1]}.")
    try:
        found = sensed.linearise(v.shape[1])
    except ValueError as error:
        if sensed.batch.caller.shapes is not None and (outputs := sensed.batch.outputs) != v.shape[1]:
            raise ValueError(
                f"v must have {outputs} numbers a point, one for each output, got {v.shape[1]}."
            ) from error
        raise
    result = found.pull(v.detach().to("cpu", torch.float64)).to(x.device, x.dtype)
    return result[0] if sensed.is_single else result


def detect_pattern(
    fn: Callable[..., Any],
    x: Tensor,
    *,
    probes: int | None = None,
    sparsity: int | None = None,
    generator: torch.Generator | None = None,
    **options: Any,
) -> Detection:
    """Find which outputs of a black box depend on which inputs, from a batch whose rows share that pattern.

    Args:
        fn: as for `jacobian`.
        x: `(N, n)`: the more rows, the fewer probes each takes.
        probes: directions a row; None: about `sparsity + 2`, and a quarter more as long as they leave something unexplained.
        sparsity: the largest number of nonzeros in a row; None: not known.
        generator: as for `jacobian`.
        **options: as for `jacobian`.

    Returns:
        What was found; its `pattern` is what `jacobian` and `BlackBox` take.

    Raises:
        ValueError, TypeError, NonFiniteError, BlackBoxError, CallBudgetExceededError: as `jacobian`.

    Source: simultaneous orthogonal matching pursuit, Tropp, Gilbert & Strauss, Signal Processing 86 (2006).
    """
    if probes is not None:
        _checks.at_least("probes", probes, 3)
    sensed = _Sensed(fn, x, generator, {"pattern": "discover", "sparsity": sparsity, **options})
    y, precision = sensed.start()
    found = sensed.sensor.discover(sensed.batch.x, precision, y.shape[1], sensed.batch.evaluate, probes)
    if probes is not None and len(found.unexplained):
        warnings.warn(
            f"{probes} probes a row do not explain {len(found.unexplained)} of {y.shape[1]} outputs, whose rows may lack "
            "entries: give more probes or rows, or leave probes out.",
            SensingWarning,
            stacklevel=2,
        )
    return found


def verify(
    fn: Callable[..., Any],
    x: Tensor,
    *,
    n_probes: int = 3,
    tolerance: float = 1e-2,
    generator: torch.Generator | None = None,
    **options: Any,
) -> Verification:
    """Sense the Jacobian as `jacobian` does, and compare it with derivatives along fresh directions.

    Args:
        fn: as for `jacobian`.
        x: `(n,)` or `(N, n)`.
        n_probes: fresh directions a point.
        tolerance: misfit that is accepted beyond noise, relative to an output's derivatives.
        generator: as for `jacobian`.
        **options: as for `jacobian`.

    Raises:
        ValueError, TypeError, NonFiniteError, BlackBoxError, CallBudgetExceededError: as `jacobian`.
    """
    sensed = _Sensed(fn, x, generator, options)
    y, precision = sensed.start()
    found = sensed.sensor.linearise(sensed.batch.x, y, precision, y.shape[1], sensed.batch.evaluate, "evaluation")
    return check(sensed.sensor, sensed.batch, y, precision, found, n_probes, tolerance)
