"""Transfer functions with the convex integrals that give their matching losses.

The matching loss of a non-decreasing transfer function f = F' is the Bregman divergence of its integral F between two
pre-activations (Amid, Anil & Warmuth, AISTATS 2022, arXiv 2106.06199, section 3):

    D_F(a, z) = F(a) - F(z) - f(z) (a - z)  >=  0,        its gradient in a:  f(a) - f(z)

It is convex in a, hence in the weights of a layer that produces a.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor

from beyondprop import _checks
from beyondprop.nn.activations import gelu_slope

Map = Callable[[Tensor, int], Tensor]


@dataclass(frozen=True, slots=True)
class Transfer:
    """A non-decreasing transfer function.

    Attributes:
        name: how it is asked for.
        value: `value(z, dim)` returns f(z); only softmax looks at `dim`, the dimension of the features.
        value_: the same; may write over `z`.
        slope: `slope(z, dim)` returns f'(z), of softmax the diagonal of its Jacobian.
        integral: `integral(z, dim)` returns F(z), of softmax with `dim` summed out.
    """

    name: str
    value: Map
    value_: Map
    slope: Map
    integral: Map

    @property
    def is_identity(self) -> bool:
        """Whether f(z) = z, so that the matching loss is the squared one."""
        return self.name == "identity"


def matching_loss(a: Tensor, z: Tensor, transfer: Transfer, dim: int = -1) -> Tensor:
    """Return D_F(a, z), summed over all entries: 0-d.

    Args:
        a: pre-activations under new weights.
        z: pre-activations under the old ones, of the same shape.
        transfer: the transfer function that follows.
        dim: the dimension of the features.
    """
    between = transfer.integral(a, dim).sum() - transfer.integral(z, dim).sum()
    return between - (transfer.value(z, dim) * (a - z)).sum()


def _elementwise(name: str, *functions: Callable[[Tensor], Tensor]) -> Transfer:
    """Return a transfer function of its value, value_, slope and integral, none of which looks at a dimension."""
    return Transfer(name, *(lambda z, dim, f=f: f(z) for f in functions))


def _log_cosh(z: Tensor) -> Tensor:
    # The naive form overflows beyond |z| = 88 in float32.
    size = z.abs()
    return size + torch.log1p(torch.exp(-2 * size)) - math.log(2)


def _tanh(z: Tensor) -> Tensor:
    return (2 * z).sigmoid() * 2 - 1 if z.device.type == "cpu" else torch.tanh(z)


def _tanh_(z: Tensor) -> Tensor:
    # On a CPU the sigmoid is faster than tanh by 6 to 16 times. Near 0 this loses relative accuracy, not absolute, and
    # corrections are differences of values of order 1.
    return z.mul_(2).sigmoid_().mul_(2).sub_(1) if z.device.type == "cpu" else z.tanh_()


def _leaky_relu(negative_slope: float = 0.01) -> Transfer:
    if not negative_slope >= 0:
        raise ValueError(f"negative_slope must be >= 0 for a non-decreasing transfer, got {negative_slope!r}.")
    return _elementwise(
        "leaky_relu",
        lambda z: F.leaky_relu(z, negative_slope),
        lambda z: F.leaky_relu_(z, negative_slope),
        lambda z: torch.where(z > 0, torch.ones_like(z), negative_slope),
        lambda z: torch.where(z > 0, torch.ones_like(z), negative_slope) * z * z / 2,
    )


def _softplus(beta: float = 1.0, threshold: float = 20.0) -> Transfer:
    return _elementwise(
        "softplus",
        lambda z: F.softplus(z, beta, threshold),
        lambda z: F.softplus(z, beta, threshold),
        lambda z: torch.where(z * beta > threshold, 1.0, torch.sigmoid(z * beta)).to(z.dtype),
        partial(_softplus_integral, beta=beta, threshold=threshold),
    )


def _softplus_integral(z: Tensor, beta: float, threshold: float) -> Tensor:
    """-Li2(-exp(beta z)) / beta^2 up to the threshold, and from there the integral of the identity, as torch's f is.

    Only for reporting: training needs f alone.
    """
    end = threshold / beta
    beyond = torch.where(z > end, (z * z - end * end) / 2, 0.0)
    z = z.clamp(max=end)
    size = (beta * z).abs().to(torch.float64)
    # -Li2(-q) = sum_k (-1)^(k+1) q^k / k^2 converges slowly at q = 1; integrate log1p(e^-t) from |beta z| upwards instead.
    nodes, weights = _gauss_legendre()
    span = 40.0
    shape = (-1,) + (1,) * size.ndim
    t = size + span * nodes.to(size.device).view(shape)
    small = (torch.log1p(torch.exp(-t)) * weights.to(size.device).view(shape)).sum(0) * span
    whole = torch.where(beta * z > 0, size * size / 2 + math.pi**2 / 6 - small, small)
    return (whole / beta**2).to(z.dtype) + beyond


@cache
def _gauss_legendre(count: int = 200) -> tuple[Tensor, Tensor]:
    from numpy.polynomial.legendre import leggauss  # slow to load, and integrals are for reporting only

    nodes, weights = leggauss(count)
    return torch.from_numpy((nodes + 1) / 2), torch.from_numpy(weights / 2)


# GELU falls to the left of its minimum, so it has no convex integral. Its monotone part has one: left of the minimum f is
# taken as constant, max(z, z_min) in place of z. f' is then 0 where GELU's is negative.
_GELU_MINIMUM = {"none": -0.7517915246935645, "tanh": -0.7524614220710162}


def _gelu(approximate: str = "none") -> Transfer:
    lowest = _GELU_MINIMUM[approximate]

    def value(z: Tensor) -> Tensor:
        return F.gelu(z.clamp(min=lowest), approximate=approximate)

    def slope(z: Tensor) -> Tensor:
        return torch.where(z > lowest, gelu_slope(z, approximate), 0.0).to(z.dtype)

    def integral(z: Tensor) -> Tensor:
        inside = z.clamp(min=lowest)
        if approximate == "tanh":  # no closed form; the integral of the exact one is off by 1e-3 and not its own
            nodes, weights = _gauss_legendre()
            shape = (-1,) + (1,) * z.ndim
            nodes, weights = nodes.to(z).view(shape), weights.to(z).view(shape)
            whole = (F.gelu(inside * nodes, approximate="tanh") * weights).sum(0) * inside
        else:
            cdf = 0.5 * (1 + torch.erf(inside / math.sqrt(2)))
            density = torch.exp(-0.5 * inside * inside) / math.sqrt(2 * math.pi)
            whole = ((inside * inside - 1) * cdf + inside * density) / 2
        return whole + value(inside) * (z - inside)

    return _elementwise("gelu" if approximate == "none" else "gelu_tanh", value, value, slope, integral)


_TRANSFERS: dict[str, Transfer] = {
    "identity": _elementwise("identity", lambda z: z, lambda z: z, torch.ones_like, lambda z: z * z / 2),
    "relu": _elementwise(
        "relu", torch.relu, torch.relu_, lambda z: (z > 0).to(z.dtype), lambda z: z.clamp(min=0).square() / 2
    ),
    "leaky_relu": _leaky_relu(),
    "tanh": _elementwise("tanh", _tanh, _tanh_, lambda z: 1 - torch.tanh(z).square(), _log_cosh),
    "sigmoid": _elementwise(
        "sigmoid",
        torch.sigmoid,
        torch.sigmoid_,
        lambda z: torch.sigmoid(z) * torch.sigmoid(-z),
        lambda z: F.softplus(z),
    ),
    "softplus": _softplus(),
    "gelu": _gelu(),
    "gelu_tanh": _gelu("tanh"),
    "softmax": Transfer(
        "softmax",
        lambda z, dim: torch.softmax(z, dim),
        lambda z, dim: torch.softmax(z, dim),
        lambda z, dim: (p := torch.softmax(z, dim)) * (1 - p),
        lambda z, dim: torch.logsumexp(z, dim),
    ),
}

_SETTINGS: dict[str, tuple[Callable[..., Transfer], tuple[str, ...]]] = {
    "leaky_relu": (_leaky_relu, ("negative_slope",)),
    "softplus": (_softplus, ("beta", "threshold")),
}
NAMES = tuple(_TRANSFERS)
"""The transfer functions that can be asked for by name."""


def transfer(name: str, **settings: float | str) -> Transfer:
    """Return a transfer function.

    Args:
        name: one of `NAMES`.
        settings: `negative_slope` of leaky ReLU; `beta` and `threshold` of softplus.

    Raises:
        ValueError: if there is none of that name, or it has no such setting.
    """
    _checks.one_of("transfer", name, NAMES)
    if not settings:
        return _TRANSFERS[name]
    build, accepted = _SETTINGS.get(name, (None, ()))
    if build is None or not set(settings) <= set(accepted):
        raise ValueError(
            f"Transfer {name!r} accepts {', '.join(accepted) or 'no settings'}, got {', '.join(settings)}."
        )
    return build(**settings)  # type: ignore[arg-type]
