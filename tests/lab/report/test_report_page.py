"""The figures and the HTML page."""

from __future__ import annotations

import base64
import os
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from recorded_cases import TITLES, config, curves, write_run

from beyondprop.lab.report import figures, read_run, write_report
from beyondprop.lab.report._curves import Band, Curve, band, end_limits
from beyondprop.lab.report._figures import _accuracy, _bands, draw
from beyondprop.lab.report._style import entries

ONE = {"adam": "Adam"}


class Page(HTMLParser):
    """Every tag, attribute value and text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.values: list[str] = []
        self.texts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.values += [value or "" for _, value in attrs]

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def written(path: Path) -> tuple[str, Page]:
    text = write_report(path).read_text(encoding="utf-8")
    return text, Page(text)


def colors_in(path: Path) -> set[tuple[int, ...]]:
    with Image.open(path) as image:
        packed = np.asarray(image.convert("RGB"), dtype=np.int64) @ np.array([1 << 16, 1 << 8, 1])
    return {(int(c) >> 16, int(c) >> 8 & 255, int(c) & 255) for c in np.unique(packed)}


def test_a_stage_without_an_update_has_no_direction(tmp_path: Path) -> None:
    """As in a net whose units are all dead: the run records null."""
    rows = curves(ONE)
    for row in rows:
        if row["kind"] == "alignment" and row["seed"] == 1 and row["epoch"] > 1:
            row["stages"]["0"] = {"cosine": None, "angle": None, "norm_ratio": None}
    path = write_run(tmp_path / "run", config(ONE), rows)
    _, page = written(path)
    assert page.texts.count("undefined") == 3  # cosine, angle and ratio of that stage
    assert "nan" not in " ".join(page.texts)
    assert "alignment.png" in [file.name for file in figures(read_run(path), tmp_path / "figures")]


def test_figures_are_drawn(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run", config(TITLES), curves(TITLES)))
    files = figures(run, tmp_path / "made" / "figures")
    assert [file.name for file in files] == ["accuracy.png", "loss.png", "alignment.png"]
    for file in files[:2]:
        found = colors_in(file)
        # Blue, green, vermillion, orange: each known rule's own colour is on the canvas, on white.
        assert {(0, 114, 178), (0, 158, 115), (213, 94, 0), (230, 159, 0), (255, 255, 255)} <= found, file
    assert (68, 1, 84) in colors_in(files[2])
    assert not list((tmp_path / "made" / "figures").glob(".*"))


def test_curves_are_drawn_against_what_is_asked_for(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run", config(ONE), curves(ONE)))
    names = ("epochs", "work (gradient-equivalents)", "training time (s)")
    whole, part = draw(entries([run]), ["svg"])[0], draw(entries([run]), ["svg"], xs=("epoch", "work"))[0]
    for drawing, drawn in ((whole, names), (part, names[:2])):
        svg = drawing.files["svg"].decode()
        assert [name for name in names if f"<!-- {name} -->" in svg] == list(drawn)


def test_equal_runs_give_equal_pages(tmp_path: Path) -> None:
    pages = []
    for parent in ("a", "b"):
        pages.append(written(write_run(tmp_path / parent / "run", config(ONE), curves(ONE)))[0])  # noqa: PERF401
    assert pages[0] == pages[1]


def test_page_is_self_contained_and_complete(tmp_path: Path) -> None:
    path = write_run(tmp_path / "my run", config(TITLES), curves(TITLES))
    text, page = written(path)
    assert not {"script", "link", "iframe", "object", "base"} & set(page.tags)
    assert not [v for v in page.values if re.search(r"(https?:)?//", v) and not v.startswith("data:image/svg+xml")]
    assert "url(" not in text
    assert "@import" not in text
    images = [v for v in page.values if v.startswith("data:image/svg+xml;base64,")]
    assert len(images) == 3
    for image in images:
        svg = base64.b64decode(image.split(",")[1]).decode()
        assert svg.count("<path") > 20
        assert not re.search(r'href="(?!#)', svg)
    said = " ".join(page.texts)
    for part in (
        "digits · mlp:100x2 · 4 rules × 3 seeds",  # noqa: RUF001
        "mean and range over 3 seeds",
        "lr = 0.003, steps = 2",
        "What AM-mem does.",
        "norm ratio",
        "2.13.0",
        "beyondprop report 'my run'",
    ):
        assert part in said, part
    assert "Failures" not in said
    assert str(tmp_path) not in text
    assert sorted(file.name for file in path.iterdir()) == [
        "config.toml", "env.json", "figures", "metrics.jsonl", "report.html",
    ]  # fmt: skip


def test_everything_from_files_is_escaped(tmp_path: Path) -> None:
    evil = '<script>alert(1)</script>"&$\\frac$'
    titles = {"adam": evil, "_hidden": "_hidden"}
    settings = config(titles) | {"data": evil, "net": evil, "schedule": evil}
    rows = curves(titles)
    rows.append({"kind": "warning", "rule": "adam", "seed": 0, "step": 1, "message": evil})
    rows.append({"kind": "failed", "rule": evil, "seed": 0, "step": 1, "message": evil})
    text, page = written(write_run(tmp_path / "<b>run", settings, rows))
    assert "script" not in page.tags
    assert "<b>run" not in text
    assert sum(evil in said for said in page.texts) >= 7


def test_failures_warnings_and_half_written_lines_are_told(tmp_path: Path) -> None:
    rows = [r for r in curves(TITLES) if r["rule"] != "sgd" or r["seed"] != 1 or r["step"] < 100]
    rows += [
        {"kind": "failed", "rule": "sgd", "seed": 1, "step": 101, "message": "the loss is not finite"},
        {"kind": "warning", "rule": "am-mem", "seed": 0, "step": 3, "message": "stage 0 does not move"},
    ]
    path = write_run(tmp_path / "run", config(TITLES), rows)
    with (path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "ev')
    said = " ".join(written(path)[1].texts)
    assert "Backpropagation, SGD, seed 1, step 101 : the loss is not finite" in said
    assert "AM-mem, seed 0, step 3 : stage 0 does not move" in said
    assert "half-written" in said
    assert "2 of 3, 1 failed" in said
    assert "seeds that finished (2 to 3 per rule)" in said
    assert "Thin lines are single seeds that did not reach the end: Backpropagation, SGD." in said


def test_a_rule_whose_seeds_all_failed(tmp_path: Path) -> None:
    rows = [r for r in curves(TITLES) if r["rule"] != "sgd" or r["step"] < 60]
    rows += [{"kind": "failed", "rule": "sgd", "seed": s, "step": 61, "message": f"bang {s}"} for s in range(3)]
    said = " ".join(written(write_run(tmp_path / "run", config(TITLES), rows))[1].texts)
    assert "0 of 3, 3 failed" in said
    assert all(f"bang {s}" in said for s in range(3))
    assert "Every seed of Backpropagation, SGD was stopped" in said
    only = [r for r in rows if r["rule"] == "sgd"]
    text, page = written(write_run(tmp_path / "only", config({"sgd": "SGD"}), only))
    assert "No rule has a seed with an evaluation to report." in text
    assert any(v.startswith("data:image") for v in page.values)  # the stopped seeds' own curves


def test_single_seed_and_single_rule_say_so(tmp_path: Path) -> None:
    text = written(write_run(tmp_path / "run", config(ONE, seeds=1), curves(ONE, seeds=1)))[0]
    assert "1 rule × 1 seed" in text  # noqa: RUF001
    assert "One seed, so no spread is known" in text
    assert "mean and range" not in text.lower()
    assert "★" not in text


def test_regression_shows_losses_only(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run", config(TITLES), curves(TITLES, accuracy=False))
    text = written(path)[0]
    assert "accuracy" not in text.lower()
    assert [file.name for file in sorted((path / "figures").iterdir())] == ["alignment.png", "loss.png"]
    assert "★ Lowest mean" in text


def test_validation_is_not_called_test(tmp_path: Path) -> None:
    text = written(write_run(tmp_path / "run", config(ONE) | {"validation": True}, curves(ONE)))[0]
    assert "validation accuracy (%)" in text
    assert "test accuracy" not in text.lower()


def test_nothing_recorded_yet(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run", config(ONE), [])
    assert figures(read_run(path), tmp_path / "figures") == []
    assert "No rule has a seed with an evaluation" in written(path)[0]


def test_runs_side_by_side(tmp_path: Path) -> None:
    a = write_run(tmp_path / "a" / "run", config(ONE), curves(ONE))
    rows = [
        *curves(ONE, seeds=1),
        {"kind": "warning", "rule": "adam", "seed": 0, "step": 5, "message": "slow"},
    ]
    b = write_run(tmp_path / "b" / "run", config(ONE, seeds=1) | {"batch_size": 8}, rows)
    out = tmp_path / "both.html"
    assert write_report(a, b, output=out) == out
    text = out.read_text(encoding="utf-8")
    assert "Adam · a/run" in text
    assert "Adam · b/run" in text
    assert "The runs differ in batch_size, seeds" in text
    assert "<b>Adam, seed 0, step 5</b> (b/run): slow" in text
    assert not (a / "report.html").exists()
    assert [entry.color for entry in entries([read_run(a), read_run(b)])] == ["#D55E00"] * 2
    assert len({entry.line for entry in entries([read_run(a), read_run(b)])}) == 2
    assert write_report(a, b) == a / "report.html"
    with pytest.raises(ValueError, match="one run directory or more, got none"):
        write_report()


def test_a_failed_write_leaves_the_old_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_run(tmp_path / "run", config(ONE, seeds=1), curves(ONE, seeds=1, epochs=2))
    out = tmp_path / "out" / "page.html"
    out.parent.mkdir()
    out.write_text("old")

    def broken(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", broken)
    with pytest.raises(OSError, match="disk full"):
        write_report(path, output=out)
    assert [(file.name, file.read_text()) for file in out.parent.iterdir()] == [("page.html", "old")]


def test_many_rules_have_distinct_looks(tmp_path: Path) -> None:
    names = {f"rule-{i}": f"Rule {i}" for i in range(20)} | {"adam": "Adam"}
    looks = entries([read_run(write_run(tmp_path / "run", config(names), []))])
    assert len({(e.color, e.marker) for e in looks}) == 21
    assert looks[-1].color == "#D55E00"


def test_band_interpolates_where_the_seeds_differ() -> None:
    one, two = (
        Curve(np.array([0.0, 2.0]), np.array([0.0, 2.0])),
        Curve(np.array([0.0, 1.0, 3.0]), np.array([0.0, 3.0, 5.0])),
    )
    b = band([one, two])
    assert b is not None
    np.testing.assert_allclose(b.x, [0, 1, 2])
    np.testing.assert_allclose(b.mean, [0, 2, 3])
    np.testing.assert_allclose(b.low, [0, 1, 2])
    np.testing.assert_allclose(b.high, [0, 3, 4])
    assert b.marks == [0, 2]
    assert band([Curve(np.array([]), np.array([]))]) is None


def test_the_enlarged_row_has_the_range_that_the_epochs_ask_for(tmp_path: Path) -> None:
    rows = curves(TITLES)
    for row in rows:
        if row["seed"] == 1 and "seconds" in row:
            row["seconds"] *= 4
    shown = entries([read_run(write_run(tmp_path / "run", config(TITLES), rows))])
    figure = _accuracy(shown, ["epoch", "work", "seconds"], [])[2]
    wanted = end_limits(list(_bands(shown, "epoch", "test_accuracy", scale=100).values()), higher_is_better=True)
    assert wanted is not None
    for axes in figure.axes[3:6]:
        assert axes.get_ylim() == pytest.approx((wanted[0], min(wanted[1], 100.5)))


def test_a_slower_seed_takes_nothing_from_the_end_of_the_band() -> None:
    fast = Curve(np.array([0.0, 1.0, 2.0]), np.array([0.1, 0.8, 0.9]))
    slow = Curve(np.array([0.0, 4.0, 8.0]), np.array([0.1, 0.7, 0.95]))
    b = band([fast, slow])
    assert b is not None
    np.testing.assert_allclose(b.x, [0, 2.5, 5])
    np.testing.assert_allclose(b.mean, [0.1, 0.75, 0.925])
    np.testing.assert_allclose(b.low, [0.1, 0.7, 0.9])
    assert b.marks == [0, 1, 2]


def test_end_limits_show_the_end_and_leave_out_the_lost() -> None:
    def ends(at: float) -> Band:
        x = np.arange(10.0)
        y = np.where(x < 6, 0.1, at)
        return Band(x, y, y, y, [])

    limits = end_limits([ends(0.97), ends(0.96), ends(0.95), ends(0.30)], higher_is_better=True)
    assert limits is not None
    assert 0.94 < limits[0] < 0.95
    assert 0.97 < limits[1] < 0.98
    assert end_limits([], higher_is_better=True) is None
