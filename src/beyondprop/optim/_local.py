"""A layer's local problem for one batch, in delta form.

With W the weights before the step and V those on the way, the local objective of LocoProp is

    target_lr <grad_W, V - W>  +  sum_n D_F(V x_n, W x_n)

Its gradient is `target_lr grad_W` plus a correction that is 0 at V = W. The target itself, f(z) - target_lr dL/dz, is never
formed: in float32 a small delta would be lost in the sum, and clipping, unscaling or averaging of `.grad` carries over.
"""

from __future__ import annotations

import contextlib
import math
import operator
from collections.abc import Iterable, Mapping
from functools import reduce
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from beyondprop.optim._maps import LayerMap
from beyondprop.optim._units import Call, Unit
from beyondprop.optim.matching import Transfer, transfer
from beyondprop.optim.projection import RowMoments, widened

LOSSES = ("matching", "squared", "quadratic")
Buffers = Mapping[Any, Tensor]
"""Tensors by parameter; for None, the bias of a layer without one, there is none."""


class LocalProblem:
    """The corrections to a unit's gradient as its weights move.

    Args:
        unit: with its calls of this batch.
        before: the weights W, by parameter.
        transfers: transfer function by layer name.
        local_steps: how many steps will be made, which decides whether a Gram matrix pays.
        loss, rows, gram: as of `LocoProp`.
        group: process group whose ranks have parts of the batch.
    """

    def __init__(
        self,
        unit: Unit,
        before: Buffers,
        loss: str,
        transfers: Mapping[str, Transfer],
        local_steps: int,
        rows: float | int,
        gram: bool | None,
        group: dist.ProcessGroup | None,
    ) -> None:
        self.group = group
        self.direct: list[_Direct] = []
        self.grams: list[_Gram] = []
        for layer in unit.layers:
            calls = [call for call in unit.calls if call.layer is layer]
            f = transfers.get(layer.name, transfer("identity"))
            count, curved = _looked_at(calls, rows), bool(calls) and loss != "squared" and not f.is_identity
            if group is not None:
                # Ranks must agree on the form; one of them may have no calls of this layer.
                votes = layer.weight.new_tensor([count, float(curved)], dtype=torch.float64)
                sum_over_ranks([votes], group)
                count, curved = float(votes[0]), bool(votes[1])
            elif not calls:
                continue
            found = together(calls, rows)
            if loss == "quadratic" and curved:
                self.grams.append(_Gram(layer, found, f, before, rows, group))
            elif not curved and _pays(layer, count, local_steps, gram):
                self.grams.append(_Gram(layer, found, None, before, rows, group))
            else:
                self.direct += [_Direct(alike, f if curved else None, before, rows) for alike in found]

    def add_corrections(self, gradients: Buffers, step: int) -> None:
        """Add the corrections at the present weights to `gradients`; those that are missing are not wanted.

        `step` is the number of the local step, from 1: it chooses the samples.
        """
        for problem in self.grams:
            problem.add(gradients)
        own = gradients if self.group is None else {p: torch.zeros_like(g) for p, g in gradients.items()}
        for problem in self.direct:
            problem.add(own, step)
        if own is not gradients:
            sum_over_ranks(own.values(), self.group)
            for p, g in gradients.items():
                g.add_(own[p])


class Alike(NamedTuple):
    """Calls of one layer whose rows are looked at as one."""

    calls: list[Call]
    inputs: list[Tensor]  # theirs, prepared
    is_part: bool  # whether a local step looks at a block of each; they are then of one length


def together(calls: Iterable[Call], rows: float | int) -> list[Alike]:
    """Return the calls of one layer, joined where they may be: a few large products take less time than many small ones.

    The local objective is a sum over rows, whichever call they are of; only blocks are a share of their own call.
    """
    found: dict[Any, Alike] = {}
    for call in calls:
        x = call.prepared()
        is_part = block(len(x), rows, 1) != slice(None)
        alike = found.setdefault((x.shape if is_part else x.shape[1:], x.dtype, is_part), Alike([], [], is_part))
        alike.calls.append(call)
        alike.inputs.append(x)
    return list(found.values())


