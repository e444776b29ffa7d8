"""Training that another rule began: in Python by `fit(..., stop=)` and `fit(..., after=)`, in comparisons by `warm_start`."""

from __future__ import annotations

import copy
import json
import math
import signal
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import SGD, equal
from torch import Tensor, nn

from beyondprop import Backprop, data
from beyondprop.cli import main
from beyondprop.data import Dataset, batches
from beyondprop.errors import UnsupportedModelError
from beyondprop.lab import nets, registry, report
from beyondprop.lab.comparing.comparison import compare, resume
from beyondprop.lab.comparing.member import Member, Observer
from beyondprop.lab.comparing.settings import Settings
from beyondprop.lab.runs.checkpoint import load_checkpoint
from beyondprop.lab.runs.recorded import read_rows
from beyondprop.lab.training import History, Training, fit
from beyondprop.lab.training.work import work_per_step

NET = "mlp:12x2:dropout=0.2"
QUICK: dict[str, Any] = {"nets": (NET,), "epochs": 3, "batch_size": 32, "seeds": (0, 1), "threads": 1}
START = "warm-start=am-adam"


def make_digits() -> Dataset:
    g = torch.Generator().manual_seed(0)
    x = torch.rand(240, 1, 8, 8, generator=g)
    y = (x.flatten(1)[:, :40].reshape(-1, 10, 4).sum(2)).argmax(1)
    return Dataset("digits", x[:180], y[:180], x[180:], y[180:], tuple("0123456789"))


