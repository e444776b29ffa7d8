"""A stage: one local map of the network, and its linearisation at one input.

`stage.record(z)` runs the stage on a detached input and returns a `Pullback`: the output, a function from an output
cotangent to an input cotangent, its transpose for tangents, and the weights' gradient. No autograd graph crosses a stage.

Four kinds: `affine.AffineStage` has closed forms (Linear or Conv behind reshapes and one common nonlinearity), and so has
`pipeline.PipelineStage` (a run of such layers with pooling, dropout, normalisation and residual blocks);
`recurrent.RecurrentStage` has a code for every time step; `block.BlockStage` is any other module or run of modules,
differentiated locally by autograd.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from beyondprop.stages.weight_transport import counterpart

Found = TypeVar("Found")

NORMS = (
    nn.modules.batchnorm._NormBase,  # BatchNorm and InstanceNorm
    nn.LayerNorm,
    nn.GroupNorm,
    nn.LocalResponseNorm,
    nn.RMSNorm,
)
"""Layers that normalise: their weights stand for no map of their own."""


class Pullback(abc.ABC):
    """A stage at one input.

    Attributes:
        stage: the stage.
        input_shape: shape of the input.
        input: the detached input `(N, ...)`; there while codes are kept, see `Chain.record`.
        output: the detached output `(N, ...)`; likewise.
        has_codes: whether there are codes inside, by whose deltas one of the output is pulled down.
    """

    has_codes: bool = False
    stage: Stage
    input_shape: torch.Size
    input: Tensor
    output: Tensor

    def __getattr__(self, name: str) -> Any:
        if name in ("input", "output"):
            raise AttributeError(
                f"The {name} of stage {self.stage.name!r} was not kept; set needs_codes = True on the credit."
            )
        raise AttributeError(name)

    def forget(self, name: str) -> None:
        """Drop `input` or `output`, so that the code's memory is free before the step ends."""
        vars(self).pop(name, None)

    @property
    def is_closed_form(self) -> bool:
        """Whether tangents are pushed without autograd, each sample by itself; default: no."""
        return False

    @property
    def head_shape(self) -> torch.Size:
        """Shape of what the stage hands to its first weights; default: of its input."""
        return self.input_shape

    def pull_head(self, cotangent: Tensor) -> Tensor:
        """Return the input's cotangent for one of what the stage hands to its first weights, which it may overwrite.

        Default: that is the input itself.
        """
        return cotangent

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

    def relinearize(self, before: Mapping[nn.Parameter, Tensor]) -> tuple[Pullback, Tensor]:
        """Return the stage at the same input under its present weights, and how its output changed.

        `before` holds the weights at recording time: closed forms multiply the weights' change, so that a small change is
        not lost in the difference of two outputs. Default: by another run at the same input.
        """
        torch.clear_autocast_cache()  # it holds casts of the old weights
        fresh = self.at(self.input)
        return fresh, fresh.output - self.output


class Stage(abc.ABC):
    """One local map `z_{l-1} -> z_l` of a chain.

    Attributes:
        name: dotted name, in the user's model, of the module that carries the weights.
        modules: the modules it applies, in order.
        parameters: its parameters.
        is_block: whether it has several layers of weights, as a residual block has: then its gain may be of any size.
        feedback: tensors that its pullbacks use in place of weights, their shapes the same; the weights' own gradients do
            not. Empty: the pullback is the transposed Jacobian.
    """

    def __init__(self, name: str, modules: Sequence[tuple[str, nn.Module]]) -> None:
        self.name = name
        self.names = [n for n, _ in modules]
        self.modules = [m for _, m in modules]
        self.parameters = list(dict.fromkeys(p for m in self.modules for p in m.parameters()))
        self.is_block = sum(_weights(m) for m in self.modules) > 1
        self.feedback: dict[nn.Parameter, Tensor] = {}

    @abc.abstractmethod
    def record(self, z: Tensor, *, push: bool = False) -> Pullback:
        """Run the stage on `z` and return its linearisation there; `push` says whether tangents will be pushed."""

    def backward_weight(self, weight: nn.Parameter) -> Tensor:
        """Return what a pullback uses in place of a weight: its feedback where there is one, else the weight."""
        if not self.feedback or weight not in self.feedback:
            return weight
        found = self.feedback[weight] = counterpart(weight, self.feedback[weight])
        return found

    @property
    def is_trainable(self) -> bool:
        """Whether any of its parameters requires a gradient."""
        return any(p.requires_grad for p in self.parameters)

    @property
    def couples_batch(self) -> bool:
        """Whether one sample's output depends on the others: normalisation over the batch, in training mode; default: no."""
        return False

    def forward(self, z: Tensor) -> Tensor:
        """Apply the stage as the user's model would; default: its modules, one after the other."""
        for module in self.modules:
            z = module(z)
        return z

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r}: {' -> '.join(type(m).__name__ for m in self.modules)})"


class Memo(Generic[Found]):
    """What was found for one cotangent, as long as that is the same tensor with the same values."""

    def __init__(self) -> None:
        self._kept: tuple[Tensor, int, Found] | None = None

    def keep(self, cotangent: Tensor, found: Found) -> None:
        """Keep what was found for `cotangent`, in place of anything kept before."""
        self._kept = cotangent, cotangent._version, found

    def find(self, cotangent: Tensor) -> Found | None:
        """Return what was found for `cotangent`, or None."""
        kept = self._kept
        return kept[2] if kept is not None and kept[0] is cotangent and kept[1] == cotangent._version else None


def _weights(module: Any) -> int:
    """Return how many weights of two or more dimensions a module has; several tensors that make up one weight are one."""
    if isinstance(module, NORMS):
        return 0
    own = sum(p.ndim > 1 for p in module.parameters(recurse=False))
    if is_parametrized(module):
        return own + sum(any(p.ndim > 1 for p in made.parameters()) for made in module.parametrizations.values())
    return own + sum(_weights(m) for m in module.children())


def too_few_values(name: str) -> ValueError:
    """Return the error for a batch that has one value for a channel, which cannot be normalised over the batch."""
    return ValueError(
        f"Stage {name!r} normalises over the batch in training mode, and the batch has 1 value for each channel: 2 or more "
        "samples are needed, or model.eval()."
    )


def add_to_gradient(parameter: nn.Parameter, value: Tensor, factor: float) -> None:
    """Add `factor * value` to the parameter's `.grad`, which has the parameter's memory layout."""
    if parameter.grad is None:
        gradient = (value * factor).to(parameter.dtype)
        if gradient.stride() != parameter.stride():  # fused optimizers walk both in the order of memory
            gradient = torch.empty_like(parameter).copy_(gradient)
        parameter.grad = gradient
    else:
        parameter.grad.add_(value, alpha=factor)
