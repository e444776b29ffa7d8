"""Black boxes whose Jacobians are known, and what counts and looks at their calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

Array = np.ndarray


class Counted:
    """A box that counts the rows it is given, and keeps the smallest and largest number in each column."""

    def __init__(self, fn: Callable[..., Any]) -> None:
        self.fn = fn
        self.rows = self.times = 0
        self.low: Array | None = None
        self.high: Array | None = None

    def __call__(self, x: Any, *more: Any, **named: Any) -> Any:
        rows = np.asarray(x)
        self.rows += len(rows)
        self.times += 1
        low, high = rows.min(0), rows.max(0)
        self.low = low if self.low is None else np.minimum(self.low, low)
        self.high = high if self.high is None else np.maximum(self.high, high)
        return self.fn(x, *more, **named)

    def since(self) -> int:
        """Return the rows since this was asked last."""
        found, self.rows = self.rows, 0
        return found


class Smooth:
    """`y = M tanh(x) + (M o M) x^2 / 20`, with `M` zero outside a pattern; bends in every input."""

    def __init__(self, mask: Tensor, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        # Away from 0, so that no entry of the pattern looks like a zero.
        size = 0.5 + torch.rand(mask.shape, generator=generator, dtype=torch.float64)
        sign = torch.randint(0, 2, mask.shape, generator=generator) * 2.0 - 1.0
        self.mask, self.matrix = mask, size * sign * mask
        self._m = self.matrix.numpy()

    def __call__(self, x: Array) -> Array:
        m = self._m.astype(x.dtype)
        return np.tanh(x) @ m.T + (x * x / 20) @ (m * m).T

    def torch(self, x: Tensor) -> Tensor:
        """The same for tensors, which autograd sees."""
        m = self.matrix.to(x.dtype)
        return torch.tanh(x) @ m.T + (x * x / 20) @ (m * m).T

    def jacobian(self, x: Tensor) -> Tensor:
        """Return the Jacobians, `(B, m, n)`."""
        x = x.double()
        return self.matrix * (1 - torch.tanh(x) ** 2)[:, None] + self.matrix**2 * x[:, None] / 10


class Linear:
    """`y = M x + c`."""

    def __init__(self, matrix: Tensor, shift: float = 0.0) -> None:
        self.matrix, self.shift = matrix.double(), shift

    def __call__(self, x: Array) -> Array:
        return x @ self.matrix.numpy().astype(x.dtype).T + x.dtype.type(self.shift)


class Noisy:
    """A box with Gaussian noise, fresh in every call; with `seed`, the same for equal seeds."""

    def __init__(self, fn: Callable[[Array], Array], sigma: float, seed: int = 0) -> None:
        self.fn, self.sigma, self.rng = fn, sigma, np.random.default_rng(seed)

    def __call__(self, x: Array) -> Array:
        y = self.fn(x)
        return y + self.sigma * self.rng.standard_normal(y.shape)

    def seeded(self, x: Array, seed: int) -> Array:
        """The same with a seed from outside."""
        y = self.fn(x)
        return y + self.sigma * np.random.default_rng(seed).standard_normal(y.shape)


def random_pattern(m: int, n: int, per_row: int, seed: int = 0) -> Tensor:
    """Return a mask with `per_row` entries in each row."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.zeros(m, n, dtype=torch.bool)
    return mask.scatter_(1, torch.rand(m, n, generator=generator).argsort(1)[:, :per_row], True)


def band(m: int, n: int, half: int = 1) -> Tensor:
    """Return a mask around the diagonal."""
    place = torch.arange(m)[:, None] * (n / m) - torch.arange(n)
    return place.abs() <= half


def arrow(n: int) -> Tensor:
    """Return the symmetric mask of a full first row, a full first column and the diagonal."""
    mask = torch.eye(n, dtype=torch.bool)
    mask[0] = mask[:, 0] = True
    return mask


def points(rows: int, n: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return inputs."""
    return torch.randn(rows, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def far(found: Tensor, wanted: Tensor) -> float:
    """Return the distance relative to what is wanted."""
    found, wanted = found.detach(), wanted.detach()
    return float((found.double() - wanted.double()).norm() / wanted.double().norm().clamp(min=1e-300))
