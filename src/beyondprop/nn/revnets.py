"""Reversible residual networks as published, and the residual networks of the same block that they were compared with.

Gomez, Ren, Urtasun & Grosse, "The Reversible Residual Network: Backpropagation Without Storing Activations", NeurIPS 2017,
arXiv 1707.04585. Widths, blocks and initialisation are those of the authors' code:

    function      BN-ReLU-conv3x3, twice (basic); BN-ReLU-conv1x1, -conv3x3, -conv1x1 on a quarter of the width (bottleneck);
                  the first function of a network has no BN-ReLU in front of its first convolution
    unit          y1 = x1 + F(x2), y2 = x2 + G(y1) on halves of the channels; in a residual network y = x + F(x)
    transition    the same where the shape changes: F has the stride, and a skip S takes the place of x1 and x2: average
                  pooling and channels of zeros (basic), a 1x1 convolution for each half (bottleneck)
    weights       normal with variance 2 / (k^2 outputs), cut at two standard deviations; U(-sqrt(3 / n), sqrt(3 / n)) in the
                  last layer with n inputs
    BatchNorm     eps 1e-3, running statistics that keep 0.99 of what they were

One thing differs: where a 3x3 or larger window has a stride, the authors' odd row and column of padding are below and to the
right, here, as torch has them, above and to the left. Transitions and the stem keep their input and are run again in the
backward pass; the authors kept what is inside the stem.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from beyondprop import _checks
from beyondprop.nn.residual import Residual
from beyondprop.nn.reversible import AdditiveCoupling, Recomputed, ReversibleSequential

MODES = ("inverse", "checkpoint", "store")
"""What a reversible network may keep for its backward pass, the least first."""


class PooledShortcut(nn.Module):
    """The skip without weights of a basic block that changes the shape: average pooling, new channels of zeros on both sides.

    Args:
        stride: >= 1.
        padding: channels of zeros on each side, >= 0.

    Raises:
        ValueError: if a setting is out of its range; on a batch whose height or width is no multiple of the stride.

    Source: the authors' code of arXiv 1707.04585.
    """

    def __init__(self, stride: int = 1, padding: int = 0) -> None:
        super().__init__()
        self.stride = _checks.at_least("stride", stride, 1)
        self.padding = _checks.at_least("padding", padding, 0)

    def forward(self, x: Tensor) -> Tensor:
        """Map `(N, C, H, W)` to `(N, C + 2 padding, H / stride, W / stride)`."""
        if x.shape[2] % self.stride or x.shape[3] % self.stride:
            raise ValueError(
                f"height and width must be multiples of the stride {self.stride}, got {x.shape[2]}x{x.shape[3]}: "
                "the skip would not fit the branch."
            )
        return F.pad(F.avg_pool2d(x, self.stride), (0, 0, 0, 0, self.padding, self.padding))

    def extra_repr(self) -> str:
        return f"stride={self.stride}, padding={self.padding}"


class TransitionCoupling(nn.Module):
    """A coupling that changes the shape, so that it has no inverse: `y1 = s1(x1) + f(x2)`, `y2 = s2(x2) + g(y1)`.

    Args:
        f: from the second half of the channels to the shape of the first half of the output.
        g: keeps that shape.
        skip1: what the first half goes through beside `f`.
        skip2: what the second half goes through beside `g`.

    Source: Gomez et al. 2017, section 3.2; what its input is split into are halves of the channels.
    """

    def __init__(self, f: nn.Module, g: nn.Module, skip1: nn.Module, skip2: nn.Module) -> None:
        super().__init__()
        self.f, self.g, self.skip1, self.skip2 = f, g, skip1, skip2

    def forward(self, x: Tensor) -> Tensor:
        """Map `(N, C, H, W)` to `(N, C', H', W')`."""
        x1, x2 = x.chunk(2, 1)
        y1 = self.skip1(x1) + self.f(x2)
        return torch.cat([y1, self.skip2(x2) + self.g(y1)], 1)


def _norm(width: int) -> list[nn.Module]:
    return [nn.BatchNorm2d(width, eps=1e-3, momentum=0.01), nn.ReLU()]


def _conv(size: int, inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=False)


def _branch(inputs: int, outputs: int, stride: int = 1, *, bottleneck: bool, first: bool = False) -> nn.Sequential:
    """Return a function of a unit; the `first` of a network has no BN-ReLU in front."""
    front = [] if first else _norm(inputs)
    if not bottleneck:
        return nn.Sequential(*front, _conv(3, inputs, outputs, stride), *_norm(outputs), _conv(3, outputs, outputs))
    inner = outputs // 4
    return nn.Sequential(
        *front,
        _conv(1, inputs, inner, stride),
        *_norm(inner),
        _conv(3, inner, inner),
        *_norm(inner),
        _conv(1, inner, outputs),
    )


def _skip(inputs: int, outputs: int, stride: int, *, bottleneck: bool) -> nn.Module:
    return _conv(1, inputs, outputs, stride) if bottleneck else PooledShortcut(stride, (outputs - inputs) // 2)


def _stem(channels: int, width: int, *, large: bool) -> nn.Sequential:
    if not large:
        return nn.Sequential(_conv(3, channels, width), *_norm(width))
    return nn.Sequential(_conv(7, channels, width, 2), *_norm(width), nn.MaxPool2d(3, 2, 1))


def _whole(parts: OrderedDict[str, nn.Module], width: int, num_classes: int) -> nn.Sequential:
    """Return the network of parts with its head, and draw its weights from the global random state."""
    linear = nn.Linear(width, _checks.at_least("num_classes", num_classes, 1))
    parts["head"] = nn.Sequential(*_norm(width), nn.AdaptiveAvgPool2d(1), nn.Flatten(), linear)
    model = nn.Sequential(parts)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            std = math.sqrt(2 / (module.kernel_size[0] ** 2 * module.out_channels))
            nn.init.trunc_normal_(module.weight, std=std, a=-2 * std, b=2 * std)
        elif isinstance(module, nn.Linear):
            bound = math.sqrt(3 / module.in_features)
            nn.init.uniform_(module.weight, -bound, bound)
            nn.init.zeros_(module.bias)
    return model


def _sizes(units: Sequence[int], widths: Sequence[int], multiple: int, *, bottleneck: bool) -> list[int]:
    """Return the width of the stem and of each stage, checked."""
    if len(widths) != len(units) + 1 or not units:
        raise ValueError(
            f"widths must be those of the stem and of each stage, one more than units, got {tuple(widths)} and {tuple(units)}."
        )
    for count in units:
        _checks.at_least("units of a stage", count, 1)
    for width in widths:
        if _checks.at_least("a width", width, 1) % multiple:
            raise ValueError(f"widths must be multiples of {multiple}, got {tuple(widths)}.")
    return [widths[0], *((4 if bottleneck else 1) * width for width in widths[1:])]


def revnet(
    units: Sequence[int],
    widths: Sequence[int],
    num_classes: int,
    *,
    bottleneck: bool = False,
    large: bool = False,
    channels: int = 3,
    mode: str = "inverse",
) -> nn.Sequential:
    """Build a reversible residual network: images `(N, channels, H, W)` to `(N, num_classes)`.

    Args:
        units: of each stage; the first unit of every stage but the first halves height and width.
        widths: channels of the stem and of each stage, both halves together, multiples of 4; bottleneck stages have four times
            as many.
        num_classes: outputs.
        bottleneck: which functions the units have.
        large: the stem for large images: 7x7 with stride 2, then max-pooling.
        channels: of the images.
        mode: `"inverse"`: activations are computed again from each chain's output; `"checkpoint"`: from each unit's input;
            `"store"`: they are kept. Weights and their names are the same.

    Raises:
        ValueError: if a setting is out of its range; on a batch whose height or width does not fit the strides.
    """
    sizes = _sizes(units, widths, 4, bottleneck=bottleneck)
    recomputed = "store" if _checks.one_of("mode", mode, MODES) == "store" else "checkpoint"
    parts: OrderedDict[str, nn.Module] = OrderedDict()
    parts["stem"] = Recomputed(_stem(channels, widths[0], large=large), mode=recomputed)
    inputs = widths[0] // 2
    for stage, (count, width) in enumerate(zip(units, sizes[1:], strict=True), 1):
        half, couplings = width // 2, list[AdditiveCoupling]()
        for unit in range(count):
            is_first = stage == 1 and unit == 0
            stride = 2 if stage > 1 and unit == 0 else 1
            f = _branch(inputs, half, stride, bottleneck=bottleneck, first=is_first)
            g = _branch(half, half, bottleneck=bottleneck)
            if stride > 1 or inputs != half:
                skips = [_skip(inputs, half, stride, bottleneck=bottleneck) for _ in range(2)]
                parts[f"transition{stage}"] = Recomputed(TransitionCoupling(f, g, *skips), mode=recomputed)
            else:
                couplings.append(AdditiveCoupling(f, g))
            inputs = half
        if couplings:
            parts[f"stage{stage}"] = ReversibleSequential(*couplings, mode=mode)
    return _whole(parts, 2 * inputs, num_classes)


def preactivation_resnet(
    units: Sequence[int],
    widths: Sequence[int],
    num_classes: int,
    *,
    bottleneck: bool = False,
    large: bool = False,
    channels: int = 3,
) -> nn.Sequential:
    """Build the residual network of the same block: `y = S(x) + F(x)` on all channels, every activation stored.

    Args:
        units: of each stage; the first unit of every stage but the first halves height and width.
        widths: channels of the stem and of each stage; bottleneck stages have four times as many.
        num_classes: outputs.
        bottleneck: which functions the units have.
        large: the stem for large images: 7x7 with stride 2, then max-pooling.
        channels: of the images.

    Raises:
        ValueError: if a setting is out of its range; on a batch whose height or width does not fit the strides.
    """
    sizes = _sizes(units, widths, 2, bottleneck=bottleneck)
    parts: OrderedDict[str, nn.Module] = OrderedDict(stem=_stem(channels, widths[0], large=large))
    before = widths[0]
    for stage, (count, width) in enumerate(zip(units, sizes[1:], strict=True), 1):
        blocks: list[nn.Module] = []
        for unit in range(count):
            stride = 2 if stage > 1 and unit == 0 else 1
            branch = _branch(before, width, stride, bottleneck=bottleneck, first=stage == 1 and unit == 0)
            changes = stride > 1 or before != width
            blocks.append(Residual(branch, _skip(before, width, stride, bottleneck=bottleneck) if changes else None))
            before = width
        parts[f"stage{stage}"] = nn.Sequential(*blocks)
    return _whole(parts, before, num_classes)


def revnet38(num_classes: int, *, channels: int = 3, mode: str = "inverse") -> nn.Sequential:
    """RevNet-38 for small images: 3-3-3 basic units; see `revnet`."""
    return revnet((3, 3, 3), (32, 32, 64, 112), num_classes, channels=channels, mode=mode)


def revnet110(num_classes: int, *, channels: int = 3, mode: str = "inverse") -> nn.Sequential:
    """RevNet-110 for small images: 9-9-9 basic units; see `revnet`."""
    return revnet((9, 9, 9), (32, 32, 64, 128), num_classes, channels=channels, mode=mode)


def revnet164(num_classes: int, *, channels: int = 3, mode: str = "inverse") -> nn.Sequential:
    """RevNet-164 for small images: 9-9-9 bottleneck units; see `revnet`."""
    return revnet((9, 9, 9), (32, 32, 64, 128), num_classes, bottleneck=True, channels=channels, mode=mode)


def revnet56(num_classes: int, *, channels: int = 3, mode: str = "inverse") -> nn.Sequential:
    """RevNet-56 for images of 224x224: 2-2-3-2 bottleneck units; see `revnet`."""
    widths = (128, 128, 256, 512, 832)
    return revnet((2, 2, 3, 2), widths, num_classes, bottleneck=True, large=True, channels=channels, mode=mode)


def revnet104(num_classes: int, *, channels: int = 3, mode: str = "inverse") -> nn.Sequential:
    """RevNet-104 for images of 224x224: 2-2-11-2 bottleneck units; see `revnet`."""
    widths = (128, 128, 256, 512, 832)
    return revnet((2, 2, 11, 2), widths, num_classes, bottleneck=True, large=True, channels=channels, mode=mode)


def resnet32(num_classes: int, *, channels: int = 3) -> nn.Sequential:
    """ResNet-32 of RevNet-38's block: 5-5-5 basic units; see `preactivation_resnet`."""
    return preactivation_resnet((5, 5, 5), (16, 16, 32, 64), num_classes, channels=channels)


