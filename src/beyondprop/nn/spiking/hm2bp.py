"""The spike-train-level backward pass: counts are differentiated through what each train contributed to each firing.

With U a train's response without reset and Q the weights of the firings (`scans.weights_of_firings`), the membrane potential
that train j alone caused in neuron i at its firings is `e_ij = sum_t Q_i[t] U_j[t]`, and `a_i = sum_j W_ij e_ij` is the sum of
i's membranes at its firings, near threshold times count. A coefficient c_i for each neuron makes the weights' gradient
`sum_i c_i e_ij`, which is an ordinary product of the input spikes with the transposed response of `Q c`: nothing of the shape
(batch, outputs, inputs) is ever made.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from threading import RLock
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from beyondprop.errors import NonFiniteError, UnsupportedModelError
from beyondprop.nn.spiking import products, scans, slopes
from beyondprop.nn.spiking.neuron import CubaLIF

SILENT_WEIGHT = 0.1
"""What e is taken for, from a train that spikes to a neuron that does not: else it would never recover."""

LEAST_LATERAL = 0.1
"""Below which the denominator of the lateral factor is not let: it reaches 0 with a small threshold, or a strong inhibition."""


SWAPPED = RLock()
"""Held while an operator has other weights in it than its own, which another thread must not take for them."""

NEGATIVE = (
    "A SpikingLayer with rule='hm2bp' sends derivatives to trains by their counts, which it divides by, and there are negative "
    "numbers in these trains: make them >= 0, or take rule='surrogate'."
)

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
    slope: str
    injected: int
    kernel: str
    learns: bool


class Fire(torch.autograd.Function):
    """Spikes of a layer; its backward pass takes and returns derivatives by counts, the same in every step.

    Shapes: x `(N, T, ...)` spikes, output `(N, T, ...)` in the precision of the operator's. What is kept for the backward
    pass is a bit for each step and train and neuron, and what `_needs` says.

    Source: Jin, Zhang & Li, NeurIPS 2018, equations 14 to 23; in a form linear in time.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, op: nn.Module, settings: Settings, names: tuple[str, ...], *weights: Tensor
    ) -> Tensor:
        ctx.buffers = {name: buffer.detach().clone() for name, buffer in op.named_buffers()}
        ctx.is_plain = products.is_plain(op)
        ctx.op, ctx.settings, ctx.names, ctx.of, ctx.kind, ctx.device = op, settings, names, x.shape, x.dtype, x.device
        kept: list[Tensor] = []
        found: Tensor | None = None
        told_by = _needs(settings)
        plain = products.Products(op, next((w.detach() for w in weights), None)) if ctx.is_plain else None
        for part in _parts(ctx, len(x)):
            drive: Tensor | None = None
            for piece in _pieces(ctx, part):
                trains = products.Trains.of(x[piece])
                if x.requires_grad and trains.bits is None and bool((x[piece] < 0).any()):
                    raise ValueError(NEGATIVE)
                own = plain.drive(trains) if plain else _drive(ctx, trains, [w.detach() for w in weights])
                if piece == part:
                    drive = own
                else:
                    drive = own.new_empty((part.stop - part.start, *own.shape[1:])) if drive is None else drive
                    drive[piece.start - part.start : piece.stop - part.start] = own
                kept.append(trains.kept)
            assert drive is not None
            flat = precise(drive.flatten(2))
            if found is None:
                found = drive.new_empty((len(x), *drive.shape[1:]))
            spikes = found[part].flatten(2) if flat.dtype == found.dtype else torch.empty_like(flat)
            sums = torch.zeros_like(flat[:, 0]) if told_by == "sums" else None
            fired(
                flat.transpose(0, 1), settings.neuron, settings.lateral, spikes.transpose(0, 1), sums
            )  # time first, as views
            if flat.dtype != found.dtype:
                found[part] = spikes.view(drive.shape)
            kept += [
                products.packed(spikes != 0),
                flat if told_by == "drive" else flat.new_empty(0) if sums is None else sums,
            ]
        assert found is not None
        ctx.shape = found.shape
        ctx.save_for_backward(*weights, *(kept if settings.learns else ()))
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        saved = ctx.saved_tensors
        weights, kept = saved[: len(ctx.names)], iter(saved[len(ctx.names) :])
        by_count = _by_count(precise(gradient).flatten(2))
        wanted_x, wanted_w = ctx.needs_input_grad[0], any(ctx.needs_input_grad[4:])
        gradients: list[Tensor | None] = [None] * len(weights)
        below: list[Tensor] = []
        plain = products.Products(ctx.op, next(iter(weights), None)) if ctx.is_plain else None
        with torch.autocast(gradient.device.type, enabled=False):
            for part in _parts(ctx, len(by_count)):
                pieces = list(_pieces(ctx, part))
                heard = [next(kept) for _ in pieces]
                went = Went(ctx, next(kept), by_count[part], next(kept), weights)
                adjoint = scans.adjoint_of_firings(went.spikes, went.kernel, went.neuron.refractory).transpose(0, 1)
                learned = _learned(ctx, adjoint, went) if wanted_w else ()
                sent = _sent(ctx, adjoint, went) if wanted_x else None
                for piece, given in zip(pieces, heard, strict=True):
                    own = slice(piece.start - part.start, piece.stop - part.start)
                    trains = products.Trains.kept_as(given, ctx.of[1], ctx.kind)
                    if learned and plain:
                        plain.learn(trains, *(one[own] for one in learned))
                    elif learned:
                        gradients = _by_weights(ctx, trains, *learned, weights)
                    if sent is not None:
                        below.append(_below(ctx, trains, sent[own], weights, plain))
            if wanted_w and plain:
                gradients = [plain.gradient]
        down = torch.cat(below).expand(-1, ctx.of[1], *[-1] * (len(ctx.of) - 2)) if below else None
        return down, None, None, None, *gradients


