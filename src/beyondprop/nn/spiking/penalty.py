"""The regulariser of the published runs."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from beyondprop import _checks
from beyondprop.nn.spiking.hm2bp import precise
from beyondprop.nn.spiking.layer import SpikingLayer


def exponential_penalty(
    model: nn.Module, strength: float = 10.0, sharpness: float = 0.04, largest: float = 8.0
) -> Tensor:
    """Return a penalty, to add to a loss, that grows exponentially with the mean square of what each neuron's weights are.

    Its derivative by a weight w of a neuron is
    `strength * sharpness * (w / largest) * exp(sharpness * (mean((w / largest)^2) - 1))`, the mean over the neuron's weights.

    Args:
        model: whose spiking layers' parameters of two or more dimensions are meant, a row a neuron's, each once.
        strength: of the penalty; the published code has 10.
        sharpness: of the exponential; 0.04 for MNIST and 0.01 for N-MNIST there.
        largest: weight that is taken for a large one.

    Raises:
        ValueError: if a number is not positive, or the model has no spiking layer with weights.

    Source: Jin, Zhang & Li, NeurIPS 2018, arXiv 1805.07866, and the authors' code.
    """
    _checks.positive("strength", strength)
    _checks.positive("sharpness", sharpness)
    _checks.positive("largest", largest)
    layers = [layer for layer in model.modules() if isinstance(layer, SpikingLayer)]
    weights = {id(weight): weight for layer in layers for weight in layer.op.parameters() if weight.ndim > 1}
    if not weights:
        raise ValueError(f"model has no SpikingLayer with weights, got {type(model).__name__}.")
    return torch.stack([_of_layer(weight, strength, sharpness, largest) for weight in weights.values()]).sum()


def _of_layer(weight: Tensor, strength: float, sharpness: float, largest: float) -> Tensor:
    rows = precise(weight).flatten(1) / largest
    scale = 0.5 * strength * largest * rows.shape[1]
    return scale * torch.exp(sharpness * (rows.square().mean(1) - 1.0)).sum()
