"""What a sensor tells of a box without a call: derivatives that drown in rounding, and a misfit that nothing explains."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from beyondprop.errors import SensingWarning
from beyondprop.func.sensing.linearised import Dense, Sparse
from beyondprop.func.sensing.recoveries import Seen
from beyondprop.func.sensing.steps import Step, StepSettings

MISFIT, LOOKED_AT = 1e-2, 8
_SLIGHT, _DROWNED, _FIRST_LOOKS = 1e-3, 0.02, 16


class Doubts:
    """Looks at what was seen, the first times and then now and again, and warns once.

    Args:
        steps: how far probes go.
    """

    def __init__(self, steps: StepSettings) -> None:
        self.steps = steps
        self._warned, self._looks = False, 0

    def check_rounding(self, seen: Seen, precision: float, size: float) -> None:
        """Tell derivatives that drown in the rounding of large outputs."""
        if self._warned or self._looks > _FIRST_LOOKS:
            return
        drowned = precision * seen.magnitude
        known = seen.differences[:LOOKED_AT].nan_to_num(0.0).square().mean((0, 1)).sqrt()
        # What changes by rounding alone matters where that is large beside the others' changes.
        counts = (drowned > _SLIGHT * float(known.square().mean().sqrt())) & (known > 0)
        excess = torch.where(counts, drowned - _DROWNED * known, 0.0)
        worst = int(excess.argmax())
        if float(excess[worst]) > 0:
            self._warned = True
            width = self.steps.sides * size
            warnings.warn(
                f"Derivatives of a black box drown in rounding: output {worst}, of {float(seen.magnitude[worst]) * width:.1e}, "
                f"is precise to {precision:.0e} of that, and a step changes it by {float(known[worst]) * width:.1e}. "
                "Subtract an offset inside the box, let it return float64, or give x_scale or a larger step.",
                SensingWarning,
                stacklevel=2,
            )

    def check_fit(self, jacobians: Sparse | Dense, seen: Seen, step: Step, precision: float) -> float | None:
        """Compare what is left of some samples' directional derivatives with what noise explains.

        Returns the relative misfit; None where it did not look.
        """
        self._looks += 1
        if self._looks > _FIRST_LOOKS and self._looks % _FIRST_LOOKS:
            return None
        few = slice(LOOKED_AT)
        known = seen.differences[few]
        taken = seen.probes[few] if seen.moved is None else seen.probes[few] * seen.moved[few, None]
        left = known - jacobians.of(torch.arange(len(known))).along(taken)
        if seen.missing is not None:
            gone = seen.missing[few, :, None]
            left, known = left.masked_fill(gone, 0.0), known.masked_fill(gone, 0.0)
        of_output, misfit = known.square().mean((0, 1)).sqrt(), left.square().mean((0, 1)).sqrt()
        size = float(known.square().mean().sqrt())
        residual = float(left.square().mean().sqrt()) / size if size > 0 else 0.0
        excess = misfit - (
            MISFIT * of_output + slight(seen, step, precision, self.steps.sides) + 6.0 * step.error(self.steps.sides)
        )
        worst = int(excess.argmax())
        if float(excess[worst]) > 0 and not self._warned:
            self._warned = True
            share = float(misfit[worst] / of_output[worst])
            warnings.warn(
                f"Directional derivatives of a black box differ from what its Jacobian says, at output {worst} by {share:.0%} "
                f"and by {residual:.1%} overall: the pattern lacks entries, the box is noisier than it was said "
                f"to be (noise={self.steps.noise!r}), or rounded or bent within a step. verify() tells how far it goes; "
                "noise='estimate' measures the noise, pattern='discover' the pattern.",
                SensingWarning,
                stacklevel=2,
            )
        return residual


def slight(seen: Seen, step: Step, precision: float, sides: int) -> Tensor:
    """Return what rounding and bends that nobody measured may do to each output's derivatives, `(m,)`."""
    values = seen.magnitude * sides * step.size
    return values * (3.0 * precision / step.size + 10.0 * step.size**2)
