"""Spiking nets by name: forms, ranges, spikes counted, and every rule beside them."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import equal
from torch import Tensor, nn

from beyondprop.errors import NonFiniteError, UnsupportedModelError
from beyondprop.lab import nets, registry
from beyondprop.lab.comparing.comparison import compare
from beyondprop.lab.comparing.settings import Settings
from beyondprop.lab.nets.spiking import UnitRange, spike_loss
from beyondprop.lab.runs.recorded import number, read_run
from beyondprop.nn import PoissonEncoder, SpikingLayer

REFUSED = {
    "hm2bp": {
        "am-paper-fc", "am-paper-lenet", "am-paper-binary",
        "am-adam", "am-adam-unit", "am-sgd", "am-mem", "am-mem-bcd", "locoprop-m", "locoprop-m-rows", "locoprop-s",
        "consequentialism", "offline-am", "mac", "bcd", "admm", "dfa",
    },
    "surrogate": {"am-mem", "am-mem-bcd", "offline-am", "mac", "bcd", "admm", "fa"},
}  # fmt: skip


def _layers(model: nn.Module) -> list[SpikingLayer]:
    return [module for module in model.modules() if isinstance(module, SpikingLayer)]


def test_forms_say_what_is_built() -> None:
    one = nets.build("spiking:30x2", (1, 8, 8), 10)
    assert [layer.op.weight.shape for layer in _layers(one)] == [(30, 64), (30, 30), (10, 30)]
    assert {layer.rule for layer in _layers(one)} == {"hm2bp"}
    assert [m.steps for m in one.modules() if isinstance(m, PoissonEncoder)] == [50]
    other = nets.build("spiking:30:surrogate:T=40:conv", (3, 9, 8), 7)
    assert {layer.rule for layer in _layers(other)} == {"surrogate"}
    assert other(torch.rand(2, 3, 9, 8)).shape == (2, 7)
    events = nets.build("spiking:30:events", (35, 2, 4, 4), 3)
    assert events(torch.ones(2, 35, 2, 4, 4)).shape == (2, 3)
    assert nets.build("spiking:9:events:conv", (35, 2, 6, 6), 3)(torch.ones(2, 35, 2, 6, 6)).shape == (2, 3)


@pytest.mark.parametrize(
    ("form", "shape", "said"),
    [
        ("spiking", (4,), "must be WIDTHxDEPTH"),
        ("spiking:3x", (4,), "must be WIDTHxDEPTH"),
        ("spiking:0", (4,), "must be WIDTHxDEPTH"),
        ("spiking:3:T=0", (4,), "T must be a whole number >= 1"),
        ("spiking:3:T=99999", (4,), "T must be at most 10,000"),
        ("spiking:3:T=31:target=11", (4,), "the target must be <= 10, as many spikes as fit"),
        ("spiking:3:events", (7, 4), "the target must be <= 2"),
        ("spiking:3:T=40:events", (40, 4), "leave one of them out"),
        ("spiking:3:events", (), "takes .T, ...., got samples of shape"),
        ("spiking:3", (), "takes rows or images"),
        ("spiking:3:conv", (4,), "takes images"),
        ("spiking:3:conv", (1, 3, 9), "4x4 or more"),
        ("spiking:3:hm2bp:surrogate", (4,), "take one of them"),
        ("spiking:100000x2000", (4,), "weights or more"),
    ],
)
def test_forms_that_are_none_are_refused(form: str, shape: tuple[int, ...], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        nets.build(form, shape, 10)


def test_both_rules_begin_with_the_same_weights_and_spikes() -> None:
    found = []
    for rule in ("hm2bp", "surrogate"):
        torch.manual_seed(0)
        model = nets.build(f"spiking:20:{rule}:T=40", (1, 8, 8), 10)
        found.append(model(torch.rand(3, 1, 8, 8)))
    assert torch.equal(*found)
    assert found[0].any()


def test_the_range_is_that_of_what_was_trained_on() -> None:
    module = UnitRange(2)
    x = torch.tensor([[0.0, 5.0], [4.0, 5.0], [2.0, 5.0]])
    assert module.eval()(x).tolist() == [[0.0, 0.0], [1.0, 0.0], [0.5, 0.0]]  # nothing was trained on
    module.train()(x)
    module(torch.tensor([[-4.0, 7.0]]))
    assert module.eval()(torch.tensor([[0.0, 6.0], [9.0, 4.0]])).tolist() == [[0.5, 0.5], [1.0, 0.0]]
    other = UnitRange(2)
    other.load_state_dict(module.state_dict())
    assert torch.equal(other.low, torch.tensor([-4.0, 5.0]))
    images = UnitRange(3)(torch.arange(24.0).view(2, 3, 2, 2))
    assert images.amin((0, 2, 3)).tolist() == [0.0] * 3
    assert images.amax((0, 2, 3)).tolist() == [1.0] * 3


def test_what_is_no_input_leaves_the_range_as_it_was() -> None:
    module = UnitRange(2)
    module(torch.tensor([[0.0, 0.0], [1.0, 2.0]]))
    before = copy.deepcopy(module.state_dict())
    for wrong in (float("nan"), float("inf")):
        with pytest.raises(NonFiniteError):
            module(torch.tensor([[0.5, wrong]]))
    with pytest.raises(ValueError, match="for 2 features or channels"):
        module(torch.zeros(5, 1))
    assert module(torch.zeros(0, 2)).shape == (0, 2)
    assert equal(module.state_dict(), before)


def test_evaluations_that_follow_each_other_are_counted_apart() -> None:
    model = nets.build("spiking:9:T=40", (6,), 3)
    model(torch.rand(50, 6))
    model.eval()
    layer: Any = _layers(model)[0]
    model(torch.ones(4, 6))
    assert layer.counters["spikes_a_row"] > 0
    model(torch.zeros(4, 6))
    assert layer.counters == {"spikes_a_row": 0.0}


def test_spikes_a_row_are_those_of_the_last_evaluation() -> None:
    torch.manual_seed(0)
    model = nets.build("spiking:20:T=40", (1, 8, 8), 10)
    layers: list[Any] = _layers(model)
    assert all(layer.counters == {} for layer in layers)
    spikes: dict[int, Tensor] = {}
    for i, layer in enumerate(layers):
        layer.register_forward_hook(lambda _module, _inputs, out, i=i: spikes.update({i: out.detach()}))
    for _ in range(2):  # what was counted before a training batch is forgotten
        model.train()
        model(torch.rand(5, 1, 8, 8))
        model.eval()
        totals = [0.0, 0.0]
        for rows in (4, 2):
            model(torch.rand(rows, 1, 8, 8))
            totals = [total + float(spikes[i].sum()) for i, total in enumerate(totals)]
        assert all(totals)
        assert [layer.counters["spikes_a_row"] for layer in layers] == [total / 6 for total in totals]
    counted = [layer.counters for layer in layers]
    copy.deepcopy(model)(torch.rand(4, 1, 8, 8))
    assert [layer.counters for layer in layers] == counted


@pytest.mark.parametrize("rule", ["hm2bp", "surrogate"])
@pytest.mark.filterwarnings("ignore")
def test_every_rule_trains_them_or_refuses_by_name(rule: str) -> None:
    refused = set()
    for spec in registry.rules:
        if not spec.build.__module__.startswith("beyondprop."):
            continue
        torch.manual_seed(0)
        form = f"spiking:20:{rule}:T=31"
        model = nets.build(form, (1, 8, 8), 10)
        x, y = torch.rand(20, 1, 8, 8), torch.arange(20) % 10
        before = copy.deepcopy(list(model.parameters()))
        try:
            trained = spec.build(model, spike_loss(form), spec.lr)
            for _ in range(2):
                trained.step(x, y)
        except (UnsupportedModelError, ValueError, RuntimeError) as error:
            assert "Spik" in str(error) or "tage" in str(error) or "Layer" in str(error), (spec.name, error)  # noqa: PT017
            refused.add(spec.name)
        else:
            moved = [not torch.equal(one, other) for one, other in zip(before, model.parameters(), strict=True)]
            assert all(moved), spec.name
    assert refused == REFUSED[rule]


def test_a_form_has_a_loss_of_its_own() -> None:
    for form, target in (
        ("spiking:9", 10),
        ("spiking:9:T=100", 20),
        ("spiking:9:target=7:events", 7),
        ("spiking:9:T=4", 1),
    ):
        loss = spike_loss(form)
        assert (loss.target, loss.off, loss.margin) == (target, target / 10, target / 10)
        model = nets.build(form, (50, 3) if "events" in form else (3,), 4)
        assert _layers(model)[-1].injected == target


def test_they_are_compared_with_a_column_of_spikes(tmp_path: Path) -> None:
    forms = ("spiking:30:hm2bp:T=31", "spiking:30:surrogate:T=31", "mlp:30x1")
    settings = Settings(data="digits", nets=forms, rules=("adam",), epochs=4, seeds=(0,))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run = read_run(compare(settings, out=tmp_path / "run"))
    for form in forms:
        row = run.of("eval", f"adam {form}", 0)[-1]
        assert ("spikes_a_row" in row["counters"]) == ("spiking" in form) if "counters" in row else "mlp" in form
        assert number(row, "accuracy") > 0.6
    assert list(run.counters) == ["spikes_a_row"]
