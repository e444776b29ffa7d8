"""Optimizers as factories: what builds a `torch.optim` optimizer over the parameters that it is given."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import nn

from beyondprop.optim.rmsprop import RMSProp

OptimizerFactory = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
"""Builds a torch optimizer over parameters, such as `partial(torch.optim.Adam, lr=3e-3)`."""


def adam(lr: float = 3e-3) -> OptimizerFactory:
    """Return a factory of `torch.optim.Adam`, fused where the parameters' device has a fused kernel."""

    def build(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        parameters = list(parameters)
        fused = all(p.device.type in ("cpu", "cuda", "mps", "xpu") and p.is_floating_point() for p in parameters)
        return torch.optim.Adam(parameters, lr=lr, fused=fused)

    return build


def sgd_with_decay(model: nn.Module, lr: float, weight_decay: float, momentum: float = 0.9) -> torch.optim.SGD:
    """Return SGD with momentum over the trainable parameters of a model that decays the weights of its products alone.

    Biases, normalisations, embeddings and what else is no matrix of a Linear, convolution or attention are in a second
    parameter group, without decay. A weight that such a layer shares with another module decays.

    Args:
        model: the model.
        lr: learning rate of both groups.
        weight_decay: added to the gradient, times the weight.
        momentum: of the running sum of gradients, without dampening.

    Raises:
        ValueError: if no parameter can be trained.

    Source: Gomez et al., NeurIPS 2017, arXiv 1707.04585, for which parameters decay.
    """
    products = (nn.Linear, nn.modules.conv._ConvNd, nn.MultiheadAttention)
    decayed = {
        p: None
        for module in model.modules()
        if isinstance(module, products)
        for name, p in module.named_parameters(recurse=False)
        if name.endswith("weight") and p.requires_grad
    }
    others = [p for p in model.parameters() if p.requires_grad and p not in decayed]
    groups = [{"params": list(decayed), "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    if not (groups := [group for group in groups if group["params"]]):
        raise ValueError(f"{type(model).__name__} has no parameter that can be trained.")
    return torch.optim.SGD(groups, lr=lr, momentum=momentum)


def centered_rmsprop(lr: float, **settings: float) -> OptimizerFactory:
    """Return a factory of a centered `RMSProp` whose second moment starts at 0, with the settings of Lee et al., ECML 2015."""
    own: dict[str, Any] = {"alpha": 0.95, "momentum": 0.9, "eps": 1e-3, "initial": 0.0} | settings
    return partial(RMSProp, lr=lr, centered=True, **own)
