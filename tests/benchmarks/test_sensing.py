"""The comparison of Jacobian sensing with its peers: its problems, its counter, its tables."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import sparse

from beyondprop.lab import registry

FOLDER = Path(__file__).parents[2] / "benchmarks"
if not FOLDER.is_dir():
    pytest.skip("the benchmarks are not here", allow_module_level=True)


@pytest.fixture
def peers(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(FOLDER))
    return __import__("jacobian_peers")


@pytest.fixture
def bench(peers: Any) -> Any:
    return registry.load_file(str(FOLDER / "sensing.py"))


def _problems(peers: Any) -> list[Any]:
    x = np.random.default_rng(0).standard_normal(25)
    plain = peers.Problem("plain", peers.random_rows(25, 3), x)
    made = {"arrow": peers.arrow(25), "band": peers.banded(25, 2), "grid": peers.grid(5)}
    return [plain, *(peers.Problem(name, weights, x, symmetric=True) for name, weights in made.items())]


def test_the_closed_form_and_the_counter(peers: Any) -> None:
    for problem in _problems(peers):
        box = peers.Box(problem)
        exact = problem.jacobian
        assert np.array_equal(exact != 0, problem.weights.toarray() != 0)
        (two_sided,) = [peer for peer in peers.DENSE if "3-point" in peer.name]
        assert np.abs(two_sided.run(problem, box, None) - exact).max() < 1e-7
        assert box.calls == 2 * 25 + 1
        assert np.array_equal(box.columns(problem.x[:, None])[:, 0], box.one(problem.x))
        assert box.calls == 2 * 25 + 3
        if problem.symmetric:
            assert np.array_equal(problem.weights.toarray(), problem.weights.toarray().T)


def test_a_float32_box_computes_in_float32(peers: Any) -> None:
    problem = peers.halved(_problems(peers)[0])
    found = peers.Box(problem).one(problem.x.astype(np.float64))
    assert found.dtype == np.float32


def test_each_peer_that_is_here_finds_the_jacobian(peers: Any) -> None:
    problem = _problems(peers)[0]
    exact, v = problem.jacobian, np.random.default_rng(1).standard_normal(25)
    chosen = [peers.ours_with_pattern("auto", problem), *peers.DENSE, *peers.PATTERNED, *peers.COLORED]
    for peer in peers.available(chosen):
        found = np.asarray(peer.run(problem, peers.Box(problem), v))
        assert found.shape == exact.shape
        if "stochastic" not in peer.name:
            assert np.abs(found - exact).max() < 1e-3, peer.name


def test_what_is_not_installed_is_left_out(peers: Any) -> None:
    missing = peers.Peer("nobody", lambda *_: None, "nowhere-to-be-found")
    assert peers.installed("nowhere-to-be-found") is None
    assert peers.installed("scipy")
    assert peers.available([missing, peers.DENSE[0]]) == [peers.DENSE[0]]


def test_colourings_are_those_of_the_pattern(peers: Any) -> None:
    found = {name: count() for name, count in peers.colorings(sparse.csr_array(np.ones((3, 4)))).items()}
    assert found["scipy group_columns"] == 4
    assert set(found.values()) == {4}


def test_the_table_of_calls(peers: Any, bench: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    problem = _problems(peers)[0]
    asked = [peers.ours_with_pattern("auto", problem), peers.DENSE[0]]
    monkeypatch.setattr(bench, "compared", lambda: [(problem, asked)])
    bench.calls()
    _, title, _, ours, theirs = capsys.readouterr().out.splitlines()
    assert title == "plain"
    assert ours.split()[-3] == "8"
    assert theirs.split()[-3] == "26"
    assert all(float(line.split()[-2]) < 1e-5 for line in (ours, theirs))


def test_the_script_runs() -> None:
    command = [sys.executable, str(FOLDER / "sensing.py"), "--parts", "unknown", "training", "--rounds", "1"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout + found.stderr
    lines = found.stdout.splitlines()
    assert all(line.endswith("100.0%") for line in lines if "detect_pattern" in line)
    (ours,) = [line.split() for line in lines if "BlackBox, auto" in line]
    assert ours[-3] == "7"
