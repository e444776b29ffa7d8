"""Spiking layers, trained on whole spike trains."""

from beyondprop.nn.spiking.layer import PoissonEncoder, SpikeCountLoss, SpikeCounts, SpikingLayer
from beyondprop.nn.spiking.neuron import CubaLIF

__all__ = ["CubaLIF", "PoissonEncoder", "SpikeCountLoss", "SpikeCounts", "SpikingLayer"]