def _parts(ctx: Any, samples: int) -> Iterator[slice]:
    """Yield parts of the batch for recursions: all of it where an operator is called by name, whose hooks count calls."""
    if not ctx.is_plain:
        return iter([slice(0, samples)])
    return products.parts(samples, ctx.of[1], products.outputs_of(ctx.op, ctx.of[2:]), ctx.device)


def _pieces(ctx: Any, part: slice) -> Iterator[slice]:
    """Yield pieces of a part for the products of a plain operator, by what goes into it."""
    if not ctx.is_plain:
        return iter([part])
    inside = products.parts(part.stop - part.start, ctx.of[1], math.prod(ctx.of[2:]), ctx.device)
    return (slice(part.start + one.start, part.start + one.stop) for one in inside)


def _drive(ctx: Any, trains: products.Trains, weights: Sequence[Tensor]) -> Tensor:
    """Return what the operator makes of spikes, `(N, T, ...)`.

    Raises:
        UnsupportedModelError: if it learns by tensors that are no parameters of it.
    """
    with torch.enable_grad():
        found = applied(ctx.op, ctx.names, weights, {}, trains.x.detach())
    if ctx.settings.learns and found.requires_grad:
        raise UnsupportedModelError(
            f"The {type(ctx.op).__name__} of a SpikingLayer learns by tensors that are no parameters of it, of which "
            "rule='hm2bp' does not know: tied weights, those of FullyShardedDataParallel (fully_shard works), a replica, a "
            "cached parametrization. Make them its parameters, or take rule='surrogate'."
        )
    return found.detach()


def _needs(settings: Settings) -> str:
    """Return what the slope is told by, beside the counts: the `"sums"` of membranes that fired, or the `"drive"`.

    The side effect is of what the trains contributed, without inhibition, through the kernel, at spikes that never were, too.
    """
    if settings.slope == "discrete":
        return "sums"
    is_simulated = settings.kernel == "discrete" and not settings.lateral
    return "sums" if is_simulated and not (settings.injected and settings.silent == "reference") else "drive"


