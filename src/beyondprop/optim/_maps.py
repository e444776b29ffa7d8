"""The layers whose weights act linearly on their input: Linear, Conv and Embedding, each as a map of (input, weights)."""

from __future__ import annotations

import abc
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from beyondprop.nn.functional import patches
from beyondprop.optim.projection import RowMoments, moments

_PATCH_LIMIT = 2**24  # numbers in the patches that are held at a time
LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding)


class LayerMap(abc.ABC):
    """A layer as `z = map(x, weight, bias)`, linear in the weights.

    Weights as matrices are `(groups, out, n)`: the inputs of every output unit. Groups are those of a convolution, else 1.

    Attributes:
        module: the layer.
        features: the dimension of its output that has the units.
        units: how many output units it has.
        fan_in: n.
        sample_ndim: dimensions of one sample's output.
    """

    features = -1
    sample_ndim = 1

    def __init__(self, module: Any) -> None:
        self.module = module
        self.groups = getattr(module, "groups", 1)
        self.units, self.fan_in = module.weight.shape[0], module.weight.shape[1:].numel()

    @abc.abstractmethod
    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return the layer's output under these weights."""

    @abc.abstractmethod
    def add_gradients(self, x: Tensor, r: Tensor, weight: Tensor | None, bias: Tensor | None, factor: float) -> None:
        """Add `factor` times the gradient of `<r, map(x, ., .)>` to `weight` and `bias`; None: not wanted."""

    @abc.abstractmethod
    def prepare(self, x: Tensor) -> Tensor:
        """Return the captured input as the other methods take it, batch first."""

    def prepare_output(self, z: Tensor) -> Tensor:
        """Return a captured output batch first, too."""
        return z.unsqueeze(0) if z.ndim == self.sample_ndim else z

    @abc.abstractmethod
    def count(self, x: Tensor) -> int:
        """Return how many rows a captured input has."""

    @abc.abstractmethod
    def no_moments(self) -> RowMoments:
        """Return the moments of no rows."""

    @abc.abstractmethod
    def rows(self, x: Tensor) -> Tensor:
        """Return the inputs of every output position `(groups, N, n)`."""

    @abc.abstractmethod
    def positions(self, g: Tensor) -> Tensor:
        """Return output-shaped values as rows `(groups, N, out)`."""

    @abc.abstractmethod
    def moments(self, x: Tensor, *, mirror: bool = True) -> RowMoments:
        """Return the moments of the rows; `mirror` as for `projection.gram`."""

    @abc.abstractmethod
    def matrix(self, weight: Tensor) -> Tensor:
        """Return what has the shape of the weight as matrices `(groups, out, n)`."""

    @abc.abstractmethod
    def unmatrix(self, matrix: Tensor) -> Tensor:
        """Undo `matrix`."""


class _MatrixMap(LayerMap):
    """A layer whose weight has an output unit's inputs in a row."""

    def no_moments(self) -> RowMoments:
        return moments(self.module.weight.new_zeros(self.groups, 0, self.fan_in))

    def matrix(self, weight: Tensor) -> Tensor:
        return weight.reshape(self.groups, -1, self.fan_in)

    def unmatrix(self, matrix: Tensor) -> Tensor:
        return matrix.reshape(self.module.weight.shape)


class LinearMap(_MatrixMap):
    """`nn.Linear`, over any leading dimensions."""

    def prepare(self, x: Tensor) -> Tensor:
        return x.unsqueeze(0) if x.ndim == 1 else x

    def count(self, x: Tensor) -> int:
        return x.numel() // self.fan_in

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight, bias)

    def add_gradients(self, x: Tensor, r: Tensor, weight: Tensor | None, bias: Tensor | None, factor: float) -> None:
        r = r.reshape(-1, r.shape[-1])
        if weight is not None:
            weight.addmm_(r.t(), x.reshape(-1, x.shape[-1]), alpha=factor)
        if bias is not None:
            bias.add_(r.sum(0), alpha=factor)

    def rows(self, x: Tensor) -> Tensor:
        return x.reshape(1, -1, self.fan_in)

    def positions(self, g: Tensor) -> Tensor:
        return g.reshape(1, -1, g.shape[-1])

    def moments(self, x: Tensor, *, mirror: bool = True) -> RowMoments:
        return moments(self.rows(x), mirror=mirror)


