"""Layers of spiking neurons around any linear operator."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from beyondprop import _checks
from beyondprop.nn.spiking import surrogate
from beyondprop.nn.spiking.hm2bp import SWAPPED, Fire, Settings, precise, refuse_not_finite
from beyondprop.nn.spiking.neuron import CubaLIF
from beyondprop.nn.spiking.scans import Filter, Membranes

RULES = ("hm2bp", "surrogate")


class SpikingLayer(nn.Module):
    """Spikes `(N, T, ...)` through a linear operator into neurons that spike, `(N, T, ...)`.

    The whole sequence is one call, from a state of zero; nothing is kept between calls. `step` takes one step of time, with
    the state in the caller's hands.

    Args:
        op: a linear operator on `(N, ...)`, without bias: Linear, a convolution, average pooling.
        neuron: what fires.
        rule: `"hm2bp"` differentiates counts through the spikes that happened; it takes and returns the same derivative in
            every step, that by a count. `"surrogate"` is backpropagation through time with a smooth slope in the spike's place.
        lateral: strength by which each spike inhibits all other neurons of the layer one step later; for read-outs, since
            `hm2bp` then keeps a number for each pair of neurons.
        silent: (`hm2bp`) `"recover"` lets a neuron without spikes learn without a side effect; `"reference"` has that of the
            published code, which can turn its gradient around, and goes with `slope="published"`.
        silent_ratio: (`hm2bp`) what a contribution over its count is taken for where that is 0; the published code has 1.
        slope: (`hm2bp`) of a count by the membranes that fire: `"discrete"` is that of a leaky neuron in discrete time, with
            what is lost above the threshold and in refraction (`slopes.of_counts`); `"published"` is 1 / threshold, and a
            "side effect" of weights on firings that lets neurons grow without end which fire as often as refraction allows.
        injected: (`hm2bp`) so many evenly spaced spikes are put, in the backward pass alone, into a neuron that is silent and
            that the loss wants to fire; the target count, in a read-out. 0: none.
        kernel: (`hm2bp`) `"discrete"`, what is simulated; `"continuous"`, the exponentials of the published code.

    Raises:
        ValueError: for an operator with bias or one that is not linear, settings that are unknown or do not go together, input
            without a time dimension, or negative input that derivatives are to be sent to by `hm2bp`.
        NonFiniteError: if the drive of the neurons is NaN or Inf.
        RuntimeError: in an `hm2bp` backward pass, if derivatives differ from step to step.

    Source: Jin, Zhang & Li, "Hybrid macro/micro level backpropagation for training deep spiking neural networks", NeurIPS 2018,
    arXiv 1805.07866; surrogate slopes: Neftci, Mostafa & Zenke, IEEE Signal Processing Magazine 36 (2019).
    """

    def __init__(
        self,
        op: nn.Module,
        neuron: CubaLIF,
        *,
        rule: str = "hm2bp",
        lateral: float = 0.0,
        silent: str = "recover",
        silent_ratio: float = 0.1,
        slope: str = "discrete",
        injected: int = 0,
        kernel: str = "discrete",
    ) -> None:
        super().__init__()
        if _has_bias(op):
            raise ValueError(
                f"op must have no bias, which a spiking neuron does not have either, got {type(op).__name__} with one; give "
                "bias=False."
            )
        _checks.one_of("rule", rule, RULES)
        _checks.one_of("slope", slope, ("discrete", "published"))
        _checks.one_of("silent", silent, ("recover", "reference"))
        if silent == "reference" and slope != "published":
            raise ValueError(
                'silent="reference" is the published side effect of neurons without spikes; give slope="published" with it.'
            )
        _checks.one_of("kernel", kernel, ("discrete", "continuous"))
        Filter.of(neuron, kernel)  # it may have none
        self.op, self.neuron, self.rule = op, neuron, rule
        self.lateral = _checks.non_negative("lateral", lateral)
        self.silent, self.silent_ratio = silent, _checks.positive("silent_ratio", silent_ratio)
        self.slope, self.kernel = slope, kernel
        self.injected = _checks.at_least("injected", injected, 0)
        self._seen: list[object] = []  # the operator's modules when it was seen to be linear

    @property
    def derives_by_counts(self) -> bool:
        """Whether its derivatives are by counts, the same in every step."""
        return self.rule == "hm2bp"

    def forward(self, spikes: Tensor) -> Tensor:
        """Return the spikes that follow, `(N, T, ...)`, 0 or 1 in the precision of the weights.

        Raises:
            ValueError: if there is no time dimension, or no step in it, or fewer than the injected spikes need.
        """
        if spikes.ndim < 3 or not spikes.shape[1]:
            raise ValueError(
                f"Spikes must have the shape (N, T, ...) with T >= 1, the time second, got {tuple(spikes.shape)}."
            )
        most = (spikes.shape[1] - 1) // (self.neuron.refractory + 1)
        if self.rule == "hm2bp" and self.injected > most:
            raise ValueError(
                f"injected must be <= {most}, as many as {spikes.shape[1]} steps but the first have room for with "
                f"refractory={self.neuron.refractory}, got {self.injected}."
            )
        x = self._prepared(spikes)
        with torch.autocast(x.device.type, enabled=False):  # a filter over many steps loses half of them in bfloat16
            if self.rule == "surrogate":
                return surrogate.fire(x, self.op, self.neuron, self.lateral)
            settings = Settings(
                self.neuron,
                self.lateral,
                self.silent,
                self.silent_ratio,
                self.slope,
                self.injected,
                self.kernel,
                torch.is_grad_enabled(),
            )
            with SWAPPED:
                named = dict(self.op.named_parameters())
                found = Fire.apply(x, self.op, settings, tuple(named), *named.values())
                if any(isinstance(value, Tensor) for module in self.op.modules() for value in vars(module).values()):
                    self.op(x[:1, 0])  # weights that a hook makes, as pruning does, have the graph of their last call
            return found

    @torch.no_grad()
    def step(self, spikes: Tensor, state: SpikingState | None = None) -> tuple[Tensor, SpikingState]:
        """Return the spikes of one step of time, `(N, ...)` to `(N, ...)`, and the state behind it; no gradient.

        Args:
            spikes: of this step, `(N, ...)`.
            state: what the step before returned; None begins anew. It is not changed.

        Raises:
            ValueError: if the state is one of other neurons, another batch, kind or device.
        """
        if spikes.ndim < 2:
            raise ValueError(f"Spikes of a step must have the shape (N, ...), got {tuple(spikes.shape)}.")
        with torch.autocast(spikes.device.type, enabled=False):
            drive = self.op(self._prepared(spikes[:, None])[:, 0])
        flat = precise(drive.flatten(1))
        if state is None:
            state = SpikingState(Membranes(flat, self.neuron, self.lateral), (), drive.shape)
        elif not state.membranes.fits(flat, self.neuron, self.lateral) or state.shape != drive.shape:
            raise ValueError(
                f"The state is one of {state.membranes}, {tuple(state.shape)}, and this layer's are "
                f"{Membranes(flat, self.neuron, self.lateral)}, {tuple(drive.shape)}; begin a new sequence with state=None."
            )
        membranes, waiting = state.membranes.copy(), (*state.waiting, flat.clone())
        arriving = waiting[0] if len(waiting) > self.neuron.delay else None
        fired = membranes.advance(arriving, torch.empty_like(flat))
        refuse_not_finite(membranes.v, membranes.p)
        kept = waiting[1:] if arriving is not None else waiting
        # A copy: the state has the spikes, too, and the caller may write to what is returned.
        return fired.to(drive.dtype, copy=True).view(drive.shape), SpikingState(membranes, kept, drive.shape)

    def drive(self, spikes: Tensor) -> Tensor:
        """Return what the synapses send into the neurons in each step, `(T, N, neurons)`, before its delay."""
        x = self._prepared(spikes)
        with torch.autocast(x.device.type, enabled=False):
            return precise(self.op(x.flatten(0, 1)).reshape(*x.shape[:2], -1)).transpose(0, 1)

    def _prepared(self, spikes: Tensor) -> Tensor:
        """Return spikes `(N, T, ...)` in the precision of the weights; look at the operator, the first time."""
        if any(nn.parameter.is_lazy(p) for p in self.op.parameters()):
            with torch.no_grad():
                self.op(spikes[:, 0].to(torch.get_default_dtype()))
        given = spikes.dtype if spikes.is_floating_point() else torch.get_default_dtype()
        kind = next((p.dtype for p in self.op.parameters() if p.is_floating_point()), given)
        x = spikes.to(kind).contiguous()
        modules: list[object] = [(module, module.training, _has_bias(module)) for module in self.op.modules()]
        if self._seen != modules and x.numel():
            _refuse_nonlinear(self.op, x[:1, 0])
            self._seen = modules
        return x

    def extra_repr(self) -> str:
        return f"{self.neuron}, rule={self.rule!r}" + (f", lateral={self.lateral:g}" if self.lateral else "")


class SpikingState(NamedTuple):
    """What a `SpikingLayer` is left with after a step: membranes, drives that have not arrived yet, its neurons' shape."""

    membranes: Membranes
    waiting: tuple[Tensor, ...]
    shape: torch.Size


