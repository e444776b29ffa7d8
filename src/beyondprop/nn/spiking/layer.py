"""Layers of spiking neurons around any linear operator, and what stands before and behind them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from beyondprop import _checks
from beyondprop.nn.spiking import surrogate
from beyondprop.nn.spiking.hm2bp import Fire
from beyondprop.nn.spiking.neuron import CubaLIF

RULES = ("hm2bp", "surrogate")


class SpikingLayer(nn.Module):
    """Spikes `(N, T, ...)` through a linear operator into neurons that spike, `(N, T, ...)`.

    The whole sequence is one call, from a state of zero; nothing is kept between calls.

    Args:
        op: a linear operator on `(N, ...)`, without bias: Linear, a convolution, pooling.
        neuron: what fires.
        rule: `"hm2bp"` differentiates counts through the spikes that happened; it takes and returns the same derivative in
            every step, that by a count. `"surrogate"` is backpropagation through time with a smooth slope in the spike's place.
        silent_ratio: (`hm2bp`) what a contribution over its count is taken for where that is 0; the published code has 1.
        side_effect: (`hm2bp`) whether a change of weights is taken to move firings, too, which about doubles gradients.

    Raises:
        ValueError: for an operator with bias, an unknown rule, or input without a time dimension.

    Source: Jin, Zhang & Li, "Hybrid macro/micro level backpropagation for training deep spiking neural networks", NeurIPS 2018,
    arXiv 1805.07866; surrogate slopes: Neftci, Mostafa & Zenke, IEEE Signal Processing Magazine 36 (2019).
    """

    def __init__(
        self,
        op: nn.Module,
        neuron: CubaLIF,
        *,
        rule: str = "hm2bp",
        silent_ratio: float = 0.1,
        side_effect: bool = True,
    ) -> None:
        super().__init__()
        if getattr(op, "bias", None) is not None:
            raise ValueError(
                f"op must have no bias, which a spiking neuron does not have either, got {type(op).__name__} with one; give "
                "bias=False."
            )
        _checks.one_of("rule", rule, RULES)
        self.op, self.neuron, self.rule = op, neuron, rule
        self.silent_ratio, self.side_effect = _checks.positive("silent_ratio", silent_ratio), side_effect

    def forward(self, spikes: Tensor) -> Tensor:
        """Return the spikes that follow, `(N, T, ...)`, 0 or 1 in the precision of the weights.

        Raises:
            ValueError: if there is no time dimension, or no step in it.
        """
        if spikes.ndim < 3 or not spikes.shape[1]:
            raise ValueError(
                f"Spikes must have the shape (N, T, ...) with T >= 1, the time second, got {tuple(spikes.shape)}."
            )
        weights = tuple(self.op.parameters())
        kind = weights[0].dtype if weights else torch.get_default_dtype()
        x = spikes.transpose(0, 1).to(kind).contiguous()  # time first inside: every step is one piece of memory
        if self.rule == "surrogate":
            return surrogate.fire(x, self.op, self.neuron).transpose(0, 1)
        found = Fire.apply(x, self.op, self.neuron, self.silent_ratio, self.side_effect, *weights)
        return found.transpose(0, 1)

    def extra_repr(self) -> str:
        return f"{self.neuron}, rule={self.rule!r}"


class SpikeCounts(nn.Module):
    """Spikes `(N, T, ...)` to counts `(N, ...)`, whose derivatives go to every step alike."""

    def forward(self, spikes: Tensor) -> Tensor:
        return spikes.sum(1)


class PoissonEncoder(nn.Module):
    """Numbers in [0, 1], `(N, ...)`, to random spikes `(N, T, ...)`: in each step with the probability `max_rate * x`.

    Args:
        steps: T.
        max_rate: probability of a spike in a step at 1, in (0, 1].
        generator: of the draws; None: torch's global state.

    Raises:
        ValueError: if a number lies outside [0, 1], or is NaN.
    """

    def __init__(self, steps: int, max_rate: float = 1.0, *, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.steps = _checks.at_least("steps", steps, 1)
        if not 0 < _checks.positive("max_rate", max_rate) <= 1:
            raise ValueError(f"max_rate must be a probability in (0, 1], got {max_rate!r}.")
        self.max_rate, self.generator = max_rate, generator

    def forward(self, x: Tensor) -> Tensor:
        """Return the spikes; no gradient goes through them."""
        x = x.detach()
        if not bool(((x >= 0) & (x <= 1)).all()):
            raise ValueError("A PoissonEncoder takes numbers in [0, 1]; scale the input, and look for NaN in it.")
        drawn = torch.rand((len(x), self.steps, *x.shape[1:]), generator=self.generator, device=x.device, dtype=x.dtype)
        return (drawn < self.max_rate * x[:, None]).to(x.dtype)

    def extra_repr(self) -> str:
        return f"steps={self.steps}, max_rate={self.max_rate:g}"


class SpikeCountLoss(nn.Module):
    """Half the squared distance of counts `(N, classes)` from a target for the label and a smaller one for the others.

    Args:
        target: count of the label's neuron.
        off: count of the others.
        margin: distance within which there is no error.

    Raises:
        ValueError: unless 0 <= off < target and margin >= 0.

    Source: Jin, Zhang & Li, NeurIPS 2018, equation 10, with the dead zone of their code.
    """

    def __init__(self, target: float = 10.0, off: float = 1.0, margin: float = 1.0) -> None:
        super().__init__()
        _checks.non_negative("off", off)
        _checks.non_negative("margin", margin)
        if not target > off:
            raise ValueError(f"target must be larger than off, got {target!r} and {off!r}.")
        self.target, self.off, self.margin = target, off, margin

    def forward(self, counts: Tensor, labels: Tensor) -> Tensor:
        """Return the mean over the batch."""
        wanted = torch.full_like(counts, self.off)
        wanted.scatter_(1, labels[:, None], self.target)
        error = counts - wanted
        # Inside the margin the derivative is 0; outside it is the whole distance, as the authors' code has it.
        inside = error.abs() <= self.margin
        return 0.5 * error.masked_fill(inside, 0.0).square().sum() / len(counts)


def describe(layer: SpikingLayer, spikes: Tensor) -> dict[str, Any]:
    """Return what a layer's spikes `(N, T, ...)` say of it: mean count, shares of neurons that are silent and saturated."""
    counts = spikes.sum(1).flatten(1)
    most = layer.neuron.most_spikes(spikes.shape[1])
    return {
        "count": float(counts.mean()),
        "silent": float((counts == 0).all(0).double().mean()),
        "saturated": float((counts > 0.9 * most).all(0).double().mean()),
    }
