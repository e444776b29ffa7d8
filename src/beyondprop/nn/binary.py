"""Layers that send signs: forward a step, backward a surrogate."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from beyondprop import _checks

SURROGATES = ("hardtanh", "identity")
"""What `Sign` accepts as its backward."""


class Sign(nn.Module):
    """Forward 1 where the input is >= 0 and -1 elsewhere; backward straight through.

    The step has slope 0 almost everywhere. Straight-through estimation hands the gradient on as if the step were the
    identity, and, with `"hardtanh"`, only where the input lies in [-1, 1]: beyond, a larger input changes nothing.

    Args:
        surrogate: `"hardtanh"` (default) or `"identity"`.

    Raises:
        ValueError: if `surrogate` is neither.

    Example:
        >>> Sign()(torch.tensor([-0.5, 0.0, 2.0]))
        tensor([-1.,  1.,  1.])

    Source: Bengio, Leonard & Courville, arXiv 1308.3432; the window: Hubara et al., NIPS 2016, equation 4.
    """

    def __init__(self, surrogate: str = "hardtanh") -> None:
        super().__init__()
        self.surrogate: str = _checks.one_of("surrogate", surrogate, SURROGATES)

    def forward(self, z: Tensor) -> Tensor:
        """Map `(N, ...)` to signs of the same shape and dtype; a NaN stays one, so that it is found."""
        return _StraightThrough.apply(z, self.surrogate == "hardtanh")  # type: ignore[return-value]

    def extra_repr(self) -> str:
        """Show the surrogate."""
        return f"surrogate={self.surrogate!r}"


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, windowed: bool) -> Tensor:
        ctx.windowed = windowed
        if windowed:
            ctx.save_for_backward(z.abs() <= 1)
        signs = torch.where(z >= 0, 1.0, -1.0).to(z.dtype)
        return torch.where(z.isnan(), z, signs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        if ctx.windowed:
            (window,) = ctx.saved_tensors
            gradient = gradient * window
        return gradient, None
