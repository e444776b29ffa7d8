"""The Linear layers that offline rules solve for, and what can be said of codes and weights, chunk by chunk of the rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from beyondprop.nn.activations import Activation
from beyondprop.rules.offline.proximal import Pieces

CHUNK = 4096
"""Rows that are worked on at once, so that what is needed in passing stays small beside the codes."""

Weights = tuple[Tensor, Tensor | None]
"""One layer's weight `(out, in)` and bias `(out,)`."""


@dataclass(slots=True)
class OfflineLayer:
    """One Linear stage as offline rules see it.

    Attributes:
        name: dotted name of the Linear in the user's model.
        weight: its weight.
        bias: its bias, or None.
        activation: the nonlinearity in front of it, or None.
        pieces: the same where it is piecewise linear, else None.
        trains: whether the weights may change.
    """

    name: str
    weight: nn.Parameter
    bias: nn.Parameter | None
    activation: Activation | None
    pieces: Pieces | None
    trains: bool

    def features(self, code: Tensor) -> Tensor:
        """Return the Linear's input for the code `(N, in)` below it."""
        return code if self.activation is None else self.activation.value(code)

    @property
    def now(self) -> Weights:
        """The present weights, detached."""
        return self.weight.detach(), None if self.bias is None else self.bias.detach()

    def write(self, weights: Weights) -> None:
        """Copy new weights into the user's model; call it without gradients."""
        weight, bias = weights
        self.weight.copy_(weight)
        if self.bias is not None and bias is not None:
            self.bias.copy_(bias)


def rows(count: int) -> Iterator[slice]:
    """Yield slices of `CHUNK` rows."""
    for first in range(0, count, CHUNK):
        yield slice(first, min(first + CHUNK, count))


def nested(
    layers: Sequence[OfflineLayer], weights: Sequence[Weights], features: Tensor, keep: list[Tensor] | None = None
) -> Tensor:
    """Return the network's output `(N, out)`, chunk by chunk.

    Args:
        layers: the layers.
        weights: their weights.
        features: inputs of the first Linear `(N, in)`.
        keep: empty tensors `(N, width)`, one a layer, that take all pre-activations.
    """
    outputs = []
    for part in rows(len(features)):
        z = features[part]
        for index, (layer, (weight, bias)) in enumerate(zip(layers, weights, strict=True)):
            z = torch.nn.functional.linear(layer.features(z) if index else z, weight, bias)
            if keep is not None:
                keep[index][part] = z
        outputs.append(z)
    return torch.cat(outputs)


def pre_activations(layers: Sequence[OfflineLayer], features: Tensor) -> list[Tensor]:
    """Return what every layer gives under its present weights, `(N, width)` each."""
    pre = [features.new_empty(len(features), layer.weight.shape[0]) for layer in layers]
    nested(layers, [layer.now for layer in layers], features, pre)
    return pre


def in_dtype(weights: Weights, like: Tensor) -> Weights:
    """Return a layer's weights in the dtype of `like`."""
    weight, bias = weights
    return weight.to(like.dtype), None if bias is None else bias.to(like.dtype)


def code_gaps(
    layers: Sequence[OfflineLayer],
    weights: Sequence[Weights],
    features: Tensor,
    pre: Sequence[Tensor],
    post: Sequence[Tensor] | None = None,
) -> dict[str, dict[str, Tensor]]:
    """Return `OfflineRule.gaps` for codes `(N, width)`, one a layer: u in `pre` and, unless v = s(u) always, v in `post`.

    Those of the output may be left out. `features` `(N, in)` are the inputs of the first Linear.
    """
    found: dict[str, dict[str, list[Tensor]]] = {}
    for part in rows(len(features)):
        z = features[part]
        for index, u in enumerate(pre):
            layer, (weight, bias) = layers[index], weights[index]
            after = layers[index + 1].features if index + 1 < len(layers) else _same
            below = z if not index else layer.features(pre[index - 1][part]) if post is None else post[index - 1][part]
            z = torch.nn.functional.linear(z, weight, bias)
            code = u[part]
            distances = {
                "constraint_gap": (torch.nn.functional.linear(below, weight, bias), code),
                "nested_gap": (z, code),
            }
            if post is not None and index < len(post):
                distances["activation_gap"] = after(code), post[index][part]
            z = after(z)
            own = found.setdefault(layer.name, {})
            for name, (wanted, is_now) in distances.items():
                sums = torch.stack([(is_now - wanted).square().sum(), is_now.square().sum()]).double()
                own.setdefault(name, []).append(sums)
    return {name: {key: _ratio(sums, features) for key, sums in own.items()} for name, own in found.items()}


def split_penalty(
    layers: Sequence[OfflineLayer],
    weights: Sequence[Weights],
    features: Tensor,
    pre: Sequence[Tensor],
    post: Sequence[Tensor],
    *,
    gamma: float,
    rho: float,
) -> Tensor:
    """Return `gamma |v - s(u)|^2 / 2 + rho |u - W v_below - b|^2 / 2`, summed over layers and rows, 0-d in float64.

    The codes u are `pre`, v `post`, as for `code_gaps`; the output's v may be left out.
    """
    total = torch.zeros((), dtype=torch.float64, device=features.device)
    for index, (weight, bias) in enumerate(weights):
        below = post[index - 1] if index else features
        after = layers[index + 1].features if index + 1 < len(layers) else _same
        for part in rows(len(features)):
            rest = pre[index][part] - torch.nn.functional.linear(below[part], weight, bias)
            total += 0.5 * rho * rest.double().square().sum()
            if index < len(post):
                total += 0.5 * gamma * (post[index][part] - after(pre[index][part])).double().square().sum()
    return total


def _same(code: Tensor) -> Tensor:
    return code


def _ratio(sums: list[Tensor], like: Tensor) -> Tensor:
    above, below = torch.stack(sums).sum(0).sqrt()
    return (above / below.clamp_min(1e-30)).to(like.dtype)
