"""Couplings: blocks of two steps, each of which changes one stream by a function of the other, and can be undone.

| step | forward | undone | source |
|---|---|---|---|
| `Add` | y = x + out | x = y - out | Gomez et al., NeurIPS 2017 |
| `Scale` | y = x exp(s) + t | x = (y - t) exp(-s) | Dinh et al., ICLR 2017 |
| `Decay` | y = beta x + (1 - beta) out | x = (y - (1 - beta) out) / beta | Sander et al., ICML 2021 |
"""

from __future__ import annotations

import abc
from typing import Any

import torch
from torch import Tensor, nn

from beyondprop import _checks
from beyondprop.errors import UnsupportedModelError
from beyondprop.nn.reversible.replay import Call, Random, Weights, is_same
from beyondprop.nn.reversible.streams import Streams, shape_of


class Step(abc.ABC):
    """One stream, number `target`, is joined with `out`, what `function` makes of the other stream.

    Attributes:
        name: the function's attribute in its coupling.
        function: None: the other stream itself.
        is_exact: whether it adds, which is exact on a grid.
        needs_input: whether `pull` looks at x.
    """

    is_exact = False
    needs_input = False

    def __init__(self, name: str, target: int, function: nn.Module | None) -> None:
        self.name, self.target, self.function = name, target, function

    def shape(self, x: Tensor) -> list[int]:
        """Return the shape that `out` must have for a stream `x`."""
        return list(x.shape)

    @abc.abstractmethod
    def join(self, x: Tensor, out: Tensor) -> Tensor:
        """Return y."""

    @abc.abstractmethod
    def undo(self, y: Tensor, out: Tensor) -> Tensor:
        """Return x."""

    @abc.abstractmethod
    def pull(self, x: Tensor | None, out: Tensor, cotangent: Tensor) -> tuple[Tensor, Tensor]:
        """Return the cotangents of x and of `out` from that of y."""


class Add(Step):
    """`y = x + out`."""

    is_exact = True

    def join(self, x: Tensor, out: Tensor) -> Tensor:
        return x + out

    def undo(self, y: Tensor, out: Tensor) -> Tensor:
        return y - out

    def pull(self, x: Tensor | None, out: Tensor, cotangent: Tensor) -> tuple[Tensor, Tensor]:
        return cotangent, cotangent


class Decay(Step):
    """`y = beta x + (1 - beta) out`."""

    def __init__(self, name: str, target: int, function: nn.Module | None, beta: float) -> None:
        super().__init__(name, target, function)
        self.beta = beta

    def join(self, x: Tensor, out: Tensor) -> Tensor:
        return torch.add(self.beta * x, out, alpha=1 - self.beta)

    def undo(self, y: Tensor, out: Tensor) -> Tensor:
        return torch.sub(y, out, alpha=1 - self.beta).div_(self.beta)

    def pull(self, x: Tensor | None, out: Tensor, cotangent: Tensor) -> tuple[Tensor, Tensor]:
        return cotangent * self.beta, cotangent * (1 - self.beta)


