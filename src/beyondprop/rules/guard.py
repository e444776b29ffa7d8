"""A step either happens whole or not at all: the finite check before the weights are written, and the way back."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from beyondprop.errors import NonFiniteError, UnsupportedModelError
from beyondprop.optim.locoprop import LocoProp
from beyondprop.optim.rmsprop import RMSProp

Optimizers = Sequence[torch.optim.Optimizer]
Saved = list[tuple[Tensor, Tensor]]
"""The model's buffers (running statistics) with copies from before a step; weights are written last and need none."""


Sizes = tuple[Tensor, Sequence[Tensor], Sequence[Tensor]]


class Writer(Protocol):
    """What the guard knows of a rule."""

    model: nn.Module
    optimizers: tuple[torch.optim.Optimizer, ...]
    defers_update: bool
    is_wary: bool
    is_narrow: bool

    def write(self) -> None:
        """Write the weights."""

    def locate_nonfinite(self, x: Tensor, y: Tensor) -> str | None:
        """Name what is not finite."""
        ...

    def own_state(self) -> dict[str, Any]:
        """Return what is written elsewhere than in optimizers."""
        ...

    def load_own_state(self, state: Mapping[str, Any], /) -> None:
        """Restore it."""


@torch.no_grad()
def put_back(saved: Saved, where: Tensor | None = None) -> None:
    """Give buffers their saved values, all or those of a step whose flag `where` (0-d bool) is true, without reading it."""
    for buffer, value in saved:
        buffer.copy_(value if where is None else torch.where(where, value, buffer))
    saved.clear()  # settled: an earlier step's error must not undo this one