@pytest.fixture(autouse=True)
def _small_digits(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    small = make_digits()
    monkeypatch.setattr(data, "load", lambda name, progress=None: small)
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.chdir(tmp_path)


def rows_of(path: Path) -> list[dict[str, Any]]:
    rows, notes = read_rows(path)
    assert notes == ()
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


def by_hand(seed: int, first: str, second: str, stop: int, steps: int) -> dict[str, torch.Tensor]:
    """`stop` steps of one rule, then another's on the same weights: bare loops, the schedule written out."""
    digits = make_digits()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = nets.build(NET, digits.input_shape, digits.num_classes)
        rates = {name: registry.rules.get(name).rate(32) for name in (first, second)}
        rule = registry.rules.get(first).build(model, nn.CrossEntropyLoss(), rates[first])
        step = 0
        for epoch in range(3):
            order = torch.Generator().manual_seed((seed * 0x9E3779B97F4A7C15 + epoch) % 2**63)
            for x, y in batches(digits.x_train, digits.y_train, 32, generator=order):
                if step == stop:
                    rule = registry.rules.get(second).build(model, nn.CrossEntropyLoss(), rates[second])
                for group in rule.optimizers[0].param_groups:
                    group["lr"] = rates[first if step < stop else second] * (1 - step / steps)
                rule.step(x, y)
                step += 1
    assert step == steps
    return dict(model.state_dict())


@pytest.mark.parametrize("epochs", [0.5, 1.0, 2.2])
def test_a_warm_start_is_what_one_does_by_hand(epochs: float, tmp_path: Path) -> None:
    settings = Settings(**QUICK, rules=("adam", "sgd"), warm_start=f"am-adam:{epochs}", evaluate_every=4)
    path = compare(settings, out=tmp_path / "run")
    for rule in ("adam", "sgd"):
        for seed in (0, 1):
            found = load_checkpoint(path / "checkpoints" / f"{rule}.seed{seed}.safetensors")["model"]
            expected = by_hand(seed, "am-adam", rule, stop=round(6 * epochs), steps=18)
            assert equal(found, expected)


def test_a_rule_without_state_that_goes_on_from_itself_was_never_interrupted(tmp_path: Path) -> None:
    spec = registry.RuleSpec(
        "plain-sgd",
        "SGD",
        "",
        "",
        lambda m, loss, lr: Backprop(m, loss, lambda p: torch.optim.SGD(p, lr)),
        0.1,
        (),
    )
    registry.register(spec)
    try:
        whole = compare(Settings(**QUICK, rules=("plain-sgd",)), out=tmp_path / "whole")
        warm = compare(Settings(**QUICK, rules=("plain-sgd",), warm_start="plain-sgd:1"), out=tmp_path / "warm")
    finally:
        del registry.rules.rows["plain-sgd"]
    expected = [r for r in rows_of(whole) if r["kind"] == "eval" and r["epoch"] >= 1]
    found = [r for r in rows_of(warm) if r["kind"] == "eval" and r["contender"] == "plain-sgd"]
    for row in expected:  # what was handed over has no training loss yet
        row["train_loss"] = None if row["epoch"] == 1 else row["train_loss"]
    assert found == expected


def test_counts_go_on_where_the_warm_start_left_off(tmp_path: Path) -> None:
    path = compare(Settings(**QUICK, rules=("adam",), warm_start="am-adam:0.5", evaluate_every=4), out=tmp_path / "run")
    rows, _ = read_rows(path)
    start = [r for r in rows if r["kind"] == "eval" and (r["contender"], r["seed"]) == (START, 0)]
    own = [r for r in rows if r["kind"] == "eval" and (r["contender"], r["seed"]) == ("adam", 0)]
    assert [r["step"] for r in start] == [0, 3]
    assert [r["step"] for r in own] == [3, 4, 8, 12, 16, 18]
    for key in ("step", "epoch", "samples", "work", "seconds", "loss", "accuracy"):
        assert own[0][key] == start[-1][key]
    digits = make_digits()
    model = nets.build(NET, digits.input_shape, 10)
    rule = registry.rules.get("am-adam").build(model, nn.CrossEntropyLoss(), 1e-3)
    each = work_per_step(rule, digits.x_train[:32], digits.y_train[:32])
    assert each > 1.02
    assert start[-1]["work"] == pytest.approx(3 * each)
    assert own[-1]["work"] == pytest.approx(3 * each + 15)
    assert own[-1]["samples"] == 540
    assert own[-1]["seconds"] > start[-1]["seconds"] > 0


class InterruptAt(Observer):
    def __init__(self, count: int) -> None:
        self.count = count

    def row(self, member: Member, row: dict[str, Any]) -> None:
        del member, row
        self.count -= 1
        if self.count == 0:
            signal.raise_signal(signal.SIGINT)


# Rows of a seed: 2 x 3 of the warm start and its end, then 2 x 4 of each rule and its end.
@pytest.mark.parametrize("at", [1, 3, 5, 6, 7, 9, 14, 26])
def test_interrupted_anywhere_and_resumed_equals_undisturbed(at: int, tmp_path: Path) -> None:
    settings = Settings(**QUICK, rules=("adam", "am-sgd"), warm_start="am-adam:1.5", evaluate_every=5)
    whole = compare(settings, out=tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        compare(settings, out=tmp_path / "part", observer=InterruptAt(at))
    assert len(rows_of(tmp_path / "part")) < len(rows_of(whole))
    resume(tmp_path / "part")
    assert rows_of(tmp_path / "part") == rows_of(whole)


def test_what_is_done_is_not_done_again(tmp_path: Path) -> None:
    path = compare(Settings(**QUICK, rules=("adam",), warm_start="am-adam:1"), out=tmp_path / "run")
    before = rows_of(path)
    resume(path)
    assert rows_of(path) == before


def test_config_records_it_and_gives_it_back(tmp_path: Path) -> None:
    settings = Settings(**{**QUICK, "device": "cpu"}, rules=("adam",), warm_start="am-adam:0.5", lr={"am-adam": 0.01})
    config = tomllib.loads((compare(settings, out=tmp_path / "run") / "config.toml").read_text())
    assert config["warm_start"] == "am-adam:0.5"
    assert config["warm_start_rule"]["settings"] == {"lr": 0.01, "schedule": "linear"}
    assert [rule["name"] for rule in config["contenders"]] == ["adam"]
    assert Settings.from_config(config) == settings


def test_the_report_shows_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["compare", "--net", "mlp:12x2", "--rule", "adam", "--rule", "sgd", "--epochs", "2", "--seeds", "2"]
    assert main([*argv, "--warm-start", "am-adam:0.5", "--out", "run"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "am-adam warm start, seed 0" in out
    assert "2 contenders" in out
    assert "Contenders start from the weights of AM-Adam after 0.5 epochs, accuracy" in out
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Contenders start from the weights of AM-Adam after 0.5 epochs" in page
    assert "AM-Adam, warm start" in page
    assert "<td>warm start</td><td>am-adam:0.5</td>" in page
    assert main(["report", "run", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [rule["name"] for rule in found["contenders"]] == ["adam", "sgd"]
    assert found["warm_starts"][0]["name"] == START
    assert found["warm_starts"][0]["epochs"] == 0.5
    # The first evaluation of a rule is one after steps of its own, not what was handed over.
    assert found["contenders"][0]["first_epoch"] == 1.0
    run = report.read_run(tmp_path / "run")
    assert run.seeds(START)["done"] == (0, 1)


def test_a_warm_start_that_fails_fails_its_seed(tmp_path: Path) -> None:
    settings = Settings(**QUICK, rules=("adam", "am-mem"), warm_start="sgd:1", lr={"sgd": 1e30})
    path = compare(settings, out=tmp_path / "run")
    failed = [(r["contender"], r["seed"], r["message"]) for r in rows_of(path) if r["kind"] == "failed"]
    names = ("warm-start=sgd", "adam", "am-mem")
    assert sorted(f[:2] for f in failed) == sorted((name, seed) for seed in (0, 1) for name in names)
    assert all(m.startswith("The warm start failed: ") == (name != "warm-start=sgd") for name, _, m in failed)
    before = rows_of(path)
    resume(path)
    assert rows_of(path) == before
    assert "Backprop, SGD, warm start" in report.write_report(path).read_text()


@pytest.mark.filterwarnings("ignore:adam. Tuning chose")
def test_tuning_starts_warm_and_never_sees_the_test_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict[str, Any]] = []

    def spy(rule: Any, dataset: Any, training: Training, **arguments: Any) -> History:
        calls.append({"rows": (len(dataset.x_train), len(dataset.x_test)), "training": training, **arguments})
        return fit(rule, dataset, training, **arguments)

    monkeypatch.setattr("beyondprop.lab.comparing.tuning.fit", spy)
    settings = Settings(**QUICK, rules=("adam",), warm_start="am-adam:0.5", tune=True, tune_epochs=2)
    path = compare(settings, out=tmp_path / "run")
    assert [call["rows"] for call in calls] == [(150, 30)] * 5
    assert calls[0]["training"].stop == 0.5
    assert all(call["after"].evaluations[-1]["step"] == 2 and call["training"].epochs == 2 for call in calls[1:])
    tuned = [r for r in rows_of(path) if r["kind"] == "tuning"]
    assert {r["contender"] for r in tuned} == {"adam"}
    # Each starts from the weights that its warm start left, so none can be as bad as new weights.
    assert len({r["loss"] for r in tuned}) == 4


def test_tuning_after_a_warm_start_that_fails_says_so(tmp_path: Path) -> None:
    settings = Settings(**QUICK, rules=("adam",), warm_start="sgd:1", lr={"sgd": 1e30}, tune=True)
    with pytest.warns(UserWarning, match="Tuning failed at every learning rate"):
        path = compare(settings, out=tmp_path / "run")
    assert all("The warm start failed" in r["message"] for r in rows_of(path) if r["kind"] == "tuning")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"warm_start": "am-adam"},
            r"warm_start is RULE:EPOCHS with EPOCHS a number > 0 and <= 1e.09, such as am-adam:0.5, got 'am-adam'",
        ),
        ({"warm_start": ":1"}, r"warm_start is RULE:EPOCHS"),
        ({"warm_start": "am-adam:0"}, r"got 'am-adam:0'"),
        ({"warm_start": "am-adam:-1"}, r"got 'am-adam:-1'"),
        ({"warm_start": "am-adam:nan"}, r"got 'am-adam:nan'"),
        ({"warm_start": "am-adam:some"}, r"got 'am-adam:some'"),
        ({"warm_start": "am-adam:3"}, r"warm_start takes 3 of epochs=3; it must leave some to the rules"),
        ({"warm_start": "am-adam:1", "tune": True, "tune_epochs": 0.5}, r"warm_start takes 1 of tune_epochs=0.5"),
        ({"warm_start": "am-adm:1"}, r"the rule of warm_start must be one of .* perhaps you meant 'am-adam'"),
        (
            {"warm_start": "am-adam:1", "lr": {"sgd": 1.0}},
            r"lr is given for 'sgd', which is none of the rules adam, am-adam",
        ),
        (
            {"warm_start": "bcd:1"},
            r"warm_start is for rules that take batches; bcd takes the whole training set a step",
        ),
        ({"warm_start": "am-adam:2.99"}, r"warm_start 'am-adam:2.99' takes all of 18 step\(s\)"),
    ],
)
def test_bad_settings_are_refused(changed: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        compare(Settings(**{**QUICK, "rules": ("adam",), **changed}), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_rule_that_cannot_train_the_net_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="am-mem-bcd cannot train"):
        compare(
            Settings(**{**QUICK, "nets": ("mlp:8x2:bn:dropout=0.1",)}, rules=("adam",), warm_start="am-mem-bcd:1"),
            out=tmp_path / "run",
        )
    assert not (tmp_path / "run").exists()


def test_wrong_usage_on_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "--rule", "adam", "--warm-start", "am-adam"]) == 2
    assert "RULE:EPOCHS" in capsys.readouterr().err


