"""Reading run directories, the summaries' numbers and the terminal table."""

from __future__ import annotations

import copy
import io
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_up_runs import TITLES, config, curves, evaluation, write_run

from beyondprop.lab.report import Spread, read_run, summary, table, to_json
from beyondprop.lab.report._words import DASH
from beyondprop.lab.runs.recorded import number, read_rows


@pytest.fixture
def tiny() -> list[dict[str, Any]]:
    """Two rules, two seeds, two epochs, numbers to check by hand."""
    rows = [evaluation("a", 0, 0, 0.1, train_loss=None), evaluation("a", 1, 0, 0.1, train_loss=None)]
    rows += [evaluation("a", 0, 10, 0.95), evaluation("a", 1, 10, 0.75)]
    rows += [evaluation("a", 0, 20, 0.90, loss=0.2), evaluation("a", 1, 20, 0.80, loss=0.4)]
    rows += [evaluation("b", s, step, 0.1 + 0.03 * step) for s in (0, 1) for step in (0, 10, 20)]
    return rows


@pytest.fixture
def tiny_config() -> dict[str, Any]:
    return config({"a": "Rule A", "b": "Rule B"}, seeds=2, epochs=2.0)


def test_summary_by_hand(tmp_path: Path, tiny: list[dict[str, Any]], tiny_config: dict[str, Any]) -> None:
    a, b = summary(read_run(write_run(tmp_path / "run", tiny_config, tiny)))
    assert (a.name, a.title, a.metric) == ("a", "Rule A", "accuracy")
    assert a.final is not None
    assert a.final == Spread(pytest.approx(0.85), 0.80, 0.90, pytest.approx(0.05 * 2**0.5), 2)  # type: ignore[arg-type]
    assert a.best is not None
    assert (a.best.low, a.best.high, a.best.mean) == (0.80, 0.95, pytest.approx(0.875))
    assert a.first is not None
    assert (a.first.mean, a.first_epoch) == (pytest.approx(0.85), 1.0)
    assert a.others["loss"] is not None
    assert a.others["loss"].mean == pytest.approx(0.3)
    assert a.seconds == pytest.approx((0.2 + 0.4) / 2)
    assert a.work == pytest.approx(22.0)
    assert (a.epochs, a.seeds_done, a.seeds_failed, a.seeds_unfinished) == (2.0, (0, 1), (), ())
    assert b.final is not None
    assert b.final.mean == pytest.approx(0.7)


def test_failed_and_unfinished_seeds_do_not_count(
    tmp_path: Path, tiny: list[dict[str, Any]], tiny_config: dict[str, Any]
) -> None:
    rows = [r for r in tiny if not (r["contender"] == "b" and r["seed"] == 0 and r["step"] == 20)]
    rows.append({"kind": "failed", "contender": "a", "seed": 1, "step": 20, "message": "non-finite"})
    a, b = summary(read_run(write_run(tmp_path / "run", tiny_config, rows)))
    assert a.final == Spread(0.90, 0.90, 0.90, None, 1)
    assert (a.seeds_done, a.seeds_failed, a.comparable) == ((0,), (1,), False)
    assert (b.seeds_done, b.seeds_unfinished, b.comparable) == ((1,), (0,), False)


def test_unfinished_run_reports_what_it_has_and_an_end_one_step_short_is_an_end(
    tmp_path: Path, tiny: list[dict[str, Any]], tiny_config: dict[str, Any]
) -> None:
    half = read_run(write_run(tmp_path / "half", tiny_config, [r for r in tiny if r["step"] < 20]))
    a = summary(half)[0]
    assert a.final is not None
    assert (a.epochs, a.seeds_done, a.seeds_unfinished) == (1.0, (), (0, 1))
    short = read_run(write_run(tmp_path / "short", tiny_config | {"epochs": 2.05}, tiny))
    assert summary(short)[0].seeds_done == (0, 1)
    too_short = read_run(write_run(tmp_path / "too_short", tiny_config | {"epochs": 2.15}, tiny))
    assert summary(too_short)[0].seeds_done == ()


def test_a_resumed_run_counts_its_later_rows(
    tmp_path: Path, tiny: list[dict[str, Any]], tiny_config: dict[str, Any]
) -> None:
    again = [evaluation("a", 0, 20, 0.50), evaluation("a", 1, 20, 0.50)]
    run = read_run(write_run(tmp_path / "run", tiny_config, tiny + again))
    assert [row["step"] for row in run.of("eval", "a", 0)] == [0, 10, 20]
    a = summary(run)[0]
    assert a.final is not None
    assert (a.final.mean, a.final.n) == (0.50, 2)


