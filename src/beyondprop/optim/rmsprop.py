"""RMSProp as LocoProp was published with: the semantics of TensorFlow 1."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from beyondprop import _checks


class RMSProp(torch.optim.Optimizer):
    """RMSProp whose momentum holds steps, not gradients.

        v <- alpha v + (1 - alpha) g^2              v starts at 1
        m <- momentum m + lr g / sqrt(v + eps)
        p <- p - m

    `torch.optim.RMSprop` differs in all three lines: its v starts at 0, eps is outside the root, and the learning rate
    multiplies the whole of m, so that a decayed rate also shrinks past steps. With a momentum of 0.999 this matters.

    Args:
        params: parameters or parameter groups.
        lr: step size, > 0.
        alpha: decay of the second moment, in [0, 1).
        momentum: decay of the steps, in [0, 1).
        eps: added to the second moment, > 0.
        weight_decay: coefficient of an L2 penalty, added to the gradient.

    Raises:
        ValueError: if an argument is out of its range.

    Source: Amid, Anil & Warmuth, AISTATS 2022, authors' notebook.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-5,
        *,
        alpha: float = 0.9,
        momentum: float = 0.999,
        eps: float = 1e-5,
        weight_decay: float = 0.0,
    ) -> None:
        for name, value in (("alpha", alpha), ("momentum", momentum)):
            if not 0 <= value < 1:
                raise ValueError(f"{name} must be in [0, 1), got {value!r}.")
        defaults = {
            "lr": lr if isinstance(lr, Tensor) else _checks.non_negative("lr", lr),
            "alpha": alpha,
            "momentum": momentum,
            "eps": _checks.positive("eps", eps),
            "weight_decay": _checks.non_negative("weight_decay", weight_decay),
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
                if p.grad is not None:
                    self._move(p, p.grad, group)
        return loss

    def _move(self, p: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        if gradient.is_sparse or gradient.is_complex():
            raise RuntimeError("RMSProp takes dense real gradients, got a sparse or complex one.")
        state = self.state[p]
        if not state:
            state.update(square_avg=torch.ones_like(p), momentum_buffer=torch.zeros_like(p))
        if group["weight_decay"]:
            gradient = gradient.add(p, alpha=group["weight_decay"])
        square, steps, lr = state["square_avg"], state["momentum_buffer"], group["lr"]
        square.mul_(group["alpha"]).addcmul_(gradient, gradient, value=1 - group["alpha"])
        root = (square + group["eps"]).sqrt_()
        steps.mul_(group["momentum"])
        if isinstance(lr, Tensor):
            steps.add_(gradient.div(root).mul_(lr))
        else:
            steps.addcdiv_(gradient, root, value=lr)
        p.sub_(steps)


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
