"""A layer's local problem for one batch, in delta form.

With W the weights before the step and V those on the way, the local objective of LocoProp is

    target_lr <grad_W, V - W>  +  sum_n D_F(V x_n, W x_n)

Its gradient is `target_lr grad_W` plus a correction that is 0 at V = W. The target itself, f(z) - target_lr dL/dz, is never
formed: in float32 a small delta would be lost in the sum, and clipping, unscaling or averaging of `.grad` carries over.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from beyondprop.optim import _ranks
from beyondprop.optim._maps import EmbeddingMap, LayerMap
from beyondprop.optim._units import Call, Layer, Unit
from beyondprop.optim.matching import Transfer, transfer
from beyondprop.optim.projection import RowMoments

LOSSES = ("matching", "squared", "quadratic")
Buffers = Mapping[nn.Parameter, Tensor]


class LocalProblem:
    """The corrections to a unit's gradient as its weights move.

    Args:
        unit: with its calls of this batch.
        before: the weights W, by parameter.
        loss: one of `LOSSES`.
        transfers: transfer function by layer name.
        local_steps: how many steps will be made, which decides whether a Gram matrix pays.
        rows: samples that a correction looks at: a share in (0, 1] of a call's, or their number.
        gram: True: X^T X wherever it serves; False: nowhere; None: where it is cheaper.
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
        self.before = before
        self.rows = rows
        self.group = group
        self.direct: list[_Direct] = []
        self.grams: list[_Gram] = []
        for layer in unit.layers:
            calls = [call for call in unit.calls if call.layer is layer]
            f = transfers.get(layer.name, _IDENTITY)
            count, curved = _looked_at(calls, rows), bool(calls) and loss != "squared" and not f.is_identity
            if group is not None:
                # Ranks must agree on the form; one of them may have no calls of this layer.
                votes = layer.parameters[0].new_tensor([count, float(curved)], dtype=torch.float64)
                _ranks.sum_([votes], group)
                count, curved = float(votes[0]), bool(votes[1])
            elif not calls:
                continue
            if loss == "quadratic" and curved:
                self.grams.append(_Gram(layer, calls, f, before, rows, group))
            elif not curved and _pays(layer, count, local_steps, gram):
                self.grams.append(_Gram(layer, calls, None, before, rows, group))
            else:
                self.direct += [_Direct(call, f if curved else None, before) for call in calls]

    @property
    def form(self) -> str:
        """How corrections are found: `"gram"`, `"direct"`, or both."""
        return "+".join(name for name, used in (("gram", self.grams), ("direct", self.direct)) if used) or "none"

    def add_corrections(self, gradients: Buffers, step: int) -> None:
        """Add the corrections at the present weights to `gradients`.

        Args:
            gradients: by parameter; those that are missing are not wanted.
            step: number of the local step, from 1: it chooses the samples.
        """
        for problem in self.grams:
            problem.add(gradients, self.before)
        if self.group is None:
            for problem in self.direct:
                problem.add(gradients, self.before, self.rows, step)
            return
        own = {p: torch.zeros_like(g) for p, g in gradients.items()}
        for problem in self.direct:
            problem.add(own, self.before, self.rows, step)
        _ranks.sum_(own.values(), self.group)
        for p, g in gradients.items():
            g.add_(own[p])


_IDENTITY = transfer("identity")


class _Direct:
    """One call whose corrections are found from its rows; squared loss where there is no transfer function."""

    def __init__(self, call: Call, f: Transfer | None, before: Buffers) -> None:
        self.map = call.layer.map
        self.f = f
        module = call.layer.module
        self.weight: nn.Parameter = module.weight
        self.bias: nn.Parameter | None = getattr(module, "bias", None)
        self.x = self.map.prepare(whole(call.x, self.weight))
        if f is not None:
            self.z = _output(call, self.x, before)
        self._h: Tensor | None = None

    def add(self, gradients: Buffers, before: Buffers, rows: float | int, step: int) -> None:
        part = block(len(self.x), rows, step)
        x = self.x[part]
        factor = len(self.x) / max(len(x), 1)
        whole = len(x) == len(self.x)
        if self.f is None:
            bias = None if self.bias is None else self.bias - _old(self.bias, before)
            r = self.map(x, self.weight - _old(self.weight, before), bias)
        else:
            r = self.f.value_(self.map(x, self.weight, self.bias), self.map.features)
            if not whole:
                r.sub_(self.f.value(self.z[part], self.map.features))
            else:
                if self._h is None:
                    self._h = self.f.value(self.z, self.map.features)
                r.sub_(self._h)
        self.map.add_gradients(
            x, r, gradients.get(self.weight), None if self.bias is None else gradients.get(self.bias), factor
        )


