"""A module that keeps its input alone and runs again in the backward pass: what stands between reversible chains."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo

from beyondprop import _checks
from beyondprop.errors import UnsupportedModelError
from beyondprop.nn.reversible.function import check_transforms, refusing, saved_tensors, without_cast_cache
from beyondprop.nn.reversible.replay import (
    Arguments,
    Autocast,
    Call,
    Random,
    Weights,
    check_leaves,
    is_same,
    surroundings,
    version,
)


class Recomputed(nn.Module):
    """Keep a module's input and run it once more in the backward pass, as a checkpoint does.

    The second run has the weights, modes, autocast settings and random numbers of the first, and leaves running statistics and
    generators alone, as in a `ReversibleSequential`.

    Args:
        module: with one tensor or a tuple of tensors as its output.
        mode: `"checkpoint"`, or `"store"` for ordinary autograd. May be set at any time.

    Attributes:
        counters: `kept_bytes`, what the last forward pass with gradients kept for the backward pass, weights not counted; in
            mode `"store"` unknown, nan.

    Raises:
        TypeError, ValueError: if an argument is of the wrong kind.
        UnsupportedModelError: if the module changes its input in place or uses trainable tensors that are not its own; in a
            backward pass as of `ReversibleSequential`.

    Example:
        >>> down = Recomputed(nn.Sequential(nn.ReLU(), nn.Conv2d(4, 8, 3, stride=2)))

    Source: Chen et al., "Training Deep Nets with Sublinear Memory Cost", arXiv 1604.06174.
    """

    def __init__(self, module: nn.Module, mode: str = "checkpoint") -> None:
        super().__init__()
        if not isinstance(module, nn.Module):
            raise TypeError(
                f"module must be a torch.nn.Module, so that its weights are known, got {type(module).__name__}."
            )
        self.module = module
        self.mode: str = _checks.one_of("mode", mode, _MODES)
        self.counters: dict[str, float] = {"kept_bytes": 0}

    @_disable_dynamo
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the module returns."""
        _checks.one_of("mode", self.mode, _MODES)
        job = _Job(self, args, kwargs)
        if not (torch.is_grad_enabled() and job.trains):
            return self.module(*args, **kwargs)
        if self.mode == "store":
            self.counters["kept_bytes"] = float("nan")
            return self.module(*args, **kwargs)
        check_transforms()
        with without_cast_cache():
            outputs = _Again.apply(job, *job.arguments.taken(), *job.weights.given())
        job.kept_bytes += job.weights.seal()
        self.counters["kept_bytes"] = job.kept_bytes
        return outputs

    def extra_repr(self) -> str:
        return f"mode={self.mode!r}"


_MODES = ("checkpoint", "store")


class _Job:
    """One call of a module."""

    def __init__(self, owner: Recomputed, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.arguments, self.weights, self.kept_bytes = Arguments(args, kwargs), Weights(), 0
        self.call = Call(owner.module, repr(type(owner.module).__name__), self.weights)
        given = self.arguments.tensors or []
        self.trains = any(self.weights.trainable) or any(t.requires_grad for t in given)
        devices = {t.device for t in given} | self.weights.devices()
        self.autocast, self.random = Autocast(devices), Random(devices)

    def first(self, tensors: Sequence[Tensor]) -> Any:
        """Run the module, without a graph, and note what it takes to run it again."""
        args, kwargs = self.arguments.with_tensors(tensors)
        versions = [version(t) for t in tensors]
        self.call.start()
        before = self.random.get()
        output = self.call.function(*args, **kwargs)
        if [version(t) for t in tensors] != versions:
            raise UnsupportedModelError(f"Module {self.call.name} changes its input in place: use inplace=False.")
        if not is_same(before, self.random.get()):
            self.call.random = before
        self.kept_bytes += self.call.finish()
        parts = output if isinstance(output, tuple) else (output,)
        if not parts or not all(isinstance(part, Tensor) for part in parts):
            given = type(output).__name__
            raise UnsupportedModelError(
                f"Module {self.call.name} must return a tensor or a tuple of tensors, got {given}."
            )
        memory = {t.untyped_storage().data_ptr() for t in tensors}
        parts = tuple(part.clone() if part.untyped_storage().data_ptr() in memory else part for part in parts)
        return parts if isinstance(output, tuple) else parts[0]

    def gradients(self, tensors: Sequence[Tensor], cotangents: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Return the gradients of the arguments' tensors and of the weights."""
        self.weights.check([self.call])
        aliases = self.weights.aliases()
        inputs = [t.detach().requires_grad_(t.requires_grad) for t in tensors]
        args, kwargs = self.arguments.with_tensors(inputs)
        with surroundings(self.autocast, self.random, self.weights, aliases):
            with self.call.replayed(self.random), torch.enable_grad():
                output = self.call.function(*args, **kwargs)
            parts = output if isinstance(output, tuple) else (output,)
            pairs = [
                (part, c) for part, c in zip(parts, cotangents, strict=True) if c is not None and part.requires_grad
            ]
            leaves = [t for t in (*inputs, *aliases) if t.requires_grad]
            for part, _ in pairs:
                check_leaves(part, leaves, self.call.name)
            outs, above = [part for part, _ in pairs], [c for _, c in pairs]
            found = iter(torch.autograd.grad(outs, leaves, above, allow_unused=True) if pairs else [None] * len(leaves))
            return [next(found) if t.requires_grad else None for t in (*inputs, *aliases)]


class _Again(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, job: _Job, *tensors: Tensor) -> Any:
        ctx.set_materialize_grads(False)
        ctx.job = job
        arguments = tensors[: len(tensors) - len(job.weights.tensors)]
        output = job.first(arguments)
        ctx.save_for_backward(*arguments)
        job.kept_bytes += sum({t.untyped_storage().data_ptr(): t.nbytes for t in arguments}.values())
        return output

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> Any:
        job: _Job = ctx.job
        arguments = saved_tensors(ctx, f"An input of {job.call.name}")
        found = job.gradients(arguments, cotangents)
        if torch.is_grad_enabled():
            weights = [owner[key] for owner, key in job.call.slots.values()]
            found = refusing(found, [*arguments, *weights, *cotangents])
        return None, *found