class Went:
    """What a part of a batch did, and the derivative by its counts; shapes `(N, F)`, spikes `(T, N, F)`."""

    def __init__(self, ctx: Any, bits: Tensor, by_count: Tensor, kept: Tensor, weights: Sequence[Tensor]) -> None:
        self.ctx, self.settings, self.kept, self.weights = ctx, ctx.settings, kept, weights
        self.neuron = self.settings.neuron
        self.kernel = scans.Filter.of(self.neuron, self.settings.kernel)
        spikes = products.unpacked(bits, ctx.of[1], by_count.dtype).transpose(0, 1)
        counts = spikes.sum(0)
        self.silent = counts == 0
        if self.settings.injected:
            spikes = _injected(spikes, self.silent & (by_count < 0), self.settings.injected)
            counts = spikes.sum(0)
        self.spikes, self.counts = spikes, counts
        self.never = counts == 0  # silent, and nothing injected
        self.delta = by_count * self._slope()

    def coefficient(self) -> Tensor:
        """Return what each neuron's e is learned with, `(N, F)`: the derivative, its side effect and its lateral factor."""
        found = self.delta
        if self.settings.slope == "published":
            found = found * (1.0 + self._side_effect())
        if self.settings.lateral:
            found = found * lateral_factor(self._q(), self.spikes, self.settings.lateral, self.neuron, self.kernel)
        return found

    def _slope(self) -> Tensor:
        """Return the derivative of each count by the sum of membranes at its firings, `(N, F)`."""
        if self.settings.slope == "published":
            return torch.full_like(self.counts, 1.0 / self.neuron.threshold)
        counts = torch.where(self.silent, 0.0, self.counts)  # injected spikes have no membranes
        return slopes.of_counts(counts, self.kept, self.neuron, len(self.spikes))

    def _side_effect(self) -> Tensor:
        is_reference = self.settings.silent == "reference"
        sums = self.kept
        if _needs(self.settings) == "drive":
            sums = (self._q() * scans.response(self.kept.transpose(0, 1), self.kernel)).sum(0)
        without = self.never if is_reference else self.silent
        own = torch.where(without, 0.0, sums / (self.neuron.threshold * self.counts.clamp(min=1.0)))
        if is_reference:
            ones = torch.ones((1, 1, *self.ctx.of[2:]), dtype=self.ctx.kind, device=own.device)
            all_inputs = precise(applied(self.ctx.op, self.ctx.names, self.weights, self.ctx.buffers, ones).flatten(1))
            own = torch.where(self.never, 0.5 / self.neuron.threshold * all_inputs, own)
        return own

    def _q(self) -> Tensor:
        return scans.weights_of_firings(self.spikes, self.kernel.keep_mem, self.neuron.refractory)


def precise(x: Tensor) -> Tensor:
    """Return it in single precision at least: recursions over many steps lose half of them in less."""
    if not x.is_floating_point():
        return x.to(torch.get_default_dtype())
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def fired(drive: Tensor, neuron: CubaLIF, lateral: float, spikes: Tensor, sums: Tensor | None) -> None:
    """Write the spikes of `scans.simulate`, and add the membranes that fired to `sums`.

    Raises:
        NonFiniteError: if a drive is NaN or Inf, of which a neuron would be silent for ever.
    """
    _, state = scans.simulate(drive, neuron, lateral, spikes, sums)
    refuse_not_finite(state.v, state.p, drive[len(drive) - min(neuron.delay, len(drive)) :])


def refuse_not_finite(*tensors: Tensor) -> None:
    """Raise if a state is NaN or Inf, which has whatever came and is not reset, or what is still on its way."""
    if not all(bool(torch.isfinite(one).all()) for one in tensors):
        raise NonFiniteError(NO_DRIVE, where="drive")


def applied(
    op: nn.Module, names: Sequence[str], weights: Sequence[Tensor], buffers: dict[str, Tensor], x: Tensor
) -> Tensor:
    """Return the operator, with these weights, and copies of buffers where they are given, at every step of `(N, T, ...)`.

    As `torch.func.functional_call`, which leaves its tensors in a module that has two names.
    """
    with SWAPPED:
        own = {**dict(op.named_parameters()), **dict(op.named_buffers())}
        given = {**dict(zip(names, weights, strict=True)), **{name: one.clone() for name, one in buffers.items()}}
        others = {id(own[name]): tensor for name, tensor in given.items()}
        slots = [
            (held, key, tensor)
            for module in op.modules()
            for held in (module._parameters, module._buffers)
            for key, tensor in held.items()
            if id(tensor) in others
        ]
        try:
            for held, key, tensor in slots:
                held[key] = others[id(tensor)]  # type: ignore[assignment]
            found = op(x.flatten(0, 1))
        finally:
            for held, key, tensor in slots:
                held[key] = tensor  # type: ignore[assignment]
    return found.reshape(*x.shape[:2], *found.shape[1:])


def lateral_factor(q: Tensor, spikes: Tensor, strength: float, neuron: CubaLIF, kernel: scans.Filter) -> Tensor:
    """Return lambda `(N, F)`: how a neuron's change comes back to it through those that it inhibits.

    `1 / (1 - w0^2 sum_l (e_lj / (o_j nu)) (e_jl / (o_l nu)))`, over pairs of which both fire.
    """
    heard = scans.response(spikes, kernel.delayed(kernel.delay - neuron.delay + 1))
    e = torch.einsum("tbi,tbj->bij", q, heard)
    e.diagonal(dim1=1, dim2=2).zero_()
    counts = spikes.sum(0)
    ratio = torch.where(counts[:, None] > 0, e / (neuron.threshold * counts.clamp(min=1.0)[:, None]), 0.0)
    back = strength**2 * (ratio * ratio.transpose(1, 2)).sum(2)
    return 1.0 / (1.0 - back).clamp(min=LEAST_LATERAL)