def _joined(parts: list[Tensor], part: slice | None = None) -> Tensor:
    """Return tensors, or the same part of each, as one; what is one already is not copied."""
    if len(parts) > 1:
        return torch.cat(parts if part is None else [each[part] for each in parts])
    return parts[0] if part is None else parts[0][part]


class _Direct:
    """Calls whose corrections are found from their rows; squared loss where there is no transfer function."""

    def __init__(self, alike: Alike, f: Transfer | None, before: Buffers, rows: float | int) -> None:
        calls, self.inputs, self.is_part = alike
        self.layer, self.f, self.before, self.rows = calls[0].layer, f, before, rows
        self.outputs = [] if f is None else [_output(*each, before) for each in zip(calls, self.inputs, strict=True)]
        if len(calls) > 1 and not self.is_part:  # blocks change from step to step, so each joins its own
            self.inputs = [torch.cat(self.inputs)]
            self.outputs = [torch.cat(self.outputs)] if self.outputs else []
        self.samples = sum(map(len, self.inputs))
        self._h: Tensor | None = None

    def add(self, gradients: Buffers, step: int) -> None:
        own, x, part = self.layer, self.inputs[0], None
        if self.is_part:
            part = block(len(x), self.rows, step)
            x = _joined(self.inputs, part)
        if self.f is None:
            r = own(x, _change(own.weight, self.before), _change(own.bias, self.before))
        else:
            r = self.f.value_(own(x, own.weight, own.bias), own.features)
            if part is not None:
                r.sub_(self.f.value(_joined(self.outputs, part), own.features))
            else:
                if self._h is None:
                    self._h = self.f.value(self.outputs[0], own.features)
                r.sub_(self._h)
        factor = self.samples / max(len(x), 1)
        own.add_gradients(x, r, gradients.get(own.weight), gradients.get(own.bias), factor)


class _Gram:
    """A layer whose corrections come from X^T X: exact for the squared loss, at a cost that no longer grows with the batch.

    With a transfer function, the quadratic model of its matching loss: each unit's curvature is its mean slope.
    """

    def __init__(
        self,
        layer: LayerMap,
        found: list[Alike],
        f: Transfer | None,
        before: Buffers,
        rows: float | int,
        group: dist.ProcessGroup | None,
    ) -> None:
        self.layer, self.before = layer, before
        self.moments = total_moments(layer, found, rows)
        sum_over_ranks(self.moments, group)
        self.slopes = None
        if f is not None:
            slopes = layer.weight.new_zeros(layer.units + 1)
            for calls, inputs, _ in found:
                z = _joined([_output(*each, before) for each in zip(calls, inputs, strict=True)])
                slope = f.slope(z, layer.features).movedim(layer.features, 0).flatten(1)
                slopes += torch.cat([slope.sum(1), slope.new_tensor([slope.shape[1]])])
            sum_over_ranks([slopes], group)
            self.slopes = (slopes[:-1] / slopes[-1].clamp_min(1)).view(layer.groups, -1, 1)

    def add(self, gradients: Buffers) -> None:
        own, (inner, sums, rows) = self.layer, self.moments
        weight, bias = widened(own.matrix(_change(own.weight, self.before))), _change(own.bias, self.before)
        # rows of X V^T minus X W^T, multiplied with X once more
        by_weight = weight * inner.unsqueeze(-2) if own.one_hot else weight @ inner
        by_bias = None
        if bias is not None:
            bias = widened(bias).view(own.groups, -1, 1)
            by_weight.addcmul_(bias, sums.unsqueeze(-2))
            by_bias = weight @ sums.unsqueeze(-1) + rows * bias
        for p, correction in ((own.weight, by_weight), (own.bias, by_bias)):
            if p is not None and correction is not None and p in gradients:
                if self.slopes is not None:
                    correction = correction * self.slopes
                gradients[p].add_(own.unmatrix(correction) if p is own.weight else correction.view(p.shape))


