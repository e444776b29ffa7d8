"""Backpropagation, the baseline: autograd and any torch optimizer behind the interface of a learning rule."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from beyondprop.losses import LossFunction
from beyondprop.rules.base import LearningRule, StepResult

OptimizerFactory = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]


class Backprop(LearningRule):
    """Plain backpropagation: `loss.backward()`, `optimizer.step()`.

    Args:
        model: any module.
        loss: `loss(output, y)`, mean or sum over the batch.
        optimizer: factory called with the trainable parameters, such as `partial(torch.optim.Adam, lr=1e-3)`, or an
            optimizer that holds them.
        nonfinite: see `LearningRule`.

    Example:
        >>> rule = Backprop(nn.Linear(2, 1), nn.MSELoss(), torch.optim.SGD)
        >>> rule.step(torch.ones(4, 2), torch.ones(4, 1)).loss.shape
        torch.Size([])
    """

    def __init__(
        self,
        model: nn.Module,
        loss: LossFunction,
        optimizer: OptimizerFactory | torch.optim.Optimizer,
        *,
        nonfinite: str | None = None,
    ) -> None:
        super().__init__(model, loss, nonfinite=nonfinite)
        if not any(p.requires_grad for p in model.parameters()):
            raise ValueError("No parameter of the model requires a gradient; there is nothing to train.")
        if not isinstance(optimizer, torch.optim.Optimizer):
            optimizer = optimizer([p for p in model.parameters() if p.requires_grad])
        self.optimizers = (optimizer,)

    def backward(self, x: Tensor, y: Tensor, *, scale: float = 1.0, diagnostics: bool = False) -> StepResult:
        """Add the gradient of the loss to every `.grad`; see `LearningRule.backward`."""
        del diagnostics  # backpropagation has no relaxed energy and no per-stage problem
        output = self.model(x)
        self.loss.check(output, y)
        loss = self.loss(output, y)
        (loss if scale == 1.0 else loss * scale).backward()
        return StepResult(loss.detach(), output.detach())
