"""What LocoProp says at construction of weights that it leaves to its base."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import convnet, mlp
from torch import Tensor, nn

from beyondprop import LocoProp
from beyondprop.lab.nets.forms import build


class Recurrent(nn.Module):
    """99 % of the weights are the LSTM's."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(30, 30), nn.Linear(30, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0])


class Free(nn.Module):
    """A parameter of the model's own."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Parameter(torch.zeros(20, 6)), nn.Linear(6, 3)

    def forward(self, index: Tensor) -> Tensor:
        return self.head(self.table[index])


def block(width: int, inner: int) -> nn.Module:
    return nn.TransformerEncoderLayer(width, 2, inner)


LARGE: dict[str, tuple[Callable[[], nn.Module], str, list[str]]] = {
    "lstm": (Recurrent, r"^99% of the trainable .*: those of LSTM 99%\. .*exclude=\['lstm'\]", ["lstm"]),
    "free": (Free, r"^85% of the trainable .*: those of Free 85%\..*exclude=\[''\]", [""]),
    "attention": (
        lambda: nn.Sequential(block(8, 8), nn.Linear(8, 3)),
        r"^65% .*: those of MultiheadAttention 59%, LayerNorm 7%\. .*exclude=\['0.self_attn'\]",
        ["*.self_attn"],
    ),
    "of several kinds": (
        lambda: nn.Sequential(nn.Linear(4, 4), nn.GRU(4, 4), nn.RNN(4, 4)),
        r"those of GRU 67%, RNN 22%\.",
        ["1", "2"],
    ),
}


@pytest.mark.parametrize("name", LARGE)
def test_a_large_share_is_said_with_its_modules_and_silenced_by_naming_them(name: str) -> None:
    make, message, exclude = LARGE[name]
    with pytest.warns(UserWarning, match=message) as seen:
        LocoProp(make())
    assert seen[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        LocoProp(make(), exclude=exclude)


def test_what_is_named_is_what_is_silenced() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.GRU(4, 4), nn.RNN(4, 4))
    with pytest.warns(UserWarning, match=r"^67% of the trainable weights .*: those of GRU 67%\."):
        LocoProp(net, exclude=["2"])


ORDINARY: dict[str, Callable[[], Any]] = {
    "mlp": lambda: mlp(6, 5, 3, norm=True),
    "conv": lambda: convnet(norm=True),
    "norms": lambda: nn.Sequential(nn.Linear(4, 4, bias=False), nn.LayerNorm(4), nn.Linear(4, 3)),
    "transformer": lambda: nn.Sequential(nn.Embedding(9, 16), block(16, 64), nn.Linear(16, 9)),
    "lenet": lambda: build("lenet5", (1, 28, 28), 10),
    "frozen": lambda: nn.Sequential(nn.Linear(6, 6), nn.LSTM(6, 6).requires_grad_(False)),
}


@pytest.mark.parametrize("name", ORDINARY)
def test_an_ordinary_net_is_no_reason_to_warn(name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        LocoProp(ORDINARY[name]())
