"""Recurrent layers that a chain can cut in time: one code per time step, tied weights."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from beyondprop import _checks
from beyondprop.nn.activations import closed_form


class ElmanCell(nn.Module):
    """`c_t = W x_t + U f(c_{t-1}) + b`: the state is the pre-activation, which is where alternating minimization has its codes.

    The layer that follows starts with f. `torch.nn.RNNCell` is the same network with `f(c_t)` as its state.

    Args:
        input_size: features of an input x_t.
        hidden_size: units.
        activation: f, a module with a closed form: `nn.Tanh()` (default), `nn.ReLU()`, and those of `nets.ACTIVATIONS`.
        identity: start U at the identity, for ReLU nets with long memory (Le, Jaitly & Hinton 2015, arXiv 1504.00941);
            W then has entries of standard deviation 0.001, as published.

    Raises:
        ValueError: if a size is below 1, or the activation has no closed form or works in place.

    Source: Elman, "Finding Structure in Time", Cognitive Science 14, 1990.
    """

    def __init__(
        self, input_size: int, hidden_size: int, activation: nn.Module | None = None, *, identity: bool = False
    ) -> None:
        super().__init__()
        self.input_size = _checks.at_least("input_size", input_size, 1)
        self.hidden_size = _checks.at_least("hidden_size", hidden_size, 1)
        self.activation = nn.Tanh() if activation is None else activation
        if closed_form(self.activation) is None:
            raise ValueError(
                "activation must be an elementwise module with a closed form, such as nn.Tanh() or nn.ReLU(), got "
                f"{activation!r}."
            )
        if getattr(self.activation, "inplace", False):
            raise ValueError(f"activation must not overwrite the state, got {activation!r}; use inplace=False.")
        bound = 1 / math.sqrt(hidden_size)
        self.weight_ih = nn.Parameter(torch.empty(hidden_size, input_size).uniform_(-bound, bound))
        self.weight_hh = nn.Parameter(torch.empty(hidden_size, hidden_size).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(hidden_size).uniform_(-bound, bound))
        if identity:
            nn.init.normal_(self.weight_ih, std=1e-3)
            nn.init.eye_(self.weight_hh)
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor, state: Tensor) -> Tensor:
        """Map an input `(N, input_size)` and a state `(N, hidden_size)` to the next state."""
        return F.linear(x, self.weight_ih, self.bias) + F.linear(self.activation(state), self.weight_hh)

    def extra_repr(self) -> str:
        return f"{self.input_size}, {self.hidden_size}"


class Recurrent(nn.Module):
    """A cell unrolled over a sequence; in a chain it is one stage with a code for every time step.

    Args:
        cell: `ElmanCell`, `nn.RNNCell`, `nn.GRUCell`, `nn.LSTMCell`, or any module that maps `(x_t, state)` to the next state
            `(N, hidden_size)` and has the attributes `input_size` and `hidden_size`. An LSTM's state is `[h, c]`.
        outputs: `"last"`: `(N, T, input_size)` to `(N, hidden_size)`; `"all"`: to `(N, T, hidden_size)`.

    Raises:
        TypeError: if the cell lacks one of the attributes.

    Example:
        >>> layer = Recurrent(nn.GRUCell(2, 8))
        >>> layer(torch.zeros(5, 100, 2)).shape
        torch.Size([5, 8])
    """

    def __init__(self, cell: nn.Module, outputs: str = "last") -> None:
        super().__init__()
        if isinstance(cell, nn.RNNBase):
            kind = type(cell).__name__
            raise TypeError(
                f"cell must do one time step, such as nn.GRUCell, got {kind}, which does all; take nn.{kind}Cell."
            )
        for name in ("input_size", "hidden_size"):
            if not isinstance(getattr(cell, name, None), int):
                raise TypeError(
                    f"cell must be a module with the attribute {name}, such as nn.GRUCell, got {type(cell).__name__}."
                )
        self.cell: Any = cell
        self.outputs = _checks.one_of("outputs", outputs, ("last", "all"))

    @property
    def state_size(self) -> int:
        """Numbers of a state: twice the units for an LSTM."""
        return self.cell.hidden_size * (2 if isinstance(self.cell, nn.LSTMCell) else 1)

    def advance(self, x: Tensor, state: Tensor) -> Tensor:
        """Map an input `(N, input_size)` and a state `(N, state_size)` to the next; `ValueError` if the cell returns none."""
        if isinstance(self.cell, nn.LSTMCell):
            return torch.cat(self.cell(x, tuple(state.chunk(2, 1))), 1)
        after = self.cell(x, state)
        if not isinstance(after, Tensor) or after.shape != state.shape:
            found = f"shape {tuple(after.shape)}" if isinstance(after, Tensor) else type(after).__name__
            raise ValueError(
                f"{type(self.cell).__name__} must return the next state, of the last one's shape {tuple(state.shape)}, "
                f"got {found}."
            )
        return after

    def forward(self, x: Tensor) -> Tensor:
        """Map sequences `(N, T, input_size)` to the last state, or to all.

        Raises:
            ValueError: if `x` has another shape, or no time step.
        """
        self.check_input(x)
        state = x.new_zeros(len(x), self.state_size)
        states = []
        for moment in x.unbind(1):
            state = self.advance(moment, state)
            if self.outputs == "all":
                states.append(state[:, : self.cell.hidden_size])
        return torch.stack(states, 1) if states else state[:, : self.cell.hidden_size]

    def check_input(self, x: Tensor) -> None:
        """Raise `ValueError` where `x` is no batch of sequences for this cell."""
        if x.ndim != 3 or x.shape[1] == 0 or x.shape[2] != self.cell.input_size:
            raise ValueError(
                f"Recurrent takes sequences (N, T, {self.cell.input_size}) with T >= 1, got shape {tuple(x.shape)}; put "
                "nn.Unflatten or nn.Flatten in front."
            )

    def extra_repr(self) -> str:
        return f"outputs={self.outputs!r}"
