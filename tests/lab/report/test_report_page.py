"""The figures and the HTML page."""

from __future__ import annotations

import base64
import os
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from made_up_runs import TITLES, config, curves, write_run
from PIL import Image

from beyondprop.lab.report import figures, read_run, write_report
from beyondprop.lab.report._curves import Band, Curve, band, end_limits
from beyondprop.lab.report._figures import _bands, _course, draw
from beyondprop.lab.report._style import entries, plain
from beyondprop.lab.tasks.base import ACCURACY, R2

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
        "digits · mlp:100x2 · 4 contenders × 3 seeds",  # noqa: RUF001
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
        "config.toml", "env.json", "figures", "metrics", "report.html",
    ]  # fmt: skip


def test_everything_from_files_is_escaped(tmp_path: Path) -> None:
    evil = '<script>alert(1)</script>"&$\\frac$'
    titles = {"adam": evil, "_hidden": "_hidden"}
    settings = config(titles) | {"name": evil, "data": evil, "nets": [evil], "schedule": evil}
    rows = curves(titles)
    rows.append({"kind": "warning", "contender": "adam", "seed": 0, "step": 1, "message": evil})
    rows.append({"kind": "failed", "contender": evil, "seed": 0, "step": 1, "message": evil})
    text, page = written(write_run(tmp_path / "<b>run", settings, rows))
    assert "script" not in page.tags
    assert "<b>run" not in text
    assert sum(evil in said for said in page.texts) >= 7


def test_failures_warnings_and_half_written_lines_are_told(tmp_path: Path) -> None:
    rows = [r for r in curves(TITLES) if r["contender"] != "sgd" or r["seed"] != 1 or r["step"] < 100]
    rows += [
        {"kind": "failed", "contender": "sgd", "seed": 1, "step": 101, "message": "the loss is not finite"},
        {"kind": "warning", "contender": "am-mem", "seed": 0, "step": 3, "message": "stage 0 does not move"},
    ]
    path = write_run(tmp_path / "run", config(TITLES), rows)
    with (path / "metrics" / "03.jsonl").open("a") as file:
        file.write('{"kind": "ev')
    said = " ".join(written(path)[1].texts)
    assert "Backpropagation, SGD, seed 1, step 101 : the loss is not finite" in said
    assert "AM-mem, seed 0, step 3 : stage 0 does not move" in said
    assert "half-written" in said
    assert "2 of 3, 1 failed" in said
    assert "seeds that finished (2 to 3 per contender)" in said
    assert "Thin lines are single seeds that did not reach the end: Backpropagation, SGD." in said


def test_a_rule_whose_seeds_all_failed(tmp_path: Path) -> None:
    rows = [r for r in curves(TITLES) if r["contender"] != "sgd" or r["step"] < 60]
    rows += [{"kind": "failed", "contender": "sgd", "seed": s, "step": 61, "message": f"bang {s}"} for s in range(3)]
    said = " ".join(written(write_run(tmp_path / "run", config(TITLES), rows))[1].texts)
    assert "0 of 3, 3 failed" in said
    assert all(f"bang {s}" in said for s in range(3))
    assert "Every seed of Backpropagation, SGD was stopped" in said
    only = [r for r in rows if r["contender"] == "sgd"]
    text, page = written(write_run(tmp_path / "only", config({"sgd": "SGD"}), only))
    assert "No contender has a seed with an evaluation to report." in text
    assert any(v.startswith("data:image") for v in page.values)  # the stopped seeds' own curves


def test_single_seed_and_single_rule_say_so(tmp_path: Path) -> None:
    text = written(write_run(tmp_path / "run", config(ONE, seeds=1), curves(ONE, seeds=1)))[0]
    assert "1 contender × 1 seed" in text  # noqa: RUF001
    assert "One seed, so no spread is known" in text
    assert "mean and range" not in text.lower()
    assert "★" not in text


