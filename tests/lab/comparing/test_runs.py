from __future__ import annotations

import dataclasses
import json
import math
import signal
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import InterruptAt

from beyondprop import data
from beyondprop.data import Dataset
from beyondprop.errors import NonFiniteError, UnsupportedModelError
from beyondprop.lab import registry, report
from beyondprop.lab.comparing import train, tuning
from beyondprop.lab.comparing.comparison import compare, resume
from beyondprop.lab.comparing.settings import Settings
from beyondprop.lab.runs.directory import RunDirectory, check_free, default_path
from beyondprop.lab.runs.recorded import read_rows
from beyondprop.rules.backprop import Backprop

QUICK: dict[str, Any] = {"nets": ("mlp:12x2",), "epochs": 3, "batch_size": 32, "seeds": (0, 1), "threads": 1}

EMPTY: dict[str, Any] = {"data": "digits", "nets": [], "contenders": []}


@pytest.fixture(autouse=True)
def _small_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    small = make_digits()
    monkeypatch.setattr(data, "load", lambda name, progress=None: small)


@pytest.fixture
def extra_rules() -> Iterator[None]:
    registry.rules.names()  # what is built in is loaded when somebody looks
    before = dict(registry.rules.rows)
    yield
    registry.rules.rows.clear()
    registry.rules.rows.update(before)


def make_digits() -> Dataset:
    g = torch.Generator().manual_seed(0)
    x = torch.rand(240, 1, 8, 8, generator=g)
    y = (x.flatten(1)[:, :40].reshape(-1, 10, 4).sum(2)).argmax(1)
    return Dataset("digits", x[:180], y[:180], x[180:], y[180:], tuple("0123456789"))


def rows_of(path: Path) -> list[dict[str, Any]]:
    rows, notes = read_rows(path)
    assert notes == ()
    return rows


def comparable(path: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows_of(path)]


def config_of(path: Path) -> dict[str, Any]:
    return tomllib.loads((path / "config.toml").read_text())


def test_a_run_directory_is_complete_and_readable(tmp_path: Path) -> None:
    path = compare(Settings(**QUICK, rules=("am-adam", "adam")), out=tmp_path / "run")
    config = config_of(path)
    assert {
        k: config[k] for k in ("data", "nets", "epochs", "batch_size", "seeds", "schedule", "validation", "threads")
    } == {
        "data": "digits",
        "nets": ["mlp:12x2"],
        "epochs": 3.0,
        "batch_size": 32,
        "seeds": [0, 1],
        "schedule": "linear",
        "validation": False,
        "threads": 1,
    }
    assert isinstance(config["epochs"], float)
    assert config["contenders"][0]["name"] == "am-adam"
    assert config["contenders"][0]["settings"] == {"lr": 3e-3, "schedule": "linear"}
    env = json.loads((path / "env.json").read_text())
    assert {"python", "torch", "beyondprop", "platform", "cpu", "threads", "device", "started"} <= set(env)
    assert str(Path.cwd()) not in json.dumps(env)
    run = report.read_run(path)
    assert run.notes == ()
    for rule in ("am-adam", "adam"):
        assert run.seeds(rule) == {"done": (0, 1), "failed": (), "unfinished": ()}
        assert [r["epoch"] for r in run.of("eval", rule, 0)] == [0, 1, 2, 3]
        assert len(run.of("alignment", rule, 1)) == 4
        assert (path / "checkpoints" / f"{rule}.seed0.safetensors").is_file()
    assert Settings.from_config(config) == Settings(**{**QUICK, "device": "cpu"}, rules=("am-adam", "adam"))


def test_rules_share_weights_and_seeds_differ(tmp_path: Path) -> None:
    path = compare(Settings(**QUICK, rules=("am-adam", "sgd", "am-mem")), out=tmp_path / "run")
    first = {(r["contender"], r["seed"]): r["loss"] for r in rows_of(path) if r["kind"] == "eval" and r["step"] == 0}
    assert len(first) == 6
    assert len({loss for (_, seed), loss in first.items() if seed == 0}) == 1
    assert first["sgd", 0] != first["sgd", 1]


