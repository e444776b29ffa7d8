"""The spike-train-level backward pass: counts are differentiated through what each train contributed to each firing.

With U a train's response without reset and Q the weights of the firings (`scans.weights_of_firings`), the membrane potential
that train j alone caused in neuron i at its firings is `e_ij = sum_t Q_i[t] U_j[t]`, and `a_i = sum_j W_ij e_ij` is the sum of
i's membranes at its firings, near threshold times count. A coefficient c_i for each neuron makes the weights' gradient
`sum_i c_i e_ij`, which is an ordinary product of the input spikes with the transposed response of `Q c`: nothing of the shape
(batch, outputs, inputs) is ever made.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from beyondprop.nn.spiking import scans
from beyondprop.nn.spiking.neuron import CubaLIF

SILENT_WEIGHT = 0.1
"""What e is taken for, from a train that spikes to a neuron that does not: else it would never recover."""


class Fire(torch.autograd.Function):
    """Spikes of a layer; its backward pass takes and returns derivatives by counts, the same in every step.

    Shapes: x `(T, N, ...)` spikes, drive `(T, N, ...)` of the operator, output `(T, N, ...)` in the precision of the drive.

    Source: Jin, Zhang & Li, NeurIPS 2018, equations 14 to 23; in a form linear in time.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, op: nn.Module, neuron: CubaLIF, silent_ratio: float, side_effect: bool, *weights: Tensor
    ) -> Tensor:
        with torch.no_grad():
            drive = applied(op, x)
        spikes = scans.simulate(drive.flatten(2), neuron)
        ctx.op, ctx.neuron, ctx.silent_ratio, ctx.side_effect = op, neuron, silent_ratio, side_effect
        ctx.shape = drive.shape
        ctx.save_for_backward(x, drive if side_effect else drive.new_empty(0), spikes, *weights)
        return spikes.to(drive.dtype).view(drive.shape)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, drive, spikes, *weights = ctx.saved_tensors
        neuron, shape = ctx.neuron, ctx.shape
        by_count = gradient.flatten(2).mean(0)  # dE/do, (N, F)
        counts = spikes.sum(0).to(by_count.dtype)
        silent = counts == 0
        delta = by_count / neuron.threshold
        q = scans.weights_of_firings(spikes, neuron, by_count.dtype)
        factor = torch.ones_like(delta)
        if ctx.side_effect:
            membrane = (q * scans.response(drive.flatten(2), neuron)).sum(0)
            factor = 1.0 + torch.where(silent, 0.0, membrane / (neuron.threshold * counts.clamp(min=1.0)))
        wanted_x, wanted_w = ctx.needs_input_grad[0], any(ctx.needs_input_grad[5:])
        down = scans.adjoint_response(q * delta, neuron) if wanted_x else None
        gradients: list[Tensor | None] = [None] * len(weights)
        if wanted_w:
            own = scans.adjoint_response(q * (delta * factor), neuron)
            # A silent neuron learns from every train that spikes, the same from each.
            heard = (x.flatten(2).sum(0) > 0).to(own.dtype).view(x.shape[1:])
            quiet = torch.where(silent, SILENT_WEIGHT * delta * factor, 0.0)
            gradients = weight_gradients(ctx.op, x, own.view(shape), heard, quiet.view(shape[1:]), weights)
        found = None
        if down is not None:
            found = _below(ctx.op, x, down.view(shape), delta.view(shape[1:]), ctx.silent_ratio)
        return found, None, None, None, None, *gradients


def applied(op: nn.Module, x: Tensor) -> Tensor:
    """Return the operator at every step of `(T, N, ...)`."""
    found = op(x.flatten(0, 1))
    return found.view(*x.shape[:2], *found.shape[1:])


def weight_gradients(
    op: nn.Module, x: Tensor, cotangent: Tensor, heard: Tensor, quiet: Tensor, weights: list[Tensor]
) -> list[Tensor | None]:
    """Return the gradients of an operator's weights: of spikes in every step, and of what silent neurons heard of."""
    with torch.enable_grad():
        output = applied(op, torch.cat([x, heard[None].to(x.dtype)]))
    wanted = [w for w in weights if w.requires_grad]
    found = iter(torch.autograd.grad(output, wanted, torch.cat([cotangent, quiet[None]]), allow_unused=True))
    return [next(found) if w.requires_grad else None for w in weights]


def _below(op: nn.Module, x: Tensor, cotangent: Tensor, delta: Tensor, silent_ratio: float) -> Tensor:
    """Return dE/do of the trains below, alike in every step: `sum_i delta_i W_ij e_ij / o_j`; e/o is fixed where o is 0."""
    with torch.enable_grad():
        z = x.detach().requires_grad_()
        (all_steps,) = torch.autograd.grad(applied(op, z), z, cotangent)
        one = torch.zeros_like(x[0]).requires_grad_()
        (fallback,) = torch.autograd.grad(op(one), one, delta)
    counts = x.sum(0)
    spoken = (all_steps * x).sum(0) / counts.clamp(min=1.0)
    return torch.where(counts > 0, spoken, silent_ratio * fallback).expand_as(x)
