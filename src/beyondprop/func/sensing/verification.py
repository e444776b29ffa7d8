"""How far a sensed Jacobian tells what a black box does along directions that it was not sensed with."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from beyondprop import _checks
from beyondprop.func.sensing import designs
from beyondprop.func.sensing.batch import Batch
from beyondprop.func.sensing.linearised import Linearised, Sparse
from beyondprop.func.sensing.looking import look
from beyondprop.func.sensing.sensor import Sensor
from beyondprop.func.sensing.steps import Step, scales

_MOST = 1e-2


@dataclass(frozen=True, eq=False)
class Verification:
    """What fresh probes say of a Jacobian.

    Attributes:
        residual: of each output, the norm of what its row does not explain, relative to its derivatives along the probes,
            `(m,)`.
        expected: what noise explains of it, `(m,)`.
        tolerance: beyond noise, what is accepted.
        calls: of the box that it took.
        coupled: whether a row's outputs depend on the other rows of a call, in which no Jacobian can be told from another.
    """

    residual: Tensor
    expected: Tensor
    tolerance: float
    calls: int
    coupled: bool = False

    @property
    def wrong(self) -> Tensor:
        """Outputs whose row is wrong, the worst first."""
        excess = self.residual - self.expected - self.tolerance
        order = excess.argsort(descending=True)
        return order[excess[order] > 0]

    @property
    def ok(self) -> bool:
        """Whether every row holds."""
        return not self.coupled and not len(self.wrong)

    def __bool__(self) -> bool:
        return self.ok

    def __repr__(self) -> str:
        if self.coupled:
            return "Verification(a row's outputs depend on the other rows of a call; give vectorized=False)"
        if self.ok:
            return f"Verification(ok, residual at most {float(self.residual.max()):.1e}, {self.calls} calls)"
        worst = self.wrong
        named = ", ".join(f"{int(i)} ({float(self.residual[i]):.0%})" for i in worst[:5])
        more = f" and {len(worst) - 5} more" if len(worst) > 5 else ""
        return f"Verification({len(worst)} of {len(self.residual)} outputs wrong: {named}{more}; {self.calls} calls)"


def check(
    sensor: Sensor, batch: Batch, y: Tensor, precision: float, jacobians: Linearised, count: int, tolerance: float
) -> Verification:
    """Compare Jacobians with directional derivatives along `count` random directions a sample.

    Args:
        sensor: what sensed them.
        batch: the inputs `(B, n)`.
        y: outputs there `(B, m)`.
        precision: of the box's numbers, relative.
        jacobians: what is checked.
        count: of probes.
        tolerance: misfit that is accepted, relative.
    """
    _checks.at_least("n_probes", count, 1)
    before = batch.caller.counts.total
    generator = torch.Generator().manual_seed(2)
    rows, inputs = batch.x.shape
    probes = torch.stack([designs.general(count, inputs, generator) for _ in range(rows)])
    report = sensor.report
    step = Step(report.step or precision ** (1 / 3), report.noise or 0.0, report.curvature)
    unit = scales(sensor.steps, batch.x, shared=False)
    # Central differences in any case: they bend less than what is checked.
    seen = look(sensor.steps, batch.x, None, probes, unit, step.size, batch.evaluate, "evaluation")
    told = torch.stack([jacobians.push(seen.probes[:, q] * unit) for q in range(count)], 1)
    gone = torch.zeros(rows, count, 1, dtype=torch.bool) if seen.missing is None else seen.missing[..., None]
    left, known = (
        (v.masked_fill(gone, 0.0)).square().sum((0, 1)).sqrt() for v in (seen.differences - told, seen.differences)
    )
    size_of = torch.maximum(known, left).clamp(min=1e-300)
    # What is checked has the errors of its own entries, of which a direction sees as many as a row has.
    widest = jacobians.pattern.widest if isinstance(jacobians, Sparse) else inputs
    own = 2.0 * (step.blur(sensor.sides) + step.bend(sensor.sides)) * math.sqrt(widest / count)
    expected = 4.0 * (step.blur(2) + own) * math.sqrt(rows * count) / size_of
    # An output that does not move at all, but for rounding, has no direction to be wrong in.
    silent = torch.maximum(known, left) <= 1e3 * precision / step.size * (1.0 + y.abs().amax(0))
    coupled = _coupled(batch, y, precision, sensor.report.noise or 0.0)
    calls = batch.caller.counts.total - before
    return Verification((left / size_of).masked_fill(silent, 0.0), expected, tolerance, calls, coupled)


def _coupled(batch: Batch, y: Tensor, precision: float, noise: float) -> bool:
    """Call the box without its first row, and see whether the others' outputs change."""
    if len(y) < 2 or batch.seed is not None:
        return False
    others = torch.arange(1, len(y))
    again = batch.evaluate(batch.x[None, 1:], others, "evaluation", lambda _, b: f"sample {b}", False).leaves[0]
    return bool(((again - y[1:]).abs() > 1e3 * precision * (1.0 + y[1:].abs()) + 10.0 * noise).any())