def test_fit_refuses_what_does_not_fit_together() -> None:
    digits = make_digits()

    def rule() -> Any:
        torch.manual_seed(0)
        return registry.rules.get("adam").build(nets.build(NET, (1, 8, 8), 10), nn.CrossEntropyLoss(), 1e-3)

    call: dict[str, Any] = {"epochs": 2, "batch_size": 32}
    first = fit(rule(), digits, stop=0.5, **call)
    assert [r["step"] for r in first.evaluations] == [0, 3]
    with pytest.raises(ValueError, match=r"after ends at step 3 and epoch 0.5; here an epoch has 9 steps"):
        fit(rule(), digits, after=first, epochs=2, batch_size=20)
    with pytest.raises(ValueError, match="after has no evaluation"):
        fit(rule(), digits, after=History(), **call)
    with pytest.raises(ValueError, match="handed over in after ends at step 3, this one at step 2"):
        fit(rule(), digits, after=first, stop=0.3, **call)
    with pytest.raises(ValueError, match=r"stop=2 epochs is step 12 of 12; one or more must be left"):
        fit(rule(), digits, stop=2.0, **call)
    with pytest.raises(ValueError, match="stop must be a finite number > 0"):
        fit(rule(), digits, stop=math.inf, **call)
    states: list[Any] = []
    fit(rule(), digits, after=first, save=lambda s: states.append(copy.deepcopy(s)), **call)
    with pytest.raises(ValueError, match="first 3 then, 0 now"):
        fit(rule(), digits, resume=states[0], **call)


