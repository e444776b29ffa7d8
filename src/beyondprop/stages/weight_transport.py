"""Other tensors in place of a stage's weights, in its backward pass only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from beyondprop.errors import UnsupportedModelError

Feedback = Mapping[nn.Parameter, Tensor]
"""What a backward pass uses in place of each weight: tensors of the weights' shapes."""

# What autograd puts between a weight and the form in which an operation saves it.
# fmt: off
_VIEWS = {f"{name}Backward0" for name in (
    "Alias", "AsStrided", "Detach", "Expand", "Narrow", "Permute", "Reshape", "ReshapeAlias", "Select", "Slice", "Split",
    "SplitWithSizes", "Squeeze", "T", "ToCopy", "Transpose", "Unbind", "UnsafeView", "Unsqueeze", "View",
)}
# fmt: on
_CARRIERS = (nn.Linear, nn.Bilinear, nn.modules.conv._ConvNd, nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention)


def counterpart(weight: nn.Parameter, feedback: Tensor) -> Tensor:
    """Return `feedback` on the weight's device, in its dtype and with its order in memory; itself where all of that holds."""
    if feedback.device == weight.device and feedback.dtype == weight.dtype and feedback.stride() == weight.stride():
        return feedback
    fresh = torch.empty_strided(weight.shape, weight.stride(), dtype=weight.dtype, device=weight.device)
    return fresh.copy_(feedback)


class Transport:
    """A context in which autograd saves feedback tensors where operations save weights.

    An operation's gradient at its input is formed with the weight that it saved, its gradient at the weight with the input
    that it saved. So what runs in this context sends cotangents down through the feedback, with the slopes of the forward
    pass, and its weights' own gradients are those of the cotangents that arrive there.

    A saved weight is known by its memory, as a view of it, or, where autocast saves a cast copy, by its history.

    Attributes:
        met: the weights that were replaced.
    """

    def __init__(self, feedback: Feedback) -> None:
        self.feedback = feedback
        self.met: set[nn.Parameter] = set()
        self._homes: dict[int, list[nn.Parameter]] = {}
        for weight in feedback:
            self._homes.setdefault(weight.untyped_storage().data_ptr(), []).append(weight)
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda packed: packed)

    def __enter__(self) -> Transport:
        # A frozen weight's cast copy has no history; nobody asks for the gradient that this makes possible.
        self._frozen = [weight for weight in self.feedback if not weight.requires_grad]
        for weight in self._frozen:
            weight.requires_grad_(True)
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._hooks.__exit__(*error)
        for weight in self._frozen:
            weight.requires_grad_(False)

    def _pack(self, saved: Tensor) -> Tensor:
        weight, start = self._origin(saved)
        if weight is None:
            return saved.detach()  # an output that is held together with its history would hold itself
        self.met.add(weight)
        feedback = self.feedback[weight].to(saved.dtype)
        return feedback.as_strided(saved.shape, saved.stride(), saved.storage_offset() - start)

    def _origin(self, saved: Tensor) -> tuple[nn.Parameter | None, int]:
        """Return the weight that `saved` shows, and where its memory starts; None for anything else."""
        if saved.layout is not torch.strided or not saved.numel():
            return None, 0
        storage = saved.untyped_storage()
        for weight in self._homes.get(storage.data_ptr(), ()):
            start = int(weight.storage_offset())
            if start <= saved.storage_offset() and saved.storage_offset() + _extent(saved) <= start + _extent(weight):
                return weight, start
        node, casts = saved.grad_fn, 0
        while node is not None and type(node).__name__ in _VIEWS:
            casts += type(node).__name__ == "ToCopyBackward0"
            node = node.next_functions[0][0]
        weight = getattr(node, "variable", None)
        is_whole = storage.nbytes() == saved.element_size() * (0 if weight is None else weight.numel())
        return (weight, 0) if casts == 1 and is_whole and weight in self.feedback else (None, 0)


def check_met(name: str, modules: list[nn.Module], transport: Transport, output: Tensor) -> None:
    """Raise `UnsupportedModelError` where a layer's weight takes part in a stage's output and was not replaced.

    `output` was computed in the context `transport` and has its graph.
    """
    for module in modules:
        for key in getattr(module, "parametrizations", {}):
            raise _hidden(name, f"{type(module).__name__}.{key}")
        if not isinstance(module, _CARRIERS):
            continue
        for key, weight in module.named_parameters(recurse=False):
            is_left = weight.ndim >= 2 and weight in transport.feedback and weight not in transport.met
            if is_left and output.requires_grad and weight.requires_grad:
                (used,) = torch.autograd.grad(output.sum(), weight, retain_graph=True, allow_unused=True)
                if used is not None:
                    raise _hidden(name, f"{type(module).__name__}.{key}")


def _hidden(name: str, weight: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"Stage {name!r}: its backward pass does not use {weight} as it is (a parametrization, activation checkpointing, a "
        "reversible chain or a fused kernel is between), so no feedback can take its place. Remove that (a reversible net: by "
        'mode="store"), or use another rule.'
    )


def _extent(tensor: Tensor) -> int:
    """Return how many elements of its memory a tensor reaches over."""
    return 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