def _has_bias(module: nn.Module) -> bool:
    return getattr(module, "bias", None) is not None


@torch.no_grad()
def _refuse_nonlinear(op: nn.Module, like: Tensor) -> None:
    """Raise for a part that is known not to be linear, and if the operator of -2 x is not -2 times that of x."""
    for name, module in op.named_modules():
        biased = _has_bias(module)
        if biased or isinstance(module, (nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd)):
            raise ValueError(
                f"op must be linear, without bias, and the same at every call, and {name or 'op'} in it is a "
                f"{type(module).__name__}" + (" with a bias; give bias=False." if biased else "; leave it out.")
            )
    x = torch.cos(torch.arange(like.numel(), device=like.device)).to(like.dtype).view(like.shape)
    once, twice = precise(op(x)), precise(op(-2.0 * x))
    tolerance = 1e-3 if once.dtype == like.dtype else 5e-2
    # What is NaN or Inf is refused where it arrives, by its own name.
    if bool(((twice + 2.0 * once).abs() > tolerance * once.abs().amax()).any()):
        raise ValueError(
            f"op must be linear and without bias, and op(-2 x) is not -2 op(x) for this {type(op).__name__}; leave out biases, "
            "activations, dropout and normalisation: a layer's nonlinearity is its neurons."
        )


class SpikingSumPool2d(SpikingLayer):
    """Neurons over windows of spikes `(N, T, C, H, W)`, each driven by the sum of its window; nothing in it is trained.

    Args:
        kernel_size: width of a window, and the step from one to the next.
        neuron: what fires.
        rule: as in `SpikingLayer`.
        silent_ratio: as in `SpikingLayer`.

    Source: Jin, Zhang & Li, NeurIPS 2018, section 4; their code also divides the error below by the window.
    """

    def __init__(self, kernel_size: int, neuron: CubaLIF, *, rule: str = "hm2bp", silent_ratio: float = 0.1) -> None:
        _checks.at_least("kernel_size", kernel_size, 1)
        super().__init__(nn.AvgPool2d(kernel_size, divisor_override=1), neuron, rule=rule, silent_ratio=silent_ratio)
