"""The recipe of Jacobian sensing: its boxes against differences, and what would be judged as missed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from beyondprop.func import sensing
from beyondprop.lab.recipes import get, sensing_recovery
from beyondprop.lab.recipes._base import Context, Row
from beyondprop.lab.recipes._synthetic_boxes import Box, random_rows, sensed, symmetric

SHAPES = ("arrow", "band", "grid")


def _context(out: Path, quick: bool = False) -> Context:
    out.mkdir(exist_ok=True)
    return Context(out, quick, lambda line: None)


def _boxes() -> list[Any]:
    made: list[Any] = [pytest.param(Box(random_rows(20, 4, 0)), id="random")]
    return made + [pytest.param(Box(symmetric(shape, 0), symmetric=True), id=shape) for shape in SHAPES]


@pytest.mark.parametrize("box", _boxes())
def test_the_closed_form_is_what_dense_differences_say(box: Box) -> None:
    x = np.random.default_rng(1).standard_normal(box.size[1])
    found = sensing.jacobian(box, torch.from_numpy(x), method="dense").numpy()
    exact = box.jacobian(x)
    assert np.abs(found - exact).max() < 1e-8
    assert np.array_equal(exact != 0, box.weights.toarray() != 0)
    if box.symmetric:
        assert np.abs(exact - exact.T).max() < 1e-14


def test_boxes_have_the_places_that_they_are_named_for() -> None:
    assert np.array_equal(np.diff(random_rows(30, 7, 3).indptr), np.full(30, 7))
    counts = {shape: (symmetric(shape, 0).toarray() != 0).sum(1) for shape in SHAPES}
    assert counts["arrow"].tolist() == [100] + [2] * 99
    assert counts["band"].max() == 7
    assert counts["band"].sum() == 7 * 100 - 12
    assert sorted(set(counts["grid"].tolist())) == [3, 4, 5]
    assert counts["grid"].sum() == 100 + 4 * 90


def test_noise_and_garbage_are_those_of_the_seed() -> None:
    weights, rows = random_rows(10, 2, 0), np.ones((400, 10))
    clean = Box(weights)(rows)
    ways: list[dict[str, Any]] = [{"noise": 0.1}, {"corrupted": 0.25}]
    for own in ways:
        first, again, other = (Box(weights, seed=seed, **own)(rows) for seed in (0, 0, 1))
        assert np.array_equal(first, again)
        assert not np.array_equal(first, other)
    assert np.std(Box(weights, noise=0.1)(rows) - clean) == pytest.approx(0.1, rel=0.05)
    box = Box(weights, corrupted=0.25)
    wrong = (box(rows) != clean).any(1)
    assert wrong.mean() == pytest.approx(0.25, abs=0.06)
    assert box.calls == 400


def test_calls_and_errors_are_the_box_s_own() -> None:
    weights = random_rows(30, 3, 0)
    box = Box(weights)
    found = sensed(box, 0, pattern=weights, method="regression", probes=5)
    assert (found["calls"], found["probes"], box.calls) == (10, 5, 10)
    assert found["error"] < 1e-9
    unknown = sensed(Box(weights), 0, sparsity=3)
    assert unknown["calls"] == 1 + 2 * unknown["probes"]
    missing = weights.toarray()
    missing[0, missing[0].nonzero()[0][0]] = 0
    assert sensed(Box(weights), 0, pattern=missing)["error"] > 1e-3


# ---- what is judged ------------------------------------------------------------------------------------------------------


GOOD: dict[str, Any] = {"calls": 4, "probes": 2, "error": 1e-10}


def _measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **changed: Any) -> list[Row]:
    """Return the rows with everything good but what is changed."""
    ways = (
        "auto",
        "regression",
        "colouring",
        "l1",
        "symmetric",
        "LP decoding",
        sensing_recovery.NOISY,
        "least squares",
    )
    for name in ("of_sparsity", "of_symmetry", "of_noise", "of_corruption", "_in_float32"):
        found = {way: GOOD | changed.get(name, {}).get(way, {}) for way in ways}
        monkeypatch.setattr(sensing_recovery, name, lambda *_, found=found: found)
    places = {"probes": 8, "exact": 1.0, "true": 1.0, "false": 0.0} | changed.get("discovered", {})
    monkeypatch.setattr(sensing_recovery, "discovered", lambda *_: places)
    monkeypatch.setattr(sensing_recovery, "of_discovery", lambda *_: 1.0)
    monkeypatch.setattr(sensing_recovery, "audited", lambda seed: {"dense": 0} | changed.get("audited", {}))
    rows, settings = sensing_recovery.measure(_context(tmp_path))
    assert settings == {"seeds": [0, 1, 2]}
    return list(rows)


def test_what_is_good_is_reached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = _measured(tmp_path, monkeypatch)
    assert {row.verdict for row in rows} == {"reached", "shown"}
    assert sum(row.verdict == "reached" for row in rows) == 11
    assert (tmp_path / "figure.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("changed", "missed"),
    [
        ({"of_sparsity": {"auto": {"calls": 9}}}, ["n = m = 100, 3 nonzeros a row"]),
        ({"of_sparsity": {"auto": {"probes": 13}}}, ["n = m = 200, 10 nonzeros a row"]),
        ({"of_sparsity": {"auto": {"error": 2e-9}}}, ["n = m = 100, 3 nonzeros a row: error"]),
        ({"of_symmetry": {"symmetric": {"probes": 4}}}, ["n = m = 100, symmetric arrow"]),
        (
            {"of_corruption": {"LP decoding": {"error": 2e-3}}},
            ["20% of calls corrupted, 40 probes: error of LP decoding"],
        ),
        ({"_in_float32": {"auto": {"error": 3e-4}}}, ["float32 box, 3 nonzeros a row: error"]),
        (
            {"discovered": {"probes": 9, "exact": 0.995}},
            [
                "pattern of a batch of 64, n = 200, 5 nonzeros a row: found by",
                "the same: rows that are exact",
            ],
        ),
        ({"audited": {"l1": -1}}, ["l1: calls counted less promised"]),
        ({"audited": {"l1": 1}}, ["l1: calls counted less promised"]),
    ],
)
def test_what_is_worse_is_missed(
    changed: dict[str, Any], missed: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sensing_recovery, "_draw", lambda *_: None)
    rows = _measured(tmp_path, monkeypatch, **changed)
    assert [row.label for row in rows if row.verdict == "missed"] == missed


def test_the_recipe_says_what_it_is() -> None:
    recipe = get("sensing-recovery")
    assert "NeurIPS 2017" in recipe.source
    assert recipe.minutes <= 2
    assert not recipe.needs