class _Gram:
    """A layer whose corrections come from X^T X: exact for the squared loss, at a cost that no longer grows with the batch.

    With a transfer function, the quadratic model of its matching loss: each unit's curvature is its mean slope.
    """

    def __init__(
        self,
        layer: Layer,
        calls: list[Call],
        f: Transfer | None,
        before: Buffers,
        rows: float | int,
        group: dist.ProcessGroup | None,
    ) -> None:
        self.map = layer.map
        self.weight: nn.Parameter = layer.module.weight
        self.bias: nn.Parameter | None = getattr(layer.module, "bias", None)
        inputs = [self.map.prepare(whole(call.x, self.weight)) for call in calls]
        self.moments = total_moments(self.map, inputs, rows)
        sums = list(self.moments)
        slopes = None
        if f is not None:
            slopes = self.weight.new_zeros(self.map.units + 1)
            for call, x in zip(calls, inputs, strict=True):
                slope = f.slope(_output(call, x, before), self.map.features).movedim(self.map.features, 0).flatten(1)
                slopes += torch.cat([slope.sum(1), slope.new_tensor([slope.shape[1]])])
            sums.append(slopes)
        _ranks.sum_(sums, group)
        self.slopes = None if slopes is None else (slopes[:-1] / slopes[-1].clamp_min(1)).view(self.map.groups, -1, 1)

    def add(self, gradients: Buffers, before: Buffers) -> None:
        inner, sums, rows = self.moments
        weight = self.map.matrix(self.weight - _old(self.weight, before))
        # rows of X V^T minus X W^T, multiplied with X once more
        by_weight = weight @ inner if inner.ndim == 3 else weight * inner.unsqueeze(-2)
        by_bias = None
        if self.bias is not None:
            bias = (self.bias - _old(self.bias, before)).view(self.map.groups, -1, 1)
            by_weight.addcmul_(bias, sums.unsqueeze(-2))
            by_bias = weight @ sums.unsqueeze(-1) + rows * bias
        for p, correction in ((self.weight, by_weight), (self.bias, by_bias)):
            if p is not None and correction is not None and p in gradients:
                if self.slopes is not None:
                    correction = correction * self.slopes
                gradients[p].add_(self.map.unmatrix(correction) if p is self.weight else correction.view(p.shape))


def total_moments(own: LayerMap, inputs: list[Tensor], rows: float | int, *, mirror: bool = True) -> RowMoments:
    """Return the moments of prepared inputs of several calls.

    Args:
        own: the layer's map.
        inputs: as `LayerMap.prepare` returned them.
        rows: share or number of the samples of each that they are estimated from.
        mirror: as for `projection.gram`.
    """
    total = None
    for x in inputs:
        # A token that is not looked at would count as never seen; counting is cheap.
        part = x if isinstance(own, EmbeddingMap) else x[block(len(x), rows, 1)]
        found = own.moments(part, mirror=mirror)
        if len(part) < len(x):
            found = found.scaled(len(x) / max(len(part), 1))
        total = found if total is None else total + found
    return own.no_moments() if total is None else total


def _looked_at(calls: list[Call], rows: float | int) -> float:
    """Return how many rows of these calls corrections look at."""
    count = 0.0
    for call in calls:
        share = min(1.0, rows if isinstance(rows, float) else rows / max(len(call.x) if call.x.ndim else 1, 1))
        count += share * call.layer.map.count(call.x)
    return count


def _pays(layer: Layer, count: float, local_steps: int, gram: bool | None) -> bool:
    """Whether X^T X costs fewer operations than the `count` rows themselves."""
    if isinstance(layer.module, nn.Embedding):
        return True
    if gram is not None:
        return gram
    corrections = local_steps - 1
    n, out = layer.map.fan_in, layer.map.units // layer.map.groups
    return count * n * n + corrections * n * n * out < 2 * corrections * count * n * out


def block(samples: int, rows: float | int, step: int) -> slice:
    """Return the block of samples of a local step: batches are shuffled, so a block is a random subset."""
    size = max(1, math.ceil(rows * samples - 1e-6)) if isinstance(rows, float) else rows
    if size >= samples:
        return slice(None)
    first = (step - 1) * size % samples
    first = min(first, max(samples - size, 0))
    return slice(first, first + size)


def _output(call: Call, x: Tensor, before: Buffers) -> Tensor:
    """Return a call's output under the old weights, prepared; `x` is its prepared input."""
    own, z = call.layer.map, call.z
    weight, bias = own.module.weight, getattr(own.module, "bias", None)
    # Half precision rounds away what a small step changes; an in-place operation has written over it.
    if z is None or z.dtype is not weight.dtype or z._version != call.version:
        z = own(x, _old(weight, before), _old(bias, before))
    return own.prepare_output(z)


def _old(p: nn.Parameter | None, before: Buffers) -> Tensor:
    return before.get(p, p)  # type: ignore[arg-type, return-value]


def whole(x: Tensor, weight: Tensor) -> Tensor:
    """Return an input in the dtype of the weight; what counts tokens as it is."""
    return x.to(weight.dtype) if x.is_floating_point() and x.dtype is not weight.dtype else x


def bound(before: Buffers, trust: float) -> None:
    """Shorten a change that is longer than `trust` times the weights."""
    # At least that of weights of 1e-3, so that a layer of zeros can move.
    least = 1e-3 * math.sqrt(sum(w.numel() for w in before.values()))
    size = torch.stack([w.square().sum() for w in before.values()]).sum().sqrt().clamp(min=least)
    change = torch.stack([(p - w).square().sum() for p, w in before.items()]).sum().sqrt()
    share = (trust * size / change.clamp_min(torch.finfo(change.dtype).tiny)).clamp(max=1)
    for p, w in before.items():
        p.copy_(torch.lerp(w, p, share))


def keep_finite(before: Buffers) -> Tensor:
    """Put the weights back where they are no longer finite; return whether they are."""
    fine = torch.stack([p.sum() for p in before]).sum().isfinite()
    if fine.device.type == "cpu":
        if not bool(fine):
            for p, w in before.items():
                p.copy_(w)
    else:  # without waiting for the device
        for p, w in before.items():
            torch.where(fine, p, w, out=p)
    return fine


def whole_precision(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Return a context without autocast."""
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()
