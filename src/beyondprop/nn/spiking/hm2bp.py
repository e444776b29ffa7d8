"""The spike-train-level backward pass: counts are differentiated through what each train contributed to each firing.

With U a train's response without reset and Q the weights of the firings (`scans.weights_of_firings`), the membrane potential
that train j alone caused in neuron i at its firings is `e_ij = sum_t Q_i[t] U_j[t]`, and `a_i = sum_j W_ij e_ij` is the sum of
i's membranes at its firings, near threshold times count. A coefficient c_i for each neuron makes the weights' gradient
`sum_i c_i e_ij`, which is an ordinary product of the input spikes with the transposed response of `Q c`: nothing of the shape
(batch, outputs, inputs) is ever made.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from threading import RLock
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call

from beyondprop.errors import NonFiniteError, UnsupportedModelError
from beyondprop.nn.spiking import scans
from beyondprop.nn.spiking.neuron import CubaLIF

SILENT_WEIGHT = 0.1
"""What e is taken for, from a train that spikes to a neuron that does not: else it would never recover."""

LEAST_LATERAL = 0.1
"""Below which the denominator of the lateral factor is not let: it reaches 0 with a small threshold, or a strong inhibition."""


SWAPPED = RLock()
"""Held while an operator has other weights in it than its own, which another thread must not take for them."""

NO_DRIVE = (
    "The drive of a SpikingLayer is NaN or Inf, of which its neurons would be silent; look at its input and its weights, and "
    "at the learning rate."
)


@dataclass(frozen=True)
class Settings:
    """What the backward pass is told beside the spikes; `SpikingLayer` explains each."""

    neuron: CubaLIF
    lateral: float
    silent: str
    silent_ratio: float
    side_effect: bool
    injected: int
    kernel: str
    learns: bool


class Fire(torch.autograd.Function):
    """Spikes of a layer; its backward pass takes and returns derivatives by counts, the same in every step.

    Shapes: x `(T, N, ...)` spikes, drive `(T, N, ...)` of the operator, output `(T, N, ...)` in the precision of the drive.

    Source: Jin, Zhang & Li, NeurIPS 2018, equations 14 to 23; in a form linear in time.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, op: nn.Module, settings: Settings, names: tuple[str, ...], *weights: Tensor
    ) -> Tensor:
        ctx.buffers = {name: buffer.detach().clone() for name, buffer in op.named_buffers()}
        with torch.enable_grad():
            drive = applied(op, names, [weight.detach() for weight in weights], {}, x.detach())
        if settings.learns and drive.requires_grad:
            raise UnsupportedModelError(
                f"The {type(op).__name__} of a SpikingLayer learns by tensors that are no parameters of it, of which "
                "rule='hm2bp' does not know: tied weights, those of FullyShardedDataParallel (fully_shard works), a replica, a "
                "cached parametrization. Make them its parameters, or take rule='surrogate'."
            )
        flat = precise(drive.flatten(2))
        spikes = fired(flat, settings.neuron, settings.lateral)
        ctx.op, ctx.settings, ctx.names, ctx.shape = op, settings, names, drive.shape
        ctx.save_for_backward(x, flat if settings.side_effect else flat.new_empty(0), spikes, *weights)
        return spikes.to(drive.dtype).view(drive.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, drive, spikes, *weights = ctx.saved_tensors
        set_to: Settings = ctx.settings
        neuron, kernel = set_to.neuron, scans.Filter.of(set_to.neuron, set_to.kernel)
        by_count = _by_count(precise(gradient).flatten(2))
        silent = ~spikes.any(0)
        if set_to.injected:
            spikes = _injected(spikes, silent & (by_count < 0), set_to.injected)
        counts = spikes.sum(0).to(by_count.dtype)
        never = counts == 0  # silent, and nothing injected
        delta = by_count / neuron.threshold
        q = scans.weights_of_firings(spikes, kernel.keep_mem, neuron.refractory, by_count.dtype)
        wanted_x, wanted_w = ctx.needs_input_grad[0], any(ctx.needs_input_grad[4:])
        gradients: list[Tensor | None] = [None] * len(weights)
        found = None
        with torch.autocast(x.device.type, enabled=False):
            if wanted_w:
                factor = torch.ones_like(delta)
                if set_to.side_effect:
                    membrane = (q * scans.response(drive, kernel)).sum(0)
                    is_reference = set_to.silent == "reference"
                    without = never if is_reference else silent
                    own = torch.where(without, 0.0, membrane / (neuron.threshold * counts.clamp(min=1.0)))
                    if is_reference:
                        all_inputs = applied(ctx.op, ctx.names, weights, ctx.buffers, torch.ones_like(x[:1]))[
                            0
                        ].flatten(1)
                        own = torch.where(never, 0.5 / neuron.threshold * all_inputs, own)
                    factor = factor + own
                if set_to.lateral:
                    factor = factor * lateral_factor(q, spikes, set_to.lateral, neuron, kernel)
                learned = scans.adjoint_response(q * (delta * factor), kernel)
                quiet = torch.where(never, SILENT_WEIGHT * delta * factor, 0.0)
                gradients = _by_weights(ctx, x, learned.view(ctx.shape), quiet.view(ctx.shape[1:]), weights)
            if wanted_x:
                down = scans.adjoint_response(q * delta, kernel)
                found = _below(
                    ctx, x, down.view(ctx.shape), delta.view(ctx.shape[1:]), never.view(ctx.shape[1:]), weights
                )
        return found, None, None, None, *gradients


def precise(x: Tensor) -> Tensor:
    """Return it in single precision at least: recursions over many steps lose half of them in less."""
    if not x.is_floating_point():
        return x.to(torch.get_default_dtype())
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def fired(drive: Tensor, neuron: CubaLIF, lateral: float) -> Tensor:
    """Return the spikes of `scans.simulate`.

    Raises:
        NonFiniteError: if a drive is NaN or Inf, of which a neuron would be silent for ever.
    """
    spikes, last = scans.simulate(drive, neuron, lateral)
    refuse_not_finite(last, drive, neuron)
    return spikes


def refuse_not_finite(currents: Tensor, drive: Tensor | None = None, neuron: CubaLIF | None = None) -> None:
    """Raise if a current is NaN or Inf, which is not reset and has whatever came, or what is still on its way."""
    are_finite = torch.isfinite(currents).all()
    if drive is not None and neuron is not None and neuron.delay:
        are_finite = are_finite & torch.isfinite(drive[-neuron.delay :]).all()
    if not bool(are_finite):
        raise NonFiniteError(NO_DRIVE, where="drive")


def applied(
    op: nn.Module, names: Sequence[str], weights: Sequence[Tensor], buffers: dict[str, Tensor], x: Tensor
) -> Tensor:
    """Return the operator, with these weights, and buffers where they are given, at every step of `(T, N, ...)`."""
    with SWAPPED:
        found = functional_call(op, {**dict(zip(names, weights, strict=True)), **buffers}, (x.flatten(0, 1),))
    return found.reshape(*x.shape[:2], *found.shape[1:])


def lateral_factor(q: Tensor, spikes: Tensor, strength: float, neuron: CubaLIF, kernel: scans.Filter) -> Tensor:
    """Return lambda `(N, F)`: how a neuron's change comes back to it through those that it inhibits.

    `1 / (1 - w0^2 sum_l (e_lj / (o_j nu)) (e_jl / (o_l nu)))`, over pairs of which both fire.
    """
    heard = scans.response(spikes.to(q.dtype), kernel.delayed(kernel.delay - neuron.delay + 1))
    e = torch.einsum("tbi,tbj->bij", q, heard)
    e.diagonal(dim1=1, dim2=2).zero_()
    counts = spikes.sum(0).to(q.dtype)
    ratio = torch.where(counts[:, None] > 0, e / (neuron.threshold * counts.clamp(min=1.0)[:, None]), 0.0)
    back = strength**2 * (ratio * ratio.transpose(1, 2)).sum(2)
    return 1.0 / (1.0 - back).clamp(min=LEAST_LATERAL)


def _by_count(gradient: Tensor) -> Tensor:
    """Return the derivative by a count, `(N, F)`, of derivatives by all of its spikes, `(T, N, F)`."""
    first = gradient[0]
    if gradient.stride(0) == 0 or len(gradient) == 1 or not gradient.numel():
        return first
    size = gradient.abs().amax(0)
    apart = (gradient - first).abs().amax(0)
    if bool((apart > 1e-4 * size + 1e-5 * size.amax()).any()):
        raise RuntimeError(
            "A SpikingLayer with rule='hm2bp' knows derivatives by counts, the same in every step of time, and those that "
            "came back to it differ from step to step. Read the spikes through SpikeCounts; let nothing that differs in time "
            "(dropout, max pooling, a surrogate layer, a loss of single steps) stand behind it; or take rule='surrogate'."
        )
    return gradient.mean(0)


def _injected(spikes: Tensor, into: Tensor, count: int) -> Tensor:
    """Return the spikes with evenly spaced ones in those neurons, `(N, F)`."""
    period = (len(spikes) - 1) // count  # the published code divides the number of steps, and may have twice as many
    times = torch.arange(len(spikes), device=spikes.device)
    when = (times > 0) & (times % period == 0) & (times <= count * period)
    return spikes | (when[:, None, None] & into)


def _by_weights(
    ctx: Any, x: Tensor, cotangent: Tensor, quiet: Tensor, weights: Sequence[Tensor]
) -> list[Tensor | None]:
    """Return the gradients of an operator's weights: of spikes in every step, and of what silent neurons heard of.

    A silent neuron learns from every train that spikes, the same from each.
    """
    heard = (x != 0).any(0).to(x.dtype)
    leaves = [w.detach().requires_grad_(need) for w, need in zip(weights, ctx.needs_input_grad[4:], strict=True)]
    with torch.enable_grad():
        output = applied(ctx.op, ctx.names, leaves, ctx.buffers, torch.cat([x, heard[None]]))
    wanted = [w for w in leaves if w.requires_grad]
    both = torch.cat([cotangent, quiet[None]]).to(output.dtype)
    found = iter(torch.autograd.grad(output, wanted, both, allow_unused=True))
    return [next(found) if w.requires_grad else None for w in leaves]


def _below(ctx: Any, x: Tensor, cotangent: Tensor, delta: Tensor, never: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """Return dE/do of the trains below, alike in every step: `sum_i delta_i W_ij e_ij / o_j`.

    e over count is fixed for every pair of which one is silent.
    """
    with torch.enable_grad():
        # Two steps more than there are: what all neurons send, and what those send that are silent.
        z = torch.zeros_like(x[:1]).expand(len(x) + 2, *x.shape[1:]).contiguous().requires_grad_()
        output = applied(ctx.op, ctx.names, [w.detach() for w in weights], ctx.buffers, z)
    fixed = ctx.settings.silent_ratio * torch.stack([delta, torch.where(never, delta, 0.0)])
    (found,) = torch.autograd.grad(output, z, torch.cat([cotangent, fixed]).to(output.dtype))
    counts = precise(x).sum(0)
    spoken = (precise(found[:-2]) * x).sum(0) / torch.where(counts == 0, 1.0, counts) + found[-1]
    return torch.where(counts == 0, found[-2], spoken).to(x.dtype).expand_as(x)