class FiniteGuard:
    """Lets an update pass only if the loss, every gradient and every running statistic are finite.

    Finite gradients of moderate size cannot take weights out of their range by the optimizers of `are_tame`. Where either is
    otherwise, weights and state are kept, what was written is looked at, too, and put back where it is not finite.

    On a CPU the flag is read and the error raised before the update. On an accelerator reading it would make the host
    wait at every step; there the flag goes to the fused optimizers, which skip the update on the device (the protocol
    of `torch.amp.GradScaler`), and the error is raised as soon as the flag has arrived.

    A `KeyboardInterrupt` inside the step of such an optimizer leaves that step half written, for want of a copy.
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
        bad: Tensor,
        optimizers: Optimizers,
        saved: Saved,
    ) -> None:
        """Call `update`, whose optimizers skip the step on the device if the flag `bad` (0-d bool) is true.

        Raises:
            NonFiniteError: if the flag of this or of an earlier step has arrived, and says so.
        """
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

    def write(self, rule: Writer, sizes: Sizes, saved: Saved, batch: tuple[Any, Tensor]) -> None:
        """Let `rule` write where that is known to leave all finite; else keep, write, look and put back.

        Args:
            rule: what was handed a batch.
            sizes: the loss, the gradients and what else was gathered, the running statistics.
            saved: buffers, for a step that the device skips.
            batch: x and y.

        Raises:
            NonFiniteError: if something is not finite; weights and states are as they were.
        """
        loss, optimizers = sizes[0], rule.optimizers
        is_tame = not (rule.is_narrow or rule.is_wary) and are_tame(optimizers)
        if self.defers(loss, optimizers) and rule.defers_update and is_tame:
            return self.defer(rule.write, is_bad(*sizes), optimizers, saved)
        bad: Tensor | None = None
        if not is_tame and loss.device.type != "cpu":
            bad = is_bad(*sizes)  # read with what is written
        elif is_moderate(*sizes):
            if is_tame:
                return rule.write()
        elif not is_finite((loss, *sizes[1], *sizes[2])):
            raise self.error(loss, rule.locate_nonfinite(*batch), y=batch[1])
        kept = Kept(rule)
        try:
            rule.write()
            if kept.is_finite_now(bad):
                return None
        except BaseException as error:
            kept.put_back()
            if bad is not None and bool(bad):
                raise self.error(loss, rule.locate_nonfinite(*batch), y=batch[1]) from error
            raise
        kept.put_back()
        raise self.error(loss, rule.locate_nonfinite(*batch), "The update")

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
                f"Step {step} had a non-finite loss, gradient or running statistic, or a gradient above {_FAR:g}, and was "
                "skipped; the weights are as they were before it. Repeat the batch with nonfinite='raise' to learn which "
                "stage.",
                where="loss",
            )

    def error(self, loss: Tensor | None, where: str | None, what: str = "", y: Any = None) -> NonFiniteError:
        """Return the error of a step that was refused.

        `where` is what was not finite first, where that was found, else `what` or what the loss says. `y` are the labels.
        """
        value = math.nan if loss is None else float(loss)
        if where is None and math.isnan(value) and (label := _only_label(y)) is not None:
            return NonFiniteError(
                f"The loss is not finite at step {self.steps}: all labels are {label}, and where the loss ignores that one, as "
                "padding, its mean is over nothing. No weight was changed. Leave such a batch out.",
                where="loss",
            )
        what = what or ("A gradient" if math.isfinite(value) else "The loss")
        return NonFiniteError(
            f"{what if where is None else named(where)} is not finite at step {self.steps} (loss {value:.4g}). No weight was "
            "changed. Check the inputs, lower the learning rate, or raise the damping.",
            where=where or "loss",
        )

    def retell(self, error: BaseException, rule: Writer) -> None:
        """Raise in words of ours what a known error of torch in a step is about, with that as its cause.

        Raises:
            UnsupportedModelError: if the model or a tensor is none that can be trained.
            ValueError: if there is no gradient to train by.
            NonFiniteError: if a number has left its range.
        """
        if not isinstance(error, RuntimeError | ValueError) or isinstance(
            error, UnsupportedModelError | NonFiniteError
        ):
            return
        name, said = type(rule).__name__, str(error)
        if "without overflow" in said:
            raise self.error(None, "A setting or a step") from error
        if "nference tensor" in said:
            raise UnsupportedModelError(
                "x, y or a parameter of the model was made under torch.inference_mode(), and nothing can be trained with it. "
                "Clone it outside, such as x.clone()."
            ) from error
        if "use_reentrant=True" in said:
            raise UnsupportedModelError(
                f"The model is checkpointed with use_reentrant=True, which only loss.backward() can go through; {name} takes "
                "gradients block by block. Checkpoint with use_reentrant=False."
            ) from error
        if "does not require grad and does not have a grad_fn" in said:
            why = (
                "the model or the loss detaches its output"
                if torch.is_grad_enabled()
                else "torch.no_grad() is on; call step() outside"
            )
            raise ValueError(f"{name} has no gradient to train by: {why}.") from error
        for optimizer in rule.optimizers:
            for p, held in optimizer.state.items():
                for value in held.values() if isinstance(held, dict) else ():
                    if isinstance(value, Tensor) and value.ndim and value.shape == p.shape and value.dtype != p.dtype:
                        raise UnsupportedModelError(
                            f"The state of {type(optimizer).__name__} is {value.dtype} and a parameter {p.dtype}: the model "
                            "was converted after its first step. Convert the state, too: call "
                            "rule.load_state_dict(rule.state_dict())."
                        ) from error


def are_tame(optimizers: Optimizers) -> bool:
    """Return whether no step along gradients of moderate size can leave the range of float32; waits for nobody."""
    for optimizer in optimizers:
        if type(optimizer) is LocoProp:  # looks at what it writes by itself
            continue
        if type(optimizer) not in _KNOWN:
            return False
        for group in optimizer.param_groups:
            lr = group["lr"]
            if not (isinstance(lr, Tensor) or abs(lr) <= 1e3) or group.get("eps", 1.0) < 1e-15:
                return False
    return True


_KNOWN = {
    getattr(torch.optim, name)
    for name in ("SGD", "Adam", "AdamW", "NAdam", "RAdam", "Adamax", "Adagrad", "Adadelta", "RMSprop")
} | {RMSProp}
MODERATE, _FAR = 1e12, 1e18
"""Norms of all gradients: a square is finite below the second, and far from the end of float32 below the first."""


def is_moderate(loss: Tensor, gradients: Sequence[Tensor], statistics: Sequence[Tensor]) -> bool:
    """Return whether loss and statistics are finite and all gradients' norm is moderate; waits for the device."""
    sizes = [_norms(gradients, 2), _norms(statistics, 1), [loss]]
    if loss.device.type == "cpu":
        # Floats are added faster in Python than 0-d tensors by torch, and reading them waits for nobody.
        gradient, statistic, value = [sum([t.item() for t in each]) for each in sizes]
    else:
        gradient, statistic, value = torch.stack([_added(each, loss) for each in sizes]).tolist()
    return gradient < MODERATE and math.isfinite(statistic) and math.isfinite(value)


@torch.no_grad()
def is_bad(loss: Tensor, gradients: Sequence[Tensor], statistics: Sequence[Tensor]) -> Tensor:
    """Return, without reading it, whether something is not finite, or would have no finite square, 0-d bool."""
    others = _added([*_norms(statistics, 1), loss.abs()], loss)
    return ~((_added(_norms(gradients, 2), loss) < _FAR) & others.isfinite())


