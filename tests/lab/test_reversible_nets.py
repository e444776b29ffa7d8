"""Reversible nets in the laboratory: their forms, what they keep for the backward pass, and what they are compared with."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import SGD
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from beyondprop import AltMin, Backprop, LearningRule, data, fit
from beyondprop.cli import main
from beyondprop.data import Dataset
from beyondprop.lab import nets
from beyondprop.lab.training.counted import KEPT, counters, kept_bytes


def _net(form: str, shape: tuple[int, ...] = (3, 16, 16), outputs: int = 4) -> nn.Module:
    torch.manual_seed(0)
    return nets.build(form, shape, outputs)


def _kept(form: str, batch: int = 4) -> int:
    rule = Backprop(_net(form), nn.CrossEntropyLoss(), SGD)
    return kept_bytes(rule, torch.randn(batch, 3, 16, 16), torch.arange(batch) % 4)


# Forms


@pytest.mark.parametrize(
    ("form", "count"),
    [
        ("revnet38", 464_890),
        ("revnet110:mode=store", 1_729_194),
        ("revnet164:mode=checkpoint", 1_748_778),
        ("resnet32:preact", 464_154),
        ("resnet110:preact", 1_727_962),
        ("resnet164:preact:bottleneck", 1_703_258),
        ("resnet32", 464_154),  # of He et al., CVPR 2016: other blocks, as many weights
    ],
)
def test_forms_are_the_published_nets(form: str, count: int) -> None:
    with torch.device("meta"):
        model = nets.build(form, (3, 32, 32), 10)
    assert sum(p.numel() for p in model.parameters()) == count


@pytest.mark.parametrize("family", ["revnet14", "revnet164", "revnet56", "revtransformer:32x2:dropout=0.1"])
def test_the_mode_is_passed_on_and_the_weights_are_the_same(family: str) -> None:
    models = [_net(f"{family}:mode={mode}") for mode in ("inverse", "checkpoint", "store")]
    states = [model.state_dict() for model in (*models, _net(family))]
    for other in states[1:]:
        assert list(other) == list(states[0])
        assert all(torch.equal(a, b) for a, b in zip(other.values(), states[0].values(), strict=True))
    found = [{m.mode for m in model.modules() if hasattr(m, "mode")} for model in (*models, _net(family))]
    assert found[2] == {"store"}
    assert "inverse" in found[0]
    assert found[0] == found[3]
    assert found[1] == {"checkpoint"}


@pytest.mark.parametrize(
    ("form", "shape", "message"),
    [
        ("revnet", (3, 32, 32), "the depth must be 12 n"),
        ("revnet20", (3, 32, 32), "'revnet20': the depth must be 12 n"),
        ("revnet2", (3, 32, 32), "the depth must be 12 n"),
        ("revnet20000", (3, 32, 32), "the depth must be at most 2,000"),
        ("revnet\u00b2", (3, 32, 32), "net must be one of|the depth must be"),
        (
            "revnet38:mode=stored",
            (3, 32, 32),
            "unknown option 'mode=stored'; accepted: mode=inverse, mode=checkpoint, mode=store",
        ),
        ("revnet38:store", (3, 32, 32), "unknown option 'store'"),
        ("revnet38:mode=store:mode=inverse", (3, 32, 32), "are given; take one of them"),
        ("revnet38", (784,), "takes images"),
        ("revnet38", (3, 30, 32), "height and width are multiples of 4, got 30x32"),
        ("resnet32:preact", (3, 32, 30), "height and width are multiples of 4, got 32x30"),
        ("resnet33:preact", (3, 32, 32), "the depth must be 6 n"),
        ("resnet32:preact:bottleneck", (3, 32, 32), r"must be 9 n \+ 2, such as resnet164:preact:bottleneck"),
        ("resnet164:bottleneck", (3, 32, 32), "bottleneck units are for 'preact'"),
        ("resnet32:nonsense", (3, 32, 32), "unknown option 'nonsense'; accepted: preact, bottleneck"),
        ("revtransformer:32", (3, 32, 32), "'32' must be WIDTHxDEPTH"),
        ("revtransformer:65x2", (3, 32, 32), "multiple of its 2 heads"),
        ("revtransformer:32x2:patch=33", (3, 32, 32), "1 <= SIZE <= 32"),
        ("revtransformer:32x2:dropout=1", (3, 32, 32), r"dropout must be in \[0, 1\)"),
        ("revtransformer:32000x1", (3, 32, 32), "weights or more"),
    ],
)
def test_what_is_no_reversible_net_is_refused(form: str, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        nets.build(form, shape, 10)


@pytest.mark.parametrize("form", ["revnet14", "resnet8:preact", "revtransformer:32x2:patch=4"])
def test_local_rules_train_them(form: str) -> None:
    """As backpropagation does, where codes are gradients."""
    x, y = torch.randn(6, 3, 8, 8, dtype=torch.float64), torch.arange(6) % 4
    model, twin = (_net(form, (3, 8, 8)).double() for _ in range(2))
    local = AltMin(model, nn.CrossEntropyLoss(), SGD, code_solver="gradient")
    plain = Backprop(twin, nn.CrossEntropyLoss(), SGD)
    assert len(local.chain) >= 4
    for _ in range(2):
        local.step(x, y)
        plain.step(x, y)
    for (name, p), q in zip(model.state_dict().items(), twin.state_dict().values(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12, msg=name)


# What is kept for the backward pass


def test_what_autograd_keeps_is_counted_to_the_byte() -> None:
    """Inputs of each layer, where they are not the batch; memory once, whoever shares it; no weight."""
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3, bias=False))
    rule = Backprop(model, nn.CrossEntropyLoss(), SGD)
    x, y = torch.randn(5, 4), torch.arange(5) % 3
    relu, log_softmax, total_weight = 5 * 6 * 4, 5 * 3 * 4, 4
    assert kept_bytes(rule, x, y) == relu + log_softmax + total_weight


def test_a_batch_of_several_tensors_is_there_anyway() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 3), nn.Linear(2, 3)

        def forward(self, x: dict[str, Any]) -> Tensor:
            return self.a(x["a"]) + self.b(x["b"][0])

    y = torch.arange(5) % 3
    x = {"a": torch.randn(5, 4), "b": (torch.randn(5, 2),)}
    log_softmax, total_weight = 5 * 3 * 4, 4
    assert kept_bytes(Backprop(Two(), nn.CrossEntropyLoss(), SGD), x, y) == log_softmax + total_weight


class _Checkpointed(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Any:
        return checkpoint(self.inner, x, use_reentrant=False)


def test_what_is_thrown_away_is_not_counted() -> None:
    inner = nn.Sequential(nn.Linear(4, 50), nn.ReLU(), nn.Linear(50, 4))
    plain, saving = (nn.Sequential(nn.Linear(4, 4), part, nn.Linear(4, 3)) for part in (inner, _Checkpointed(inner)))
    x, y = torch.randn(5, 4), torch.arange(5) % 3
    found = [kept_bytes(Backprop(model, nn.CrossEntropyLoss(), SGD), x, y) for model in (plain, saving)]
    assert found[0] - found[1] == 5 * 50 * 4


def test_measuring_changes_nothing() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 3))
    rule = Backprop(model, nn.CrossEntropyLoss(), SGD)
    before, random = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    kept_bytes(rule, torch.randn(5, 4, generator=torch.Generator().manual_seed(0)), torch.arange(5) % 3)
    assert torch.equal(random, torch.get_rng_state())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("family", ["revnet{}", "revtransformer:32x{}"])
def test_reversible_nets_keep_the_same_at_every_depth(family: str) -> None:
    shallow, deep = (26, 110) if family == "revnet{}" else (2, 12)
    kept = {
        mode: [_kept(f"{family.format(d)}:mode={mode}") for d in (shallow, deep)]
        for mode in ("inverse", "checkpoint", "store")
    }
    assert kept["inverse"][1] <= 1.02 * kept["inverse"][0]
    assert kept["store"][1] > 3 * kept["store"][0]
    assert kept["inverse"][1] < kept["checkpoint"][1] < kept["store"][1]


class _Counting(nn.Sequential):
    counters = {KEPT: 1.0}  # noqa: RUF012 - as a module has it


def _toy(rows: int = 60) -> Dataset:
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(rows + 20, 3, 8, 8, generator=g), torch.arange(rows + 20) % 4
    return Dataset("digits", x[:rows], y[:rows], x[rows:], y[rows:], tuple("abcd"))


def _fit(rule: LearningRule, **settings: Any) -> list[dict[str, float]]:
    history = fit(rule, _toy(), epochs=2, batch_size=20, **settings)
    return [row.get("counters", {}) for row in history.evaluations]


def test_kept_bytes_are_measured_where_a_net_counts_them_or_they_are_wanted() -> None:
    layers = nn.Flatten(), nn.Linear(192, 6), nn.Tanh(), nn.Linear(6, 4)
    sgd = partial(Backprop, loss=nn.CrossEntropyLoss(), optimizer=SGD)
    found = _fit(sgd(_Counting(*layers)))
    assert len(found) == 3
    assert [set(row) for row in found] == [{KEPT}] * 3
    assert len({row[KEPT] for row in found}) == 1
    assert found[0][KEPT] > 20 * 6 * 4  # of the whole net, in place of its own 1
    assert _fit(sgd(nn.Sequential(*layers)), kept_bytes=True) == found
    assert _fit(sgd(nn.Sequential(*layers))) == [{}] * 3
    assert _fit(sgd(_Counting(*layers)), kept_bytes=False) == [{KEPT: 1.0}] * 3
    # It makes no backward pass through the modules: what they counted is of evaluations and looks.
    assert _fit(AltMin(_Counting(*layers), nn.CrossEntropyLoss(), SGD)) == [{}] * 3


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "load", lambda name, progress=None, **_: _toy())


def test_a_comparison_has_both_nets_bytes_side_by_side(
    small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    named = ["--net", "revnet26", "--net", "revnet26:mode=store", "--net", "resnet8:preact", "--rule", "sgd"]
    usual = ["--epochs", "1", "--batch-size", "20", "--seeds", "1", "--no-alignment", "--out", "run"]
    assert main(["compare", "--data", "digits", *named, *usual, "--json"]) == 0
    found = {c["net"]: c["counters"][KEPT] for c in json.loads(capsys.readouterr().out)["contenders"]}
    assert list(found) == ["revnet26", "revnet26:mode=store", "resnet8:preact"]
    assert 0 < found["revnet26"] < found["resnet8:preact"] < found["revnet26:mode=store"]
    assert "kept bytes" in Path("run/report.html").read_text()
    assert main(["report", "run"]) == 0
    shown = capsys.readouterr().out
    assert "kept" in shown
    assert "bytes" in shown


def test_a_comparison_of_ordinary_nets_has_none(
    small: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    usual = ["--epochs", "1", "--batch-size", "20", "--seeds", "1", "--no-alignment", "--out", str(tmp_path / "run")]
    assert main(["compare", "--data", "digits", "--net", "resnet8", "--rule", "sgd", *usual, "--json"]) == 0
    assert not json.loads(capsys.readouterr().out)["contenders"][0].get("counters")


def test_what_two_modules_share_is_measured_once() -> None:
    """A chain's output is what the transition above it keeps; their own counters have it twice."""
    model = _net("revnet26")
    assert counters(model) == {KEPT: 0}
    model(torch.randn(2, 3, 16, 16))
    assert 0 < _kept("revnet26", 2) < counters(model)[KEPT]