class Told(Backprop):
    """Notes what `begin_epoch` is given."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.told: list[list[Tensor]] = []

    def begin_epoch(self, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
        self.told.append([x for x, _ in batches])


def test_an_epoch_that_begins_in_its_middle_is_begun(tmp_path: Path) -> None:
    digits, loss = make_digits(), nn.CrossEntropyLoss()
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    usual: dict[str, Any] = {"epochs": 3, "batch_size": 32}
    steps = 6
    first = Told(model, loss, SGD)
    began = fit(first, digits, stop=1.5, **usual)
    assert [len(xs) for xs in first.told] == [6, 3]
    saved: list[Any] = []
    rule = Told(model, loss, SGD)
    fit(rule, digits, after=began, save=saved.append, evaluate_every=4, **usual)
    assert [len(xs) for xs in rule.told] == [3, 6]
    order = torch.Generator().manual_seed(1)
    second = [x for x, _ in batches(digits.x_train, digits.y_train, 32, generator=order)]
    assert len(second) == steps
    assert all(torch.equal(a, b) for a, b in zip(rule.told[0], second[3:], strict=True))
    again = Told(model, loss, SGD)
    (mid,) = (state for state in saved if state["step"] == 16)
    fit(again, digits, after=began, resume=mid, **usual)
    assert again.told == []  # the epoch was begun before it was interrupted


def test_a_warm_start_that_leaves_nothing_is_found_before_anything_is_written(tmp_path: Path) -> None:
    # 180 rows in batches of 179: BatchNorm could not normalise the last row, so that an epoch is one step.
    settings = Settings(nets=("mlp:8x1:bn",), rules=("adam",), epochs=1, batch_size=179, warm_start="sgd:0.4")
    with pytest.raises(ValueError, match=r"'sgd:0.4' takes all of 1 step\(s\)"):
        compare(settings, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()
