"""Backpropagation and what only replaces its update: autograd and any torch optimizer as a learning rule."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from beyondprop.errors import BlackBoxError, CallBudgetExceededError, NonFiniteError, UnsupportedModelError
from beyondprop.optim.affine_projection import AffineProjection
from beyondprop.optim.factories import OptimizerFactory
from beyondprop.optim.locoprop import LocoProp
from beyondprop.rules.base import LearningRule, StepResult, trainable
from beyondprop.rules.refusals import check_optimizers
from beyondprop.stages.losses import LossFunction

_OF_TORCH = torch.OutOfMemoryError  # pyright: ignore[reportPrivateImportUsage]
_TOLD = (_OF_TORCH, NonFiniteError, UnsupportedModelError, BlackBoxError, CallBudgetExceededError)
"""What a model raises in words of its own, which are not about its inputs."""


class Preconditioner(Protocol):
    """What rewrites gradients between `loss.backward()` and `optimizer.step()`, such as `AffineProjection`."""

    def step(self) -> None:
        """Rewrite the gradients in place."""

    def state_dict(self) -> dict[str, Any]:
        """Return its state."""
        ...

    def load_state_dict(self, state: dict[str, Any], /) -> None:
        """Restore what `state_dict` returned."""


class Backprop(LearningRule):
    """Backpropagation: `loss.backward()`, `optimizer.step()`.

    Args:
        model: any module.
        loss: `loss(output, y)`, mean or sum over the batch.
        optimizer: factory called with the trainable parameters, such as `partial(torch.optim.Adam, lr=1e-3)`, or an
            optimizer that holds them, `LocoProp` among them.
        preconditioner: rewrites the gradients before the optimizer steps.

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
        preconditioner: Preconditioner | None = None,
        nonfinite: str | None = None,
    ) -> None:
        super().__init__(model, loss, nonfinite=nonfinite)
        trained = trainable(model)
        self.optimizers = (optimizer if isinstance(optimizer, torch.optim.Optimizer) else optimizer(trained),)
        check_optimizers(self.optimizers)
        self.preconditioner = preconditioner
        self.defers_update = preconditioner is None
        self.is_wary = not isinstance(preconditioner, AffineProjection | None)  # that one looks at its gradients itself

    takes_any_input = is_autograd = keeps_ranks = True

    def can_follow(self, parameters: set[nn.Parameter]) -> bool:
        """Return whether every parameter has its optimizer still: of modules nothing is known here, unless hooks know them."""
        known = self.held() | set(self._asked)
        return parameters <= known and self.preconditioner is None and not isinstance(self.optimizers[0], LocoProp)

    def backward(self, x: Any, y: Tensor, *, scale: float = 1.0, diagnostics: bool = False) -> StepResult:
        del diagnostics  # backpropagation has no relaxed energy and no per-stage problem
        output = self._forward(x)
        self.loss.check(output, y)
        loss = self.loss(output, y)
        (loss if scale == 1.0 else loss * scale).backward()
        return StepResult(loss.detach(), output.detach())

    def _forward(self, x: Any) -> Tensor:
        try:
            output = self.model(x)
        except _TOLD:
            raise
        except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
            given = f"{tuple(x.shape)}, {x.dtype}" if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"The model does not take these inputs, {given}: {error}") from error
        if not isinstance(output, Tensor):
            raise UnsupportedModelError(
                f"{type(self.model).__name__} returns a {type(output).__name__}; a rule takes a model that returns one tensor, "
                "for its loss and metrics. Wrap it in a module that returns that part."
            )
        return output

    def prepare(self) -> None:
        if self.preconditioner is not None:
            self.preconditioner.step()

    def own_state(self) -> dict[str, Any]:
        return {} if self.preconditioner is None else {"preconditioner": self.preconditioner.state_dict()}

    def load_own_state(self, state: Mapping[str, Any]) -> None:
        if self.preconditioner is not None:
            self.preconditioner.load_state_dict(state.get("preconditioner", {}))
