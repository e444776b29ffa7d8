"""How many samples a loss averages over: what the first dimension of a model's inputs says, and what speaks against it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from beyondprop.errors import UnsupportedModelError

_MEAN = 1  # of torch's reductions
# fmt: off
_OF_CLASSES = {f"{name}Backward" for name in ("NllLoss", "NllLoss2D", "MultiMarginLoss", "MultilabelMarginLoss")}
_OF_NUMBERS = {f"{name}Backward" for name in (
    "MseLoss", "BinaryCrossEntropy", "BinaryCrossEntropyWithLogits", "SmoothL1Loss", "HuberLoss", "SoftMarginLoss",
)}
_JOINED = {"StackBackward", "CatBackward"}
# What weighs and adds losses, which are scalars.
_SUMS = {f"{name}Backward" for name in (
    "Add", "Sub", "Mul", "Div", "Neg", "Sum", "Alias", "Clone", "ToCopy", "View", "Unsqueeze", "Squeeze",
)} | _JOINED | {"_DDPSinkBackward"}
# What makes few numbers of many, which are no longer those of the targets.
_REDUCE = ("Sum", "Mean", "Stack", "Cat", "LinalgVectorNorm", "Norm", "Max", "Amax", "Min", "Amin", "Logsumexp")
# fmt: on
_NEAR = 12  # nodes below a mean that are looked at
RECURRENT = (nn.MultiheadAttention, nn.RNNBase)


@dataclass(slots=True, eq=False)
class Batch:
    """One forward pass of the whole model, or one call of a layer outside of any."""

    samples: int  # what the first dimension says
    rows: int = -1  # first dimension of the model's output
    is_outside: bool = False
    is_past: bool = False  # whether it went past the `DistributedDataParallel` that averages gradients
    task: int = -1  # the backward pass that reached it
    averages: list[list[int]] = field(default_factory=list)  # of the losses that reached it, as of `averaged`
    doubt: str = ""  # what speaks against `samples`


def of_model(arguments: Any) -> Batch | None:
    """Return the batch of a model that is called with nested `arguments`, None where they hold no tensor."""
    first = _first_tensor(arguments)
    return None if first is None else Batch(first.shape[0])


def see_output(batch: Batch, output: Any) -> None:
    """Doubt a batch where the model's first output that is no scalar has no whole number of rows a sample."""
    first = _first_tensor(output)
    if first is not None:
        batch.rows = first.shape[0]
        if batch.rows % max(batch.samples, 1):
            batch.doubt = f"its output has the shape {tuple(first.shape)}"


def is_sequence_first(module: nn.Module) -> bool:
    """Whether a module takes `(time, N, features)`."""
    return isinstance(module, RECURRENT) and not module.batch_first


def see_input(batch: Batch, module: nn.Module, arguments: Any) -> None:
    """Doubt a batch whose samples are the time steps of a module of `is_sequence_first`."""
    positional, named = arguments
    given = positional[0] if positional else next(iter(named.values()), None)
    if isinstance(given, nn.utils.rnn.PackedSequence):
        if int(given.batch_sizes[0]) % max(batch.samples, 1):
            batch.doubt = f"a {type(module).__name__} takes {int(given.batch_sizes[0])} packed sequences"
        return
    x = _first_tensor(given)
    if x is not None and x.ndim == 3 and x.shape[0] == batch.samples != x.shape[1]:
        batch.doubt = (
            f"a {type(module).__name__} with batch_first=False takes {tuple(x.shape)} as (time, samples, features)"
        )


def averaged(roots: Iterable[Any]) -> list[list[int]]:
    """Return over how many targets the means in a loss are taken: of every list, one number must be a multiple of the samples.

    Means that are no criteria of torch may be penalties: they count only where there is nothing else, and then one of them is
    enough. What cannot be read says nothing.

    Args:
        roots: the autograd nodes that a backward pass begins with, as of `_graph.roots`. It may have freed what they saved.
    """
    criteria: list[list[int]] = []
    means: list[int] = []
    pending, is_read = list(roots), True
    for node in pending:  # which grows
        name = _kind(node)
        if name in _OF_CLASSES | _OF_NUMBERS:
            shape = next(_shape(*below) for below in node.next_functions if below[0] is not None)
            if node._saved_reduction == _MEAN:
                classes = shape[1] if name in _OF_CLASSES and len(shape) > 1 else 1
                criteria.append([shape.numel() // max(classes, 1)])
        elif name in _SUMS or (name == "MeanBackward" and _kind(node.next_functions[0][0]) in _JOINED):
            below = [each for each in node.next_functions if each[0] is not None]
            fine = [each[0] for each in below if _shape(*each).numel() == 1 or _kind(each[0]) in _JOINED]
            pending += fine
            is_read &= len(fine) == len(below)
        elif name == "MeanBackward" and not _is_reduced(node):
            means.append(node._saved_self_sym_numel)
        else:
            is_read = False
    return criteria or ([means] if means and is_read else [])


def _kind(node: Any) -> str:
    return node.name().rstrip("0123456789")  # the number tells variants apart


def _shape(node: Any, output: int) -> torch.Size:
    known = getattr(node, "_input_metadata", ())
    return torch.Size(known[output].shape) if output < len(known) else torch.Size((0,))


def _is_reduced(mean: Any) -> bool:
    """Whether what is averaged, or what it was computed from, was reduced before."""
    pending = [below for below, _ in mean.next_functions]
    for node in pending:
        if node is not None:
            if _kind(node).removesuffix("Backward") in _REDUCE:
                return True
            if len(pending) < _NEAR:
                pending += [below for below, _ in node.next_functions]
    return False


def doubt(batches: Iterable[Batch]) -> str | None:
    """Return why it is doubtful over how many samples a loss averaged that reached `batches`; None where it is not."""
    batches = set(batches)
    if not any(batch.doubt or batch.averages or batch.is_outside for batch in batches):
        return None
    for batch in batches:
        if batch.doubt:
            return f"it was called with {batch.samples} and {batch.doubt}"
    counts = sorted({max(batch.samples, 1) for batch in batches})
    for numbers in (numbers for batch in batches for numbers in batch.averages):
        if all(number % count for number in numbers for count in counts):
            return f"it was called with {counts[0]} and its loss averages over {max(numbers)}"
    outside: dict[int, set[int]] = {}
    for batch in batches:
        if batch.is_outside:
            outside.setdefault(batch.task, set()).add(batch.samples)
    unlike = next((sorted(lengths) for lengths in outside.values() if len(lengths) > 1), None)
    return None if unlike is None else f"it was not called as a whole, its layers with {unlike}"


def refusal(doubt: str) -> UnsupportedModelError:
    """Return the error of a step with such a doubt."""
    return UnsupportedModelError(
        "How many samples the loss averages over is doubtful: the first dimension of what the model is called with counts as "
        f"samples, and {doubt}. Say it by step(samples=...), or pass reduction='sum' and multiply the learning rate by the "
        "number of samples."
    )


def _first_tensor(value: Any) -> Tensor | None:
    """Return the first tensor with a batch dimension in nested arguments."""
    if isinstance(value, Tensor):
        return value if value.ndim else None
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    return next((found for part in parts if (found := _first_tensor(part)) is not None), None)
