"""What a step returns."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one step saw. Every tensor is detached and stays on its device; nothing is read to the host.

    Attributes:
        loss: task loss before the update, 0-d.
        output: the model's output before the update.
        energy: relaxed objective after the credit was assigned, 0-d, where the rule has one and diagnostics were asked
            for; before it, the relaxed objective is `loss`, in an offline rule's first step its output loss.
        stages: per stage, named 0-d tensors; filled where diagnostics were asked for.
    """

    loss: Tensor
    output: Tensor
    energy: Tensor | None = None
    stages: dict[str, dict[str, Tensor]] = field(default_factory=dict)
