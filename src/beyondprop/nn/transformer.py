"""The parts of an image transformer that torch has no modules for."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from beyondprop import _checks


class Patches(nn.Module):
    """Cut images into square patches: `(N, C, H, W)` to `(N, patches, C * size * size)`; what does not fill one is left out.

    Args:
        size: pixels of a side, >= 1.

    Raises:
        ValueError: if `size` is below 1.

    Source: Dosovitskiy et al., "An Image is Worth 16x16 Words", ICLR 2021, arXiv 2010.11929.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = _checks.at_least("size", size, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.unfold(x, self.size, stride=self.size).transpose(1, 2)

    def extra_repr(self) -> str:
        return f"{self.size}"


class Positions(nn.Module):
    """Add a learned vector to every position: `(N, count, width)` to the same shape.

    Args:
        count: positions, >= 1.
        width: features, >= 1.

    Raises:
        ValueError: if one of them is below 1.
    """

    def __init__(self, count: int, width: int) -> None:
        super().__init__()
        shape = _checks.at_least("count", count, 1), _checks.at_least("width", width, 1)
        self.weight = nn.Parameter(torch.empty(shape))
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.weight

    def extra_repr(self) -> str:
        return "{}, {}".format(*self.weight.shape)


class MeanOverPositions(nn.Module):
    """Average over positions: `(N, count, width)` to `(N, width)`."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)
