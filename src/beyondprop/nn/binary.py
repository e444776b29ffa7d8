"""Layers that send signs or steps: forward a threshold, backward by a target rule.

A threshold has slope 0 almost everywhere. A delta at its output says which value each unit should send instead, its target; a
target rule says how strongly the unit's input is to move toward the side of that target, as a factor on the delta.
Straight-through estimation is a rule that does not look at the target; a hinge is one that lets units rest which already send
it with a margin.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from beyondprop import _checks
from beyondprop.nn.activations import Activation, register_closed_form

TargetRule = Callable[[Tensor, Tensor], Tensor]
"""Maps inputs z and targets in {-1, 0, 1} (0: none) to factors >= 0 on the deltas, all of one shape."""


TARGET_RULES: dict[str, TargetRule] = {
    "hardtanh": lambda z, target: (z.abs() <= 1).to(z.dtype),
    "identity": lambda z, target: torch.ones_like(z),
    "tanh": lambda z, target: 1 - z.tanh().square_(),
    "hinge": lambda z, target: (z * target <= 1).to(z.dtype),
}
"""Target rules by name.

| name | factor | where it is from |
|---|---|---|
| `hardtanh` | 1 where z is in [-1, 1] | straight-through estimation with a window, Hubara et al., NIPS 2016, equation 4 |
| `identity` | 1 | straight-through estimation, Bengio, Leonard & Courville, arXiv 1308.3432 |
| `tanh` | 1 - tanh(z)^2: soft hinge on the target's side, weighted by the delta | Friesen & Domingos, ICLR 2018, section 3.2 |
| `hinge` | 1 where target * z <= 1: a hinge, weighted by the delta | Friesen & Domingos, ICLR 2018, section 3.2 |
"""


def register_target_rule(name: str, rule: TargetRule) -> None:
    """Let `Sign` and `Step` accept a target rule by name.

    Args:
        name: not yet taken.
        rule: see `TargetRule`; elementwise, so that every sample stays its own.

    Raises:
        ValueError: if the name is taken.
        TypeError: if `rule` cannot be called.
    """
    if name in TARGET_RULES:
        raise ValueError(f"There is a target rule {name!r} already; registered are {', '.join(TARGET_RULES)}.")
    if not callable(rule):
        raise TypeError(f"A target rule is a function (z, target) -> factors, got {type(rule).__name__}.")
    TARGET_RULES[name] = rule


class Threshold(nn.Module):
    """A unit that sends one of two values; `Sign` and `Step` are those to use.

    Args:
        target_rule: one of `TARGET_RULES`.

    Raises:
        ValueError: if there is no such rule.
    """

    low, high = -1.0, 1.0

    def __init__(self, target_rule: str = "hardtanh") -> None:
        super().__init__()
        self.target_rule: str = _checks.one_of("target_rule", target_rule, TARGET_RULES)

    def forward(self, z: Tensor) -> Tensor:
        """Map `(N, ...)` to values of the same shape and dtype; a NaN stays one, so that it is found."""
        return _Thresholded.apply(z, self)  # type: ignore[return-value]

    def send(self, z: Tensor) -> Tensor:
        """Return what `forward` returns, without a graph."""
        return torch.where(z.isnan(), z, torch.where(z >= 0, self.high, self.low).to(z.dtype))

    def factors(self, z: Tensor, delta: Tensor) -> Tensor:
        """Return the target rule's factors on deltas at the output; a delta's sign is the target."""
        return TARGET_RULES[self.target_rule](z, delta.sign())

    def extra_repr(self) -> str:
        return f"target_rule={self.target_rule!r}"


class Sign(Threshold):
    """Forward 1 where the input is >= 0 and -1 elsewhere; backward by a target rule, straight through by default.

    Example:
        >>> Sign()(torch.tensor([-0.5, 0.0, 2.0]))
        tensor([-1.,  1.,  1.])
    """


class Step(Threshold):
    """Forward 1 where the input is >= 0 and 0 elsewhere; backward by a target rule, straight through by default.

    Example:
        >>> Step()(torch.tensor([-0.5, 0.0, 2.0]))
        tensor([0., 1., 1.])
    """

    low = 0.0


class _Thresholded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, unit: Threshold) -> Tensor:
        ctx.unit, ctx.kept = unit, None
        ctx.save_for_backward(z)
        return unit.send(z)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        # The first delta, minus a gradient, sets the targets: later passes through the same graph see one linear map.
        if ctx.kept is None:
            (z,) = ctx.saved_tensors
            with torch.no_grad():
                ctx.kept = ctx.unit.factors(z, -gradient)
        return gradient * ctx.kept, None


for _kind in (Sign, Step):
    register_closed_form(
        _kind, lambda m: Activation(m.send, lambda z, a: m.factors(z, torch.zeros_like(z)), factors=m.factors)
    )
