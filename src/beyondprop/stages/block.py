"""The stage without closed forms: any module or run of modules, differentiated by autograd inside the stage only."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from beyondprop.errors import UnsupportedModelError
from beyondprop.nn.binary import Threshold
from beyondprop.nn.functional import evaluation_mode
from beyondprop.nn.structure import is_costly
from beyondprop.stages.stage import Memo, Pullback, Stage, add_to_gradient, too_few_values
from beyondprop.stages.weight_transport import Transport, check_met, counterpart


class BlockStage(Stage):
    """Any run of modules as one stage, differentiated by autograd inside the stage only."""

    def __init__(self, name: str, modules: Sequence[tuple[str, nn.Module]]) -> None:
        super().__init__(name, modules)
        self._leaves = [m for module in self.modules for m in module.modules()]
        self.norms = [m for m in self._leaves if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        self.is_stochastic = any(not is_deterministic(m) for m in self._leaves)
        # In backpropagation a unit's delta is minus what comes back; here, deltas come as they are.
        self.takes_targets = any(isinstance(m, Threshold) for m in self._leaves)
        # Whether its pullback can be differentiated, by its modules' modes: fused kernels may serve one only.
        self.has_second_derivative: dict[tuple[bool, ...], bool] = {}
        self._is_checked = any(map(is_costly, self.modules))  # the check is another run
        self._is_transport_checked = False

    @property
    def couples_batch(self) -> bool:
        return any(m.training or not m.track_running_stats for m in self.norms)

    @property
    def derives_by_counts(self) -> bool:
        """Whether a module has derivatives by counts of spikes alone, the same in every step of time."""
        return any(getattr(m, "derives_by_counts", False) for m in self._leaves)

    @property
    def modes(self) -> tuple[bool, ...]:
        """Which of its modules are in training mode."""
        return tuple(m.training for m in self._leaves)

    def record(self, z: Tensor, *, push: bool = False) -> Pullback:
        """Run the stage on `z`.

        Raises:
            UnsupportedModelError: if the stage overwrites its input, mixes samples, or returns no tensor of the batch.
            ValueError: if a channel's only value is to be normalised over the batch.
        """
        state = generator(z.device).get_state() if self.is_stochastic else None
        pullback = BlockPullback(self, z, push, state)
        self.check_samples_are_apart(z, state)
        return pullback

    def at(self, z: Tensor, random_state: Tensor | None, *, push: bool = False) -> BlockPullback:
        """Return the stage once more, with the masks of `random_state` and the statistics as they are."""
        with self.replayed(random_state, z.device):
            return BlockPullback(self, z, push, random_state)

    def run_differentiably(self, z: Tensor) -> Tensor:
        """Apply the modules such that what goes down goes through `feedback`, where there is any."""
        if not self.feedback:
            return self.run(z)
        for weight, feedback in self.feedback.items():
            self.feedback[weight] = counterpart(weight, feedback)
        with Transport(self.feedback) as transport:
            output = self.run(z)
        if not self._is_transport_checked:
            check_met(self.name, self._leaves, transport, output)
            self._is_transport_checked = True
        return output

    def run(self, z: Tensor) -> Tensor:
        """Apply the modules to a leaf, naming the stage where they refuse."""
        version = z._version
        try:
            output = self.forward(z)
        except RuntimeError as error:
            if "in-place operation" in str(error) or "modified inplace" in str(error):
                raise _in_place(self.name) from error
            raise
        except ValueError as error:
            if "more than 1 value per channel" in str(error):  # torch names no module
                raise too_few_values(self.name) from error
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

    @contextmanager
    def replayed(self, state: Tensor | None, device: torch.device) -> Iterator[None]:
        """Return a context in which the stage draws the masks of `state` and leaves its statistics alone."""
        # Looked up now: moving a model to another device or dtype replaces its buffers.
        saved = [(buffer, buffer.clone()) for module in self.modules for buffer in module.buffers()]
        present = None if state is None else generator(device).get_state()
        if state is not None:
            generator(device).set_state(state)
        try:
            yield
        finally:
            for buffer, value in saved:
                # Through .data: the first run's graph has saved the buffer, and the value that it saw comes back.
                buffer.data.copy_(value)
            if present is not None:
                generator(device).set_state(present)

    def check_samples_are_apart(self, z: Tensor, random_state: Tensor | None) -> None:
        """Raise `UnsupportedModelError`, at the first batch, if a sample's output depends on another's input."""
        if self._is_checked or z.shape[0] < 2 or not z.is_floating_point():
            return
        self._is_checked = True
        if any(not m.track_running_stats for m in self.norms):
            return  # these mix samples in either mode
        # Batch statistics mix samples by right; anything else must not.
        with evaluation_mode(*self.norms):
            z = z.detach().requires_grad_()
            with torch.enable_grad(), self.replayed(random_state, z.device):
                output = self.run(z)
            if not output.requires_grad:
                return
            cotangent = torch.zeros_like(output)
            one = cotangent[0, :1] if self.derives_by_counts else cotangent[0]  # the same in every step of time
            cotangent[0] = torch.linspace(0.5, 1.5, one.numel(), device=z.device).view_as(one)
            (gradient,) = torch.autograd.grad(output, z, cotangent, allow_unused=True)
        # NaN is no sign of mixing: 0 * NaN. The step refuses it by itself.
        if gradient is not None and bool((gradient[1:].nan_to_num(0.0) != 0).any()):
            raise UnsupportedModelError(
                f"Stage {self.name!r} mixes the samples of a batch: the first sample's output depends on other samples' "
                "input. Only BatchNorm may do that; is the batch the first dimension everywhere (batch_first=True)?"
            )


class BlockPullback(Pullback):
    """A `BlockStage` at one input: holds the local graph until the step is over.

    The graph is held by its two ends, not by the tensors there: an input or output that no operation saved is free as soon
    as nobody else uses it, as in plain backpropagation.
    """

    def __init__(self, stage: BlockStage, z: Tensor, push: bool, random_state: Tensor | None) -> None:
        self.stage = self.block = stage
        if push and stage.derives_by_counts:
            raise UnsupportedModelError(
                f"Stage {stage.name!r} has a SpikingLayer with rule='hm2bp', which has derivatives by counts and no product "
                "with a tangent; take rule='surrogate'."
            )
        self.random_state = random_state
        self.weights = [p for p in stage.parameters if p.requires_grad]
        known = stage.has_second_derivative.get(stage.modes) if push else None
        self._pushes = push
        self._makes_dual = push and known is not False
        with torch.enable_grad():
            start = _Start.apply(z, z.new_zeros(0).requires_grad_()) if z.is_floating_point() else z
            end = stage.run_differentiably(start)
        self._start = get_gradient_edge(start) if z.is_floating_point() else None
        self._end = get_gradient_edge(end) if end.requires_grad else None
        self.input_shape = z.shape
        self._shapes = z.shape, end.shape
        self._like = z.new_empty(0), end.detach().new_empty(0)
        self.input = z
        self.output = end.detach().to(z.dtype) if z.is_floating_point() else end.detach()
        # Without a second derivative, tangents are pushed by a difference of two runs, which start from the input.
        self._kept = z if push and not known else None
        self._was_pulled = False
        self._own: Memo[list[Tensor | None]] = Memo()
        self._dual: tuple[Tensor, Tensor] | None = None

    def _gradients(self, cotangent: Tensor, ends: Sequence[Any], *, create_graph: bool = False) -> list[Tensor | None]:
        if self._end is None or not ends:
            return [None] * len(ends)
        flip = self.block.takes_targets
        found = torch.autograd.grad(
            self._end,
            ends,
            cotangent.neg() if flip else cotangent,
            retain_graph=True,
            create_graph=create_graph,
            allow_unused=True,
        )
        return [g.neg() if flip and g is not None else g for g in found]

    def _at_input(self, gradient: Tensor | None) -> Tensor:
        if gradient is None:
            return self._like[0].new_zeros(self._shapes[0])
        return gradient.contiguous() if 0 in gradient.stride() else gradient  # expanded, as the derivative of a sum

    def __call__(self, cotangent: Tensor) -> Tensor:
        # The first call keeps the weights' gradient, too, so that one pass serves both.
        dual = cotangent.to(self._like[1].dtype)
        ends = [] if self._start is None else [self._start]
        if self._was_pulled:
            return self._at_input(next(iter(self._gradients(dual, ends)), None))
        if self._makes_dual:
            dual = dual.clone().requires_grad_()
        found = self._gradients(dual, [*ends, *self.weights], create_graph=self._makes_dual)
        gradient = self._at_input(found[0] if ends else None)
        if self._makes_dual:
            # Not copied: where a push would need what the caller has overwritten, autograd says so.
            self._dual = dual, gradient
            gradient = gradient.detach()
        self._was_pulled = True
        self._own.keep(cotangent, [None if g is None else g.detach() for g in found[len(ends) :]])
        return gradient

    def push(self, tangent: Tensor, *, gated: bool = False) -> Tensor:
        # The transpose of the pullback, by differentiating it with respect to its cotangent.
        stage = self.block
        nothing = tangent.new_zeros(self._shapes[1])
        if not self._pushes:
            raise RuntimeError(
                f"Stage {stage.name!r} was recorded without tangents to push: set pushes = True on the credit."
            )
        if not self._makes_dual:
            return self._difference(tangent)
        if self._dual is None:
            self(nothing)
        if self._dual is None or not self._dual[1].requires_grad:
            return nothing
        dual, gradient = self._dual
        try:
            (image,) = torch.autograd.grad(gradient, dual, tangent, retain_graph=True, allow_unused=True)
        except RuntimeError as error:
            if self._kept is None or not any(words in str(error) for words in _NO_SECOND_DERIVATIVE):
                raise
            stage.has_second_derivative[stage.modes] = False
            return self._difference(tangent)
        # A backward that differentiates once is cut off without an error: the image is None.
        stage.has_second_derivative[stage.modes] = image is not None
        return self._difference(tangent) if image is None else image.to(tangent.dtype)

    @torch.no_grad()
    def _difference(self, tangent: Tensor) -> Tensor:
        """`J tangent` by two more forward passes, where an operation has no second derivative (fused attention)."""
        assert self._kept is not None
        z = self._kept
        norm, size = (t.flatten(1).norm(dim=1).view(-1, *([1] * (z.ndim - 1))) for t in (tangent, z))
        # Sample by sample: tangents differ by magnitudes.
        unit = tangent / norm.clamp_min(torch.finfo(tangent.dtype).tiny)
        step = torch.finfo(tangent.dtype).eps ** (1 / 3) * (1 + size)
        with self.block.replayed(self.random_state, z.device):
            above = self.block.run(z + step * unit)
        with self.block.replayed(self.random_state, z.device):
            below = self.block.run(z - step * unit)
        factor = (norm / (2 * step)).view(-1, *([1] * (above.ndim - 1)))
        return (above - below).to(tangent.dtype) * factor

    def add_gradients(self, cotangent: Tensor, factor: float) -> None:
        for p, g in zip(self.weights, self._weight_gradients(cotangent), strict=True):
            if g is not None:
                add_to_gradient(p, g, factor)

    def take_gradients(self, cotangent: Tensor) -> list[Tensor | None]:
        """Return the weights' gradients for a cotangent, by weight, and keep none of them."""
        found = self._weight_gradients(cotangent)
        self._own = Memo()
        return found

    def _weight_gradients(self, cotangent: Tensor) -> list[Tensor | None]:
        return self._own.find(cotangent) or self._gradients(cotangent.to(self._like[1].dtype), self.weights)

    def at(self, z: Tensor, *, push: bool = False) -> BlockPullback:
        """Return the stage at another input; `push` says whether tangents will be pushed there, too."""
        return self.block.at(z, self.random_state, push=push)


