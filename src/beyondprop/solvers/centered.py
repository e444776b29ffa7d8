"""Centered RMSprop as difference target propagation was published with."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from beyondprop import _checks
from beyondprop.solvers.base import OptimizerFactory


class CenteredRMSprop(torch.optim.Optimizer):
    """RMSprop by the gradient's variance, with momentum on the steps.

        m <- decay m + (1 - decay) g        v <- decay v + (1 - decay) g^2        both start at 0
        s <- momentum s + lr g / sqrt(v - m^2 + eps)
        p <- p - s

    `torch.optim.RMSprop(centered=True)` has eps outside the root. Here it matters: the gradients of a mean over the batch
    are smaller than `sqrt(eps)`, so that eps is most of what they are divided by.

    Args:
        params: parameters or parameter groups.
        lr: step size, >= 0.
        decay: of the two moments, in [0, 1).
        momentum: decay of the steps, in [0, 1).
        eps: added to the variance, > 0.

    Raises:
        ValueError: if an argument is out of its range.

    Source: Lee et al., ECML 2015, authors' release.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        *,
        decay: float = 0.95,
        momentum: float = 0.9,
        eps: float = 1e-3,
    ) -> None:
        for name, value in (("decay", decay), ("momentum", momentum)):
            if not 0 <= value < 1:
                raise ValueError(f"{name} must be in [0, 1), got {value!r}.")
        defaults = {
            "lr": _checks.non_negative("lr", lr),
            "decay": decay,
            "momentum": momentum,
            "eps": _checks.positive("eps", eps),
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Make one step; see `torch.optim.Optimizer.step`."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state.update({name: torch.zeros_like(p) for name in ("mean", "square", "steps")})
                mean, square, steps = state["mean"], state["square"], state["steps"]
                mean.lerp_(p.grad, 1 - group["decay"])
                square.mul_(group["decay"]).addcmul_(p.grad, p.grad, value=1 - group["decay"])
                root = torch.addcmul(square, mean, mean, value=-1.0).clamp_min_(0.0).add_(group["eps"]).sqrt_()
                steps.mul_(group["momentum"]).addcdiv_(p.grad, root, value=group["lr"])
                p.sub_(steps)
        return loss


def centered_rmsprop(lr: float, **settings: float) -> OptimizerFactory:
    """Return a factory of `CenteredRMSprop`."""

    def build(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        return CenteredRMSprop(parameters, lr, **settings)

    return build
