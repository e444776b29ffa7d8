"""How far a sensed Jacobian tells what a black box does along directions that it was not sensed with."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from beyondprop import _checks
from beyondprop.func.sensing import designs
from beyondprop.func.sensing.batch import Batch
from beyondprop.func.sensing.linearised import Linearised, Probed, Sparse
from beyondprop.func.sensing.looking import look
from beyondprop.func.sensing.sensor import Sensor
from beyondprop.func.sensing.steps import Step, scales

_RMS, _ERROR = 0.5, 2.0  # of the entries of a direction, and of a Jacobian in units of one difference
_MEDIAN = 0.6745  # of the size of a normal number


@dataclass(frozen=True, eq=False)
class Verification:
    """What fresh probes say of a Jacobian.

    Attributes:
        residual: of each output, the norm of what its row does not explain, relative to its derivatives along the probes,
            `(m,)`.
        expected: what noise explains of it, `(m,)`.
        tolerance: beyond noise, what is accepted.
        calls: of the box that the comparison took, beside those of the outputs and the Jacobian.
        coupled: whether a row's outputs depend on the other rows of a call, in which no Jacobian can be told from another.
        untold_noise: standard deviation of the outputs at one point, where it is more than was told.
    """

    residual: Tensor
    expected: Tensor
    tolerance: float
    calls: int
    coupled: bool = False
    untold_noise: float = 0.0

    @property
    def wrong(self) -> Tensor:
        """Outputs whose row is wrong, the worst first."""
        excess = self.residual - self.expected - self.tolerance
        order = excess.argsort(descending=True)
        return order[excess[order] > 0]

    @property
    def undecided(self) -> Tensor:
        """Outputs of which noise leaves so little that a row could be missing as a whole: more rows or probes would tell."""
        return torch.nonzero(self.expected + self.tolerance >= 1.0).flatten()

    @property
    def ok(self) -> bool:
        """Whether every row holds."""
        return not self.coupled and not self.untold_noise and not len(self.wrong)

    def __bool__(self) -> bool:
        return self.ok

    def __repr__(self) -> str:
        if self.coupled:
            return "Verification(a row's outputs depend on the other rows of a call; give vectorized=False)"
        if self.untold_noise:
            return f"Verification(the box has noise of about {self.untold_noise:.1e}; give noise='estimate', or seed_kwarg)"
        doubt = f", {len(self.undecided)} outputs too noisy to tell" if len(self.undecided) else ""
        if self.ok:
            return f"Verification(ok, residual at most {float(self.residual.max()):.1e}{doubt}, {self.calls} calls)"
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
    if isinstance(jacobians, Probed):
        raise ValueError(
            "verify compares Jacobians, and method='spsa' gives an estimate of products alone; take another method."
        )
    before = batch.caller.counts.total
    generator = torch.Generator().manual_seed(2)
    rows, inputs = batch.x.shape
    probes = torch.stack([designs.general(count, inputs, generator) for _ in range(rows)]) * (_RMS * math.sqrt(count))
    report = sensor.report
    step = Step(report.step or precision ** (1 / 3), report.noise or 0.0, report.curvature, report.shares)
    unit = scales(sensor.steps, batch.x, shared=False)
    # Central differences in any case: they bend less than what is checked.
    seen = look(sensor.steps, batch.x, None, probes, unit, step.size, batch.evaluate, "evaluation")
    told = torch.stack([jacobians.push(seen.probes[:, q] * unit) for q in range(count)], 1)
    gone = torch.zeros(rows, count, 1, dtype=torch.bool) if seen.missing is None else seen.missing[..., None]
    is_robust = sensor.plan is not None and sensor.plan.method == "robust"
    left, known = (
        _size(v.masked_fill(gone, 0.0), is_robust=is_robust) for v in (seen.differences - told, seen.differences)
    )
    size = torch.maximum(known, left).clamp(min=1e-300)
    # What is checked has the errors of its own entries, of which a direction sees as many as a row has.
    widest = jacobians.pattern.widest if isinstance(jacobians, Sparse) else inputs
    own = _ERROR * step.blur(sensor.sides) * _RMS * math.sqrt(widest)
    spread = 1.0 + 4.0 / math.sqrt(2.0 * rows * count)
    bend = step.bend(2) + step.bend(sensor.sides) * _RMS * math.sqrt(widest)
    shares = 1.0 if step.shares is None else step.shares
    expected = (math.hypot(step.blur(2), own) * spread + 2.0 * bend) * shares / size
    # An output that does not move at all, but for rounding, has no direction to be wrong in.
    silent = size <= 1e3 * precision / step.size * (1.0 + y.abs().amax(0))
    # Where calls may be wrong, one that differs says nothing.
    coupled, untold = (False, 0.0) if is_robust else _again(batch, y, precision, step.noise)
    calls = batch.caller.counts.total - before
    return Verification((left / size).masked_fill(silent, 0.0), expected, tolerance, calls, coupled, untold)


def _size(values: Tensor, *, is_robust: bool) -> Tensor:
    """Return the size of each output's `(B, k, m)`, by the median where some are arbitrary."""
    if not is_robust:
        return values.square().mean((0, 1)).sqrt()
    return values.abs().flatten(0, 1).median(0).values / _MEDIAN


def _again(batch: Batch, y: Tensor, precision: float, noise: float) -> tuple[bool, float]:
    """Call the box without its first row, and with it: whether rows depend on each other, and noise that was not told."""
    if len(y) < 2 or batch.seed is not None:
        return False, 0.0

    def called(rows: Tensor) -> Tensor:
        return batch.evaluate(batch.x[None, rows], rows, "evaluation", lambda _, b: f"sample {b}", False).leaves[0]

    slight = 1e3 * precision * (1.0 + y.abs()) + 10.0 * noise
    others = torch.arange(1, len(y))
    if not bool(((called(others) - y[1:]).abs() > slight[1:]).any()):
        return False, 0.0
    change = called(torch.arange(len(y))) - y
    if not bool((change.abs() > slight).any()):
        return True, 0.0
    return False, float(change.square().mean().sqrt()) / math.sqrt(2.0)
