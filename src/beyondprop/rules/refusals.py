"""What rules refuse by name: models that they cannot write, optimizers that they cannot step."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from beyondprop.errors import UnsupportedModelError


def check_parameters(rule: str, model: nn.Module) -> None:
    """Raise `UnsupportedModelError` where `rule` cannot write parameters: sharded, lazy, of sparse gradients."""
    for name, p in model.named_parameters():
        if isinstance(p, UninitializedParameter):
            raise UnsupportedModelError(
                f"Parameter {name!r} is lazy, and {rule} needs to know its shape: run one batch through the model first."
            )
        if type(p.data) is not Tensor:
            raise UnsupportedModelError(
                f"Parameter {name!r} is a {type(p.data).__name__}, and {rule} writes plain tensors: a part of a sharded weight "
                "has no local problem. Train whole weights, or by Backprop with an optimizer of torch."
            )
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.sparse and module.weight.requires_grad:
            raise UnsupportedModelError(
                f"Layer {name!r} is an {type(module).__name__} with sparse=True, and {rule} adds dense gradients. Build it "
                "with sparse=False, or train by Backprop with torch.optim.SparseAdam or SGD."
            )


def check_optimizers(optimizers: Iterable[torch.optim.Optimizer]) -> None:
    """Raise `TypeError` where an optimizer needs a closure."""
    if any(isinstance(optimizer, torch.optim.LBFGS) for optimizer in optimizers):
        raise TypeError(
            "Rules take optimizers whose step takes no closure, got LBFGS, which evaluates the loss again. Pass Adam or SGD."
        )


def explain(error: Exception, optimizers: Sequence[torch.optim.Optimizer], model: nn.Module) -> None:
    """Raise in words of ours what an optimizer's error was about, where that is known."""
    try:
        check_optimizers(optimizers)
    except TypeError as own:
        raise own from error
    for name, p in model.named_parameters():
        if p.grad is not None and p.grad.layout is not torch.strided and "sparse" in str(error):
            kinds = " and ".join(dict.fromkeys(type(optimizer).__name__ for optimizer in optimizers))
            raise UnsupportedModelError(
                f"The gradient of {name!r} is sparse, and {kinds} takes dense ones. Pass torch.optim.SparseAdam or SGD, or "
                "build the Embedding with sparse=False."
            ) from error


def shapes(parameters: Iterable[nn.Parameter]) -> list[list[int] | None]:
    """Return the parameters' shapes, None for one that is lazy still."""
    return [None if isinstance(p, UninitializedParameter) else list(p.shape) for p in parameters]


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters that require a gradient, or raise `ValueError` where there is none."""
    found = [p for p in model.parameters() if p.requires_grad]
    if not found:
        raise ValueError("No parameter of the model requires a gradient; there is nothing to train.")
    return found
