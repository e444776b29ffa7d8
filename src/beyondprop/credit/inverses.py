"""Small modules that map a stage's output back to its input: what target propagation learns."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from beyondprop.errors import UnsupportedModelError
from beyondprop.nn.activations import closed_form
from beyondprop.stages.reversible import ReversibleStage
from beyondprop.stages.stage import NORMS, Stage

InverseFactory = Callable[[Stage, Stage], nn.Module]
"""Takes a stage's lower neighbour and the stage; returns the module from the stage's output to its input, `(N, ...)` both."""

_CONVS: dict[type[nn.Module], tuple[Callable[..., nn.Module], str]] = {
    nn.Conv1d: (nn.ConvTranspose1d, "linear"),
    nn.Conv2d: (nn.ConvTranspose2d, "bilinear"),
    nn.Conv3d: (nn.ConvTranspose3d, "trilinear"),
}


def mirror(below: Stage, stage: Stage) -> nn.Module:
    """Return one Linear or transposed convolution, then a copy of the nonlinearity that the stage's input went through.

    A coupling has an inverse that is exact and learns nothing: `Undone`.

    Weights start orthogonal, biases at 0. A convolution's pooling is undone by interpolation. The nonlinearity is the last
    one of the stage below where its output is what came out of it (pooling and dropout may follow), none where codes are
    pre-activations.

    Args:
        below: the stage whose output is to be found.
        stage: the stage to be inverted; it must have one Linear or Conv, and else only normalisations have weights.

    Raises:
        UnsupportedModelError: if the stage has another form; the message names it and the way out.
    """
    if isinstance(stage, ReversibleStage):
        return Undone(stage)
    modules = stage.modules
    carriers = [m for m in modules if list(m.parameters()) and not isinstance(m, NORMS)]
    affine = carriers[0] if len(carriers) == 1 else None
    inverse: list[nn.Module] = []
    if type(affine) is nn.Linear:
        if any(isinstance(m, nn.Flatten) for m in modules[modules.index(affine) :]):
            inverse.append(nn.Unflatten(1, (-1, affine.out_features)))
        inverse.append(_orthogonal(nn.Linear(affine.out_features, affine.in_features)))
    elif affine is not None and type(affine) in _CONVS:
        folded = [m for m in modules[: modules.index(affine)] if isinstance(m, nn.Unflatten)]
        inverse.append(TransposedConvolution(affine, tuple(folded[-1].unflattened_size)[1:] if folded else None))
    else:
        kinds = ", ".join(type(m).__name__ for m in carriers)
        raise UnsupportedModelError(
            f"Stage {stage.name!r} ({kinds}) has no inverse by default: one Linear or Conv a stage has. Pass "
            "inverse=factory, where factory(below, stage) returns a module from the stage's output to its input."
        )
    activation = _last_activation(below)
    if activation is not None:
        inverse.append(copy.deepcopy(activation))
    return nn.Sequential(*inverse) if len(inverse) > 1 else inverse[0]


class Undone(nn.Module):
    """A coupling backwards, without weights of its own: its functions are the stage's.

    Args:
        stage: the coupling's stage.
    """

    stage: ReversibleStage

    def __init__(self, stage: ReversibleStage) -> None:
        super().__init__()
        self.__dict__["stage"] = stage  # its weights are the model's

    def forward(self, h: Tensor) -> Tensor:
        """Map the coupling's output to its input, running statistics as they are.

        Raises:
            UnsupportedModelError: if a function draws random numbers, which are not those of the way up.
        """
        stage = self.stage
        if stage.is_stochastic and stage.coupling.training:
            raise UnsupportedModelError(
                f"Stage {stage.name!r} draws random numbers, and its inverse would draw others: take out dropout, or pass "
                "inverse=factory."
            )
        with stage.replayed(None, h.device):
            found = stage.coupling.inverse(h)
        assert isinstance(found, Tensor)
        return found


class TransposedConvolution(nn.Module):
    """The transposed convolution of a Conv, with interpolation where the spatial sizes need it.

    Args:
        conv: the convolution whose output comes in, after pooling or not.
        size: spatial size of its input where an `nn.Unflatten(1, (channels, *size))` is in front of it: the result is
            flattened again.

    Raises:
        UnsupportedModelError: if that `nn.Unflatten` leaves its size open.
    """

    def __init__(self, conv: Any, size: tuple[int, ...] | None = None) -> None:
        super().__init__()
        if any(n < 0 for n in size or ()):
            raise UnsupportedModelError(
                f"nn.Unflatten in front of a convolution must name its size for an inverse, got {size}."
            )
        self.size = size
        kind, self.mode = _CONVS[type(conv)]
        padding = conv.padding
        if isinstance(padding, str):
            same = padding == "same"
            padding = [d * (k - 1) // 2 if same else 0 for k, d in zip(conv.kernel_size, conv.dilation, strict=True)]
        given = {"stride": conv.stride, "padding": padding, "groups": conv.groups, "dilation": conv.dilation}
        self.transposed = _orthogonal(kind(conv.out_channels, conv.in_channels, conv.kernel_size, **given))

    def forward(self, h: Tensor, size: tuple[int, ...] = ()) -> Tensor:
        """Map `(N, out_channels, ...)` to `(N, in_channels, *size)`."""
        layer, size = self.transposed, self.size or size
        geometry = list(zip(size, layer.kernel_size, layer.stride, layer.padding, layer.dilation, strict=True))
        # What the convolution made of `size` before any pooling.
        whole = [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in geometry]
        if list(h.shape[2:]) != whole and min(whole) > 0:
            h = F.interpolate(h, size=whole, mode=self.mode, align_corners=False)
        found = layer(h, output_size=size) if min(whole) > 0 else layer(h)
        if tuple(found.shape[2:]) != tuple(size):
            found = F.interpolate(found, size=size, mode=self.mode, align_corners=False)
        return found.flatten(1) if self.size else found


def apply(inverse: nn.Module, h: Tensor, size: tuple[int, ...]) -> Tensor:
    """Return `inverse(h)`; the library's own are told the spatial size that is wanted, within an `nn.Sequential`, too."""
    if type(inverse) is nn.Sequential:
        for module in inverse:
            h = apply(module, h, size)
        return h
    return inverse(h, size) if isinstance(inverse, TransposedConvolution) else inverse(h)


def _orthogonal(layer: Any) -> Any:
    nn.init.orthogonal_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def _last_activation(stage: Stage) -> nn.Module | None:
    for module in reversed(stage.modules):
        if closed_form(module) is not None:
            return module
        if isinstance(module, NORMS) or list(module.parameters()):
            return None
    return None
