"""From networks of ReLU to spiking ones: every ReLU, with the linear modules before it, becomes a layer of neurons."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

from beyondprop import _checks
from beyondprop.errors import UnsupportedModelError
from beyondprop.nn.spiking.encoders import Encoder
from beyondprop.nn.spiking.layer import SpikingLayer
from beyondprop.nn.spiking.neuron import CubaLIF
from beyondprop.nn.spiking.readout import SpikeCounts

LINEAR = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.Flatten)

_INSTEAD = {
    nn.modules.batchnorm._BatchNorm: "fold it into the weights before it, or leave it out",
    nn.LayerNorm: "leave it out",
    nn.modules.dropout._DropoutNd: "leave it out, a mask that changes from step to step is no dropout",
    nn.modules.pooling._MaxPoolNd: "take average pooling, which is linear",
}

QUANTILE = 0.99
"""Of the largest drives, what the most driven neuron's is taken for: one alone may lie far out."""


def convert_to_spiking(
    model: nn.Module,
    neuron: CubaLIF,
    *,
    rule: str = "hm2bp",
    encoder: Encoder | None = None,
    inputs: Tensor | None = None,
    interval: int = 4,
) -> nn.Sequential:
    """Return a spiking net with copies of a ReLU network's weights; it takes trains `(N, T, ...)` and returns counts.

    Every ReLU becomes a `SpikingLayer` around the linear modules before it, and what is behind the last ReLU one more.

    Args:
        model: `nn.Sequential`s of Linear, convolutions and average pooling without bias, Flatten and ReLU.
        neuron: of all layers.
        rule: as in `SpikingLayer`.
        encoder: put in front, where the input is to be numbers in [0, 1] and not trains.
        inputs: what the net will be given, `(N, ...)`: thresholds are then fitted to the weights, layer by layer, such that the
            most driven neurons fire every `interval` steps. None: the neuron's own threshold everywhere.
        interval: steps from one spike to the next, > the neuron's refraction.

    Raises:
        UnsupportedModelError: for a module that has no spiking form, by its name, with what to take in its place.
        ValueError: if `interval` is too small, or no neuron of a layer is driven by `inputs`.
    """
    if _checks.at_least("interval", interval, 1) <= neuron.refractory:
        raise ValueError(f"interval must be > {neuron.refractory}, the neuron's refraction, got {interval}.")
    layers: list[nn.Module] = [] if encoder is None else [encoder]
    memo: dict[int, object] = {}  # what the model shares, the net shares
    for linear in _parts(model):
        op = copy.deepcopy(linear[0] if len(linear) == 1 else nn.Sequential(*linear), memo)
        layers.append(SpikingLayer(op, neuron, rule=rule))
    found = nn.Sequential(*layers, SpikeCounts())
    if inputs is not None:
        _fit(found, inputs, interval)
    return found


def _parts(model: nn.Module) -> Iterator[list[nn.Module]]:
    """Yield the linear modules between the ReLUs of a model."""
    found: list[nn.Module] = []
    carries = any_yet = False
    for name, module in _chain("", model):
        if module._forward_hooks or module._forward_pre_hooks:
            raise UnsupportedModelError(
                f"{name or 'model'} is a {type(module).__name__} with hooks, of pruning or others, which a copy would not "
                "have; remove them."
            )
        if isinstance(module, nn.Flatten) and (module.start_dim, module.end_dim) != (1, -1):
            raise UnsupportedModelError(f"{name} is a {module}; a spiking layer has room for nn.Flatten(1) alone.")
        if isinstance(module, nn.ReLU):
            if not carries:
                raise UnsupportedModelError(f"{name} is a ReLU with no weights before it; a spiking layer needs some.")
            yield found
            found, carries, any_yet = [], False, True
        elif type(module) in LINEAR:
            if getattr(module, "bias", None) is not None:
                raise UnsupportedModelError(
                    f"{name} is a {type(module).__name__} with a bias, which a spiking neuron does not have; build and train "
                    "the model with bias=False."
                )
            found.append(module)
            carries |= any(True for _ in module.parameters())
        elif not isinstance(module, nn.Identity):
            instead = next((text for kind, text in _INSTEAD.items() if isinstance(module, kind)), "")
            raise UnsupportedModelError(
                f"{name or 'model'} is a {type(module).__name__}, which has no spiking form; "
                + (instead or "nn.Sequential, Linear, convolutions, average pooling, Flatten and ReLU have")
                + "."
            )
    if found and carries:
        yield found
    elif found:
        raise UnsupportedModelError(
            f"What is behind the last ReLU, {type(found[0]).__name__}, has no weights; leave it out."
        )
    elif not any_yet:
        raise UnsupportedModelError("The model has no ReLU and no weights to make a spiking layer of.")


def _chain(name: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    if type(module) is not nn.Sequential:
        yield name, module
        return
    for key, child in module._modules.items():  # all of them: a ReLU may stand at several places
        if child is not None:
            yield from _chain(f"{name}.{key}" if name else key, child)


@torch.no_grad()
def _fit(net: nn.Sequential, inputs: Tensor, interval: int) -> None:
    """Set the thresholds of all layers by what drives them."""
    x = inputs
    for index, module in enumerate(list(net)[:-1]):
        if isinstance(module, SpikingLayer):
            # The mean over time is what a membrane settles at, `tau_mem` times; drives are those of the trains before.
            drive = module.drive(x).mean(0)
            top = float(torch.quantile(drive.amax(1).double(), QUANTILE)) if drive.numel() else 0.0
            if not top > 0:
                raise ValueError(f"No neuron of layer {index} is driven by these inputs: its drives are all <= 0.")
            neuron = module.neuron
            kept = (1.0 - 1.0 / neuron.tau_mem) ** (interval - neuron.refractory)
            module.neuron = replace(neuron, threshold=top * neuron.tau_mem * (1.0 - kept))
        x = module(x)