class _Start(torch.autograd.Function):
    """The identity at the lower end of a local graph; its node stands for the input without holding it."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, anchor: Tensor) -> Tensor:
        """Return a view of `z` that requires a gradient because `anchor` does."""
        return z.view_as(z)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, None]:
        """End here: gradients are taken at this node."""
        return None, None


_NO_SECOND_DERIVATIVE = ("not implemented", "not differentiable", "once_differentiable", "twice")


def generator(device: torch.device) -> torch.Generator:
    """Return the generator that modules on this device draw from."""
    if device.type == "cpu":
        return torch.default_generator
    return getattr(torch, device.type).default_generators[device.index]


_DRAWING = (
    *(nn.modules.dropout._DropoutNd, nn.FractionalMaxPool2d, nn.FractionalMaxPool3d),
    *(nn.MultiheadAttention, nn.RNNBase, nn.RReLU),
)


def is_deterministic(module: nn.Module) -> bool:
    """Return whether a module is known to draw no random number."""
    # A module of torch.nn draws only if it is one of these; a user's own module may call functional dropout.
    return type(module).__module__.startswith("torch.nn.") and not isinstance(module, _DRAWING)


def _in_place(name: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"Stage {name!r} changes its input in place, which is the code of the stage below: use inplace=False, or an "
        "operation that returns a new tensor."
    )
