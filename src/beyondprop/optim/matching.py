"""Transfer functions, each with its slope: what training on their matching losses needs.

The matching loss of a non-decreasing transfer function f = F' is the Bregman divergence of its integral F between two
pre-activations (Amid, Anil & Warmuth, AISTATS 2022, arXiv 2106.06199, section 3):

    D_F(a, z) = F(a) - F(z) - f(z) (a - z)  >=  0,        its gradient in a:  f(a) - f(z)

It is convex in a, hence in the weights of a layer that produces a. Training takes its gradient alone: F is computed nowhere.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from inspect import signature

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from beyondprop import _checks
from beyondprop.nn.activations import closed_form, gelu_slope

Map = Callable[[Tensor, int], Tensor]


@dataclass(frozen=True, slots=True)
class Transfer:
    """A non-decreasing transfer function.

    Attributes:
        name: how it is asked for.
        value: `value(z, dim)` returns f(z); only softmax looks at `dim`, the dimension of the features.
        value_: the same; may write over `z`.
        slope: `slope(z, dim)` returns f'(z), of softmax the diagonal of its Jacobian.
    """

    name: str
    value: Map
    value_: Map
    slope: Map

    @property
    def is_identity(self) -> bool:
        """Whether f(z) = z, so that the matching loss is the squared one."""
        return self.name == "identity"


def _elementwise(name: str, *functions: Callable[[Tensor], Tensor]) -> Transfer:
    """Return a transfer function of its value, value_ and slope, none of which looks at a dimension."""
    return Transfer(name, *(lambda z, dim, f=f: f(z) for f in functions))


def _closed_form(module: nn.Module) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """Return value and slope of an activation whose slope does not look at the value."""
    form = closed_form(module)
    assert form is not None
    return form.value, lambda z: form.slope(z, z)


def _tanh(z: Tensor) -> Tensor:
    return (2 * z).sigmoid() * 2 - 1 if z.device.type == "cpu" else torch.tanh(z)


def _tanh_(z: Tensor) -> Tensor:
    # On a CPU the sigmoid is faster than tanh by 6 to 16 times. Near 0 this loses relative accuracy, not absolute, and
    # corrections are differences of values of order 1.
    return z.mul_(2).sigmoid_().mul_(2).sub_(1) if z.device.type == "cpu" else z.tanh_()


def _leaky_relu(negative_slope: float = 0.01) -> Transfer:
    if not negative_slope >= 0:
        raise ValueError(f"negative_slope must be >= 0 for a non-decreasing transfer, got {negative_slope!r}.")
    value, slope = _closed_form(nn.LeakyReLU(negative_slope))
    return _elementwise("leaky_relu", value, lambda z: F.leaky_relu_(z, negative_slope), slope)


def _softplus(beta: float = 1.0, threshold: float = 20.0) -> Transfer:
    value, slope = _closed_form(nn.Softplus(beta, threshold))
    return _elementwise("softplus", value, value, slope)


# GELU falls to the left of its minimum, so it has no convex integral. Its monotone part has one: left of the minimum f is
# taken as constant, max(z, z_min) in place of z. f' is then 0 where GELU's is negative.
_GELU_MINIMUM = {"none": -0.7517915246935645, "tanh": -0.7524614220710162}


def _gelu(approximate: str = "none") -> Transfer:
    lowest = _GELU_MINIMUM[approximate]

    def value(z: Tensor) -> Tensor:
        return F.gelu(z.clamp(min=lowest), approximate=approximate)

    def slope(z: Tensor) -> Tensor:
        return torch.where(z > lowest, gelu_slope(z, approximate), 0.0).to(z.dtype)

    return _elementwise("gelu" if approximate == "none" else "gelu_tanh", value, value, slope)


def _softmax_slope(z: Tensor, dim: int) -> Tensor:
    p = torch.softmax(z, dim)
    return p * (1 - p)


_TRANSFERS = {
    f.name: f
    for f in (
        _elementwise("identity", lambda z: z, lambda z: z, torch.ones_like),
        _elementwise("relu", torch.relu, torch.relu_, lambda z: (z > 0).to(z.dtype)),
        _leaky_relu(),
        _elementwise("tanh", _tanh, _tanh_, lambda z: 1 - torch.tanh(z).square()),
        _elementwise("sigmoid", torch.sigmoid, torch.sigmoid_, lambda z: z.sigmoid() * (-z).sigmoid()),
        _softplus(),
        _gelu(),
        _gelu("tanh"),
        Transfer("softmax", torch.softmax, torch.softmax, _softmax_slope),
    )
}
_BUILDERS: dict[str, Callable[..., Transfer]] = {"leaky_relu": _leaky_relu, "softplus": _softplus}
NAMES = tuple(_TRANSFERS)
"""The transfer functions that can be asked for by name."""


@cache
def transfer(name: str, **settings: float) -> Transfer:
    """Return a transfer function: of equal settings, the same.

    Args:
        name: one of `NAMES`.
        settings: `negative_slope` of leaky ReLU; `beta` and `threshold` of softplus.

    Raises:
        ValueError: if there is none of that name, or it has no such setting.
    """
    _checks.one_of("transfer", name, NAMES)
    if not settings:
        return _TRANSFERS[name]
    accepted = signature(_BUILDERS[name]).parameters if name in _BUILDERS else {}
    if not set(settings) <= set(accepted):
        raise ValueError(
            f"Transfer {name!r} accepts {', '.join(accepted) or 'no settings'}, got {', '.join(settings)}."
        )
    return _BUILDERS[name](**settings)
