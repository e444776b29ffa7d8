"""A step either happens whole or not at all: the finite check before the weights are written, and the way back."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from beyondprop.errors import NonFiniteError

Optimizers = Sequence[torch.optim.Optimizer]
Saved = list[tuple[Tensor, Tensor]]
"""The model's buffers (running statistics) with copies from before a step; weights are written last and need none."""


@torch.no_grad()
def put_back(saved: Saved, where: Tensor | None = None) -> None:
    """Give buffers their saved values, all or those of a step whose flag `where` (0-d bool) is true, without reading it."""
    for buffer, value in saved:
        buffer.copy_(value if where is None else torch.where(where, value, buffer))
    saved.clear()  # settled: an earlier step's error must not undo this one


class FiniteGuard:
    """Lets an update pass only if the loss and every gradient are finite.

    On a CPU the flag is read and the error raised before the update. On an accelerator reading it would make the host
    wait at every step; there the flag goes to the fused optimizers, which skip the update on the device (the protocol
    of `torch.amp.GradScaler`), and the error is raised as soon as the flag has arrived.
    """

    def __init__(self, mode: str | None) -> None:
        self.mode = mode
        self.steps = 0
        self.pending: list[tuple[int, Tensor, torch.cuda.Event | None]] = []

    def defers(self, loss: Tensor, optimizers: Optimizers) -> bool:
        """Return whether the flag goes to the optimizers, which then skip a step by themselves.

        Raises:
            ValueError: if it must, and an optimizer cannot.
        """
        if self.mode == "raise" or (self.mode is None and loss.device.type == "cpu"):
            return False
        skips = all(
            getattr(o, "_step_supports_amp_scaling", False) and all(group.get("fused") for group in o.param_groups)
            for o in optimizers
        )
        if not skips and self.mode == "deferred":
            raise ValueError(
                'nonfinite="deferred" needs optimizers that can skip a step on the device: pass fused=True to '
                "torch.optim.Adam, AdamW or SGD, or use nonfinite='raise'."
            )
        return skips

    @torch.no_grad()
    def defer(
        self,
        update: Callable[[], None],
        loss: Tensor,
        parameters: Sequence[Tensor],
        optimizers: Optimizers,
        saved: Saved,
    ) -> None:
        """Call `update`, whose optimizers skip the step on the device if the loss or a gradient is not finite.

        Raises:
            NonFiniteError: if the flag of this or of an earlier step has arrived, and says so.
        """
        bad = ~_total(loss, parameters).isfinite()
        for optimizer in optimizers:
            optimizer.grad_scale = None  # type: ignore[attr-defined]
            optimizer.found_inf = bad.float()  # type: ignore[attr-defined]
            _start_momentum(optimizer)
        try:
            update()
        finally:
            for optimizer in optimizers:
                del optimizer.grad_scale, optimizer.found_inf  # type: ignore[attr-defined]
        put_back(saved, bad)
        flag, event = bad, None
        if bad.is_cuda:
            flag, event = bad.to("cpu", non_blocking=True), torch.cuda.Event()
            event.record()
        self.pending.append((self.steps, flag, event))
        while self.pending and (self.pending[0][2] is None or self.pending[0][2].query()):
            self._check(*self.pending.pop(0)[:2])

    def wait(self) -> None:
        """Read all flags that are still under way."""
        pending, self.pending = self.pending, []
        for step, flag, event in pending:
            if event is not None:
                event.synchronize()
            self._check(step, flag)

    def _check(self, step: int, flag: Tensor) -> None:
        if bool(flag):
            raise NonFiniteError(
                f"Step {step} had a non-finite loss or gradient and was skipped; the weights are as they were before it. "
                "Repeat the batch with nonfinite='raise' to learn which stage.",
                where="loss",
            )

    def error(self, loss: Tensor, where: str | None) -> NonFiniteError:
        """Return the error of a step that was refused: `where` is what was not finite first, where that was found."""
        what = "A gradient" if math.isfinite(float(loss)) else "The loss"
        return NonFiniteError(
            f"{what if where is None else named(where)} is not finite at step {self.steps} (loss {float(loss):.4g}). No weight "
            "was changed. Check the inputs, lower the learning rate, or raise the damping.",
            where=where or "loss",
        )


def is_finite(loss: Tensor, parameters: Sequence[Tensor]) -> bool:
    """Return whether the loss and every gradient are finite; waits for the device."""
    if loss.device.type != "cpu":
        return bool(_total(loss, parameters).isfinite())
    gradients = [p.grad for p in parameters if p.grad is not None]
    vectors = [g for g in gradients if g.ndim == 1]  # biases, together
    sums = [_sum(g) for g in gradients if g.ndim != 1]
    if vectors:
        sums.append(_sum(torch.cat(vectors)))
    # Floats are added faster in Python than 0-d tensors by torch, and reading them waits for nobody.
    return math.isfinite(sum(map(float, sums), float(loss)))


def first_nonfinite(tensors: Iterable[tuple[str, Tensor | None]]) -> str | None:
    """Return the name of the first tensor that holds a NaN or Inf, or None; what has no tensor is passed over."""
    return next((name for name, t in tensors if t is not None and not bool(t.isfinite().all())), None)


def named(where: str) -> str:
    """Return the first words of an error: an input by its name, a stage as one."""
    return where if where in ("x", "y") else f"Stage {where!r}"


_HALF = (torch.float16, torch.bfloat16)


def _total(loss: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    # A sum is finite if its terms are: one pass over each gradient, cheaper than isfinite().all() by 30 times.
    sums = [_sum(p.grad) for p in parameters if p.grad is not None]
    sums.append(loss)
    dtype = torch.float32 if loss.dtype in _HALF else loss.dtype
    return torch.stack([s if s.dtype is dtype else s.to(dtype) for s in sums]).sum()


def _sum(values: Tensor) -> Tensor:
    return values.sum(dtype=torch.float32) if values.dtype in _HALF else values.sum()  # halves end at 65504


def _start_momentum(optimizer: torch.optim.Optimizer) -> None:
    # Fused SGD allocates its momentum uninitialised at its first step, and a skipped step leaves it so.
    if isinstance(optimizer, torch.optim.SGD):
        for group in optimizer.param_groups:
            for p in group["params"] if group["momentum"] else ():
                if optimizer.state[p].get("momentum_buffer") is None:
                    optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
