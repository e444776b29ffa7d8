"""Weights as they were when a batch went up, until its delta has come down."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from beyondprop.errors import UnsupportedModelError

_set_versions: Any = torch._C._autograd._unsafe_set_version_counter  # pyright: ignore[reportAttributeAccessIssue]


@dataclass(slots=True, eq=False)
class Copy:
    """Weights at one time.

    Attributes:
        parameters: whose they are.
        values: what they were.
        versions: the parameters' version counters then, which autograd asks for.
    """

    parameters: list[nn.Parameter]
    values: list[Tensor]
    versions: tuple[int, ...]


class HeldWeights:
    """Copies of parameters that are trained, each in memory of its own, which the parameters show for a while.

    Outside `shown` the parameters are the newest, in their own memory: optimizers, hooks and checkpoints know of nothing.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self._parameters = parameters
        self._free: list[Copy] = []

    def copy(self) -> Copy:
        """Return a copy of the newest weights, those that require a gradient."""
        present = [p for p in self._parameters if p.requires_grad]
        copy = self._free.pop() if self._free else None
        if copy is None or not _fits(copy, present):
            copy = Copy(present, [torch.empty_like(p, requires_grad=False) for p in present], ())
        if present:
            torch._foreach_copy_(copy.values, [p.detach() for p in present])  # pyright: ignore[reportPrivateImportUsage]
        copy.versions = _versions(present)
        return copy

    def give_back(self, copy: Copy) -> None:
        """Let another copy take this one's memory."""
        self._free.append(copy)

    @contextlib.contextmanager
    def shown(self, copy: Copy | None) -> Iterator[None]:
        """Return a context in which the parameters are those of the copy; None: the newest.

        Raises:
            UnsupportedModelError: if the weights were written in it, which the newest would never see.
        """
        if copy is None:
            yield
            return
        parameters, newest = copy.parameters, [p.data for p in copy.parameters]
        versions = _versions(parameters)
        _show(parameters, copy.values, copy.versions)
        try:
            yield
            if _versions(parameters) != copy.versions:
                raise UnsupportedModelError(
                    "The weights of this part are written in its own forward or backward pass, which the copies for batches in "
                    "flight do not follow; use in_flight=1."
                )
        finally:
            _show(parameters, newest, versions)


def _fits(copy: Copy, parameters: list[nn.Parameter]) -> bool:
    return len(copy.parameters) == len(parameters) and all(
        old is p and v.dtype == p.dtype and v.device == p.device
        for old, v, p in zip(copy.parameters, copy.values, parameters, strict=True)
    )


def _versions(parameters: list[nn.Parameter]) -> tuple[int, ...]:
    return tuple(p._version for p in parameters)


def _show(parameters: list[nn.Parameter], values: list[Tensor], versions: tuple[int, ...]) -> None:
    for p, value in zip(parameters, values, strict=True):
        p.data = value
    # What autograd saved is the copy's memory, which nobody writes; the counter is of the parameter, which optimizers step.
    _set_versions(tuple(parameters), versions)
    torch.clear_autocast_cache()  # it holds casts of the other weights