def test_the_global_state_stays(tmp_path: Path) -> None:
    torch.manual_seed(7)
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    compare(Settings(**{**QUICK, "threads": threads + 1}, rules=("adam",)), out=tmp_path / "run")
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize("at", [1, 5, 13, 20])
def test_interrupted_anywhere_and_resumed_equals_undisturbed(at: int, tmp_path: Path) -> None:
    settings = Settings(**{**QUICK, "nets": ("mlp:12x2:dropout=0.2",)}, rules=("am-sgd", "adam"), evaluate_every=5)
    whole = compare(settings, out=tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        compare(settings, out=tmp_path / "part", observer=InterruptAt(at))
    assert len(rows_of(tmp_path / "part")) < len(rows_of(whole))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    resume(tmp_path / "part")
    assert comparable(tmp_path / "part") == comparable(whole)
    assert len(json.loads((tmp_path / "part" / "env.json").read_text())["resumed"]) == 1


def test_rows_after_the_checkpoint_are_dropped_and_written_again(tmp_path: Path) -> None:
    settings = Settings(**QUICK, rules=("adam", "sgd"))
    whole = compare(settings, out=tmp_path / "whole")
    part = tmp_path / "part"
    with pytest.raises(KeyboardInterrupt):
        compare(settings, out=part, observer=InterruptAt(12))
    # As if the process had been killed after rows that no checkpoint knows of, in the middle of one more.
    with (part / "metrics" / "sgd.seed0.jsonl").open("a") as file:
        unknown = {"kind": "eval", "contender": "sgd", "seed": 0, "step": 10**6, "epoch": 99.0, "loss": 0.0}
        file.write(json.dumps(unknown) + "\n" + '{"kind": "eval", "contender": "sg')
    resume(part)
    assert comparable(part) == comparable(whole)


def test_what_is_done_is_not_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings(**QUICK, rules=("adam", "sgd"))
    path = compare(settings, out=tmp_path / "run")
    before = rows_of(path)

    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(train, "fit", fail)
    monkeypatch.setattr(tuning, "fit", fail)
    resume(path)
    assert rows_of(path) == before


def test_a_failure_stops_that_rule_and_seed_alone(tmp_path: Path, extra_rules: None) -> None:
    class Failing(Backprop):
        failing = False

        def step(self, *args: Any, **options: Any) -> Any:
            if self.watchdog.steps == 7 and self.failing:
                raise NonFiniteError("The loss is not finite.", "loss")
            return super().step(*args, **options)

    def build(model: Any, loss: Any, lr: float) -> Failing:
        rule = Failing(model, loss, torch.optim.SGD(model.parameters(), lr=lr))
        rule.failing = float(next(model.parameters())[0, 0]) == first_weight
        return rule

    torch.manual_seed(0)
    from beyondprop.lab import nets

    first_weight = float(next(nets.build("mlp:12x2", (1, 8, 8), 10).parameters())[0, 0].detach())
    registry.register(dataclasses.replace(registry.rules.get("sgd"), name="failing", build=build))
    path = compare(Settings(**QUICK, rules=("failing", "adam")), out=tmp_path / "run")
    failed = [r for r in rows_of(path) if r["kind"] == "failed"]
    assert len(failed) == 1
    assert failed[0] | {"epoch": 0} == {
        "kind": "failed",
        "contender": "failing",
        "seed": 0,
        "step": 7,
        "epoch": 0,
        "message": "The loss is not finite.",
    }
    run = report.read_run(path)
    assert run.seeds("failing") == {"done": (1,), "failed": (0,), "unfinished": ()}
    assert run.seeds("adam")["done"] == (0, 1)
    resume(path)
    assert rows_of(path) == [*rows_of(path)]
    assert sum(r["kind"] == "failed" for r in rows_of(path)) == 1


def test_schedule_of_a_rule_goes_before_the_runs(tmp_path: Path) -> None:
    path = compare(Settings(**QUICK, rules=("am-paper-fc", "adam"), schedule="cosine"), out=tmp_path / "run")
    found = {r["name"]: r["settings"]["schedule"] for r in config_of(path)["contenders"]}
    assert found == {"am-paper-fc": "halve:8", "adam": "cosine"}


def test_tuning_never_sees_the_test_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full = make_digits()
    poisoned = dataclasses.replace(full, x_test=torch.full_like(full.x_test, math.nan))
    monkeypatch.setattr(data, "load", lambda name, progress=None: poisoned)
    settings = Settings(**QUICK, rules=("sgd", "adam"), tune=True, tune_epochs=1, lr={"sgd": 0.04})
    with pytest.warns(
        UserWarning, match=r"adam: Tuning chose 0.01, at the edge of 0.0003, 0.001, 0.003, 0.01; a better"
    ):
        path = compare(settings, out=tmp_path / "run")
    rows = rows_of(path)
    tuning = [r for r in rows if r["kind"] == "tuning"]
    assert [(r["contender"], r["lr"], r["epochs"]) for r in tuning] == [
        ("adam", lr, 1) for lr in registry.rules.get("adam").grid
    ]
    assert all(math.isfinite(r["loss"]) for r in tuning)
    assert all(r["loss"] is None for r in rows if r["kind"] == "eval")
    best = max(tuning, key=lambda r: (r["accuracy"], -r["loss"]))
    found = {r["name"]: r["settings"] for r in config_of(path)["contenders"]}
    assert found["adam"] == {
        "lr": best["lr"],
        "schedule": "linear",
        "lr_tuned_over": list(registry.rules.get("adam").grid),
    }
    assert found["sgd"] == {"lr": 0.04, "schedule": "linear"}
    assert [r["contender"] for r in rows if r["kind"] == "warning"] == ["adam"]


def test_validation_never_sees_the_test_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full = make_digits()
    poisoned = dataclasses.replace(full, x_test=torch.full_like(full.x_test, math.nan))
    monkeypatch.setattr(data, "load", lambda name, progress=None: poisoned)
    path = compare(Settings(**QUICK, rules=("adam",), validation=True), out=tmp_path / "run")
    found = [r for r in rows_of(path) if r["kind"] == "eval"]
    assert all(r["loss"] is not None for r in found)
    assert found[-1]["samples"] == 3 * 150


def test_interrupted_tuning_goes_on(tmp_path: Path) -> None:
    settings = Settings(**QUICK, rules=("sgd", "adam"), tune=True, tune_epochs=1)
    with pytest.warns(UserWarning, match="at the edge"):
        whole = compare(settings, out=tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        compare(settings, out=tmp_path / "part", observer=InterruptAt(6))
    with pytest.warns(UserWarning, match="at the edge"):
        resume(tmp_path / "part")
    assert comparable(tmp_path / "part") == comparable(whole)
    assert config_of(tmp_path / "part") == config_of(whole)


def test_a_rule_that_cannot_train_the_net_is_named_before_anything_is_written(tmp_path: Path) -> None:
    settings = Settings(**{**QUICK, "nets": ("mlp:12x2:bn:dropout=0.1",)}, rules=("adam", "am-mem-bcd"))
    with pytest.raises(UnsupportedModelError, match=r"am-mem-bcd cannot train mlp:12x2:bn:dropout=0.1: Memory needs"):
        compare(settings, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"rules": ("amadam",)}, r"rule must be one of 'am-adam', .* got 'amadam'; perhaps you meant 'am-adam'"),
        ({"rules": ("adam", "adam")}, r"rules must be one or more, each once, got adam, adam"),
        ({"seeds": ()}, r"seeds must be one or more, each once, got none"),
        ({"data": "minst"}, r"data must be one of diabetes, digits, .* perhaps you meant 'mnist'"),
        ({"nets": ("mpl:3x3",)}, r"net must be one of mlp:WIDTH\[xDEPTH\].* got 'mpl:3x3'; perhaps you meant 'mlp'"),
        ({"nets": ("conv:3",)}, r"must be WIDTHxDEPTH"),
        ({"tune": True, "validation": True}, r"tune chooses learning rates on the rows that validation reports"),
        ({"schedule": "linar"}, r"schedule must be one of"),
        ({"lr": {"adm": 0.1}}, r"lr is given for 'adm', which is none of the rules"),
        ({"lr": {"adam": -1.0}}, r"lr of adam must be a finite number > 0"),
        ({"epochs": 0}, r"epochs must be"),
        ({"threads": 0}, r"threads must be an integer >= 1"),
        ({"threads": 10**9}, r"threads must be at most 1024, got 1000000000"),
        ({"epochs": 1e308}, r"epochs must be at most 1e\+09, got 1e\+308"),
        ({"epochs": 10**400}, r"epochs must be"),
        ({"tune_epochs": 1e308, "tune": True}, r"tune_epochs must be at most 1e\+09"),
        ({"batch_size": 10**20}, r"batch_size must be at most 1e\+09"),
        ({"early_stop": 10**20}, r"early_stop must be at most 1e\+09"),
        ({"evaluate_every": 10**20}, r"evaluate_every must be at most 1e\+09"),
        ({"seeds": (2**64,)}, r"seed must be at most 4.29497e\+09"),
        ({"rules": ("sgd",), "lr": {"sgd": 1e300}}, r"lr of sgd must be at most 1e\+38"),
        ({"warm_start": "sgd:1e308"}, r"warm_start is RULE:EPOCHS with EPOCHS a number > 0 and <= 1e\+09"),
        ({"nets": ("mlp:4x100000",)}, r"'mlp:4x100000': the depth must be at most 2,000, got 100000"),
        ({"device": "gpu"}, r"device must be one of 'auto', 'cpu', 'cuda'"),
    ],
)
def test_bad_settings_are_refused(bad: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        compare(Settings(**bad), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_plugins_register_once_and_are_recorded(tmp_path: Path, extra_rules: None) -> None:
    plugin = tmp_path / "my_rules.py"
    plugin.write_text(
        "import dataclasses\nfrom beyondprop.lab import registry\n"
        "registry.register(dataclasses.replace(registry.rules.get('sgd'), name='mine', title='Mine'))\n"
    )
    settings = Settings(**{**QUICK, "epochs": 1}, rules=("mine",), plugins=(str(plugin),))
    path = compare(settings, out=tmp_path / "run")
    resume(path)
    assert config_of(path)["plugins"] == [str(plugin)]
    broken = tmp_path / "broken.py"
    broken.write_text("1 / 0\n")
    with pytest.raises(ImportError, match=r"broken.py' cannot be loaded: ZeroDivisionError"):
        compare(Settings(plugins=(str(broken),)), out=tmp_path / "other")
    with pytest.raises(ImportError, match=r"no_such.py"):
        compare(Settings(plugins=(str(tmp_path / "no_such.py"),)), out=tmp_path / "other")


def test_foreign_directories_are_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    check_free(tmp_path / "empty")
    begun = tmp_path / "begun"  # killed before its config was written
    (begun / "checkpoints").mkdir(parents=True)
    (begun / "env.json").write_text("{}")
    (begun / "metrics").mkdir()
    check_free(begun)
    (begun / "metrics" / "adam.seed0.jsonl").write_text('{"kind": "eval"}')
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("x")
    for taken in ("full", "full/thesis.txt", "begun"):
        with pytest.raises(FileExistsError, match=rf"{taken}' is there already and no empty directory"):
            compare(Settings(**QUICK), out=tmp_path / taken)
    RunDirectory.create(tmp_path / "run", EMPTY, {}).close()
    with pytest.raises(FileExistsError, match=r"run' holds a run already; go on with it by --resume"):
        check_free(tmp_path / "run")
    with pytest.raises(FileNotFoundError, match=r"full' is no run directory: config.toml, env.json, metrics missing"):
        resume(tmp_path / "full")


def test_one_process_at_a_time(tmp_path: Path) -> None:
    pytest.importorskip("fcntl")
    with (
        RunDirectory.create(tmp_path / "run", EMPTY, {}),
        pytest.raises(RuntimeError, match=r"run' is being written by another process"),
    ):
        RunDirectory.open(tmp_path / "run")
    RunDirectory.open(tmp_path / "run").close()


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    RunDirectory.create(tmp_path / "run", EMPTY, {}).close()
    (tmp_path / "run" / "metrics" / "run.jsonl").write_text('{"kind": "note"}\nnonsense\n{"kind": "note"}\n')
    with pytest.raises(ValueError, match=r"run.jsonl', line 2, is no JSON"):
        RunDirectory.open(tmp_path / "run")
    (tmp_path / "run" / "config.toml").write_text("data = \n")
    with pytest.raises(ValueError, match=r"config.toml' is damaged"):
        RunDirectory.open(tmp_path / "run")


def test_default_path_is_named_by_data_and_net_and_free(tmp_path: Path) -> None:
    first = default_path("digits", "mlp:20x2:dropout=0.1", tmp_path)
    first.mkdir()
    second = default_path("digits", "mlp:20x2:dropout=0.1", tmp_path)
    assert first.name.endswith("-digits-mlp-20x2-dropout0.1")
    assert second != first
    assert not second.exists()


def test_warnings_of_building_a_rule_are_recorded_once(tmp_path: Path, extra_rules: None) -> None:
    from beyondprop import AltMin, Memory

    registry.register(
        dataclasses.replace(
            registry.rules.get("am-mem"),
            name="small",
            build=lambda m, loss, lr: AltMin(m, loss, Memory(lr=lr, limit=30)),
        )
    )
    settings = Settings(**{**QUICK, "seeds": (0,)}, rules=("small",))
    with pytest.warns(UserWarning, match="its memory takes"), pytest.raises(KeyboardInterrupt):
        compare(settings, out=tmp_path / "run", observer=InterruptAt(5))
    with pytest.warns(UserWarning, match="its memory takes"):
        resume(tmp_path / "run")
    found = [r for r in rows_of(tmp_path / "run") if r["kind"] == "warning"]
    assert [(r["contender"], r["seed"], r["step"]) for r in found] == [("small", 0, 0)]
