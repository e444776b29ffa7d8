"""RMSProp whose momentum holds steps, as TensorFlow 1 and Theano had it and as several methods were published with."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from beyondprop import _checks
from beyondprop.optim.projection import widened


class RMSProp(torch.optim.Optimizer):
    """RMSProp whose momentum holds steps, not gradients.

        v <- alpha v + (1 - alpha) g^2              v starts at `initial`
        a <- alpha a + (1 - alpha) g                a starts at 0; only where `centered`, elsewhere a = 0
        m <- momentum m + lr g / sqrt(v - a^2 + eps)
        p <- p - m

    `torch.optim.RMSprop` has v start at 0, eps outside the root, and the learning rate multiply the whole of m, so that a
    decayed rate also shrinks past steps. With a momentum of 0.999 this matters; so does eps where the gradients of a mean over
    the batch are smaller than `sqrt(eps)`, which is then most of what they are divided by. The state of parameters in half
    precision is float32: bfloat16 rounds 0.999 m back to m, and float16 has no square above 65504.

    Args:
        params: parameters or parameter groups.
        lr: step size, >= 0.
        alpha: decay of the moments, in [0, 1).
        momentum: decay of the steps, in [0, 1).
        eps: added to the second moment, > 0.
        weight_decay: coefficient of an L2 penalty, added to the gradient.
        centered: divide by the root of the gradient's variance, not of its second moment.
        initial: of the second moment, >= 0.

    Raises:
        ValueError: if an argument is out of its range.

    Source: Amid, Anil & Warmuth, AISTATS 2022, authors' notebook (the defaults, by TensorFlow 1); Lee et al., ECML 2015,
        authors' release (centered, from 0).
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
        centered: bool = False,
        initial: float = 1.0,
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
            "centered": centered,
            "initial": _checks.non_negative("initial", initial),
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._move(p, p.grad, group)
        return loss

    def _move(self, p: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        if gradient.is_sparse or gradient.is_complex():
            raise RuntimeError("RMSProp takes dense real gradients, got a sparse or complex one.")
        state, alpha, lr = self.state[p], group["alpha"], group["lr"]
        gradient = widened(gradient)
        if not state:
            state["square_avg"] = torch.full_like(gradient, group["initial"])
            state["momentum_buffer"] = torch.zeros_like(gradient)
            if group["centered"]:
                state["grad_avg"] = torch.zeros_like(gradient)
        if group["weight_decay"]:
            gradient = gradient.add(p, alpha=group["weight_decay"])
        square, steps = state["square_avg"], state["momentum_buffer"]
        square.mul_(alpha).addcmul_(gradient, gradient, value=1 - alpha)
        if group["centered"]:
            mean = state["grad_avg"].lerp_(gradient, 1 - alpha)
            # Rounding may leave the variance below 0.
            root = torch.addcmul(square, mean, mean, value=-1.0).clamp_min_(0.0).add_(group["eps"]).sqrt_()
        else:
            root = (square + group["eps"]).sqrt_()
        steps.mul_(group["momentum"])
        if isinstance(lr, Tensor):
            steps.add_(gradient.div(root).mul_(lr))
        else:
            steps.addcdiv_(gradient, root, value=lr)
        p.sub_(steps)

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)  # which gives the state the dtype of its parameter
        saved = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        own = chain.from_iterable(group["params"] for group in self.param_groups)
        for key, p in zip(saved, own, strict=True):
            if p.dtype in (torch.float16, torch.bfloat16):
                for name, value in state_dict["state"].get(key, {}).items():
                    self.state[p][name] = widened(value).to(p.device, copy=True)