class Scale(Step):
    """`y = x exp(s) + t`, where `out` is (r, t) side by side and `s = limit tanh(r / limit)`."""

    needs_input = True

    def __init__(self, name: str, target: int, function: nn.Module, dim: int, limit: float) -> None:
        super().__init__(name, target, function)
        self.dim, self.limit = dim, limit

    def shape(self, x: Tensor) -> list[int]:
        shape = list(x.shape)
        shape[self.dim] *= 2
        return shape

    def _parts(self, out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        r, t = out.chunk(2, self.dim)
        bend = torch.tanh(r / self.limit)
        return bend, torch.exp(self.limit * bend), t

    def join(self, x: Tensor, out: Tensor) -> Tensor:
        _, scale, t = self._parts(out)
        return x * scale + t

    def undo(self, y: Tensor, out: Tensor) -> Tensor:
        _, scale, t = self._parts(out)
        return (y - t).div_(scale)

    def pull(self, x: Tensor | None, out: Tensor, cotangent: Tensor) -> tuple[Tensor, Tensor]:
        assert x is not None
        bend, scale, _ = self._parts(out)
        below = torch.cat((cotangent * x * scale * (1 - bend.square()), cotangent), self.dim)
        return cotangent * scale, below


class Coupling(nn.Module, abc.ABC):
    """A reversible block; `AdditiveCoupling`, `AffineCoupling` and `MomentumCoupling` are those to use.

    By itself it is an ordinary module, differentiated by autograd; `ReversibleSequential` trains many of them in the memory of
    one.

    Args:
        split_dim: where one tensor is cut into its two streams; a chain's own `split_dim` goes before it.
    """

    def __init__(self, split_dim: int = 1) -> None:
        super().__init__()
        if isinstance(split_dim, bool) or not isinstance(split_dim, int):
            raise TypeError(f"split_dim must be an integer, got {split_dim!r}.")
        self.split_dim = split_dim

    @abc.abstractmethod
    def steps(self, split_dim: int) -> tuple[Step, ...]:
        """Return the steps in their order."""

    def forward(self, x: Tensor | Streams, *args: Any, **kwargs: Any) -> Tensor | Streams:
        """Map a tensor, or a pair of streams, to the same shape; further arguments go to every function."""
        shape = shape_of(x, self.split_dim, None, type(self).__name__)
        streams = list(x.chunk(2, self.split_dim) if isinstance(x, Tensor) else x)
        for step in self.steps(self.split_dim):
            out = self._out(step, streams, args, kwargs)
            streams[step.target] = step.join(streams[step.target], out)
        return shape.join((streams[0], streams[1]))

    def inverse(self, y: Tensor | Streams, *args: Any, **kwargs: Any) -> Any:
        """Return the x of which `forward` makes `y`, without a graph; running statistics stay as they are.

        Raises:
            UnsupportedModelError: if a function draws random numbers, as dropout does: nobody knows which.
        """
        shape = shape_of(y, self.split_dim, None, type(self).__name__)
        with torch.no_grad():
            streams = list(y.chunk(2, self.split_dim) if isinstance(y, Tensor) else y)
            for step in reversed(self.steps(self.split_dim)):
                out = self._again(step, streams, args, kwargs)
                streams[step.target] = step.undo(streams[step.target], out)
        return shape.join((streams[0], streams[1]))

    def _again(self, step: Step, streams: list[Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        if step.function is None:
            return streams[1 - step.target]
        weights = Weights()
        call = Call(step.function, f"{step.name!r} of {type(self).__name__}", weights)
        random = Random({streams[0].device, *weights.devices()})
        with random.kept(), call.replayed(random):
            before = random.get()
            out = self._out(step, streams, args, kwargs)
            if not is_same(before, random.get()):
                raise UnsupportedModelError(
                    f"Function {call.name} draws random numbers, and nobody knows which it drew before: call eval(), or use "
                    "the `inverse` of a ReversibleSequential."
                )
        return out

    def _out(self, step: Step, streams: list[Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        other = streams[1 - step.target]
        if step.function is None:
            return other
        out = step.function(other, *args, **kwargs)
        check_out(step, streams[step.target], out, f"{step.name!r} of {type(self).__name__}")
        return out


def check_out(step: Step, x: Tensor, out: Any, name: str) -> None:
    """Raise unless `out` is what can be joined with the stream `x`."""
    if not isinstance(out, Tensor):
        raise UnsupportedModelError(f"Function {name} must return one tensor, got {type(out).__name__}.")
    if list(out.shape) != step.shape(x):
        raise UnsupportedModelError(
            f"Function {name} must return the shape {tuple(step.shape(x))} for a stream of shape {tuple(x.shape)}, got "
            f"{tuple(out.shape)}."
        )
    if not out.is_floating_point():
        raise UnsupportedModelError(f"Function {name} must return a floating-point tensor, got {out.dtype}.")


def _module(name: str, function: Any) -> nn.Module:
    # The weights of a plain function are hidden: their gradients would be lost in silence.
    if not isinstance(function, nn.Module):
        raise TypeError(
            f"{name} must be a torch.nn.Module, so that its weights are known, got {type(function).__name__}."
        )
    return function


class AdditiveCoupling(Coupling):
    """`y1 = x1 + f(x2)`, `y2 = x2 + g(y1)`.

    Args:
        f: any module that keeps the shape of a stream.
        g: the same.
        split_dim: as of `Coupling`.

    Raises:
        TypeError: if `f` or `g` is no module.
        UnsupportedModelError: on a batch that cannot be cut into halves, or for which a function returns another shape.

    Example:
        >>> block = AdditiveCoupling(nn.Linear(4, 4), nn.Linear(4, 4))
        >>> x = torch.randn(2, 8)
        >>> bool(torch.allclose(block.inverse(block(x)), x, atol=1e-6))
        True

    Source: Gomez et al., "The Reversible Residual Network", NeurIPS 2017, arXiv 1707.04585, equations 6 and 7.
    """

    def __init__(self, f: nn.Module, g: nn.Module, split_dim: int = 1) -> None:
        super().__init__(split_dim)
        self.f, self.g = _module("f", f), _module("g", g)

    def steps(self, split_dim: int) -> tuple[Step, ...]:
        return Add("f", 0, self.f), Add("g", 1, self.g)


class AffineCoupling(Coupling):
    """`y1 = x1 exp(s) + t` with s and t from `f(x2)`, and `y2` in the same way from `g(y1)`.

    A function returns twice the channels of a stream along `split_dim`: r, then t; `s = limit tanh(r / limit)`.

    Args:
        f: a module that doubles `split_dim`.
        g: the same.
        split_dim: as of `Coupling`.
        limit: bound on the size of s, > 0: a step divides by no less than exp(-limit) on the way back.

    Raises:
        TypeError, ValueError: if an argument is of the wrong kind.
        UnsupportedModelError: as of `AdditiveCoupling`.

    Source: Dinh, Sohl-Dickstein & Bengio, "Density Estimation using Real NVP", ICLR 2017, arXiv 1605.08803, equations 7 and 8.
    """

    def __init__(self, f: nn.Module, g: nn.Module, split_dim: int = 1, limit: float = 1.0) -> None:
        super().__init__(split_dim)
        self.f, self.g = _module("f", f), _module("g", g)
        self.limit = _checks.positive("limit", limit)

    def steps(self, split_dim: int) -> tuple[Step, ...]:
        return Scale("f", 0, self.f, split_dim, self.limit), Scale("g", 1, self.g, split_dim, self.limit)

    def extra_repr(self) -> str:
        return f"limit={self.limit}"


class MomentumCoupling(Coupling):
    """`v' = beta v + (1 - beta) f(x)`, `x' = x + v'`, on the streams (x, v); a residual block with momentum.

    Pass `(x, torch.zeros_like(x))` to start as the paper does. A way back multiplies rounding errors of v by 1 / beta in every
    block: keep the number of blocks below about 7 / (1 - beta) in float32.

    Args:
        f: any module that keeps the shape of a stream.
        beta: momentum, in (0, 1).
        split_dim: as of `Coupling`.

    Raises:
        TypeError, ValueError: if an argument is of the wrong kind.
        UnsupportedModelError: as of `AdditiveCoupling`.

    Source: Sander et al., "Momentum Residual Neural Networks", ICML 2021, arXiv 2102.07870, equations 4 and 5.
    """

    def __init__(self, f: nn.Module, beta: float = 0.9, split_dim: int = 1) -> None:
        super().__init__(split_dim)
        self.f = _module("f", f)
        if not (isinstance(beta, float) and 0 < beta < 1):
            raise ValueError(f"beta must be a number in (0, 1), got {beta!r}.")
        self.beta = beta

    def steps(self, split_dim: int) -> tuple[Step, ...]:
        return Decay("f", 1, self.f, self.beta), Add("x", 0, None)

    def extra_repr(self) -> str:
        return f"beta={self.beta}"
