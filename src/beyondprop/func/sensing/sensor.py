"""Senses the Jacobians of a black box on a batch, by the method that fits what is known of it."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from beyondprop.errors import SensingWarning
from beyondprop.func.sensing import designs
from beyondprop.func.sensing.discovery import Detection, detect
from beyondprop.func.sensing.doubts import LOOKED_AT, MISFIT, Doubts, slight
from beyondprop.func.sensing.linearised import Dense, Linearised, Probed, Sparse
from beyondprop.func.sensing.looking import Evaluate, evaluated, look, points_of
from beyondprop.func.sensing.patterns import Pattern
from beyondprop.func.sensing.plan import Plan, Wanted, check_shape, plan
from beyondprop.func.sensing.recoveries import (
    Seen,
    by_color,
    decoded,
    entry_by_entry,
    joined,
    mean_of_probes,
    row_by_row,
    unscaled,
)
from beyondprop.func.sensing.robust import decode
from beyondprop.func.sensing.steps import (
    LONGEST,
    Step,
    StepSettings,
    base_scales,
    bounds_of,
    default_size,
    measured,
    scales,
)

_CONFIRMATIONS = 2
_MOST_MEASURED = 1024


@dataclass
class Report:
    """What was found when a box was sensed last.

    Attributes:
        step: distance of probes, in units of each input's scale.
        noise: standard deviation of the outputs, given or measured.
        curvature: see `Step`.
        condition: the worst condition number of a system that is solved; None: none is.
        residual: relative misfit of directional derivatives, where there are more than unknowns; None: there are not.
        shares: see `Step`.
    """

    step: float | None = None
    noise: float | None = None
    curvature: float | None = None
    condition: float | None = None
    residual: float | None = None
    shares: Tensor | None = None


class Sensor:
    """Senses Jacobians.

    Args:
        wanted: what is known of them.
        steps: how far probes go.
        generator: for probe directions; None: those of a plan are always the same, and random ones (`spsa`) come from torch's
            global state.

    Attributes:
        plan: how; None before the first batch.
        detection: what was found with `pattern="discover"`.
        report: what was found when the box was sensed last.
        measured_step: the step that noise and curvature made; None: not measured.
        precision: of the box's numbers, relative, as it was last.
        unconfirmed: on how many further batches the pattern that was found is to be looked at.
        flat: batches since the step was measured where the box showed no curvature; at the 1st, 2nd, 4th, ... it is again.
    """

    def __init__(self, wanted: Wanted, steps: StepSettings, generator: torch.Generator | None = None) -> None:
        if wanted.method == "robust" and steps.noise == "estimate":
            raise ValueError(
                "method='robust' is for calls that may be wrong, among which noise cannot be measured; give noise as a number."
            )
        self.wanted, self.steps, self.generator = wanted, steps, generator
        self.plan: Plan | None = None
        self.detection: Detection | None = None
        self.report = Report()
        self.measured_step: Step | None = None
        self.unconfirmed = self.flat = 0
        self.precision = 0.0
        self.doubts = Doubts(steps)

    @property
    def sides(self) -> int:
        """Calls a probe."""
        return self.steps.sides

    def prepare(self, outputs: int, inputs: int) -> Plan:
        """Plan how to sense a box of so many outputs and inputs; a pattern that must be found was found.

        Raises:
            ValueError: where what is known does not fit these numbers.
        """
        if self.plan is not None:
            check_shape(self.plan.shape, outputs, inputs)
        else:
            self.steps.check(inputs)
            wanted = self.wanted
            if self.detection is not None:
                found = self.detection.pattern
                wanted = Wanted(found, None, wanted.method, wanted.probes)
            noisy, unit = self.steps.noise not in (None, 0), base_scales(self.steps, inputs)
            self.plan = plan(
                wanted, outputs, inputs, sides=self.sides, noisy=noisy, unit=unit, generator=self.generator
            )
        return self.plan

    @property
    def must_discover(self) -> bool:
        """Whether the pattern is still to be found."""
        return self.wanted.pattern == "discover" and self.detection is None

    def linearise(
        self, x: Tensor, y: Tensor | None, precision: float, outputs: int, evaluate: Evaluate, kind: str = "backward"
    ) -> Linearised:
        """Return the Jacobians at inputs `(B, n)`.

        Args:
            x: the inputs, in the precision in which the box takes them.
            y: outputs there `(B, m)`, float64, which forward differences start from; not needed by central ones.
            precision: of the box's numbers, relative.
            outputs: m.
            evaluate: calls the box.
            kind: what the calls are counted as.

        Raises:
            BlackBoxError, CallBudgetExceededError: as the calls do.
            ValueError: if the calls that are left do not determine a row.
        """
        if is_new := self.must_discover:
            self.discover(x, precision, outputs, evaluate)
        found, self.precision = self.prepare(outputs, x.shape[1]), precision
        if found.pattern is not None and not found.probes:
            return Sparse(found.pattern, torch.zeros(len(x), 0, dtype=torch.float64))
        probes = found.directions
        if probes is None:
            probes = designs.signs(len(x), found.probes, x.shape[1], self.generator)
        step = self._measured(x, probes, precision, evaluate)
        unit = scales(self.steps, x, shared=found.scales_are_shared)
        if found.method == "robust":
            jacobians = self._robust(found, x, probes, unit, step, evaluate, kind)
        else:
            seen = look(self.steps, x, y, probes, unit, step.size, evaluate, kind, found.own)
            check_shape(found.shape, seen.differences.shape[-1], x.shape[1])
            if found.tied is not None:  # what is tied are entries in the inputs' own units
                base = base_scales(self.steps, x.shape[1])
                seen, unit = seen._replace(probes=seen.probes * base), unit[:, :1] / base[:1]
                unit = unit.expand(len(x), x.shape[1])
            if kind == "backward":
                self.doubts.check_rounding(seen, precision, step.size)
            jacobians = self._solved(found, seen, step)
            if kind == "backward" and not isinstance(jacobians, Probed):  # `verify` tells by itself
                must_look = self.unconfirmed > 0 and not is_new
                if (
                    must_look
                    and isinstance(jacobians, Sparse)
                    and not self._confirmed(jacobians, x, unit, step, evaluate)
                ):
                    self._widen(x, precision, outputs, evaluate)
                    return self.linearise(x, y, precision, outputs, evaluate, kind)
                assert isinstance(jacobians, Sparse | Dense)
                residual = self.doubts.check_fit(jacobians, seen, step, precision)
                self.report.residual = self.report.residual if residual is None else residual
        self.report.step, self.report.noise, self.report.curvature = step.size, step.noise, step.curvature
        self.report.shares = step.shares
        self.report.condition = found.condition
        return unscaled(jacobians, unit)

    def discover(
        self, x: Tensor, precision: float, outputs: int, evaluate: Evaluate, probes: int | None = None
    ) -> Detection:
        """Find the pattern on a batch, along so many probes where that is given, and keep it."""
        size = default_size(self.steps, precision)
        first = designs.general(4, x.shape[1], self.generator)
        step = self._measured(x, first, precision, evaluate) if self.steps.noise is not None else Step(size, 0.0)

        unit = scales(self.steps, x, shared=False)

        def look_along(probes: Tensor) -> tuple[Tensor, Tensor]:
            seen = look(self.steps, x, None, probes, unit, step.size, evaluate, "setup")
            return seen.probes, seen.differences

        generator = self.generator or torch.Generator().manual_seed(1)
        self.detection = detect(
            look_along,
            len(x),
            outputs,
            x.shape[1],
            blur=torch.as_tensor(step.error(2)).expand(outputs),
            precision=10.0 * precision ** (2 / 3 if self.sides == 2 else 1 / 2),
            probes=probes,
            sparsity=self.wanted.sparsity,
            generator=generator,
        )
        self.unconfirmed = _CONFIRMATIONS
        if self.detection.pattern.is_dense and self.steps.noise in (None, 0):
            self._ask_twice(x, precision, evaluate)
        return self.detection

    def _ask_twice(self, x: Tensor, precision: float, evaluate: Evaluate) -> None:
        """Tell undeclared noise, for which every input seems to move every output."""
        few = x[:LOOKED_AT].expand(2, -1, -1)
        values, _ = evaluated(few, evaluate, "setup", lambda g, b: f"sample {b}", may_drop=False)
        if bool(((values[1] - values[0]).abs() > 1e2 * precision * (1.0 + values[0].abs())).any()):
            noise = float((values[1] - values[0]).square().mean().sqrt()) / math.sqrt(2.0)
            warnings.warn(
                f"A black box seems to have no pattern, but it has noise of about {noise:.1e}, in which every input seems to "
                "move every output. Give noise='estimate', or seed_kwarg.",
                SensingWarning,
                stacklevel=2,
            )

    def _must_measure(self) -> bool:
        """Whether there is no step yet, or one as long as any: where the box was flat, it is measured again, now and then."""
        if self.measured_step is None:
            return True
        is_given = not isinstance(self.steps.step, str)
        if is_given or self.measured_step.size < LONGEST or self.wanted.method == "robust":
            return False
        self.flat += 1
        return self.flat <= _MOST_MEASURED and self.flat.bit_count() == 1

    def _confirmed(self, jacobians: Sparse, x: Tensor, unit: Tensor, step: Step, evaluate: Evaluate) -> bool:
        """Look along one fresh direction at some samples of a batch that the pattern was not found on."""
        self.unconfirmed -= 1
        few = slice(LOOKED_AT)
        fresh = designs.general(1, x.shape[1], torch.Generator().manual_seed(3))
        seen = look(self.steps, x[few], None, fresh, unit[few], step.size, evaluate, "setup")
        told = Sparse(jacobians.pattern, jacobians.values[few]).along(seen.probes)
        left, known = (v.square().mean((0, 1)).sqrt() for v in (seen.differences - told, seen.differences))
        widest = math.sqrt(1.0 + jacobians.pattern.widest)
        allowed = (
            MISFIT * known + slight(seen, step, self.precision, self.sides) + 10.0 * step.error(self.sides) * widest
        )
        return bool((left <= allowed).all())

    def _widen(self, x: Tensor, precision: float, outputs: int, evaluate: Evaluate) -> None:
        """Find the pattern on another batch, too: what either has may be nonzero."""
        before, unconfirmed = self.detection, self.unconfirmed
        assert before is not None
        now = self.discover(x, precision, outputs, evaluate)
        rows, columns = (
            torch.cat([getattr(one.pattern, name) for one in (before, now)]) for name in ("rows", "columns")
        )
        self.detection = replace(now, pattern=Pattern.of_entries(rows, columns, now.pattern.shape))
        self.plan, self.unconfirmed = None, unconfirmed

    def _measured(self, x: Tensor, probes: Tensor, precision: float, evaluate: Evaluate) -> Step:
        # A step that is given is how far a probe moves those inputs that it moves.
        given = None if isinstance(self.steps.step, str) else 1.0 / float(probes[probes != 0].square().mean().sqrt())
        if self._must_measure():
            if self.steps.noise in (None, 0):
                return Step(given or default_size(self.steps, precision), 0.0)
            shared = probes if probes.ndim == 2 else probes[0]

            def at(points: Tensor, samples: Tensor) -> Tensor:
                points = points.to(x.dtype)
                found = evaluate(points, samples, "setup", lambda g, b: f"set-up point {g} of sample {b}", False)
                return found.leaves[0].view(points.shape[0], points.shape[1], -1)

            found = measured(
                self.steps,
                x,
                shared,
                precision,
                at,
                shared=self.plan is not None and self.plan.scales_are_shared,
                is_corrupted=self.wanted.method == "robust",
            )
            if self.measured_step is None or found.size < self.measured_step.size:
                self.measured_step = found
        assert self.measured_step is not None
        if given is not None:
            return replace(self.measured_step, size=given)
        return self.measured_step

    def _solved(self, found: Plan, seen: Seen, step: Step) -> Linearised:
        if found.method == "spsa":
            return mean_of_probes(seen)
        if found.method == "dense":
            return entry_by_entry(seen, found.pattern)
        if found.method == "l1":
            return row_by_row(seen, step.blur(self.sides), found.sparsity)
        if found.method == "coloring":
            assert found.coloring is not None
            pattern = found.coloring.pattern
            jacobians = Sparse(pattern, by_color(seen, found.coloring.colors, pattern))
        elif found.method == "rainbow":
            assert found.pattern is not None
            jacobians = decoded(seen, found.pattern)
        else:
            solver = found.rows or found.tied
            assert solver is not None
            jacobians = solver.fit(seen.differences, seen.probes, seen.missing)
        return jacobians

    def _robust(
        self, found: Plan, x: Tensor, probes: Tensor, unit: Tensor, step: Step, evaluate: Evaluate, kind: str
    ) -> Sparse:
        """Find wrong calls among raw outcomes, the value at `x` one more unknown; then take differences of the others."""
        start = x.to(torch.float64)
        points = points_of(self.steps, x, probes, step.size * unit, both=self.sides == 2)
        count, batch = probes.shape[-2], len(x)

        def where(group: int, sample: int) -> str:
            return f"sample {sample}, probe {group % count} of {count}"

        values, missing = evaluated(points, evaluate, kind, where)
        check_shape(found.shape, values.shape[-1], x.shape[1])
        reach = ((points.to(torch.float64) - start) / (step.size * unit)).transpose(0, 1)
        raw = values.transpose(0, 1)
        if missing is not None:
            raw = raw.masked_fill(missing.T[..., None], math.nan)
        middle = raw.nanmedian(dim=1, keepdim=True).values
        assert found.pattern is not None
        pattern = found.pattern
        supports = [(rows, columns) for rows, columns, _ in pattern.supports]
        # One-sided, as at bounds, and with a value that is fitted, a call bends by as much as the step.
        known_noise = step.noise / step.size if step.noise else step.size * float(raw.abs().nanmedian())
        parts, _, inliers = decode(reach, (raw - middle) / step.size, supports, intercept=True, known_noise=known_noise)
        jacobians = Sparse(pattern, joined(parts, pattern, batch))
        self.report.residual = None
        if self.sides == 2:
            good = inliers[:, :count] & inliers[:, count:]
            enough = good.sum(1).gather(1, pattern.rows.expand(batch, -1)) > pattern.row_counts[pattern.rows]
            if bool(enough.all()) and found.rows is not None:
                difference = (raw[:, :count] - raw[:, count:]) / (2 * step.size)
                along = (reach[:, :count] - reach[:, count:]) / 2
                jacobians = found.rows.fit(difference.masked_fill(~good, 0.0), along, ~good)
        return jacobians

    def check_bounds(self, x: Tensor, given: torch.dtype) -> None:
        """Raise `ValueError` where inputs `(B, n)` lie outside the bounds, as these are in the precision that was given."""
        self.steps.check(x.shape[1])
        low, high = bounds_of(self.steps, x.to(given))
        if low is None or high is None:
            return
        outside = (x.to(torch.float64) < low) | (x.to(torch.float64) > high)
        if bool(outside.any()):
            sample, place = torch.nonzero(outside)[0].tolist()
            raise ValueError(
                f"Input {place} of sample {sample} is {float(x[sample, place]):g}, outside the bounds of the black box; clamp "
                "the inputs, or widen the bounds."
            )
