"""Reading run directories, the summaries' numbers and the terminal table."""

from __future__ import annotations

import copy
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from recorded_cases import TITLES, config, curves, evaluation, write_run

from beyondprop.lab.report import Spread, read_run, summary, table, to_json


@pytest.fixture
def tiny() -> list[dict[str, Any]]:
    """Two rules, two seeds, two epochs, numbers to check by hand."""
    rows = [evaluation("a", 0, 0, 0.1, train_loss=None), evaluation("a", 1, 0, 0.1, train_loss=None)]
    rows += [evaluation("a", 0, 10, 0.95), evaluation("a", 1, 10, 0.75)]
    rows += [evaluation("a", 0, 20, 0.90, test_loss=0.2), evaluation("a", 1, 20, 0.80, test_loss=0.4)]
    rows += [evaluation("b", s, step, 0.1 + 0.03 * step) for s in (0, 1) for step in (0, 10, 20)]
    return rows


@pytest.fixture
def tiny_config() -> dict[str, Any]:
    return config({"a": "Rule A", "b": "Rule B"}, seeds=2, epochs=2.0)


def test_summary_by_hand(tmp_path: Path, tiny: list[dict[str, Any]], tiny_config: dict[str, Any]) -> None:
    a, b = summary(read_run(write_run(tmp_path / "run", tiny_config, tiny)))
    assert (a.name, a.title, a.metric) == ("a", "Rule A", "test_accuracy")
    assert a.final is not None
    assert a.final == Spread(pytest.approx(0.85), 0.80, 0.90, pytest.approx(0.05 * 2**0.5), 2)  # type: ignore[arg-type]
    assert a.best is not None
    assert (a.best.low, a.best.high, a.best.mean) == (0.80, 0.95, pytest.approx(0.875))
    assert a.first is not None
    assert (a.first.mean, a.first_epoch) == (pytest.approx(0.85), 1.0)
    assert a.final_loss is not None
    assert a.final_loss.mean == pytest.approx(0.3)
    assert a.seconds == pytest.approx((0.2 + 0.4) / 2)
    assert a.work == pytest.approx(22.0)
    assert (a.epochs, a.seeds_done, a.seeds_failed, a.seeds_unfinished) == (2.0, (0, 1), (), ())
    assert b.final is not None
    assert b.final.mean == pytest.approx(0.7)


def test_failed_and_unfinished_seeds_do_not_count(
    tmp_path: Path, tiny: list[dict[str, Any]], tiny_config: dict[str, Any]
) -> None:
    rows = [r for r in tiny if not (r["rule"] == "b" and r["seed"] == 0 and r["step"] == 20)]
    rows.append({"kind": "failed", "rule": "a", "seed": 1, "step": 20, "message": "non-finite"})
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


@pytest.mark.parametrize("name", ["config.toml", "env.json", "metrics.jsonl"])
def test_missing_files_are_named(tmp_path: Path, tiny_config: dict[str, Any], name: str) -> None:
    path = write_run(tmp_path / "run", tiny_config, [])
    (path / name).unlink()
    with pytest.raises(FileNotFoundError, match=rf"run.*: {name} missing"):
        read_run(path)
    with pytest.raises(FileNotFoundError, match=r"no run directory.*nowhere"):
        read_run(tmp_path / "nowhere")


