"""Spiking layers, trained on whole spike trains."""

from beyondprop.nn.spiking.converting import convert_to_spiking
from beyondprop.nn.spiking.encoders import CurrentEncoder, LatencyEncoder, PoissonEncoder
from beyondprop.nn.spiking.layer import SpikingLayer, SpikingState, SpikingSumPool2d
from beyondprop.nn.spiking.monitor import LayerActivity, SpikeMonitor
from beyondprop.nn.spiking.neuron import CubaLIF
from beyondprop.nn.spiking.penalty import exponential_penalty
from beyondprop.nn.spiking.readout import SpikeCountLoss, SpikeCounts

__all__ = [
    "CubaLIF",
    "CurrentEncoder",
    "LatencyEncoder",
    "LayerActivity",
    "PoissonEncoder",
    "SpikeCountLoss",
    "SpikeCounts",
    "SpikeMonitor",
    "SpikingLayer",
    "SpikingState",
    "SpikingSumPool2d",
    "convert_to_spiking",
    "exponential_penalty",
]
