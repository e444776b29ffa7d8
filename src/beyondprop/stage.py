"""A stage: one local map of the network, and its linearisation at one input.

`stage.record(z)` runs the stage on a detached input and returns a `Pullback`: the output, a function from an output
cotangent to an input cotangent, its transpose for tangents, and the weights' gradient. No autograd graph crosses a stage.

Two kinds: `AffineStage` has closed forms (Linear or Conv behind reshapes and one common nonlinearity); `BlockStage` is any
other module or run of modules, differentiated locally by autograd.
"""

from __future__ import annotations

import abc
import copy
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from beyondprop.errors import UnsupportedModelError


class Pullback(abc.ABC):
    """A stage at one input.

    Attributes:
        stage: the stage.
        input: the detached input `(N, ...)`.
        output: the detached output `(N, ...)`.
    """

    stage: Stage
    input: Tensor
    output: Tensor

    @abc.abstractmethod
    def __call__(self, cotangent: Tensor) -> Tensor:
        """Return `J^T cotangent`, shape of the input; a new tensor, the caller's to overwrite."""

    @abc.abstractmethod
    def push(self, tangent: Tensor, *, gated: bool = False) -> Tensor:
        """Return `J tangent`, shape of the output.

        `gated` says that the tangent came out of this pullback, so that a slope of 0 or 1 need not be applied again.
        """

    @abc.abstractmethod
    def add_gradients(self, cotangent: Tensor, factor: float) -> None:
        """Add `factor * (d output / d weights)^T cotangent`, summed over the batch, to the weights' `.grad`."""

    @abc.abstractmethod
    def at(self, z: Tensor) -> Pullback:
        """Return the same stage at another input: same dropout masks, running statistics untouched."""

    @abc.abstractmethod
    def relinearize(self, before: Mapping[nn.Parameter, Tensor]) -> tuple[Pullback, Tensor]:
        """Return the stage at the same input under its present weights, and how its output changed.

        `before` holds the weights at recording time: closed forms multiply the weights' change, so that a small change is
        not lost in the difference of two outputs.
        """


class Stage(abc.ABC):
    """One local map `z_{l-1} -> z_l` of a chain.

    Attributes:
        name: dotted name, in the user's model, of the module that carries the weights.
        modules: the modules it applies, in order.
        parameters: its parameters.
    """

    def __init__(self, name: str, modules: Sequence[tuple[str, nn.Module]]) -> None:
        self.name = name
        self.names = [n for n, _ in modules]
        self.modules = [m for _, m in modules]
        self.parameters = list(dict.fromkeys(p for m in self.modules for p in m.parameters()))
        self._gradients: dict[nn.Parameter, Tensor] = {}

    @abc.abstractmethod
    def record(self, z: Tensor, *, push: bool = False) -> Pullback:
        """Run the stage on `z` and return its linearisation there; `push` says whether tangents will be pushed."""

    @property
    def is_trainable(self) -> bool:
        """Whether any of its parameters requires a gradient."""
        return any(p.requires_grad for p in self.parameters)

    @property
    def couples_batch(self) -> bool:
        """Whether one sample's output depends on the others: normalisation over the batch, in training mode."""
        return False

    def forward(self, z: Tensor) -> Tensor:
        """Apply the stage's modules as the user's model would."""
        for module in self.modules:
            z = module(z)
        return z

    def gradient(self, parameter: nn.Parameter) -> tuple[Tensor, float]:
        """Return the parameter's `.grad` and the factor to keep it with: 1 to add to it, 0 if its content is stale.

        Buffers outlive a step, so that no gradient is allocated twice.
        """
        if parameter.grad is not None:
            return parameter.grad, 1.0
        buffer = self._gradients.get(parameter)
        if buffer is None or buffer.device != parameter.device or buffer.dtype != parameter.dtype:
            buffer = self._gradients[parameter] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        parameter.grad = buffer
        return buffer, 0.0

    def __deepcopy__(self, memo: dict[int, object]) -> Stage:
        copied = object.__new__(type(self))
        memo[id(self)] = copied
        for name, value in vars(self).items():
            # Gradient buffers are one rule's own; a copy starts without.
            setattr(copied, name, {} if name == "_gradients" else copy.deepcopy(value, memo))
        return copied

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r}: {' -> '.join(type(m).__name__ for m in self.modules)})"


