"""What a forward pass keeps and what stands at once, in bytes: counted by the profiler, and by hooks on saved tensors."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile


class Standing:
    """While entered, looks at what is handed out and given back: `events` are address and signed size, in order."""

    def __enter__(self) -> Standing:
        self._profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
        self._profile.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._profile.__exit__(*error)
        nodes: list[Any] = [*self._profile.profiler.kineto_results.experimental_event_tree()]  # type: ignore[union-attr]
        for node in nodes:
            nodes.extend(node.children)
        found = sorted((n for n in nodes if n.tag == _EventType.Allocation), key=lambda n: n.start_time_ns)
        self.events = [(n.extra_fields.ptr, n.extra_fields.alloc_size) for n in found]


def peak(events: Sequence[tuple[int, int]], lasting: Iterable[Tensor]) -> int:
    """Return the running maximum, without the memory of the tensors `lasting`."""
    addresses = {t.untyped_storage().data_ptr() for t in lasting}
    left_out = {address: n for n, (address, size) in enumerate(events) if size > 0 and address in addresses}.values()
    standing, highest, skipped = 0, 0, set(left_out)
    for n, (_, size) in enumerate(events):
        standing += 0 if n in skipped else size
        highest = max(highest, standing)
    return highest


def kept_and_peak(forward: Callable[[], Any], backward: Callable[[Any], Any], weights: Sequence[Tensor]) -> list[int]:
    """Return what stands after the forward pass, and the most that stood at once."""
    gc.collect()
    with Standing() as first:
        output = forward()
    with Standing() as second:
        backward(output)
        del output
    gradients = [w.grad for w in weights if w.grad is not None]
    for w in weights:
        w.grad = None
    return [sum(size for _, size in first.events), peak([*first.events, *second.events], gradients)]


def saved(forward: Callable[[], Any], weights: Iterable[Tensor]) -> int:
    """Return the bytes of what autograd was given to keep."""
    own = {w.untyped_storage().data_ptr() for w in weights}
    found: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = forward()  # noqa: F841, what is saved must live while it is counted
    return sum(found.values())
