"""Feedback alignment inside stages: through time, in the first stage, and beside weights that are no maps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import Residual, equal, images, mlp
from torch import Tensor, nn

from beyondprop import Chain, Descent, FeedbackAlignment, LocalRule
from beyondprop.nn import ElmanCell, Positions, Recurrent

CE = nn.CrossEntropyLoss()
Through = Callable[[str, Tensor], Tensor]
"""Multiplies by the named weight of a cell; what comes back goes through its feedback."""


def _elman(cell: Any, through: Through, x: Tensor, state: Tensor) -> Tensor:
    return through("weight_ih", x) + through("weight_hh", torch.tanh(state)) + cell.bias


def _rnn(cell: Any, through: Through, x: Tensor, state: Tensor) -> Tensor:
    return torch.tanh(through("weight_ih", x) + cell.bias_ih + through("weight_hh", state) + cell.bias_hh)


def _gru(cell: Any, through: Through, x: Tensor, state: Tensor) -> Tensor:
    r, z, n = (through("weight_ih", x) + cell.bias_ih).chunk(3, 1)
    hr, hz, hn = (through("weight_hh", state) + cell.bias_hh).chunk(3, 1)
    keep = torch.sigmoid(z + hz)
    return (1 - keep) * torch.tanh(n + torch.sigmoid(r + hr) * hn) + keep * state


def _lstm(cell: Any, through: Through, x: Tensor, state: Tensor) -> Tensor:
    h, c = state.chunk(2, 1)
    i, f, g, o = (through("weight_ih", x) + cell.bias_ih + through("weight_hh", h) + cell.bias_hh).chunk(4, 1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.cat([torch.sigmoid(o) * torch.tanh(c), c], 1)


CELLS: dict[str, tuple[Callable[[int, int], nn.Module], Callable[..., Tensor]]] = {
    "elman": (ElmanCell, _elman),
    "rnn": (nn.RNNCell, _rnn),
    "gru": (nn.GRUCell, _gru),
    "lstm": (nn.LSTMCell, _lstm),
}


def _apply(weight: Tensor, feedback: Tensor | None, x: Tensor) -> Tensor:
    if feedback is None:
        return F.linear(x, weight)
    way_back = F.linear(x, feedback)
    return F.linear(x.detach(), weight) + (way_back - way_back.detach())


@pytest.mark.parametrize("cell", list(CELLS))
@pytest.mark.parametrize("outputs", ["last", "all"])
@pytest.mark.parametrize("is_first", [True, False])
def test_deltas_go_back_through_time_by_the_feedback(cell: str, outputs: str, is_first: bool) -> None:
    build, advance = CELLS[cell]
    layer = Recurrent(build(3, 6), outputs)
    below = [] if is_first else [nn.Linear(3, 3), nn.Tanh()]
    top = nn.Linear(6 if outputs == "last" else 30, 4)
    model = nn.Sequential(*below, layer, nn.Tanh(), *([] if outputs == "last" else [nn.Flatten()]), top).double()
    x, y = torch.randn(7, 5, 3, dtype=torch.float64), torch.arange(7) % 4
    credit = FeedbackAlignment(seed=3)
    rule = LocalRule(model, CE, credit, Descent())
    prefix = f"{len(below)}.cell."
    inside = [name for name in credit.feedback if name.startswith(prefix)]
    assert inside == [f"{prefix}{name}" for name in (["weight_hh"] if is_first else ["weight_ih", "weight_hh"])]
    rule.backward(x, y)
    found = [p.grad for p in model.parameters()]

    def through(name: str, z: Tensor) -> Tensor:
        return _apply(getattr(layer.cell, name), credit.feedback.get(prefix + name), z)

    z = x if is_first else torch.tanh(F.linear(x, *model[0].parameters()))
    state, states = x.new_zeros(7, layer.state_size), []
    for moment in z.unbind(1):
        state = advance(layer.cell, through, moment, state)
        states.append(state[:, :6])
    h = torch.tanh(states[-1] if outputs == "last" else torch.stack(states, 1).flatten(1))
    output = _apply(top.weight, credit.feedback[f"{len(model) - 1}.weight"], h) + top.bias
    torch.testing.assert_close(output, model(x))
    for gradient, wanted in zip(found, torch.autograd.grad(CE(output, y), list(model.parameters())), strict=True):
        assert gradient is not None
        assert float((gradient - wanted).abs().max()) < 1e-12
    true = torch.autograd.grad(CE(model(x), y), layer.cell.weight_hh)[0]
    assert float((layer.cell.weight_hh.grad - true).norm() / true.norm()) > 0.1


class _Twice(nn.Linear):
    """A Linear that is used twice: a delta at its second use goes down through it."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(torch.tanh(super().forward(input)))