@pytest.mark.parametrize("name", ["config.toml", "env.json", "metrics"])
def test_missing_files_are_named(tmp_path: Path, tiny_config: dict[str, Any], name: str) -> None:
    path = write_run(tmp_path / "run", tiny_config, [])
    (path / name).rmdir() if name == "metrics" else (path / name).unlink()
    with pytest.raises(FileNotFoundError, match=rf"run' is no run directory: {name} missing"):
        read_run(path)
    with pytest.raises(
        FileNotFoundError, match=r"nowhere' is no run directory: config.toml, env.json, metrics missing"
    ):
        read_run(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"kind": "eval"\n{"kind": "other"}\n', "line 1, is no JSON"),
        ('{"kind": "other"}\n{"kind": "ev\n', "line 2, is no JSON"),  # a whole line: no kill left it
        ("[1]\n", "line 1, must be a JSON object, got list"),
        (
            '{"kind": "eval", "contender": "a", "seed": "0", "step": 0, "epoch": 0.0}\n',
            r"line 1: a row of kind 'eval' needs seed \(int\), got '0'",
        ),
        ('{"kind": "finished", "seed": 0}\n', r"line 1: a row of kind 'finished' needs contender \(str\), got None"),
        (
            '{"kind": "eval", "contender": "a", "seed": 0, "step": 0, "epoch": 0.0, "counters": 3}\n',
            "line 1: counters must be an object, got 3",
        ),
    ],
)
def test_damaged_rows_are_named_with_file_line_and_field(
    tmp_path: Path, tiny_config: dict[str, Any], text: str, message: str
) -> None:
    path = write_run(tmp_path / "run", tiny_config, [evaluation("a", 0, 0, 0.1)])
    (path / "metrics" / "b.seed1.jsonl").write_text(text)
    with pytest.raises(ValueError, match=rf"metrics.b\.seed1\.jsonl', {message}"):
        read_run(path)


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("env.json", "{", "is no JSON"),
        ("env.json", "[]", "must hold one JSON object, got list"),
        ("config.toml", "data = \n", "is damaged"),
        ("config.toml", 'data = "digits"\n', "lacks nets, contenders"),
        ("config.toml", "nets = []\ncontenders = []\n", "lacks data"),
        ("config.toml", 'data = "digits"\nnet = "mlp:9x1"\nrules = ["a"]\n', r"contenders must be tables .* with name"),
        ("config.toml", 'data = "d"\nnets = "mlp:9x1"\ncontenders = []\n', "nets must be a list of str, got 'mlp:9x1'"),
        ("config.toml", 'data = "d"\nnets = []\ncontenders = []\nseeds = ["0"]\n', r"seeds must be a list of int"),
        (
            "config.toml",
            'data = "d"\nnets = []\ncontenders = []\nmetrics = [{}]\n',
            r"metrics must be tables .* with key",
        ),
    ],
)
def test_other_damaged_files_are_named(
    tmp_path: Path, tiny_config: dict[str, Any], file: str, text: str, message: str
) -> None:
    path = write_run(tmp_path / "run", tiny_config, [])
    (path / file).write_text(text)
    with pytest.raises(ValueError, match=rf"run.{re.escape(file)}':? {message}"):
        read_run(path)


def test_half_written_lines_in_several_files_and_unknown_kinds(
    tmp_path: Path, tiny: list[dict[str, Any]], tiny_config: dict[str, Any]
) -> None:
    path = write_run(
        tmp_path / "run", tiny_config, [{"kind": "profile", "x": [1]}, {"no": "kind"}, {"kind": []}, *tiny]
    )
    whole = read_run(path)
    for name in ("01.jsonl", "03.jsonl"):
        with (path / "metrics" / name).open("ab") as file:
            file.write('{"kind": "warning", "message": "é'.encode()[:-1])
    run = read_run(path)
    assert (summary(run), run.rows) == (summary(whole), whole.rows)
    *lines, unchecked = run.notes
    assert [note.split(",")[:2] for note in lines] == [["Line 4", f" the last of 0{i}.jsonl"] for i in (1, 3)]
    assert unchecked.startswith("config.toml, env.json, metrics have no checksums, as in directories of older versions")
    assert read_rows(path / "metrics" / "01.jsonl")[0] == [
        r for r in run.rows if r.get("contender") == "a" and not r["seed"]
    ]