def test_malformed_files_are_named_with_line_and_field(tmp_path: Path, tiny_config: dict[str, Any]) -> None:
    path = write_run(tmp_path / "run", tiny_config, [])
    metrics = path / "metrics.jsonl"
    metrics.write_text('{"kind": "eval"\n{"kind": "other"}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 1 is not valid JSON"):
        read_run(path)
    metrics.write_text('{"kind": "eval", "rule": "a", "seed": "0", "step": 0, "epoch": 0.0}\n')
    with pytest.raises(ValueError, match=r"line 1: a row of kind 'eval' needs seed \(int\), got '0'"):
        read_run(path)
    metrics.write_text("[1]\n")
    with pytest.raises(ValueError, match="line 1 must be a JSON object, got list"):
        read_run(path)
    metrics.write_text("")
    (path / "env.json").write_text("{")
    with pytest.raises(ValueError, match=r"env\.json is not valid JSON"):
        read_run(path)
    (path / "config.toml").write_text('data = "digits"\n')
    with pytest.raises(ValueError, match="lacks net, rules"):
        read_run(path)
    (path / "config.toml").write_text("data = \n")
    with pytest.raises(ValueError, match=r"config\.toml is not valid TOML"):
        read_run(path)


def test_half_written_line_and_unknown_kinds(
    tmp_path: Path, tiny: list[dict[str, Any]], tiny_config: dict[str, Any]
) -> None:
    path = write_run(tmp_path / "run", tiny_config, [{"kind": "profile", "x": [1]}, {"no": "kind"}, *tiny])
    whole = summary(read_run(path))
    with (path / "metrics.jsonl").open("ab") as file:
        file.write('{"kind": "warning", "message": "é'.encode()[:-1])
    run = read_run(path)
    assert summary(run) == whole
    assert len(run.notes) == 1
    assert "half-written" in run.notes[0]


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
        r["test_accuracy"] for r in rows if r["rule"] == "am-adam" and r.get("step") == 300 and r["kind"] == "eval"
    ])
    assert len(best) == 1
    assert "AM-Adam" in best[0]
    assert f"{100 * mean:.2f}" in best[0]
    assert text.count("3/3") == 4
    assert "…" not in text
    assert "digits · mlp:100x2 · 4 rules × 3 seeds" in text  # noqa: RUF001
    assert "Mean and range over 3 seeds" in text


def test_table_tells_of_failures_and_single_seeds(tmp_path: Path) -> None:
    titles = {"sgd": "SGD [bold]", "adam": "Adam"}
    rows = [r for r in curves(titles, seeds=1) if r["rule"] != "sgd" or r["step"] < 60]
    rows.append({"kind": "failed", "rule": "sgd", "seed": 0, "step": 70, "message": "loss is not finite"})
    text = printed(write_run(tmp_path / "run", config(titles, seeds=1), rows), 100)
    assert "SGD [bold]" in text
    assert "failed" in text
    assert "0/1" in text
    assert "1 failure recorded: sgd, seed 0: loss is not finite" in text
    assert "One seed" in text
    assert "range" not in text


def test_regression_is_judged_by_the_lowest_loss(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run", config(TITLES), curves(TITLES, accuracy=False))
    text = printed(path, 100)
    assert "acc" not in text
    assert "AM-Adam" in next(line for line in text.splitlines() if "★" in line)
    assert summary(read_run(path))[0].metric == "test_loss"


def test_json_is_strict_and_complete(tmp_path: Path, tiny: list[dict[str, Any]], tiny_config: dict[str, Any]) -> None:
    rows = copy.deepcopy(tiny)
    rows[4]["test_loss"] = float("nan")
    rows.append({"kind": "warning", "rule": "a", "seed": 0, "step": 3, "message": "slow"})
    content = to_json(read_run(write_run(tmp_path / "run", tiny_config, rows)))
    read = json.loads(json.dumps(content, allow_nan=False))
    assert read["rules"][0]["final"]["mean"] == pytest.approx(0.85)
    assert read["rules"][0]["final_loss"]["mean"] is None
    assert read["warnings"][0]["message"] == "slow"
    assert read["config"]["net"] == "mlp:100x2"


def test_importing_the_package_loads_no_drawing_library() -> None:
    code = "import sys, beyondprop.lab.report; print([m for m in ('matplotlib', 'rich') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_survivors_of_a_failing_rule_are_not_the_best(
    tmp_path: Path, tiny: list[dict[str, Any]], tiny_config: dict[str, Any]
) -> None:
    stopped = {"kind": "failed", "rule": "a", "seed": 1, "step": 20, "message": "non-finite"}
    text = printed(write_run(tmp_path / "run", tiny_config, [*tiny, stopped]), 100)
    assert "Rule B" in next(line for line in text.splitlines() if "★" in line)