class ConvMap(_MatrixMap):
    """`nn.Conv1d`, `nn.Conv2d`, `nn.Conv3d` with any stride, padding, dilation and groups."""

    features = 1

    def __init__(self, module: Any) -> None:
        super().__init__(module)
        self.spatial = module.weight.ndim - 2
        self.sample_ndim = self.spatial + 1
        # Padding that is asymmetric or no zeros is done beforehand, and the convolution then has none.
        self.pads_itself = module.padding_mode == "zeros" and not isinstance(module.padding, str)
        self.padding: Any = module.padding if self.pads_itself else (0,) * self.spatial
        self._convolve = (F.conv1d, F.conv2d, F.conv3d)[self.spatial - 1]

    def prepare(self, x: Tensor) -> Tensor:
        x = x.unsqueeze(0) if x.ndim == self.sample_ndim else x
        if self.pads_itself:
            return x
        mode = "constant" if self.module.padding_mode == "zeros" else self.module.padding_mode
        return F.pad(x, self.module._reversed_padding_repeated_twice, mode=mode)

    def count(self, x: Tensor) -> int:
        return self._positions(self.prepare(x))

    def _positions(self, x: Tensor) -> int:
        sizes = zip(
            x.shape[2:], self.padding, self.module.dilation, self.module.kernel_size, self.module.stride, strict=True
        )
        return len(x) * math.prod((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, p, d, k, s in sizes)

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        module = self.module
        return self._convolve(x, weight, bias, module.stride, self.padding, module.dilation, module.groups)

    def add_gradients(self, x: Tensor, r: Tensor, weight: Tensor | None, bias: Tensor | None, factor: float) -> None:
        m = self.module
        if weight is not None:
            settings = (m.stride, self.padding, m.dilation, False, (0,) * self.spatial, m.groups, [False, True, False])
            gradient = torch.ops.aten.convolution_backward(r.contiguous(), x, m.weight, None, *settings)[1]
            weight.add_(gradient, alpha=factor)
        if bias is not None:
            bias.add_(r.flatten(2).sum((0, 2)), alpha=factor)

    def rows(self, x: Tensor) -> Tensor:
        groups = x.chunk(self.groups, 1)
        return torch.stack([patches(group, self.module, padding=self.padding) for group in groups])

    def moments(self, x: Tensor, *, mirror: bool = True) -> RowMoments:
        # Patches repeat every input several times, so samples are taken a few at a time.
        held = self._positions(x[:1]) * self.fan_in * self.groups
        first, *rest = x.split(max(1, _PATCH_LIMIT // max(held, 1)))
        total = moments(self.rows(first), mirror=mirror)
        for part in rest:
            total = total + moments(self.rows(part), mirror=mirror)
        return total

    def positions(self, g: Tensor) -> Tensor:
        rows = g.movedim(1, -1).flatten(0, -2)
        return rows.reshape(len(rows), self.groups, self.units // self.groups).movedim(1, 0)


class EmbeddingMap(LayerMap):
    """`nn.Embedding`: rows are one-hot, X^T X is the diagonal of counts, its matrix is the transposed weight."""

    def __init__(self, module: Any) -> None:
        super().__init__(module)
        self.fan_in, self.units = module.weight.shape

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        del bias
        return F.embedding(x, weight)

    def add_gradients(self, x: Tensor, r: Tensor, weight: Tensor | None, bias: Tensor | None, factor: float) -> None:
        del bias
        if weight is not None:
            x, r = self._kept(x, r)
            weight.index_add_(0, x, r, alpha=factor)

    def prepare(self, x: Tensor) -> Tensor:
        return x.unsqueeze(0) if x.ndim == 0 else x

    def count(self, x: Tensor) -> int:
        return x.numel()

    def no_moments(self) -> RowMoments:
        return self.moments(torch.empty(0, dtype=torch.int64, device=self.module.weight.device))

    def rows(self, x: Tensor) -> Tensor:
        """Return one-hot rows: dense, which only a small batch should ask for."""
        return F.one_hot(x.reshape(1, -1), self.fan_in).to(self.module.weight.dtype)

    def positions(self, g: Tensor) -> Tensor:
        return g.reshape(1, -1, g.shape[-1])

    def moments(self, x: Tensor, *, mirror: bool = True) -> RowMoments:
        """Return the moments with the diagonal of X^T X only."""
        del mirror
        counts = torch.bincount(x.reshape(-1), minlength=self.fan_in).to(self.module.weight.dtype).unsqueeze(0)
        if self.module.padding_idx is not None:
            counts[:, self.module.padding_idx] = 0  # its row gets no gradient and stays
        return RowMoments(counts, counts.clone(), counts.sum())

    def matrix(self, weight: Tensor) -> Tensor:
        return weight.t().unsqueeze(0)

    def unmatrix(self, matrix: Tensor) -> Tensor:
        return matrix.squeeze(0).t()

    def _kept(self, x: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
        x, r = x.reshape(-1), r.reshape(-1, r.shape[-1])
        if self.module.padding_idx is None:
            return x, r
        used = x != self.module.padding_idx  # its row gets no gradient and stays
        return x[used], r[used]


def layer_map(module: nn.Module) -> LayerMap:
    """Return the map of a layer of a type in `LAYERS`."""
    if isinstance(module, nn.Linear):
        return LinearMap(module)
    return EmbeddingMap(module) if isinstance(module, nn.Embedding) else ConvMap(module)
