"""Consequentialism: before any optimizer steps, each layer's gradient is amended so that samples do not disturb each other.

Paeedeh & Ghiasi-Shirazi, "Improving the Backpropagation Algorithm with Consequentialism Weight Updates over Mini-Batches",
Neurocomputing 461, 2021, arXiv 2003.05164. Every unit has a virtual target, its output minus the backpropagated error; the
plain gradient step for one sample also moves the outputs of the others, by the inner products of their inputs. The projection

    G' = (X X^T + eps I)^-1 G,    grad_W <- G'^T X        or, the same,      grad_W <- G^T X (X^T X + eps I)^-1

foresees that, so that a step of size 1 takes every sample of the batch to its target. It is LocoProp-S solved exactly, and the
input factor of K-FAC (FOOF, Benzing 2022; ISAAC, Petersen et al. 2023).
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn

from beyondprop import _checks
from beyondprop.errors import NonFiniteError, UnsupportedModelError
from beyondprop.optim._capture import Capture
from beyondprop.optim._local import sum_over_ranks, together, total_moments
from beyondprop.optim._samples import refusal
from beyondprop.optim._units import Unit
from beyondprop.optim.projection import RowMoments, joined, parted, solve_dual, solve_primal, widened


class AffineProjection:
    """Preconditions the gradients of every Linear, Conv, Embedding and registered layer over the mini-batch, for any optimizer.

    `projection.step()` goes between `loss.backward()` and `optimizer.step()` and rewrites `.grad` in place. Parameters of other
    kinds keep their gradient.

    Args:
        model: any module; with `DistributedDataParallel`, the wrapper itself: X^T X is then summed over its ranks.
        damping: eps relative to the mean squared length of the inputs, >= 0. At 0 targets are met exactly wherever they can
            be, by the least change of the weights.
        reduction: how the loss averages over the N samples of a batch: with `"mean"` gradients are multiplied by N, so that
            the learning rate does not depend on it; `"sum"` takes them as they are. N is the length of the first dimension of
            what the model is called with, or what `step` is told.
        side: the linear system to solve: over `"inputs"` (fan-in), over `"samples"` (rows of the batch), or the `"smaller"`.
        rows: samples, along the first dimension of a layer's input, that X^T X is estimated from, a share in (0, 1] of the
            batch or their number; default: all. Fewer meet the targets no longer exactly, at a fraction of the cost where
            convolutions have many positions.
        forgetting: e in (0, 1]: weight of the newest batch in a running X^T X; 1: no memory. Below 1 all layers solve over
            inputs.
        refresh: steps between two factorisations of the running X^T X.
        nonfinite: what `step` does where a gradient is not finite: `"raise"`, or `"keep"` all gradients as they are, for loops
            with `GradScaler`, which then skips the optimizer's step.
        exclude: names or patterns of layers whose gradients are left alone.
        pipelined: whether this process trains layers of its own, as one rank of a pipeline does.

    Raises:
        TypeError, ValueError: if an argument is of the wrong kind or out of its range.
        UnsupportedModelError: if a layer cannot be captured; the message names it and the way out.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        >>> projection = AffineProjection(model, damping=1.0)
        >>> nn.functional.cross_entropy(model(torch.ones(2, 4)), torch.tensor([0, 2])).backward()
        >>> projection.step()
        >>> optimizer.step()
    """

    def __init__(
        self,
        model: nn.Module,
        damping: float = 1.0,
        *,
        reduction: str = "mean",
        side: str = "smaller",
        rows: float | int | None = None,
        forgetting: float = 1.0,
        refresh: int = 1,
        nonfinite: str = "raise",
        exclude: Iterable[str] = (),
        pipelined: bool = False,
    ) -> None:
        self.nonfinite = _checks.one_of("nonfinite", nonfinite, ("raise", "keep"))
        self.damping = _checks.non_negative("damping", damping)
        self.reduction = _checks.one_of("reduction", reduction, ("mean", "sum"))
        self.side = _checks.one_of("side", side, ("smaller", "inputs", "samples"))
        if not (isinstance(forgetting, int | float) and 0 < forgetting <= 1):
            raise ValueError(f"forgetting must be in (0, 1], got {forgetting!r}.")
        self.forgetting = float(forgetting)
        self.refresh = _checks.at_least("refresh", refresh, 1)
        self.rows = _checks.share("rows", rows)
        self._capture = Capture(model, exclude, pipelined=pipelined)
        estimated = forgetting < 1 or rows is not None or self._capture.group is not None
        if side == "samples" and estimated:
            raise ValueError(f"{_NO_SAMPLES} forgetting < 1, rows or DistributedDataParallel.")
        if refresh > 1 and forgetting == 1:
            raise ValueError(f"refresh={refresh} needs a running X^T X: pass forgetting < 1.")
        for unit in self._capture.units:
            kinds = {(type(layer.module), layer.groups, layer.fan_in, *layer.parameters) for layer in unit.layers}
            if len(kinds) > 1:
                raise UnsupportedModelError(
                    f"Layers {unit.name!r} share a parameter but have no common linear system: they use it in different "
                    f"shapes or beside different ones. Pass exclude={[layer.name for layer in unit.layers]!r}."
                )
        self._running: dict[str, _Running] = {}
        self._capture.gradients = side != "inputs" and not estimated
        self._capture.counts = reduction == "mean"
        self._capture.attach()

    def __repr__(self) -> str:
        names = ("damping", "reduction", "side", "rows", "forgetting", "refresh", "nonfinite")
        settings = ", ".join(f"{name}={getattr(self, name)!r}" for name in names)
        return (
            f"AffineProjection({type(self._capture.root).__name__} with {len(self._capture.layers)} layers, {settings})"
        )

    @torch.no_grad()
    def step(self, samples: float | None = None) -> None:
        """Rewrite the gradients of all captured layers.

        Args:
            samples: N, over how many samples the loss averaged since the last step, on this rank, > 0. Default: the length of
                the first dimension of what the model was called with, summed over calls.

        Raises:
            NonFiniteError: if a gradient or an input is not finite; no gradient was changed.
            UnsupportedModelError: if a gradient is sparse or has no captured call, if a weight is used besides its layer's
                calls, or if N is doubtful and was not given; no gradient was changed.
            ValueError: if `samples` is no number > 0.
        """
        samples = None if samples is None else float(_checks.positive("samples", samples))
        try:
            if self.side == "samples" and self._capture.group is not None:
                raise UnsupportedModelError(f"{_NO_SAMPLES} DistributedDataParallel.")
            try:
                self._capture.check()
            except NonFiniteError:
                if self.nonfinite == "keep":
                    return
                raise
            doubt = self._capture.doubt() if samples is None and self.reduction == "mean" else None
            if doubt is not None and self._capture.group is None:
                raise refusal(doubt)
            solved = []
            for unit in self._capture.units:
                if (unit.calls or self._capture.group is not None) and any(p.grad is not None for p in unit.parameters):
                    try:
                        solved.append((unit, self._solve(unit, doubt or samples)))
                    except torch.linalg.LinAlgError as error:  # pyright: ignore[reportPrivateImportUsage]
                        raise _unsolvable(unit.name) from error
                unit.calls.clear()
            found = [(unit.name, g.sum().isfinite()) for unit, new in solved for g in new if g is not None]
            if found and not bool(torch.stack([good.to(found[0][1].device) for _, good in found]).all()):
                raise _unsolvable(next(name for name, good in found if not bool(good)))
            for unit, (weight, bias) in solved:
                for p, g in ((unit.layers[0].weight, weight), (unit.layers[0].bias, bias)):
                    if p is not None and p.grad is not None and g is not None:
                        p.grad.copy_(g)
        finally:
            self._capture.clear()

    def _solve(self, unit: Unit, given: float | str | None) -> tuple[Tensor | None, Tensor | None]:
        """Return a unit's new gradients, in the shapes of weight and bias; None where there was none.

        `given` is the number of samples where it was, or why it is doubtful, which all ranks then refuse.
        """
        own, calls = unit.layers[0], unit.calls
        p, q = own.weight, own.bias
        if given is None:
            given = float(sum(b.samples for b in {call.batch for call in calls}))
        samples = torch.tensor(math.nan if isinstance(given, str) else given, device=p.device)
        sum_over_ranks([samples], self._capture.group)
        if math.isnan(samples := float(samples)):
            raise refusal(given if isinstance(given, str) else "on another rank that is doubtful")
        samples = max(samples, 1.0)
        factor = samples if self.reduction == "mean" else 1.0
        bias = None if q is None or q.grad is None else widened(q.grad).view(own.groups, -1) * factor
        if p.grad is None:  # the bias alone: its one input is 1
            assert bias is not None
            assert q is not None
            return None, (bias / (self._moments(unit, samples).rows + self.damping)).view(q.shape)
        weight = widened(own.matrix(p.grad)) * factor
        # The system of an embedding over inputs is diagonal.
        is_dual = self._capture.gradients and self._capture.group is None and not own.one_hot
        if is_dual and (self.side == "samples" or sum(own.count(call.x) for call in calls) < own.fan_in):
            rows, deltas = self._rows(unit, weight)
            damping = self.damping * (rows.square().sum((-2, -1)) / rows.shape[1] + (bias is not None))
            weight, bias = solve_dual(rows, deltas, damping, bias=bias is not None)
        else:
            weight, bias = self._over_inputs(unit, weight, bias, samples)
        return own.unmatrix(weight), None if bias is None or q is None else bias.reshape(q.shape)

    def _over_inputs(
        self, unit: Unit, weight: Tensor, bias: Tensor | None, samples: float
    ) -> tuple[Tensor, Tensor | None]:
        moments, has_bias = self._moments(unit, samples), bias is not None
        damping = self.damping * (moments.mean_square() + has_bias)
        if unit.layers[0].one_hot:
            return weight / (moments.inner + damping.unsqueeze(-1)).clamp_min(_TINY).unsqueeze(-2), None
        running = self._running.get(unit.name)
        if running is None:
            return solve_primal(weight, bias, moments, damping)
        n = moments.inner.shape[-1] + has_bias
        if running.inverse is None or running.inverse.shape[-1] != n or (running.steps - 1) % self.refresh == 0:
            identity = torch.eye(n, dtype=damping.dtype, device=damping.device).expand(len(damping), n, n)
            running.inverse = joined(*solve_primal(*parted(identity, has_bias), moments, damping)) * samples
        return parted(joined(weight, bias) @ running.inverse.to(weight) / samples, has_bias)

    def _moments(self, unit: Unit, samples: float) -> RowMoments:
        """Return X^T X of the batch, or its running average."""
        found = []
        for layer in unit.layers:
            calls = together((call for call in unit.calls if call.layer is layer), self.rows)
            found.append(total_moments(layer, calls, self.rows, mirror=False))
        total = reduce(operator.add, found)
        sum_over_ranks(total, self._capture.group)
        if self.forgetting == 1:
            return total
        new = total.scaled(1 / samples)
        running = self._running.setdefault(unit.name, _Running(new))
        if running.steps:
            parts = zip(running.moments, new, strict=True)
            running.moments = RowMoments(*(old.to(part).lerp(part, self.forgetting) for old, part in parts))
        running.steps += 1
        return running.moments.scaled(samples)

    def _rows(self, unit: Unit, weight: Tensor) -> tuple[Tensor, Tensor]:
        inputs, outputs = [], []
        for call in unit.calls:
            assert call.gradient is not None
            inputs.append(call.layer.rows(call.prepared()))
            outputs.append(call.layer.positions(call.layer.prepare_output(call.gradient.to(weight.dtype))))
        rows, deltas = widened(torch.cat(inputs, 1)), torch.cat(outputs, 1)
        eps = max(torch.finfo(call.gradient.dtype).eps for call in unit.calls if call.gradient is not None)
        return rows, deltas * _scale(unit.name, weight, rows, deltas, eps)

    def state_dict(self) -> dict[str, Any]:
        """Return the running moments by layer; empty without memory."""
        return {name: vars(running) | {"moments": tuple(running.moments)} for name, running in self._running.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned.

        Raises:
            ValueError: if it is of another model.
        """
        names = [unit.name for unit in self._capture.units]
        if not set(state) <= set(names):
            raise ValueError(f"This state has moments of layers {sorted(state)}, this model has the layers {names}.")
        self._running = {
            name: _Running(RowMoments(*saved["moments"]), saved["inverse"], int(saved["steps"]))
            for name, saved in state.items()
        }

    def clear(self) -> None:
        """Forget the backward passes since the last step, whose gradients are not to be used."""
        self._capture.clear()

    def remove_hooks(self) -> None:
        """Take the hooks off the model; `step` then has nothing to project."""
        self._capture.remove()


