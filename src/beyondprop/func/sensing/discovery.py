"""Which entries of a Jacobian are nonzero, found from calls of a whole batch."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from beyondprop.func.sensing import designs
from beyondprop.func.sensing.least_squares import each_sample
from beyondprop.func.sensing.patterns import Pattern
from beyondprop.func.sensing.supports import shared_supports

_HELD_OUT = 1
_TOLERANCE = 1e-5
_PRUNED, _SLIGHT = 1e-6, 1e-8
_FIRST_SPARSITY = 5
_AMPLE, _GAIN, _MINOR = 1.25, 0.7, 0.3
_RMS = 0.5  # of a direction's entries: those of four that make up a unit, along which curvature is measured

Look = Callable[[Tensor], tuple[Tensor, Tensor]]
"""`look(probes (B, k, n))`: the directions that were taken `(B, k, n)`, and derivatives along them `(B, k, m)`."""


@dataclass(frozen=True, eq=False)
class Detection:
    """A pattern that was found, and how far it explains what was seen.

    Attributes:
        pattern: the entries that are nonzero.
        probes: directions a sample that it took, those held out among them.
        residual: misfit of each output along probes that the pattern was not found with, relative to its derivatives, `(m,)`.
        unexplained: outputs that miss the probes that were held out by more than noise and curvature explain: entries may lack
            in their rows.

    Where each input was moved by itself, nothing was held out, and the residual is 0.
    """

    pattern: Pattern
    probes: int
    residual: Tensor
    unexplained: Tensor

    def __repr__(self) -> str:
        doubt = f", {len(self.unexplained)} outputs not explained" if len(self.unexplained) else ""
        worst = float(self.residual.max())
        return f"Detection({self.pattern!r}, {self.probes} probes a sample, residual at most {worst:.1e}{doubt})"


def detect(
    look: Look,
    batch: int,
    outputs: int,
    inputs: int,
    *,
    blur: Tensor,
    precision: float,
    probes: int | None,
    sparsity: int | None,
    generator: torch.Generator,
) -> Detection:
    """Find a pattern that the samples of a batch share.

    Probes differ from sample to sample. What few of them cannot tell is asked again with a quarter more, until derivatives
    along others are explained, or there would be half as many as inputs: then each input is moved by itself.

    Args:
        look: calls the box.
        batch: B.
        outputs: m.
        inputs: n.
        blur: error of each output's directional derivatives, by noise and curvature, `(m,)`.
        precision: of a directional derivative without noise, relative.
        probes: how many a sample, all in all; None: as needed.
        sparsity: the largest number of nonzeros in a row; None: not known.
        generator: for directions.
    """
    count = probes or min(inputs, _first(batch, inputs, sparsity) + _HELD_OUT)
    taken: Tensor | None = None
    seen: Tensor | None = None
    mask = torch.zeros(outputs, inputs, dtype=torch.bool)
    residual = torch.zeros(outputs, dtype=torch.float64)
    open_rows, before = torch.arange(outputs), math.inf
    while True:
        if count >= inputs / 2 and probes is None:
            return _dense(look, batch, outputs, inputs, blur, max(_SLIGHT, 10.0 * precision))
        more = count - (0 if taken is None else taken.shape[1])
        drawn = torch.stack([designs.general(more, inputs, generator) for _ in range(batch)]) * (_RMS * math.sqrt(more))
        new, along = look(drawn)
        taken = new if taken is None else torch.cat([taken, new], 1)
        seen = along if seen is None else torch.cat([seen, along], 1)
        # What is explained stays as it is: only the others are asked again.
        part = seen[:, :, open_rows]
        error = torch.maximum(blur[open_rows], precision * part.square().mean((0, 1)).sqrt())
        tried = _tried(taken, part, error, max(_PRUNED, 10.0 * precision), sparsity)
        mask[open_rows], residual[open_rows] = tried.mask, tried.residual
        open_rows = open_rows[tried.excess > 0]
        missed = float(tried.excess.clamp(min=0.0).square().sum())
        shows_no_more = missed > _GAIN * before and bool((residual[open_rows] < _MINOR).all())
        if probes is not None or not len(open_rows) or shows_no_more:
            # What is missed still is curvature, or noise beyond what was told.
            return Detection(Pattern(mask), count, residual, open_rows)
        before = missed
        count = min(max(count + 2, math.ceil(1.25 * count)), inputs)


def _first(batch: int, inputs: int, sparsity: int | None) -> int:
    """Return how many probes a sample are likely to do: those of one sample alone, shared by the batch."""
    known = sparsity or _FIRST_SPARSITY
    alone = 2.2 * known * math.log(max(inputs / known, math.e))
    return math.ceil(known + 0.5 + max(alone - known, 0.0) / batch**0.8)


class _Tried(NamedTuple):
    """Supports of rows `(r, n)`; their misfit along what was held out, relative, and what of it is more than is due, `(r,)`."""

    mask: Tensor
    residual: Tensor
    excess: Tensor


def _tried(probes: Tensor, seen: Tensor, blur: Tensor, negligible: float, sparsity: int | None) -> _Tried:
    """Find supports along all probes but those held out, and look along these."""
    batch, count = probes.shape[:2]
    fitted = max(count - _HELD_OUT, 1)
    # Whether a support explains its row is asked of the probes that were held out: curvature is no noise, and as large here.
    mask, _ = shared_supports(probes[:, :fitted], seen[:, :fitted], sparsity=sparsity)
    pattern = Pattern(mask)
    values = each_sample(pattern, seen[:, :fitted], probes[:, :fitted])
    size = torch.zeros(pattern.shape, dtype=torch.float64)
    size[pattern.rows, pattern.columns] = values.values.square().mean(0).sqrt()
    mask &= size > negligible * size.amax(1, keepdim=True)  # what only follows rounding and bends
    left = seen[:, fitted:] - values.along(probes[:, fitted:])
    scale = seen.square().mean((0, 1)).sqrt()
    misfit = left.square().mean((0, 1)).sqrt() if left.shape[1] else torch.zeros_like(scale)
    # The values that were fitted have errors, too, and a mean of few squares is known to a share alone.
    own = 1.0 + pattern.row_counts / (fitted - pattern.row_counts).clamp(min=1)
    allowed = blur * own.sqrt() * (1.0 + 4.0 / math.sqrt(2.0 * batch * _HELD_OUT))
    residual = torch.where(scale > 0, misfit / scale.clamp(min=1e-300), 0.0)
    return _Tried(mask, residual, misfit - _TOLERANCE * scale - _AMPLE * allowed)


def _dense(look: Look, batch: int, outputs: int, inputs: int, blur: Tensor, negligible: float) -> Detection:
    """Move every input by itself."""
    probes, along = look(torch.eye(inputs, dtype=torch.float64).expand(batch, -1, -1))
    moved = probes.diagonal(dim1=1, dim2=2)
    values = (along / moved[..., None]).mT  # (B, m, n)
    size = values.square().mean(0).sqrt()
    largest = size.amax(1, keepdim=True)
    by_chance = blur * math.sqrt(1.0 + 6.0 * math.sqrt(2.0 / batch))
    floor = torch.maximum(negligible * largest, by_chance[:, None])
    return Detection(
        Pattern((size > floor) & (size > 0)),
        inputs,
        torch.zeros(outputs, dtype=torch.float64),
        torch.empty(0, dtype=torch.int64),
    )
