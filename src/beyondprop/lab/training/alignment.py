"""How well each stage's update agrees with the true gradient."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from beyondprop import _checks
from beyondprop.lab.training.work import copied
from beyondprop.rules.base import LearningRule


@dataclass(frozen=True, slots=True)
class Alignment:
    """One stage's direction against minus the true gradient of the loss.

    Attributes:
        cosine: of the angle between them, in [-1, 1]; nan where either is zero.
        angle: in degrees.
        norm_ratio: length of the update over length of the gradient.
    """

    cosine: float
    angle: float
    norm_ratio: float


def alignment(rule: LearningRule, x: Tensor, y: Tensor, *, of: str = "gradient") -> dict[str, Alignment]:
    """Compare every stage's update on a batch with the true gradient; nothing of the rule or its model changes.

    Backpropagation's own gradient has cosine 1 everywhere, and an accuracy equal to backpropagation's with cosines near 1 is
    no evidence for another method: report both together.

    Args:
        rule: any learning rule.
        x: inputs `(N, ...)`.
        y: targets `(N, ...)`.
        of: `"gradient"`: what the rule gives the optimizer (for `Memory`, before the memory is applied); `"update"`: how
            the weights really change in one step, optimizer and memory included.

    Returns:
        By stage name, in the order of the forward pass; stages without trainable weights are left out.
    """
    _checks.one_of("of", of, ("gradient", "update"))
    rule.check_finite()
    twin = copied(rule)
    twin.discard()
    devices = [y.device] if y.device.type == "cuda" else []
    groups = {name: [p for p in parameters if p.requires_grad] for name, parameters in twin.stage_parameters().items()}
    every = [p for parameters in groups.values() for p in parameters]
    buffers = [b.clone() for b in twin.model.buffers()]
    with torch.random.fork_rng(devices=devices):
        loss = twin.loss(twin.model(x), y)
        gradients = torch.autograd.grad(loss, every, allow_unused=True, materialize_grads=True)
        true = dict(zip(every, gradients, strict=True))
    with torch.no_grad():
        for buffer, saved in zip(twin.model.buffers(), buffers, strict=True):
            buffer.copy_(saved)
    before = {p: p.detach().clone() for p in every}
    with torch.random.fork_rng(devices=devices):  # from the same state again, for the same dropout masks
        if of == "gradient":
            twin.backward(x, y)
            moved = {p: torch.zeros_like(p) if p.grad is None else -p.grad for p in every}
        else:
            twin.step(x, y)
            moved = {p: p.detach() - before[p] for p in every}
    return {
        name: _compare(*(torch.cat([found[p].flatten() for p in parameters]).double() for found in (moved, true)))
        for name, parameters in groups.items()
        if parameters
    }


def _compare(update: Tensor, gradient: Tensor) -> Alignment:
    descent = -gradient
    lengths = float(update.norm()), float(descent.norm())
    if 0.0 in lengths:
        return Alignment(math.nan, math.nan, math.inf if lengths[0] else 0.0 if lengths[1] else math.nan)
    cosine = max(-1.0, min(1.0, float(update @ descent) / (lengths[0] * lengths[1])))
    return Alignment(cosine, math.degrees(math.acos(cosine)), lengths[0] / lengths[1])