def test_regression_shows_losses_only(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run", config(TITLES, metrics=["loss"]), curves(TITLES, metrics=["loss"]))
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
    assert "No contender has a seed with an evaluation" in written(path)[0]


def test_runs_side_by_side(tmp_path: Path) -> None:
    a = write_run(tmp_path / "a" / "run", config(ONE), curves(ONE))
    rows = [
        *curves(ONE, seeds=1),
        {"kind": "warning", "contender": "adam", "seed": 0, "step": 5, "message": "slow"},
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
    figure = _course(shown, ACCURACY, ["epoch", "work", "seconds"], [])[0]
    wanted = end_limits(list(_bands(shown, "epoch", "accuracy", 100).values()), higher_is_better=True)
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


def test_each_metric_has_a_figure_and_a_column(tmp_path: Path) -> None:
    metrics = ["r2", "accuracy", "loss"]
    path = write_run(tmp_path / "run", config(TITLES, metrics=metrics), curves(TITLES, metrics=metrics))
    text, page = written(path)
    files = sorted(file.name for file in (path / "figures").iterdir())
    assert files == ["accuracy.png", "alignment.png", "loss.png", "r2.png"]
    assert text.index("<h2>R²</h2>") < text.index("<h2>Accuracy</h2>") < text.index("<h2>Loss</h2>")
    head = "".join(f"<th>{name}</th>" for name in ("test accuracy (%)", "test loss", "train loss"))
    assert "<th>test R²</th>" in text
    assert head in text
    assert "Test R²: the whole course above" in " ".join(page.texts)
    assert "★ Highest mean" in text


def test_a_diverging_contender_does_not_squeeze_the_others(tmp_path: Path) -> None:
    rows = curves(TITLES, metrics=["r2"])
    for row in rows:
        if row["contender"] == "sgd" and row.get("step"):
            row["r2"] = -1e6
    shown = entries([read_run(write_run(tmp_path / "run", config(TITLES, metrics=["r2"]), rows))])
    figure, caption = _course(shown, R2, ["epoch"], [])
    assert -2 < figure.axes[0].get_ylim()[0] < -0.2
    assert "Below the enlarged range: Backpropagation, SGD, which ends at -1e+06" in caption


def test_counters_that_count_up_are_axes_and_wrap(tmp_path: Path) -> None:
    rows = curves(TITLES)
    for row in rows:
        if row["contender"] == "adam" and row["kind"] == "eval":
            row["counters"] = {
                "calls": row["step"],
                "env_steps": 2 * row["step"],
                "bytes": 512,
                "spikes": 7 * row["step"] % 90,
            }
    path = write_run(tmp_path / "run", config(TITLES), rows)
    shown = entries([read_run(path)])
    svg = draw(shown, ["svg"])[0].files["svg"].decode()
    names = [name for name in ("epochs", "calls", "env steps", "bytes", "spikes") if f"<!-- {name} -->" in svg]
    assert names == ["epochs", "calls", "env steps"]
    figure = _course(shown, ACCURACY, ["epoch", "work", "seconds", "calls", "env_steps"], [])[0]
    places = [axes.get_subplotspec() for axes in figure.axes]
    found = sorted((place.rowspan.start, place.colspan.start) for place in places if place is not None)
    assert found == [(r, c) for r in range(4) for c in range(3 if r < 2 else 2)]
    assert len({axes.get_ylim() for axes in figure.axes}) == 2  # one for each row of panels
    text = written(path)[0]
    assert "<th>calls</th><th>env steps</th><th>bytes</th><th>spikes</th>" in text
    assert "<td>300</td><td>600</td><td>512</td>" in text


def test_rules_have_colours_and_nets_have_lines(tmp_path: Path) -> None:
    rules = {"adam": "Adam", "sgd": "SGD"}
    run = read_run(write_run(tmp_path / "two", config(rules, nets=["a", "b"]), []))
    adam, sgd, other_adam, other_sgd = entries([run])
    assert (adam.color, sgd.color) == ("#D55E00", "#E69F00") == (other_adam.color, other_sgd.color)
    assert adam.line == sgd.line != other_adam.line == other_sgd.line
    assert [e.label for e in (adam, other_sgd)] == ["Adam, a", "SGD, b"]
    one_rule = read_run(write_run(tmp_path / "one", config(ONE, nets=["a", "b", "c"]), []))
    many_nets = read_run(write_run(tmp_path / "many", config(rules, nets=list("abcde")), []))
    for found in (entries([one_rule]), entries([many_nets])):
        assert len({e.color for e in found}) == len(found)


def test_warm_starts_of_several_nets_are_told_apart(tmp_path: Path) -> None:
    settings = config(ONE, nets=["a", "b"]) | {"warm_start_rule": {"name": "sgd", "title": "SGD"}}
    rows = curves(["a/adam", "b/adam"]) + curves(["warm-start=a/sgd", "warm-start=b/sgd"], epochs=1)
    text = written(write_run(tmp_path / "run", settings, rows))[0]
    assert "Contenders start from the weights of SGD (a/sgd) after 1 epochs, accuracy" in text
    assert "SGD, warm start (b/sgd)" in text
    assert "2 contenders × 3 seeds" in text  # noqa: RUF001


def test_huge_texts_and_lone_surrogates_are_drawn(tmp_path: Path) -> None:
    huge = "A huge title " + "x" * 9_980 + " end"
    net = "mlp:" + "x".join(["100"] * 2_500)
    titles = {"adam": huge, "sgd": huge, "mine": r"lone \udc80"}
    settings = config(titles, nets=[net, "mlp:9x1"])
    names = [one["name"] for one in settings["contenders"]]
    rows = [*curves(names), {"kind": "warning", "contender": names[0], "seed": 0, "message": "m" * 10**5}]
    rows.append({"kind": "failed", "contender": names[2], "seed": 0, "message": "lone \ud83d"})
    path = write_run(tmp_path / "run", settings, rows)
    run = read_run(path)
    labels = [entry.label for entry in entries([run])]
    assert len(set(labels)) == 6  # also those whose titles are alike
    assert max(map(len, labels)) < 250
    text, page = written(path)
    assert r"lone \ud83d" in text
    assert len(text) < 2_000_000
    assert max(map(len, page.texts)) < 4_000  # a caption with all labels
    assert len(plain(huge)) <= 100
    drawn = [*(path / "figures").glob("*.png")]
    assert len(drawn) == 3
    for file in drawn:
        with Image.open(file) as image:
            assert max(image.size) <= 1700, file


def test_labels_that_differ_in_their_middle_are_told_apart(tmp_path: Path) -> None:
    names = ["a" * 200 + middle + "b" * 200 for middle in "cd"]
    settings = config(dict.fromkeys(["adam"], "t"), nets=names)
    run = read_run(write_run(tmp_path / "run", settings, curves(one["name"] for one in settings["contenders"])))
    labels = [entry.label for entry in entries([run])]
    assert len(set(labels)) == 2