def _by_count(gradient: Tensor) -> Tensor:
    """Return the derivative by a count, `(N, F)`, of derivatives by all of its spikes, `(N, T, F)`."""
    first = gradient[:, 0]
    if gradient.stride(1) == 0 or gradient.shape[1] == 1 or not gradient.numel():
        return first
    size = gradient.abs().amax(1)
    apart = (gradient - first[:, None]).abs().amax(1)
    if bool((apart > 1e-4 * size + 1e-5 * size.amax()).any()):
        raise RuntimeError(
            "A SpikingLayer with rule='hm2bp' knows derivatives by counts, the same in every step of time, and those that "
            "came back to it differ from step to step. Read the spikes through SpikeCounts; let nothing that differs in time "
            "(dropout, max pooling, a surrogate layer, a loss of single steps) stand behind it; or take rule='surrogate'."
        )
    return gradient.mean(1)


def _injected(spikes: Tensor, into: Tensor, count: int) -> Tensor:
    """Return the spikes `(T, N, F)` with evenly spaced ones in those neurons, `(N, F)`."""
    period = (len(spikes) - 1) // count  # the published code divides the number of steps, and may have twice as many
    times = torch.arange(len(spikes), device=spikes.device)
    when = (times > 0) & (times % period == 0) & (times <= count * period)
    return torch.where(when[:, None, None] & into, 1.0, spikes)


def _learned(ctx: Any, adjoint: Tensor, went: Went) -> tuple[Tensor, Tensor]:
    """Return cotangents of an operator: of every step, and of all that a silent neuron heard of, the same from each train."""
    coefficient = went.coefficient()
    learned = (adjoint * (went.kernel.gain * coefficient)[:, None]).to(ctx.kind)
    quiet = torch.where(went.never, SILENT_WEIGHT * coefficient, 0.0).to(ctx.kind)
    return learned.reshape(-1, *ctx.shape[1:]), quiet.reshape(-1, *ctx.shape[2:])


def _by_weights(
    ctx: Any, trains: products.Trains, learned: Tensor, quiet: Tensor, weights: Sequence[Tensor]
) -> list[Tensor | None]:
    """Return the gradients of the weights of an operator that is not plain."""
    leaves = [w.detach().requires_grad_(need) for w, need in zip(weights, ctx.needs_input_grad[4:], strict=True)]
    with torch.enable_grad():
        output = applied(ctx.op, ctx.names, leaves, ctx.buffers, torch.cat([trains.x, trains.any[:, None]], 1))
    wanted = [w for w in leaves if w.requires_grad]
    both = torch.cat([learned, quiet[:, None]], 1).to(output.dtype)
    found = iter(torch.autograd.grad(output, wanted, both, allow_unused=True))
    return [next(found) if w.requires_grad else None for w in leaves]


def _sent(ctx: Any, adjoint: Tensor, went: Went) -> Tensor:
    """Return cotangents of an operator, of its steps and of two steps more: what all neurons send, and what the silent ones do.

    e over count is fixed for every pair of which one is silent.
    """
    delta = went.delta[:, None]
    fixed = ctx.settings.silent_ratio * torch.cat([delta, torch.where(went.never[:, None], delta, 0.0)], 1)
    both = torch.cat([adjoint * (went.kernel.gain * delta), fixed], 1).to(ctx.kind)
    return both.reshape(len(adjoint), ctx.of[1] + 2, *ctx.shape[2:])


def _below(
    ctx: Any, trains: products.Trains, both: Tensor, weights: Sequence[Tensor], plain: products.Products | None
) -> Tensor:
    """Return dE/do of the trains below, `(N, 1, ...)`: `sum_i delta_i W_ij e_ij / o_j`."""
    x = trains.x
    z = x[:, :1].expand(
        -1, both.shape[1], *x.shape[2:]
    )  # for its shape: a linear operator's derivative is everywhere the same
    if plain:
        found = plain.down(z, both)
    else:
        z = z.contiguous().requires_grad_()
        with torch.enable_grad():
            output = applied(ctx.op, ctx.names, [w.detach() for w in weights], ctx.buffers, z)
        (found,) = torch.autograd.grad(output, z, both.to(output.dtype))
    counts = precise(x).sum(1)
    spoken = (precise(found[:, :-2]) * x).sum(1) / torch.where(counts == 0, 1.0, counts) + found[:, -1]
    return torch.where(counts == 0, found[:, -2], spoken).to(x.dtype)[:, None]