class BlockStage(Stage):
    """Any run of modules as one stage, differentiated by autograd inside the stage only."""

    def __init__(self, name: str, modules: Sequence[tuple[str, nn.Module]]) -> None:
        super().__init__(name, modules)
        leaves = [m for module in self.modules for m in module.modules()]
        self.norms = [m for m in leaves if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        self.buffers = [b for module in self.modules for b in module.buffers()]
        self.is_stochastic = any(not _is_deterministic(m) for m in leaves)
        self._is_checked = False

    @property
    def couples_batch(self) -> bool:
        """See `Stage.couples_batch`."""
        return any(m.training or not m.track_running_stats for m in self.norms)

    def record(self, z: Tensor, *, push: bool = False) -> Pullback:
        """See `Stage.record`.

        Raises:
            UnsupportedModelError: if the stage overwrites its input, mixes samples, or returns no tensor of the batch.
            ValueError: if one sample is to be normalised over the batch.
        """
        if z.shape[0] == 1 and any(m.training for m in self.norms):
            raise ValueError(
                f"Stage {self.name!r} normalises over the batch in training mode, and the batch has 1 sample: "
                "2 or more are needed, or model.eval()."
            )
        state = _random_state(z.device) if self.is_stochastic else None
        pullback = BlockPullback(self, z, push, state)
        if not self._is_checked and z.shape[0] > 1 and z.is_floating_point():
            self._check_samples_are_apart(pullback)
            self._is_checked = True
        return pullback

    def run(self, z: Tensor) -> Tensor:
        """Apply the modules to a leaf, naming the stage where they refuse."""
        version = z._version
        try:
            output = self.forward(z)
        except RuntimeError as error:
            if "in-place operation" in str(error):
                raise _in_place(self.name) from error
            raise
        if z._version != version:
            raise _in_place(self.name)
        if not isinstance(output, Tensor) or output.ndim == 0 or output.shape[0] != z.shape[0]:
            got = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise UnsupportedModelError(
                f"Stage {self.name!r} maps a batch of {z.shape[0]} to {got}: a stage must return one tensor whose first "
                "dimension is the batch."
            )
        return output

    @torch.no_grad()
    def replayed(self, state: Tensor | None, device: torch.device) -> _Replay:
        """Return a context in which the stage draws the masks of `state` and leaves its statistics alone."""
        return _Replay(self.buffers, state, device)

    def _check_samples_are_apart(self, pullback: BlockPullback) -> None:
        modes = [m.training for m in self.norms]
        for m in self.norms:  # batch statistics mix samples by right; anything else must not
            m.training = False
        try:
            z = pullback.input.detach().requires_grad_()
            with torch.enable_grad(), self.replayed(pullback.random_state, z.device):
                output = self.run(z)
            if not output.requires_grad:
                return
            cotangent = torch.zeros_like(output)
            cotangent[0] = torch.linspace(0.5, 1.5, output[0].numel(), device=z.device).view_as(output[0])
            (gradient,) = torch.autograd.grad(output, z, cotangent, allow_unused=True)
        finally:
            for m, mode in zip(self.norms, modes, strict=True):
                m.training = mode
        if gradient is not None and bool((gradient[1:] != 0).any()):
            raise UnsupportedModelError(
                f"Stage {self.name!r} mixes the samples of a batch: the first sample's output depends on other samples' "
                "input. Only BatchNorm may do that; is the batch the first dimension everywhere (batch_first=True)?"
            )


class BlockPullback(Pullback):
    """A `BlockStage` at one input: holds the local graph until the step is over."""

    def __init__(self, stage: BlockStage, z: Tensor, push: bool, random_state: Tensor | None) -> None:
        self.stage = self.block = stage
        self.random_state = random_state
        self._push = push
        self.weights = [p for p in stage.parameters if p.requires_grad]
        self._leaf = z.detach().requires_grad_(z.is_floating_point())
        with torch.enable_grad():
            self._graph = stage.run(self._leaf)
        self.input = z
        self.output = self._graph.detach().to(z.dtype if z.is_floating_point() else self._graph.dtype)
        self._last: tuple[Tensor, list[Tensor | None]] | None = None
        self._dual: tuple[Tensor, Tensor] | None = None

    def __call__(self, cotangent: Tensor) -> Tensor:
        """See `Pullback.__call__`; the first call keeps the weights' gradient, too, so that one pass serves both."""
        if not self._graph.requires_grad:
            return torch.zeros_like(self._leaf)
        if self._last is not None:
            return self._input_gradient(cotangent)
        dual = cotangent.detach().to(self._graph.dtype)
        if self._push:
            dual = dual.clone().requires_grad_()
        grads = torch.autograd.grad(
            self._graph,
            [self._leaf, *self.weights],
            dual,
            retain_graph=True,
            create_graph=self._push,
            allow_unused=True,
        )
        gradient = grads[0] if grads[0] is not None else torch.zeros_like(self._leaf)
        if self._push:
            self._dual = (dual, gradient)
            gradient = gradient.clone()
        self._last = (cotangent, [g.detach() if g is not None else None for g in grads[1:]])
        return gradient.detach()

    def _input_gradient(self, cotangent: Tensor) -> Tensor:
        (gradient,) = torch.autograd.grad(
            self._graph, self._leaf, cotangent.to(self._graph.dtype), retain_graph=True, allow_unused=True
        )
        return torch.zeros_like(self._leaf) if gradient is None else gradient

    def push(self, tangent: Tensor, *, gated: bool = False) -> Tensor:
        """See `Pullback.push`: the transpose of the pullback, by differentiating it with respect to its cotangent."""
        del gated
        if self._dual is None:
            self(torch.zeros_like(self.output))
        dual, gradient = self._dual or (self.output, self.output)
        if not gradient.requires_grad:
            return torch.zeros_like(self.output)
        try:
            (image,) = torch.autograd.grad(gradient, dual, tangent, retain_graph=True, allow_unused=True)
        except RuntimeError as error:
            if "not implemented" not in str(error) and "not differentiable" not in str(error):
                raise
            return self._difference(tangent)
        return torch.zeros_like(self.output) if image is None else image.to(self.output.dtype)

    @torch.no_grad()
    def _difference(self, tangent: Tensor) -> Tensor:
        """`J tangent` by one more forward pass, where an operation has no second derivative (fused attention)."""
        norm = tangent.norm().clamp_min(torch.finfo(tangent.dtype).tiny)
        step = torch.finfo(tangent.dtype).eps ** (1 / 3) * (1 + self.input.norm()) / norm
        with self.block.replayed(self.random_state, self.input.device):
            above = self.block.run(self.input + step * tangent)
        with self.block.replayed(self.random_state, self.input.device):
            below = self.block.run(self.input - step * tangent)
        return (above - below).to(self.output.dtype) / (2 * step)

    def add_gradients(self, cotangent: Tensor, factor: float) -> None:
        """See `Pullback.add_gradients`."""
        if not self.weights:
            return
        if self._last is not None and self._last[0] is cotangent:
            grads = self._last[1]
        else:
            grads = torch.autograd.grad(
                self._graph,
                self.weights,
                cotangent.to(self._graph.dtype),
                retain_graph=True,
                allow_unused=True,
            )
        for p, g in zip(self.weights, grads, strict=True):
            if g is not None:
                grad, keep = self.block.gradient(p)
                if keep:
                    grad.add_(g, alpha=factor)
                else:
                    torch.mul(g, factor, out=grad)

    def at(self, z: Tensor) -> BlockPullback:
        """See `Pullback.at`."""
        with self.block.replayed(self.random_state, z.device):
            return BlockPullback(self.block, z, self._push, self.random_state)

    def relinearize(self, before: Mapping[nn.Parameter, Tensor]) -> tuple[Pullback, Tensor]:
        """See `Pullback.relinearize`."""
        del before
        fresh = self.at(self.input)
        return fresh, fresh.output - self.output


class _Replay:
    """Restores the random state of the first run on entry; the present one, and all buffers, on exit."""

    def __init__(self, buffers: list[Tensor], state: Tensor | None, device: torch.device) -> None:
        self.buffers, self.state, self.device = buffers, state, device

    def __enter__(self) -> None:
        self.saved = [b.clone() for b in self.buffers]
        if self.state is not None:
            self.present = _random_state(self.device)
            _set_random_state(self.device, self.state)

    def __exit__(self, *args: object) -> None:
        with torch.no_grad():
            for buffer, saved in zip(self.buffers, self.saved, strict=True):
                # Through .data: the first run's graph has saved the buffer, and the value that it saw comes back.
                buffer.data.copy_(saved)
        if self.state is not None:
            _set_random_state(self.device, self.present)


def _random_state(device: torch.device) -> Tensor:
    if device.type == "cpu":
        return torch.get_rng_state()
    return getattr(torch, device.type).get_rng_state(device)


def _set_random_state(device: torch.device, state: Tensor) -> None:
    if device.type == "cpu":
        torch.set_rng_state(state)
    else:
        getattr(torch, device.type).set_rng_state(state, device)


_DRAWING = (nn.modules.dropout._DropoutNd, nn.MultiheadAttention, nn.RNNBase, nn.RReLU)


def _is_deterministic(module: nn.Module) -> bool:
    # A module of torch.nn draws only if it is one of these; a user's own module may call functional dropout.
    return type(module).__module__.startswith("torch.nn.") and not isinstance(module, _DRAWING)


def _in_place(name: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"Stage {name!r} changes its input in place, which is the code of the stage below: use inplace=False, or an "
        "operation that returns a new tensor."
    )