def total_moments(layer: LayerMap, found: list[Alike], rows: float | int, *, mirror: bool = True) -> RowMoments:
    """Return the moments of the inputs of a layer's calls, estimated from the first `rows` of each.

    `rows`: a share or a number; `mirror` as for `projection.gram`.
    """
    sums = []
    for alike in found:
        # A token that is not looked at would count as never seen; counting is cheap.
        is_part = alike.is_part and not layer.one_hot
        x = _joined(alike.inputs, block(len(alike.inputs[0]), rows, 1) if is_part else None)
        moments = layer.moments(x, mirror=mirror)
        sums.append(moments.scaled(sum(map(len, alike.inputs)) / len(x)) if is_part else moments)
    return reduce(operator.add, sums) if sums else layer.no_moments()


def _looked_at(calls: list[Call], rows: float | int) -> float:
    count = 0.0
    for call in calls:
        share = min(1.0, rows if isinstance(rows, float) else rows / max(call.layer.samples(call.x), 1))
        count += share * call.layer.count(call.x)
    return count


def _pays(layer: LayerMap, count: float, local_steps: int, gram: bool | None) -> bool:
    """Whether X^T X costs fewer operations than the `count` rows themselves."""
    if layer.one_hot:
        return True
    if gram is not None:
        return gram
    corrections = local_steps - 1
    n, out = layer.fan_in, layer.units // layer.groups
    return count * n * n + corrections * n * n * out < 2 * corrections * count * n * out


def block(samples: int, rows: float | int, step: int) -> slice:
    """Return the block of samples of a local step: batches are shuffled, so a block is a random subset."""
    size = max(1, math.ceil(rows * samples - 1e-6)) if isinstance(rows, float) else rows
    if size >= samples:
        return slice(None)
    first = min((step - 1) * size % samples, samples - size)
    return slice(first, first + size)


def _output(call: Call, x: Tensor, before: Buffers) -> Tensor:
    """Return a call's output under the old weights, prepared; `x` is its prepared input."""
    own, z = call.layer, call.z
    # Half precision rounds away what a small step changes; an in-place operation has written over it.
    if z is None or z.dtype is not own.weight.dtype or z._version != call.version:
        z = own(x, before.get(own.weight, own.weight), before.get(own.bias, own.bias))
    return own.prepare_output(z)


def _change(p: nn.Parameter | None, before: Buffers) -> Any:
    return None if p is None else p - before.get(p, p)


def sum_over_ranks(tensors: Iterable[Tensor], group: dist.ProcessGroup | None) -> None:
    """Replace every tensor by its sum over the ranks; nothing happens without a group."""
    if group is not None:
        for work in [dist.all_reduce(t, group=group, async_op=True) for t in tensors]:
            if work is not None:
                work.wait()


def bound(before: Buffers, trust: float) -> None:
    """Shorten a change that is longer than `trust` times the weights."""
    # At least that of weights of 1e-3, so that a layer of zeros can move.
    least = 1e-3 * math.sqrt(sum(w.numel() for w in before.values()))
    size = torch.stack([w.square().sum() for w in before.values()]).sum().sqrt().clamp(min=least)
    change = torch.stack([(p - w).square().sum() for p, w in before.items()]).sum().sqrt()
    share = (trust * size / change.clamp_min(torch.finfo(change.dtype).tiny)).clamp(max=1)
    for p, w in before.items():
        p.copy_(torch.lerp(w, p, share))


def total(t: Tensor) -> Tensor:
    """Return the sum of a tensor's entries, which is finite if they are and do not overflow it, as those of float16 would."""
    return t.sum(dtype=torch.promote_types(t.dtype, torch.float32))


def keep_finite(before: Buffers, state: Mapping[Any, Mapping[str, Any]]) -> Tensor:
    """Put the weights back where they, or what their optimizer has in `state`, are not finite; return whether all is."""
    held = [t for p in before for t in state.get(p, {}).values() if isinstance(t, Tensor) and t.is_floating_point()]
    sums = [total(t) for t in (*before, *held)]
    fine = torch.stack([s.to(sums[0]) for s in sums]).sum().isfinite()
    if fine.device.type != "cpu" or not bool(fine):  # other devices are not waited for
        for p, w in before.items():
            torch.where(fine, p, w, out=p)
    return fine


def whole_precision(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Return a context without autocast."""
    is_on = torch.is_autocast_enabled(device.type)
    return torch.autocast(device.type, enabled=False) if is_on else contextlib.nullcontext()
