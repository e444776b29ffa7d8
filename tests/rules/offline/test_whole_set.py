"""The training loop and comparisons with rules that take the whole set a step, beside those that take batches."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cases import InterruptAt, mlp
from torch import Tensor, nn

from beyondprop import BCD, Backprop, data, fit
from beyondprop.data import Dataset
from beyondprop.errors import UnsupportedModelError
from beyondprop.lab import registry
from beyondprop.lab.comparing.comparison import compare, resume
from beyondprop.lab.comparing.settings import Settings
from beyondprop.lab.runs.recorded import read_rows
from beyondprop.lab.training.work import work_per_step

WHOLE = [n for n in registry.rules.names() if registry.rules.get(n).whole_set]
CALL: dict[str, Any] = {"epochs": 4, "batch_size": 16, "seed": 3}


def _toy() -> Any:
    g = torch.Generator().manual_seed(1)
    x = torch.randn(140, 6, generator=g)
    y = x[:, :3].argmax(1)
    return SimpleNamespace(x_train=x[:100], y_train=y[:100], x_test=x[100:], y_test=y[100:])


def _build(name: str) -> Any:
    torch.manual_seed(11)
    spec = registry.rules.get(name)
    return spec.build(mlp(6, 9, 8, 3), nn.CrossEntropyLoss(), spec.lr)


def _comparable(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


def test_there_are_whole_set_rules_and_they_say_so() -> None:
    assert WHOLE == ["offline-am", "mac", "bcd", "admm"]
    assert all(_build(n).whole_set == (n in WHOLE) for n in registry.rules.names())


@pytest.mark.parametrize("name", WHOLE)
def test_an_epoch_is_one_step_on_all_rows_in_order(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    toy, rule = _toy(), _build(name)
    seen: list[tuple[Tensor, Tensor]] = []
    step = rule.step

    def spied(x: Tensor, y: Tensor, **options: Any) -> Any:
        seen.append((x, y))
        return step(x, y, **options)

    monkeypatch.setattr(rule, "step", spied)
    rows = fit(rule, toy, **CALL).evaluations
    assert [(r["step"], r["epoch"], r["samples"]) for r in rows] == [(n, n, 100 * n) for n in range(5)]
    assert len(seen) == 4 or len(seen) == 5  # the counting of work may go through the spy of a copy
    assert all(x is toy.x_train and y is toy.y_train for x, y in seen[-4:])
    work = rows[1]["work"]
    assert work > 0
    assert [r["work"] for r in rows] == pytest.approx([n * work for n in range(5)])
    # In gradients on 16 rows, as for the rules beside it; one sweep is some full gradients' worth.
    assert work == pytest.approx(work_per_step(_build(name), toy.x_train, toy.y_train, steps=1) * 100 / 16)
    assert 1 < work / (100 / 16) < 60


def test_evaluations_line_up_with_batches() -> None:
    toy = _toy()
    for every, expected in ((None, [0, 1, 2, 3, 4]), (3, [0, 1, 2, 3, 4]), (14, [0, 2, 4])):
        rows = fit(_build("bcd"), toy, **CALL, evaluate_every=every).evaluations
        assert [r["epoch"] for r in rows] == expected
    assert [r["epoch"] for r in fit(_build("adam"), toy, **CALL, evaluate_every=14).evaluations] == expected


def test_any_rule_can_be_given_the_whole_set() -> None:
    toy = _toy()
    model = mlp(6, 9, 3)
    twin = copy.deepcopy(model)
    rule = Backprop(model, nn.CrossEntropyLoss(), lambda p: torch.optim.SGD(p, lr=0.1))
    fit(rule, toy, **CALL, schedule="constant", whole_set=True)
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.1)
    for _ in range(4):
        optimizer.zero_grad()
        nn.functional.cross_entropy(twin(toy.x_train), toy.y_train).backward()
        optimizer.step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q)


def test_a_whole_set_rule_on_batches_says_what_is_wrong() -> None:
    with pytest.raises(ValueError, match=r"BCD keeps codes for the data set of its first step.*no mini-batches"):
        fit(_build("bcd"), _toy(), **CALL, whole_set=False)


@pytest.mark.parametrize("name", WHOLE)
def test_resumed_equals_undisturbed(name: str, tmp_path: Path) -> None:
    from beyondprop.lab.runs.checkpoint import load_checkpoint, save_checkpoint

    toy = _toy()
    whole = _build(name)
    expected = fit(whole, toy, **CALL, alignment=True).rows
    steps = 0

    def interrupted() -> bool:
        nonlocal steps
        steps += 1
        return steps == 2

    rows: list[dict[str, Any]] = []
    path = tmp_path / "state.safetensors"
    with pytest.raises(KeyboardInterrupt):
        fit(
            _build(name),
            toy,
            **CALL,
            alignment=True,
            log=rows.append,
            save=lambda s: save_checkpoint(path, s),
            interrupted=interrupted,
        )
    second = _build(name)
    rows += fit(second, toy, **CALL, alignment=True, resume=load_checkpoint(path)).rows
    assert _comparable(rows) == _comparable(expected)
    for p, q in zip(whole.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.fixture
def small_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    digits = data.load("digits")
    small = Dataset("digits", digits.x_train[:180], digits.y_train[:180], digits.x_test, digits.y_test, digits.classes)
    monkeypatch.setattr(data, "load", lambda name, progress=None: small)


@pytest.fixture
def extra_rules() -> Iterator[None]:
    registry.rules.names()  # what is built in is loaded when somebody looks
    before = dict(registry.rules.rows)
    yield
    registry.rules.rows.clear()
    registry.rules.rows.update(before)


SETTINGS: dict[str, Any] = {"nets": ("mlp:12x2",), "epochs": 3, "batch_size": 32, "seeds": (0, 1)}


def _rows(path: Path) -> list[dict[str, Any]]:
    rows, notes = read_rows(path)
    assert notes == ()
    return rows


@pytest.mark.usefixtures("small_digits")
@pytest.mark.parametrize("at", [4, 13, 20, 30])
def test_a_mixed_comparison_resumes_to_the_same_rows(at: int, tmp_path: Path) -> None:
    settings = Settings(**SETTINGS, rules=("bcd", "adam", "admm"))
    whole = compare(settings, out=tmp_path / "whole")
    rows = _rows(whole)
    evaluations = {(r["contender"], r["seed"], r["epoch"]) for r in rows if r["kind"] == "eval"}
    assert evaluations == {(n, s, e) for n in ("bcd", "adam", "admm") for s in (0, 1) for e in range(4)}
    assert {r["contender"] for r in rows if r["kind"] == "alignment"} == {"bcd", "adam", "admm"}
    last = {r["contender"]: r for r in rows if r["kind"] == "eval" and r["epoch"] == 3}
    assert last["bcd"]["step"] == 3
    assert last["bcd"]["samples"] == last["adam"]["samples"] == 3 * 180
    first = {r["loss"] for r in rows if r["kind"] == "eval" and r["step"] == 0 and r["seed"] == 0}
    assert len(first) == 1  # the same weights, and the same loss is reported
    with pytest.raises(KeyboardInterrupt):
        compare(settings, out=tmp_path / "part", observer=InterruptAt(at))
    resume(tmp_path / "part")
    assert _comparable(_rows(tmp_path / "part")) == _comparable(rows)


@pytest.mark.usefixtures("small_digits")
def test_tuning_of_a_whole_set_rule(tmp_path: Path) -> None:
    settings = Settings(**{**SETTINGS, "seeds": (0,)}, rules=("mac",), tune=True, tune_epochs=2, alignment=False)
    try:
        path = compare(settings, out=tmp_path / "run")
    except UserWarning:  # the best may be at the grid's edge, which is said
        path = resume(tmp_path / "run")
    tuning = [r for r in _rows(path) if r["kind"] == "tuning"]
    assert [r["lr"] for r in tuning] == list(registry.rules.get("mac").grid)
    assert all(r["accuracy"] is not None for r in tuning)


@pytest.mark.usefixtures("small_digits", "extra_rules")
def test_a_spec_alone_makes_a_rule_take_the_whole_set(tmp_path: Path) -> None:
    registry.register(dataclasses.replace(registry.rules.get("sgd"), name="full-batch", whole_set=True))
    path = compare(Settings(**{**SETTINGS, "seeds": (0,)}, rules=("full-batch",)), out=tmp_path / "run")
    assert [r["step"] for r in _rows(path) if r["kind"] == "eval"] == [0, 1, 2, 3]


def test_what_it_cannot_train_is_named_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=r"bcd cannot train conv:8x2: BCD trains stages of one Linear"):
        compare(Settings(**{**SETTINGS, "nets": ("conv:8x2",)}, rules=("adam", "bcd")), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()
    assert BCD.whole_set