def resnet110(num_classes: int, *, channels: int = 3) -> nn.Sequential:
    """ResNet-110 of RevNet-110's block: 18-18-18 basic units; see `preactivation_resnet`."""
    return preactivation_resnet((18, 18, 18), (16, 16, 32, 64), num_classes, channels=channels)


def resnet164(num_classes: int, *, channels: int = 3) -> nn.Sequential:
    """ResNet-164 of RevNet-164's block: 18-18-18 bottleneck units; see `preactivation_resnet`."""
    return preactivation_resnet((18, 18, 18), (16, 16, 32, 64), num_classes, bottleneck=True, channels=channels)


def resnet50(num_classes: int, *, channels: int = 3) -> nn.Sequential:
    """ResNet-50 of RevNet-56's block, for images of 224x224: 3-4-6-3 bottleneck units; see `preactivation_resnet`."""
    widths = (64, 64, 128, 256, 512)
    return preactivation_resnet((3, 4, 6, 3), widths, num_classes, bottleneck=True, large=True, channels=channels)


def resnet101(num_classes: int, *, channels: int = 3) -> nn.Sequential:
    """ResNet-101 of RevNet-104's block, for images of 224x224: 3-4-23-3 bottleneck units; see `preactivation_resnet`."""
    widths = (64, 64, 128, 256, 512)
    return preactivation_resnet((3, 4, 23, 3), widths, num_classes, bottleneck=True, large=True, channels=channels)