@dataclass
class _Running:
    """A layer's moments per sample, averaged over batches with forgetting, and the inverse of the damped X^T X."""

    moments: RowMoments
    inverse: Tensor | None = None
    steps: int = 0


_TINY = 1e-30
_NO_SAMPLES = (
    "side='samples' has no running or estimated X^T X and no sum over ranks; use side='inputs' or 'smaller' with"
)


def _scale(name: str, gradient: Tensor, rows: Tensor, deltas: Tensor, eps: float) -> Tensor:
    """Return what `deltas` must be multiplied with so that `deltas^T rows` is `gradient`.

    Clipping, unscaling and `reduction` scale `.grad` and not what the hooks saw. A random combination of the output units is
    enough to find the factor, and to notice that something else has happened to `.grad`. One of signs may cancel: the deltas
    of a softmax sum to 0. Random centred ones do not, and are asked where the signs leave a doubt. `eps` is that of the dtype
    in which the backward pass ran.
    """
    generator = torch.Generator(device="cpu").manual_seed(0)
    signs = torch.randint(2, (deltas.shape[-1],), generator=generator).to(deltas) * 2 - 1
    of_calls = ((deltas @ signs).unsqueeze(-2) @ rows).squeeze(-2)
    factor, rest, of_grad = _fit(of_calls, signs @ gradient)
    if eps > _FINE or not bool(rest <= _DOUBT * of_grad) or not bool(of_grad > 0):
        probes = torch.randn(_PROBES, deltas.shape[-1], generator=generator, dtype=torch.float64)
        if deltas.shape[-1] > 1:
            probes -= probes.mean(1, keepdim=True)
        probes = probes.to(deltas)
        of_calls = (deltas @ probes.mT).mT @ rows
        factor, rest, of_grad = _fit(of_calls, probes @ gradient)
        # Deltas, inputs and gradient are rounded, each relative to its own size: near a minimum the gradient is a small sum
        # of large terms.
        terms = (rows.square().sum(-1) * deltas.square().sum(-1)).sum().mul(_PROBES).sqrt() * factor.abs()
        allowed = 0.02 * of_grad + 4 * eps * (terms + of_grad + factor.abs() * of_calls.norm())
        if not bool(rest <= allowed):
            raise UnsupportedModelError(
                f"The gradient of layer {name!r} is not a multiple of what its backward pass gave (relative difference "
                f"{float(rest / of_grad.clamp_min(_TINY)):.2g}): a penalty or clipping by value changed it. Do so after "
                "projection.step(), or pass side='inputs'."
            )
    return factor


_DOUBT = 1e-3  # of the size of a combination of the gradient: differences that may not be rounding
_FINE = 1e-5  # rounding of a backward pass from which on the signs are not enough
_PROBES = 8


def _fit(of_calls: Tensor, of_grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the factor from combinations of calls to those of the gradient, what it leaves, and the size of the latter."""
    factor = (of_calls * of_grad).sum() / of_calls.square().sum().clamp_min(_TINY)
    return factor, (of_grad - factor * of_calls).norm(), of_grad.norm()


def _unsolvable(name: str) -> NonFiniteError:
    return NonFiniteError(
        f"The linear system of layer {name!r} has no finite solution; no gradient was changed. Check the inputs or raise "
        "damping.",
        where=name,
    )
