"""A network as stages with local pullbacks."""

from __future__ import annotations

from beyondprop.stages.affine import AffineStage
from beyondprop.stages.block import BlockStage
from beyondprop.stages.chain import Chain, Trace
from beyondprop.stages.losses import LossFunction, LossPoint, OutputLoss
from beyondprop.stages.pipeline import PipelineStage
from beyondprop.stages.recurrent import RecurrentStage
from beyondprop.stages.stage import Pullback, Stage

__all__ = [
    "AffineStage",
    "BlockStage",
    "Chain",
    "LossFunction",
    "LossPoint",
    "OutputLoss",
    "PipelineStage",
    "Pullback",
    "RecurrentStage",
    "Stage",
    "Trace",
]