def test_only_what_the_input_alone_meets_has_no_feedback_in_the_first_stage() -> None:
    def drawn(*modules: nn.Module, cuts: Any = "linear") -> list[str]:
        credit = FeedbackAlignment()
        credit.bind(Chain(nn.Sequential(*modules), cuts))
        return list(credit.feedback)

    top = nn.Linear(6, 3)
    assert drawn(nn.Linear(6, 6), nn.GroupNorm(2, 6), nn.SiLU(), top) == ["3.weight"]
    assert drawn(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), top, cuts=["2", "3"]) == ["2.weight", "3.weight"]
    assert drawn(nn.BatchNorm1d(6), nn.Linear(6, 6), nn.Tanh(), top) == ["1.weight", "3.weight"]
    assert drawn(_Twice(6, 6), nn.Tanh(), top) == ["0.weight", "2.weight"]
    tied = nn.Linear(6, 6)
    assert drawn(tied, nn.Tanh(), tied, top, cuts=["2", "3"]) == ["0.weight", "3.weight"]
    assert drawn(Residual(6), top) == ["0.inner.0.weight", "0.inner.2.weight", "1.weight"]
    # What has a weight that no backward pass uses as it is may be first, where no backward pass uses it.
    normed = nn.utils.parametrizations.weight_norm(nn.Linear(6, 6))
    assert drawn(normed, nn.Tanh(), top) == ["2.weight"]


@pytest.mark.parametrize("is_closed", [True, False])
def test_gains_and_tables_have_no_feedback(is_closed: bool) -> None:
    """They scale or shift each unit by itself; whatever the stage is made of, deltas meet the gains as they are."""
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.Tanh(), nn.Conv2d(4, 4, 3), nn.LayerNorm([4, 4, 4]),
        nn.Tanh() if is_closed else nn.Softsign(), nn.Flatten(2), Positions(4, 16), nn.Linear(16, 3), nn.Flatten(),
        nn.Linear(12, 3),
    ).double()  # fmt: skip
    x, y = images(6, torch.float64)
    with torch.no_grad():
        for p in model[3].parameters():
            p.normal_()
    credit = FeedbackAlignment(seed=1)
    rule = LocalRule(model, CE, credit, Descent(), cuts=["0", "3", "7", "9"])
    assert list(credit.feedback) == ["2.weight", "7.weight", "9.weight"]
    weights = {name: model.get_parameter(name).detach().clone() for name in credit.feedback}
    credit.load_state_dict({"feedback": weights})
    rule.backward(x, y)
    found = {name: p.grad for name, p in model.named_parameters()}
    true = torch.autograd.grad(CE(model(x), y), list(model.parameters()))
    for (name, gradient), wanted in zip(found.items(), true, strict=True):
        assert gradient is not None
        assert float((gradient - wanted).abs().max()) < 1e-12, name


def test_feedback_of_other_stages_does_not_depend_on_the_first() -> None:
    plain, deep = FeedbackAlignment(seed=2), FeedbackAlignment(seed=2)
    torch.manual_seed(0)
    layers = list(mlp(6, 6, 5, 3))
    plain.bind(Chain(nn.Sequential(nn.Linear(6, 6), *layers[1:])))
    deep.bind(Chain(nn.Sequential(Residual(6), *layers[1:])))
    assert equal({n: deep.feedback[n] for n in plain.feedback}, plain.feedback)
