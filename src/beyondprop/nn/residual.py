"""Residual blocks that stages know the closed forms of."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from beyondprop import _checks


class Residual(nn.Module):
    """`after(skip(x) + branch(x))`: in a chain one stage, without autograd where its parts have closed forms.

    Args:
        branch: the modules with weights, such as convolutions with their normalisation.
        skip: what the input goes through beside it; default: nothing.
        after: the nonlinearity behind the sum; default: none.

    Raises:
        TypeError: if the branch is no `nn.Sequential`.
        ValueError: on a batch for which branch and skip differ in shape.

    Example:
        >>> block = Residual(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)), after=nn.ReLU())

    Source: He et al., "Deep Residual Learning for Image Recognition", CVPR 2016, equation 1.
    """

    def __init__(self, branch: nn.Sequential, skip: nn.Module | None = None, after: nn.Module | None = None) -> None:
        super().__init__()
        if type(branch) is not nn.Sequential:
            raise TypeError(f"branch must be an nn.Sequential, got {type(branch).__name__}.")
        self.branch = branch
        self.skip = nn.Identity() if skip is None else skip
        self.after = nn.Identity() if after is None else after

    def forward(self, x: Tensor) -> Tensor:
        """Map `(N, ...)` to the shape of the branch's output, which the skip must have, too."""
        return self.after(joined(self.skip(x), self.branch(x)))


def joined(skip: Tensor, branch: Tensor) -> Tensor:
    """Return `skip + branch`; `ValueError` if their shapes differ: a sum that broadcasts is no skip."""
    if skip.shape != branch.shape:
        raise ValueError(
            f"Residual adds its skip, of shape {tuple(skip.shape)}, to its branch, of shape {tuple(branch.shape)}: these must "
            "be equal. Pass a skip that gives the branch's shape."
        )
    return skip + branch


class Shortcut(nn.Module):
    """The skip without weights where a block changes the shape: every `stride`-th pixel, new channels of zeros on both sides.

    Args:
        stride: >= 1.
        padding: channels of zeros on each side, >= 0.

    Raises:
        ValueError: if a setting is out of its range.

    Source: He et al., CVPR 2016, option A.
    """

    def __init__(self, stride: int = 1, padding: int = 0) -> None:
        super().__init__()
        self.stride = _checks.at_least("stride", stride, 1)
        self.padding = _checks.at_least("padding", padding, 0)

    def forward(self, x: Tensor) -> Tensor:
        """Map `(N, C, H, W)` to `(N, C + 2 padding, H / stride, W / stride)`."""
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.padding, self.padding))

    def extra_repr(self) -> str:
        return f"stride={self.stride}, padding={self.padding}"
