"""What stands before spiking layers: numbers in [0, 1] to trains of spikes."""

from __future__ import annotations

import abc

import torch
from torch import Tensor, nn

from beyondprop import _checks
from beyondprop.nn.spiking.hm2bp import precise


class Encoder(nn.Module, abc.ABC):
    """Numbers in [0, 1], `(N, ...)`, to trains `(N, T, ...)`; no gradient goes through.

    Args:
        steps: T.

    Raises:
        ValueError: if a number lies outside [0, 1], or is NaN.
    """

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.steps = _checks.at_least("steps", steps, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return the trains, in the precision of the numbers."""
        x = x.detach()
        if not x.is_floating_point() or not bool(((x >= 0) & (x <= 1)).all()):
            low, high = (float(x.min()), float(x.max())) if x.numel() else (0.0, 0.0)
            raise ValueError(
                f"{type(self).__name__} takes floating-point numbers in [0, 1], got {x.dtype} from {low:g} to {high:g}; scale "
                "the input (standardize=False in `data.load`), and look for NaN in it."
            )
        return self.trains(x)

    @abc.abstractmethod
    def trains(self, x: Tensor) -> Tensor:
        """Return the trains of checked numbers."""

    def extra_repr(self) -> str:
        return f"steps={self.steps}"


class PoissonEncoder(Encoder):
    """Numbers in [0, 1], `(N, ...)`, to random spikes `(N, T, ...)`: in each step with the probability `max_rate * x`.

    Args:
        steps: T.
        max_rate: probability of a spike in a step at 1, in (0, 1].
        generator: of the draws, on the device of the input; None: torch's global state.

    Raises:
        ValueError: if a number lies outside [0, 1], or is NaN.
    """

    def __init__(self, steps: int, max_rate: float = 1.0, *, generator: torch.Generator | None = None) -> None:
        super().__init__(steps)
        if not 0 < _checks.positive("max_rate", max_rate) <= 1:
            raise ValueError(f"max_rate must be a probability in (0, 1], got {max_rate!r}.")
        self.max_rate, self.generator = max_rate, generator

    def trains(self, x: Tensor) -> Tensor:
        drawn = torch.empty(
            (len(x), self.steps, *x.shape[1:]), device=x.device, dtype=torch.promote_types(x.dtype, torch.float32)
        )
        return (drawn.uniform_(generator=self.generator) < self.max_rate * x[:, None]).to(x.dtype)

    def extra_repr(self) -> str:
        return f"steps={self.steps}, max_rate={self.max_rate:g}"


class CurrentEncoder(Encoder):
    """Numbers in [0, 1], `(N, ...)`, to themselves in every step, `(N, T, ...)`: a constant current into the first layer."""

    def trains(self, x: Tensor) -> Tensor:
        return x[:, None].repeat(1, self.steps, *[1] * (x.ndim - 1))


class LatencyEncoder(Encoder):
    """Numbers in [0, 1], `(N, ...)`, to at most one spike each, `(N, T, ...)`: 1 in the first step, the smallest in the last.

    The spike of x comes in step `round((1 - x) (T - 1))`; a 0 never spikes.
    """

    def trains(self, x: Tensor) -> Tensor:
        when = ((1.0 - precise(x)) * (self.steps - 1)).round().long()
        steps = torch.arange(self.steps, device=x.device).view(1, -1, *[1] * (x.ndim - 1))
        return ((steps == when[:, None]) & (x > 0)[:, None]).to(x.dtype)
