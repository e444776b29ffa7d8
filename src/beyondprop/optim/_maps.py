"""The layers whose weights act linearly on their input: Linear, Conv and Embedding, each as a map of (input, weights)."""

from __future__ import annotations

import abc
import math
import operator
from collections.abc import Callable
from functools import cache, reduce
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from beyondprop.nn.functional import patches
from beyondprop.optim.projection import RowMoments, moments

_PATCH_LIMIT = 2**24  # numbers in the patches that are held at a time


class LayerMap(abc.ABC):
    """A layer as `z = map(x, weight, bias)`, linear in the weights.

    Weights as matrices are `(groups, out, n)`: the inputs of every output unit. Groups are those of a convolution, else 1.

    Args:
        module: the layer.
        name: its dotted name in the model.

    Attributes:
        weight_name, bias_name: of the module's parameters.
        weight, bias, parameters: those that the module had then.
        one_hot: whether rows are, so that X^T X is diagonal and the matrix is the transposed weight.
        features: the dimension of its output that has the units.
        units: how many output units it has.
        fan_in: n.
        input_ndim, sample_ndim: dimensions of one sample's input and output.
        padded: arguments of `F.pad` where the input is padded before the map.
        is_proven: whether the map is known to be the module's.
    """

    weight_name, bias_name = "weight", "bias"
    is_proven = True
    one_hot = False
    features = -1
    input_ndim = sample_ndim = 1
    padded: tuple[list[int], str] | None = None

    def __init__(self, module: Any, name: str = "") -> None:
        self.module, self.name = module, name
        self.weight: nn.Parameter = getattr(module, self.weight_name)
        self.bias: nn.Parameter | None = getattr(module, self.bias_name, None)
        self.parameters: list[nn.Parameter] = list(module.parameters(recurse=False))
        self.groups: int = getattr(module, "groups", 1)
        first, rest = self.weight.shape[0], self.weight.shape[1:].numel()
        self.units, self.fan_in = (rest, first) if self.one_hot else (first, rest)

    @property
    def is_current(self) -> bool:
        """Whether the module has the weight and bias still that it had."""
        own = self.module._parameters
        return own.get(self.weight_name) is self.weight and own.get(self.bias_name) is self.bias

    def prove(self, x: Tensor, z: Tensor) -> None:
        """Raise `UnsupportedModelError` unless the module's call on `x` gave what the map gives; once proven it is."""

    def state(self) -> tuple[Any, ...]:
        """Return what changes when the parameters are written to or exchanged.

        torch does not count what is written through `.data`. On a CPU that is noticed in a bias, and where it changes a whole
        row or column of a weight; of single entries about one in `min(rows, columns)` is seen. On other devices it is not
        noticed: they would be waited for.
        """
        return tuple([(p._version, p.data_ptr(), _shown(p) if p.is_cpu else None) for p in self.parameters])

    @abc.abstractmethod
    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return the layer's output under these weights."""

    @abc.abstractmethod
    def add_gradients(self, x: Tensor, r: Tensor, weight: Tensor | None, bias: Tensor | None, factor: float) -> None:
        """Add `factor` times the gradient of `<r, map(x, ., .)>` to `weight` and `bias`; None: not wanted."""

    @abc.abstractmethod
    def count(self, x: Tensor) -> int:
        """Return how many rows a captured input has."""

    @abc.abstractmethod
    def rows(self, x: Tensor) -> Tensor:
        """Return the inputs of every output position `(groups, N, n)`."""

    def moments(self, x: Tensor, *, mirror: bool = True) -> RowMoments:
        """Return the moments of the rows; `mirror` as for `projection.gram`."""
        return moments(self.rows(x), mirror=mirror)

    def samples(self, x: Tensor) -> int:
        """Return the length of the first dimension of a captured input; 1 where it has none besides the layer's own."""
        return 1 if x.ndim == self.input_ndim else x.shape[0]

    def prepare(self, x: Tensor) -> Tensor:
        """Return the captured input as the other methods take it, batch first."""
        x = x.unsqueeze(0) if x.ndim == self.input_ndim else x
        return x if self.padded is None else F.pad(x, *self.padded)

    def prepare_output(self, z: Tensor) -> Tensor:
        """Return a captured output batch first, too."""
        return z.unsqueeze(0) if z.ndim == self.sample_ndim else z

    def positions(self, g: Tensor) -> Tensor:
        """Return output-shaped values as rows `(groups, N, out)`."""
        rows = g.movedim(self.features, -1).flatten(0, -2)
        return rows.reshape(len(rows), self.groups, self.units // self.groups).movedim(1, 0)

    def no_moments(self) -> RowMoments:
        """Return the moments of no rows."""
        sums = self.weight.new_zeros(self.groups, self.fan_in)
        inner = sums if self.one_hot else sums.new_zeros(self.groups, self.fan_in, self.fan_in)
        return RowMoments(inner, sums.clone(), sums.new_zeros(()))

    def matrix(self, weight: Tensor) -> Tensor:
        """Return what has the shape of the weight as matrices `(groups, out, n)`."""
        return weight.t().unsqueeze(0) if self.one_hot else weight.reshape(self.groups, -1, self.fan_in)

    def unmatrix(self, matrix: Tensor) -> Tensor:
        """Undo `matrix`."""
        return matrix.squeeze(0).t() if self.one_hot else matrix.reshape(self.weight.shape)


def _shown(p: Tensor) -> float:
    """Return a sum over entries of a tensor, of which every row and every column, as of a matrix, has at least one."""
    p = p.detach()
    if not (p.is_contiguous() or (p.ndim == 4 and p.is_contiguous(memory_format=torch.channels_last))):
        p = p.contiguous()
    count = p.numel()
    stride = _stride(len(p), count // len(p)) if p.ndim > 1 and count else 1
    # In the order of memory, whichever that is.
    entries = p.as_strided(((count + stride - 1) // stride,), (stride,)) if count else p
    return (entries.float() if p.dtype.itemsize == 2 else entries).sum().item()  # halves overflow


@cache
def _stride(rows: int, columns: int) -> int:
    # At most as long as a row, it meets every row; without a common factor and short enough to go around, every column.
    stride = min(rows, columns)
    while math.gcd(stride, rows * columns) > 1:
        stride -= 1
    return stride


class LinearMap(LayerMap):
    """`nn.Linear`, over any leading dimensions."""

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight, bias)

    def add_gradients(self, x: Tensor, r: Tensor, weight: Tensor | None, bias: Tensor | None, factor: float) -> None:
        r = r.reshape(-1, r.shape[-1])
        if weight is not None:
            weight.addmm_(r.t(), x.reshape(-1, x.shape[-1]), alpha=factor)
        if bias is not None:
            bias.add_(r.sum(0), alpha=factor)

    def count(self, x: Tensor) -> int:
        return x.numel() // self.fan_in

    def rows(self, x: Tensor) -> Tensor:
        return x.reshape(1, -1, self.fan_in)


class ConvMap(LayerMap):
    """`nn.Conv1d`, `nn.Conv2d`, `nn.Conv3d` with any stride, padding, dilation and groups."""

    features = 1

    def __init__(self, module: Any, name: str = "") -> None:
        super().__init__(module, name)
        self.spatial = module.weight.ndim - 2
        self.input_ndim = self.sample_ndim = self.spatial + 1
        self.padding: Any = module.padding
        if module.padding_mode != "zeros" or isinstance(module.padding, str):
            # Padding that is asymmetric or no zeros is done beforehand, and the convolution then has none.
            mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
            self.padded = (module._reversed_padding_repeated_twice, mode)
            self.padding = (0,) * self.spatial
        self._convolve = (F.conv1d, F.conv2d, F.conv3d)[self.spatial - 1]

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

    def count(self, x: Tensor) -> int:
        return self._positions(self.prepare(x))

    def _positions(self, x: Tensor) -> int:
        m = self.module
        sizes = zip(x.shape[2:], self.padding, m.dilation, m.kernel_size, m.stride, strict=True)
        return len(x) * math.prod((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, p, d, k, s in sizes)

    def rows(self, x: Tensor) -> Tensor:
        groups = x.chunk(self.groups, 1)
        return torch.stack([patches(group, self.module, padding=self.padding) for group in groups])

    def moments(self, x: Tensor, *, mirror: bool = True) -> RowMoments:
        # Patches repeat every input several times, so samples are taken a few at a time.
        held = self._positions(x[:1]) * self.fan_in * self.groups
        parts = x.split(max(1, _PATCH_LIMIT // max(held, 1)))
        return reduce(operator.add, (moments(self.rows(part), mirror=mirror) for part in parts))


class EmbeddingMap(LayerMap):
    """`nn.Embedding`; of X^T X, moments have the diagonal: counts."""

    one_hot = True
    input_ndim = 0

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.embedding(x, weight)

    def add_gradients(self, x: Tensor, r: Tensor, weight: Tensor | None, bias: Tensor | None, factor: float) -> None:
        if weight is not None:
            x, r = x.reshape(-1), r.reshape(-1, r.shape[-1])
            if self.module.padding_idx is not None:
                used = x != self.module.padding_idx  # its row gets no gradient and stays
                x, r = x[used], r[used]
            weight.index_add_(0, x, r, alpha=factor)

    def count(self, x: Tensor) -> int:
        return x.numel()

    def rows(self, x: Tensor) -> Tensor:
        """Return one-hot rows: dense, which only a small batch should ask for."""
        return F.one_hot(x.reshape(1, -1), self.fan_in).to(self.weight.dtype)

    def moments(self, x: Tensor, *, mirror: bool = True) -> RowMoments:
        # bfloat16 cannot count beyond 256
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        counts = torch.bincount(x.reshape(-1), minlength=self.fan_in).to(dtype).unsqueeze(0)
        if self.module.padding_idx is not None:
            counts[:, self.module.padding_idx] = 0  # its row gets no gradient and stays
        return RowMoments(counts, counts.clone(), counts.sum())


MAPS: dict[type[nn.Module], tuple[Callable[[Any, str], LayerMap], str]] = {
    nn.Linear: (LinearMap, "weight"),
    nn.Conv1d: (ConvMap, "weight"),
    nn.Conv2d: (ConvMap, "weight"),
    nn.Conv3d: (ConvMap, "weight"),
    nn.Embedding: (EmbeddingMap, "weight"),
}
"""What makes the map of a layer, and the name of its weight, by its type; `layers.register_layer` adds to it."""


def layer_type(module: nn.Module) -> type[nn.Module] | None:
    """Return the type in `MAPS` that a module is of, None where it has a forward pass of its own or no parameter as weight."""
    own = type(module).forward
    kind = next((kind for kind in type(module).__mro__ if kind in MAPS and kind.forward is own), None)
    return kind if kind and isinstance(module._parameters.get(MAPS[kind][1]), nn.Parameter) else None


def layer_map(module: nn.Module, name: str = "") -> LayerMap:
    """Return the map of a layer that has a `layer_type`."""
    kind = layer_type(module)
    assert kind is not None
    return MAPS[kind][0](module, name)