def test_old_runs_read_as_new_ones(tmp_path: Path, tiny: list[dict[str, Any]], tiny_config: dict[str, Any]) -> None:
    more = [
        {"kind": "warning", "contender": "b", "message": "at the edge"},
        {"kind": "failed", "contender": "a", "seed": 1, "step": 20, "message": "non-finite"},
    ]
    rows = sorted(
        [*tiny, *more], key=lambda row: (row["contender"], row.get("seed", 9))
    )  # as files of one training are joined
    new = read_run(write_run(tmp_path / "new" / "run", tiny_config, rows))
    old = read_run(write_run(tmp_path / "old" / "run", tiny_config, rows, old=True))
    assert "net" in tomllib.loads((old.path / "config.toml").read_text())
    assert (old.rows, old.contenders, old.metrics) == (new.rows, new.contenders, new.metrics)
    left_out = {"config"}
    assert {k: v for k, v in to_json(old).items() if k not in left_out} == {
        k: v for k, v in to_json(new).items() if k not in left_out
    }
    assert printed(old.path, 100) == printed(new.path, 100)


def test_rows_of_old_runs_have_todays_names(tmp_path: Path, tiny_config: dict[str, Any]) -> None:
    path = write_run(tmp_path / "run", tiny_config, [evaluation("a", 0, 20, None)], old=True)
    with (path / "metrics.jsonl").open("a") as file:
        file.write(
            '{"kind": "tuning", "rule": "a", "seed": 0, "lr": 1, "validation_loss": 0.5, "validation_accuracy": 0.9}\n'
        )
    run = read_run(path)
    assert run.rows[1] == {"kind": "tuning", "contender": "a", "seed": 0, "lr": 1, "loss": 0.5, "accuracy": 0.9}
    assert [metric.key for metric in run.metrics] == ["loss"]  # no evaluation has an accuracy
    assert (run.config["nets"], run.contenders[0].rule, run.contenders[0].net) == (["mlp:100x2"], "a", "mlp:100x2")
    assert "rules" not in run.config


def printed(path: Path, width: int) -> str:
    from rich.console import Console

    console = Console(width=width, record=True, file=io.StringIO())
    console.print(table(read_run(path)))
    return console.export_text()


@pytest.mark.parametrize("width", [80, 140])
def test_table(tmp_path: Path, width: int) -> None:
    rows = curves(TITLES)
    path = write_run(tmp_path / "run", config(TITLES), rows)
    text = printed(path, width)
    best = [line for line in text.splitlines() if "★" in line]
    mean = np.mean([
        r["accuracy"] for r in rows if r["contender"] == "am-adam" and r.get("step") == 300 and r["kind"] == "eval"
    ])
    assert len(best) == 1
    assert "AM-Adam" in best[0]
    assert f"{100 * mean:.2f}" in best[0]
    assert text.count("3/3") == 4
    assert "…" not in text
    assert "digits · mlp:100x2 · 4 contenders × 3 seeds" in text  # noqa: RUF001
    assert "Mean and range over 3 seeds" in text


@pytest.mark.parametrize("width", [30, 40, 50, 60, 70])
@pytest.mark.parametrize("metrics", [["accuracy", "loss"], ["r2"]])
def test_a_narrow_table_keeps_the_names(tmp_path: Path, width: int, metrics: list[str]) -> None:
    settings = config(TITLES) if metrics[0] == "accuracy" else config(TITLES, metrics=metrics)
    path = write_run(tmp_path / "run", settings, curves(TITLES, metrics=metrics))
    lines = printed(path, width).splitlines()
    head = next(i for i, line in enumerate(lines) if "───" in line)
    assert max(map(len, lines)) <= width
    assert "…" not in "".join(lines[: head + 1 + len(TITLES)])
    shown = re.sub(r"\s+", "", "".join(line[:17] for line in lines[head + 1 :]))
    for title in TITLES.values():
        assert re.sub(r"\s+", "", title)[:9] in shown, lines
    assert sum("★" in line for line in lines) == 1
    seeds = [line for line in lines if "3/3" in line]
    assert len(seeds) == (len(TITLES) if width >= 40 else 0)


def test_table_tells_of_failures_and_single_seeds(tmp_path: Path) -> None:
    titles = {"sgd": "SGD [bold]", "adam": "Adam"}
    rows = [r for r in curves(titles, seeds=1) if r["contender"] != "sgd" or r["step"] < 60]
    rows.append({"kind": "failed", "contender": "sgd", "seed": 0, "step": 70, "message": "loss is not finite"})
    text = printed(write_run(tmp_path / "run", config(titles, seeds=1), rows), 100)
    assert "SGD [bold]" in text
    assert "failed" in text
    assert "0/1" in text
    assert "1 failure recorded: sgd, seed 0: loss is not finite" in text
    assert "One seed" in text
    assert "range" not in text


