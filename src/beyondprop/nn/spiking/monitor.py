"""Which spiking layers are silent or saturated, and what to change."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from beyondprop.errors import SpikingWarning
from beyondprop.nn.spiking import scans
from beyondprop.nn.spiking.hm2bp import precise
from beyondprop.nn.spiking.layer import SpikingLayer

SATURATED = 0.9
"""Share of the spikes that refraction allows, above which a neuron cannot tell its inputs apart."""


@dataclass(frozen=True)
class LayerActivity:
    """What a layer did while it was watched.

    Attributes:
        name: of the layer in its model.
        samples: that passed.
        count: mean spikes of a neuron and sample.
        silent: share of neurons that never fired.
        saturated: share of neurons that fired more than 0.9 times as often as refraction allows, in every sample.
        advice: what to change; empty where nothing is wrong.
    """

    name: str
    samples: int
    count: float
    silent: float
    saturated: float
    advice: str

    def __str__(self) -> str:
        told = f"{self.name}: {self.count:.1f} spikes, {self.silent:.0%} silent, {self.saturated:.0%} saturated"
        return f"{told}; {self.advice}" if self.advice else told


class _Watched:
    """Sums of one layer, by the shape of what it gave: a layer may stand at several places, or take several sizes."""

    def __init__(self, name: str, layer: SpikingLayer) -> None:
        self.name, self.layer = name, layer
        self.fired: dict[torch.Size, Tensor] = {}
        self.full: dict[torch.Size, Tensor] = {}
        self.samples, self.total = 0, 0.0
        self.last: Tensor | None = None

    @torch.no_grad()
    def hook(self, module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], spikes: Tensor) -> None:
        if module is not self.layer or not len(spikes):  # a copy of the layer, made within the block, has the hook, too
            return
        counts = precise(spikes).sum(1)
        fired, full = (counts > 0).any(0), (counts > SATURATED * self.layer.neuron.most_spikes(spikes.shape[1])).all(0)
        shape = fired.shape
        self.fired[shape] = self.fired[shape] | fired if shape in self.fired else fired
        self.full[shape] = self.full[shape] & full if shape in self.full else full
        self.samples += len(spikes)
        self.total += float(counts.flatten(1).mean(1).sum())
        self.last = (inputs[0] if inputs else named["spikes"]).detach()

    def __deepcopy__(self, memo: dict[int, Any]) -> _Watched:
        return _Watched(self.name, self.layer)

    def activity(self) -> LayerActivity:
        """Return what it did."""
        if not self.samples:
            return LayerActivity(self.name, 0, 0.0, 0.0, 0.0, "nothing passed through it")
        silent = 1.0 - float(torch.cat([one.flatten() for one in self.fired.values()]).double().mean())
        saturated = float(torch.cat([one.flatten() for one in self.full.values()]).double().mean())
        threshold, advice = self.layer.neuron.threshold, ""
        if silent == 1.0:
            reached = self.reached()
            advice = f"no neuron fires at threshold={threshold:g}; " + (
                f"its membranes reach {reached:.3g}: give threshold={reached / 2:.2g}"
                if reached > 0
                else "its membranes never rise above 0: give larger initial weights, or look at the layer below"
            )
        elif saturated == 1.0:
            advice = f"every neuron fires in nearly every step that refraction leaves; give threshold={2 * threshold:g}"
        return LayerActivity(self.name, self.samples, self.total / self.samples, silent, saturated, advice)

    @torch.no_grad()
    def reached(self) -> float:
        """Return the median, over neurons, of the highest membrane in the last batch."""
        assert self.last is not None
        drive = self.layer.drive(self.last)
        highest = scans.response(drive, scans.Filter.of(self.layer.neuron)).amax((0, 1))
        return float(highest.median())


class SpikeMonitor:
    """Watches the `SpikingLayer`s of a model, in a `with` block around an epoch or a batch.

    At the end of the block a `SpikingWarning` names each layer that was silent or saturated as a whole, and says what
    to change. `activity` holds all layers, within the block and after it.

    Args:
        model: any module with spiking layers in it.

    Raises:
        ValueError: if there is none.
    """

    def __init__(self, model: nn.Module) -> None:
        self._layers = {
            name or "model": module for name, module in model.named_modules() if isinstance(module, SpikingLayer)
        }
        if not self._layers:
            raise ValueError(f"There is no SpikingLayer in this {type(model).__name__} to watch.")
        self._watched: list[_Watched] = []
        self._handles: list[Any] = []
        self._activity: list[LayerActivity] | None = None

    def __enter__(self) -> SpikeMonitor:
        self._watched = [_Watched(name, layer) for name, layer in self._layers.items()]
        self._handles = [one.layer.register_forward_hook(one.hook, with_kwargs=True) for one in self._watched]
        self._activity = None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        if kind is not None:  # what the layers did is not worth an error that would hide this one
            self._activity, self._watched = [], []
            return
        self._activity = [one.activity() for one in self._watched]
        self._watched = []  # and the batches that they hold
        for found in self._activity:
            if found.advice and found.samples:
                warnings.warn(str(found), SpikingWarning, stacklevel=2)

    @property
    def activity(self) -> list[LayerActivity]:
        """What each layer did in the block, in the order of the model; none if it failed."""
        return [one.activity() for one in self._watched] if self._activity is None else self._activity

    def __str__(self) -> str:
        return "\n".join(map(str, self.activity))