def is_finite(tensors: Iterable[Tensor]) -> bool:
    """Return whether all of them are finite; waits for the device."""
    return all(bool(t.isfinite().all()) for t in tensors)


class Kept:
    """What an update may change, from before it."""

    def __init__(self, rule: Writer) -> None:
        self._rule = rule
        self._optimizers = rule.optimizers
        held = (p for o in self._optimizers for group in o.param_groups for p in group["params"])
        self._weights = [(p, p.detach().clone()) for p in dict.fromkeys((*rule.model.parameters(), *held))]
        self._states = [_copied(optimizer.state) for optimizer in self._optimizers]
        self._own = copy.deepcopy(self._now())

    def _now(self) -> dict[str, Any]:
        return {} if self._rule.defers_update else self._rule.own_state()

    @torch.no_grad()
    def is_finite_now(self, bad: Tensor | None) -> bool:
        """Return whether `bad` is false and what is written finite, apart from what was not before; waits once."""
        states = [optimizer.state for optimizer in self._optimizers]
        now = [[p for p, _ in self._weights], _tensors(states), _tensors(self._now())]
        before = [[value for _, value in self._weights], _tensors(self._states), _tensors(self._own)]
        flags = [] if bad is None else [~bad]
        for written, was in zip(now, before, strict=True):
            finite = [t.isfinite().all() for t in written]
            if len(was) == len(written):  # an optimizer's first step makes its state
                finite = [f | ~t.isfinite().all() for f, t in zip(finite, was, strict=True)]
            flags += finite
        return bool(torch.stack([flag.to(flags[0].device) for flag in flags]).all())

    @torch.no_grad()
    def put_back(self) -> None:
        """Give weights, optimizers and the rule what they had."""
        for p, before in self._weights:
            p.copy_(before)
        for optimizer, state in zip(self._optimizers, self._states, strict=True):
            optimizer.state.clear()  # the dictionary stays: it may be shared
            optimizer.state.update(state)
        if not self._rule.defers_update:
            self._rule.load_own_state(self._own)
        torch.clear_autocast_cache()


def _copied(state: Any) -> dict[Any, Any]:
    return {
        p: {k: v.clone() if isinstance(v, Tensor) else copy.deepcopy(v) for k, v in values.items()}
        if isinstance(values, dict)
        else copy.deepcopy(values)
        for p, values in state.items()
    }


def _tensors(state: Any) -> list[Tensor]:
    if isinstance(state, list):
        state = [list(each.values()) for each in state]
    return [t for t in tree_leaves(state) if isinstance(t, Tensor) and t.is_floating_point()]


def _only_label(y: Any) -> int | None:
    """Return the class that all labels name, None where they name several or are no classes."""
    if not isinstance(y, Tensor) or y.is_floating_point() or y.is_complex() or not y.numel():
        return None
    first = y.flatten()[0]
    return int(first) if bool((y == first).all()) else None


def first_nonfinite(tensors: Iterable[tuple[str, Tensor | None]]) -> str | None:
    """Return the name of the first tensor that holds a NaN or Inf, or None; what has no tensor is passed over."""
    return next((name for name, t in tensors if t is not None and not bool(t.isfinite().all())), None)


def named(where: str) -> str:
    """Return the first words of an error: an input by its name, a stage as one."""
    return where if where in ("x", "y") else f"Stage {where!r}"


_HALF = (torch.float16, torch.bfloat16)


def _norms(tensors: Sequence[Tensor], order: int) -> list[Tensor]:
    # Halves end at 65504, and what is sparse has its values elsewhere.
    plain = [t for t in tensors if not (t.dtype in _HALF or t.is_sparse)]
    foreach: Any = torch  # its type stubs do not have it
    found = list(foreach._foreach_norm(plain, order)) if plain else []
    if len(plain) < len(tensors):
        others = [t.coalesce().values() if t.is_sparse else t for t in tensors if not any(t is p for p in plain)]
        found += [torch.linalg.vector_norm(t.float() if t.dtype in _HALF else t, order) for t in others]
    return found


def _added(values: Sequence[Tensor], like: Tensor) -> Tensor:
    dtype = torch.float32 if like.dtype in _HALF else like.dtype
    return torch.stack([v.to(dtype) for v in values]).sum() if values else like.new_zeros((), dtype=dtype)


def _start_momentum(optimizer: torch.optim.Optimizer) -> None:
    # Fused SGD allocates its momentum uninitialised at its first step, and a skipped step leaves it so.
    if isinstance(optimizer, torch.optim.SGD):
        for group in optimizer.param_groups:
            for p in group["params"] if group["momentum"] else ():
                if optimizer.state[p].get("momentum_buffer") is None:
                    optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
