"""Residual blocks in closed form, where their parts are."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from beyondprop.nn.residual import Residual, Shortcut, joined
from beyondprop.stages.affine import is_modified
from beyondprop.stages.operations.base import Operation, Recorded, RecordedRun
from beyondprop.stages.stage import Memo, Stage

Lookup = Callable[[nn.Module], Operation | None]
"""Returns the closed forms of a module, or None where there are none."""


class ShortcutSkip(Operation):
    """`nn.Shortcut`."""

    def record(self, z: Tensor, first: Any = None) -> tuple[Tensor, Recorded]:
        del first
        return self.module(z), _ShortcutAt(self.module, z.shape)


class _ShortcutAt(Recorded):
    def __init__(self, module: Shortcut, shape: torch.Size) -> None:
        self.module, self.shape = module, shape

    def pull(self, cotangent: Tensor) -> Tensor:
        stride, padding = self.module.stride, self.module.padding
        gradient = cotangent.new_zeros(self.shape)
        gradient[:, :, ::stride, ::stride] = cotangent[:, padding : cotangent.shape[1] - padding]
        return gradient

    def push(self, tangent: Tensor) -> Tensor:
        return self.module(tangent)


class ResidualBlock(Operation):
    """`nn.Residual`; `ResidualBlock.of` makes one."""

    has_weights = True

    def __init__(self, module: Residual, runs: list[list[Operation]]) -> None:
        super().__init__(module)
        self.branch, self.skip, self.after = runs

    @classmethod
    def of(cls, module: Residual, operation: Lookup) -> ResidualBlock | None:
        """Return the closed forms of a block, or None where a part has none."""
        parts = [*module.branch, module.skip, module.after]
        if is_modified(module.branch) or _overwrites_input(module.branch) or getattr(module.skip, "inplace", False):
            return None
        found = [each for m in parts if (each := operation(m)) is not None]
        return cls(module, [found[:-2], found[-2:-1], found[-1:]]) if len(found) == len(parts) else None

    def share(self, stage: Stage) -> None:
        for each in (*self.branch, *self.skip, *self.after):
            each.share(stage)

    @property
    def couples_batch(self) -> bool:
        return any(each.couples_batch for each in (*self.branch, *self.skip, *self.after))

    def record(self, z: Tensor, first: Any = None) -> tuple[Tensor, Recorded]:
        parts = (None, None, None) if first is None else (first.branch, first.skip, first.after)
        branch, recorded = RecordedRun.of(self.branch, z, parts[0])
        skip, past = RecordedRun.of(self.skip, z, parts[1])
        output, after = RecordedRun.of(self.after, joined(skip, branch), parts[2])
        return output, _ResidualAt(recorded, past, after)


class _ResidualAt(Recorded):
    def __init__(self, branch: RecordedRun, skip: RecordedRun, after: RecordedRun) -> None:
        self.branch, self.skip, self.after = branch, skip, after
        self._inner: Memo[Tensor] = Memo()

    def pull(self, cotangent: Tensor) -> Tensor:
        inner = self.after.pull(cotangent)
        self._inner.keep(cotangent, inner)
        return self.branch.pull(inner) + self.skip.pull(inner)

    def push(self, tangent: Tensor) -> Tensor:
        return self.after.push(self.branch.push(tangent) + self.skip.push(tangent))

    def add_gradients(self, cotangent: Tensor, factor: float) -> None:
        inner = self._inner.find(cotangent)
        if inner is None:
            inner = self.after.pull(cotangent)
        self.after.add_gradients(cotangent, factor)
        self.branch.add_gradients(inner, factor)
        self.skip.add_gradients(inner, factor)


def _overwrites_input(branch: Iterable[nn.Module]) -> bool:
    """Whether the branch works in place on what the skip hands on; behind a map with parameters it has a tensor of its own."""
    for module in branch:
        if getattr(module, "inplace", False):
            return True
        if any(True for _ in module.parameters()):
            return False
    return False
