"""Layers of other packages that are linear in their weight, made known to `LocoProp` and `AffineProjection`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from beyondprop.errors import UnsupportedModelError
from beyondprop.optim._local import whole_precision
from beyondprop.optim._maps import MAPS, LinearMap

Rearrangement = Callable[[Tensor], Tensor]
_BUILT_IN = tuple(MAPS)


def register_layer(
    module_type: type[nn.Module],
    matrix: Rearrangement | None = None,
    *,
    weight: str = "weight",
    bias: str = "bias",
    rows: Rearrangement | None = None,
) -> None:
    """Let `LocoProp` and `AffineProjection` capture layers of a type from now on.

    Such a layer must compute z with `rows(z) = rows(x) @ matrix(weight).T + bias` from its first argument x, and have no other
    parameters. Each layer's first output is compared with that. Subclasses count where they have the same forward pass. What
    is registered again is replaced.

    Args:
        module_type: the class, such as transformers' `Conv1D` or `torch_geometric.nn.Linear`.
        matrix: returns a view of the weight as a matrix `(out, in)`, such as `lambda w: w.T`; None: the weight is one.
        weight: name of the weight.
        bias: name of the bias, of any shape with `out` numbers; layers may have none.
        rows: returns input and output as `(N, ..., features)`, such as `lambda x: x.transpose(1, 2)` where features are not
            the last dimension; None: they are.

    Raises:
        TypeError: if `module_type` is no class of modules, or an argument is of the wrong kind.
        ValueError: if layers of this type are captured by themselves.

    Example:
        >>> class Conv1D(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.weight, self.bias = nn.Parameter(torch.ones(4, 3)), nn.Parameter(torch.zeros(3))
        ...
        ...     def forward(self, x):
        ...         return x @ self.weight + self.bias
        >>> register_layer(Conv1D, lambda w: w.T)
    """
    if not (isinstance(module_type, type) and issubclass(module_type, nn.Module)):
        raise TypeError(f"register_layer takes a class of modules, got {module_type!r}.")
    if module_type in _BUILT_IN:
        raise ValueError(f"{module_type.__name__} is captured by itself; register_layer is for other layers.")
    for what, function in (("matrix", matrix), ("rows", rows)):
        if function is not None and not callable(function):
            raise TypeError(f"{what} must be a function of a tensor or None, got {type(function).__name__}.")
    for what, name in (("weight", weight), ("bias", bias)):
        if not isinstance(name, str):
            raise TypeError(f"{what} must be the name of a parameter, got {type(name).__name__}.")
    MAPS[module_type] = partial(_RegisteredMap, matrix=matrix, weight=weight, bias=bias, rows=rows), weight


class _RegisteredMap(LinearMap):
    """A layer that `register_layer` made known."""

    def __init__(
        self,
        module: Any,
        name: str = "",
        *,
        matrix: Rearrangement | None,
        weight: str,
        bias: str,
        rows: Rearrangement | None,
    ) -> None:
        self.weight_name, self.bias_name, self._rows = weight, bias, rows
        self._matrix = matrix or (lambda w: w)
        super().__init__(module, name)
        self.groups = 1
        self.is_proven = False
        self.units, self.fan_in = self._check()

    def _check(self) -> tuple[int, int]:
        """Return out and in; raise `UnsupportedModelError` where the registration cannot be right."""
        found = self._matrix(self.weight.detach())
        others = [n for n, p in self.module.named_parameters() if p is not self.weight and p is not self.bias]
        if others:
            raise self._error(f"has the parameters {others} besides its {self.weight_name} and {self.bias_name}")
        if found.ndim != 2 or found.numel() != self.weight.numel():
            raise self._error(f"has as its matrix a tensor of shape {tuple(found.shape)}")
        whole = torch.arange(self.weight.numel())
        trial = self._matrix(whole.view(self.weight.shape))
        is_view = trial.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()
        if not (is_view and torch.equal(trial.flatten().sort().values, whole)):
            raise self._error("has as its matrix no view of its whole weight, such as w.T or w.flatten(1)")
        if self.bias is not None and self.bias.numel() != found.shape[0]:
            raise self._error(f"has a bias of {self.bias.numel()} numbers for {found.shape[0]} outputs")
        return found.shape[0], found.shape[1]

    def _error(self, what: str) -> UnsupportedModelError:
        return UnsupportedModelError(
            f"Layer {self.name!r} {what}; register_layer({type(self.module).__name__}, ...) says otherwise. Amend that, or "
            f"pass exclude=[{self.name!r}]."
        )

    @torch.no_grad()
    def prove(self, x: Tensor, z: Tensor) -> None:
        """Raise `UnsupportedModelError` unless `z` is the layer's output as it was registered."""
        with whole_precision(x.device):
            wanted = self.prepare_output(z).to(self.weight.dtype)
            x = self.prepare(x.to(self.weight.dtype))
            if not bool(wanted.isfinite().all()):
                return  # which is another matter
            if x.shape[-1] != self.fan_in or wanted.shape != (*x.shape[:-1], self.units):
                raise self._error(f"made {tuple(z.shape)} of an input of which the rows are {tuple(x.shape)}")
            rest = (self(x, self.weight, self.bias) - wanted).norm()
            allowed = 4 * max(torch.finfo(z.dtype).eps, 1e-3) * wanted.norm()
        if not bool(rest <= allowed):
            raise self._error(f"gave another output (relative difference {float(rest / wanted.norm()):.2g})")
        self.is_proven = True

    def prepare(self, x: Tensor) -> Tensor:
        return super().prepare(x if self._rows is None else self._rows(x))

    def prepare_output(self, z: Tensor) -> Tensor:
        return super().prepare_output(z if self._rows is None else self._rows(z))

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, self._matrix(weight), None if bias is None else bias.reshape(-1))

    def add_gradients(self, x: Tensor, r: Tensor, weight: Tensor | None, bias: Tensor | None, factor: float) -> None:
        super().add_gradients(
            x,
            r,
            None if weight is None else self._matrix(weight),
            None if bias is None else bias.view(-1),
            factor,
        )

    def matrix(self, weight: Tensor) -> Tensor:
        return self._matrix(weight).unsqueeze(0)

    def unmatrix(self, matrix: Tensor) -> Tensor:
        out = matrix.new_empty(self.weight.shape)
        self._matrix(out).copy_(matrix.squeeze(0))
        return out