@pytest.mark.parametrize(("metrics", "value"), [(["loss"], "0.0"), (["r2", "loss"], "0.9"), (["loss", "r2"], "0.0")])
def test_the_first_metric_decides_by_its_direction(tmp_path: Path, metrics: list[str], value: str) -> None:
    run = write_run(tmp_path / "run", config(TITLES, metrics=metrics), curves(TITLES, metrics=metrics))
    text = printed(run, 100)
    assert "acc" not in text
    assert re.search(rf"AM-Adam.* ★ {value}", next(line for line in text.splitlines() if "★" in line))
    first = summary(read_run(run))[0]
    assert (first.metric, list(first.others)) == (metrics[0], metrics[1:])
    assert first.final is not None
    assert first.best is not None
    better = max if metrics[0] == "r2" else min
    assert first.best.mean == better(first.best.mean, first.final.mean)


def test_what_was_never_recorded_is_no_number(tmp_path: Path) -> None:
    rows = [{k: v for k, v in row.items() if k not in ("work", "accuracy")} for row in curves(TITLES)]
    path = write_run(tmp_path / "run", config(TITLES), rows)
    text = printed(path, 100)
    assert "work " not in text.splitlines()[4]
    assert "not finite" not in text
    assert summary(read_run(path))[0].final is None


def test_counters_are_columns(tmp_path: Path, tiny: list[dict[str, Any]], tiny_config: dict[str, Any]) -> None:
    rows = copy.deepcopy(tiny)
    for row in rows:
        if row["contender"] == "b":
            row["counters"] = {"calls": 7 * row["step"] + row["seed"], "bytes": 1024}
    path = write_run(tmp_path / "run", tiny_config, rows)
    run = read_run(path)
    assert run.counters == ("calls", "bytes")
    assert number(run.of("eval", "b", 1)[-1], "calls") == 141
    a, b = summary(run)
    assert (a.counters, b.counters) == ({"calls": None, "bytes": None}, {"calls": 140.5, "bytes": 1024})
    lines = printed(path, 80).splitlines()
    assert any("calls" in line for line in lines[:5])
    assert "bytes" not in "".join(lines)
    assert re.search(rf"Rule A.* {DASH} +2/2", next(line for line in lines if "Rule A" in line))
    assert re.search(r"Rule B.* 14[01] +2/2", next(line for line in lines if "Rule B" in line))


def test_titles_say_the_net_where_there_are_several(tmp_path: Path) -> None:
    nets = ("mlp:100x2", "conv")
    settings = config({"adam": "Adam", "sgd": "SGD on conv"}, nets=nets)
    path = write_run(tmp_path / "run", settings, curves(c["name"] for c in settings["contenders"]))
    titles = [info.title for info in read_run(path).contenders]
    assert titles == ["Adam, mlp:100x2", "SGD on conv, mlp:100x2", "Adam, conv", "SGD on conv"]
    assert "digits · mlp:100x2 and conv · 4 contenders × 3 seeds" in printed(path, 100)  # noqa: RUF001


def test_json_is_strict_and_complete(tmp_path: Path, tiny: list[dict[str, Any]], tiny_config: dict[str, Any]) -> None:
    rows = copy.deepcopy(tiny)
    rows[4]["loss"] = float("nan")
    rows.append({"kind": "warning", "contender": "a", "seed": 0, "step": 3, "message": "slow"})
    content = to_json(read_run(write_run(tmp_path / "run", tiny_config, rows)))
    read = json.loads(json.dumps(content, allow_nan=False))
    assert read["contenders"][0]["final"]["mean"] == pytest.approx(0.85)
    assert read["contenders"][0]["others"]["loss"]["mean"] is None
    assert read["warnings"][0]["message"] == "slow"
    assert read["config"]["nets"] == ["mlp:100x2"]


def test_importing_the_package_loads_no_drawing_library() -> None:
    code = "import sys, beyondprop.lab.report; print([m for m in ('matplotlib', 'rich') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_survivors_of_a_failing_rule_are_not_the_best(
    tmp_path: Path, tiny: list[dict[str, Any]], tiny_config: dict[str, Any]
) -> None:
    stopped = {"kind": "failed", "contender": "a", "seed": 1, "step": 20, "message": "non-finite"}
    text = printed(write_run(tmp_path / "run", tiny_config, [*tiny, stopped]), 100)
    assert "Rule B" in next(line for line in text.splitlines() if "★" in line)
