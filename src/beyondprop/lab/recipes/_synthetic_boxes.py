"""Black boxes whose Jacobian is known in closed form, and what sensing it takes.

The box is `tanh(W sin(x))` with random places and values in W, or the gradient `cos(x) * (W sin(x))` of a potential, whose
Jacobian is symmetric. Calls are counted by the box itself.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import torch
from scipy import sparse

from beyondprop.errors import SensingWarning
from beyondprop.func import sensing
from beyondprop.nn import BlackBox

GARBAGE = 50.0
"""Scale of what a corrupted call returns."""


class Box:
    """A function of rows `(N, n)` that counts them.

    Args:
        weights: W, `(m, n)`.
        symmetric: whether it is the gradient of a potential.
        noise: standard deviation of what is added to every output.
        corrupted: share of the calls that return garbage.
        seed: of both.
    """

    def __init__(
        self,
        weights: sparse.csr_array,
        *,
        symmetric: bool = False,
        noise: float = 0.0,
        corrupted: float = 0.0,
        seed: int = 0,
    ) -> None:
        self.weights, self.symmetric, self.noise, self.corrupted = weights, symmetric, noise, corrupted
        self.calls, self._rng = 0, np.random.default_rng([seed, 9])

    def __call__(self, rows: np.ndarray) -> np.ndarray:
        self.calls += len(rows)
        inner = (self.weights.astype(rows.dtype) @ np.sin(rows).T).T
        found = np.cos(rows) * inner if self.symmetric else np.tanh(inner)
        if self.noise:
            found = found + self.noise * self._rng.standard_normal(found.shape)
        if self.corrupted:
            wrong = self._rng.random(len(rows)) < self.corrupted
            found[wrong] = GARBAGE * self._rng.standard_normal((int(wrong.sum()), found.shape[1]))
        return found

    @property
    def size(self) -> tuple[int, int]:
        """Numbers of outputs and inputs."""
        m, n = self.weights.toarray().shape
        return m, n

    def jacobian(self, x: np.ndarray) -> np.ndarray:
        """Return the Jacobian at a point, `(m, n)`."""
        weights, inner = self.weights.toarray(), self.weights @ np.sin(x)
        if self.symmetric:
            return np.cos(x)[:, None] * weights * np.cos(x) - np.diag(np.sin(x) * inner)
        return (1 - np.tanh(inner) ** 2)[:, None] * weights * np.cos(x)


def random_rows(n: int, count: int, seed: int) -> sparse.csr_array:
    """Return weights `(n, n)` with so many nonzeros in random places of every row."""
    rng = np.random.default_rng([seed, n, count])
    columns = np.concatenate([rng.choice(n, count, replace=False) for _ in range(n)])
    values = rng.standard_normal(n * count) / math.sqrt(count)
    return sparse.csr_array((values, (np.repeat(np.arange(n), count), columns)), shape=(n, n))


def symmetric(shape: str, seed: int) -> sparse.csr_array:
    """Return symmetric weights `(100, 100)` of an `"arrow"`, a `"band"` of half width 3, or a five-point `"grid"`."""
    n, rng = 100, np.random.default_rng([seed, 7])
    if shape == "arrow":
        mask = np.eye(n, dtype=bool)
        mask[0] = mask[:, 0] = True
    elif shape == "band":
        mask = np.abs(np.subtract.outer(np.arange(n), np.arange(n))) <= 3
    else:
        places = np.stack(np.divmod(np.arange(n), 10))
        mask = np.abs(places[:, :, None] - places[:, None]).sum(0) <= 1
    values = np.triu(mask * rng.standard_normal((n, n)))
    return sparse.csr_array(values + np.triu(values, 1).T)


def sensed(box: Box, seed: int, *, dtype: torch.dtype = torch.float64, **options: Any) -> dict[str, float]:
    """Sense a Jacobian at a random point; return calls, probes and the relative error."""
    m, n = box.size
    x = torch.from_numpy(np.random.default_rng([seed, 5]).standard_normal(n)).to(dtype)
    layer = BlackBox(box, m, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SensingWarning)
        if layer.plan is None:
            layer(x[None])
        before = box.calls
        found = sensing.jacobian(box, x, **options).double().numpy()
    assert layer.plan is not None
    exact = box.jacobian(x.double().numpy())
    error = float(np.linalg.norm(found - exact) / np.linalg.norm(exact))
    return {"calls": box.calls - before, "probes": layer.plan.probes, "error": error}
