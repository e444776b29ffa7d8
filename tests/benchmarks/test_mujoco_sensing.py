"""MuJoCo as a black box: its Jacobian against MuJoCo's own, through processes, and a controller that balances."""

from __future__ import annotations

import importlib
import pickle
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"
if not FOLDER.is_dir():
    pytest.skip("the benchmarks are not here", allow_module_level=True)


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(FOLDER))  # so that other processes find it by its name, too
    return importlib.import_module("mujoco_sensing")


@pytest.fixture
def mujoco(bench: Any) -> Any:
    pytest.importorskip("mujoco", reason="needs the extra [mujoco]")
    return bench


def test_a_missing_package_is_said_so(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mujoco", None)
    with pytest.raises(SystemExit, match=r"MuJoCo is missing: pip install 'beyondprop\[mujoco\]'"):
        bench.main(["--models", "cart"])


@pytest.mark.parametrize("name", ["cart", "row", "hand", "swimmer", "walker"])
def test_a_call_is_one_step_that_forgets_the_one_before(mujoco: Any, name: str) -> None:
    case = mujoco.CASES[name]
    box = mujoco.Simulator(case.xml())
    rows = 0.3 * np.random.default_rng(0).standard_normal((3, box.inputs))
    first = box(rows)
    assert first.shape == (3, box.outputs)
    np.testing.assert_array_equal(np.stack([box(row) for row in rows[::-1]])[::-1], first)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(box))(rows), first)


@pytest.mark.parametrize("name", ["cart", "row", "hand", "swimmer", "walker"])
def test_sensed_is_what_mujoco_finds(mujoco: Any, name: str) -> None:
    case = mujoco.CASES[name]
    box = mujoco.Simulator(case.xml())
    row = mujoco.state(case, box, 1, moving=case.start is None)
    box = box if case.start is not None else box.about(row)
    truth = box.own_differences(row)
    pattern, _ = mujoco.discovered(case, box, batch=16)
    outside = np.where(pattern.mask().numpy(), 0.0, np.abs(truth))
    assert (outside.max(1) < 1e-5 * np.abs(truth).max(1)).all()
    found = mujoco.sensed(box, row, truth, pattern=pattern, method="regression")
    dense = mujoco.sensed(box, row, truth, method="dense")
    assert found.error < 1e-6
    assert dense.error < 1e-6
    assert dense.calls == 2 * box.inputs + 1
    assert found.calls <= 2 * min(int(pattern.row_counts.max()) + 2, box.inputs)
    if name in ("row", "hand"):
        assert found.calls < dense.calls / 3


@pytest.mark.parametrize("name", ["cart", "row"])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_sensed_jacobian_balances(mujoco: Any, name: str, seed: int) -> None:
    case = mujoco.CASES[name]
    box = mujoco.Simulator(case.xml())
    row = mujoco.state(case, box, 0, moving=False)
    found = mujoco.sensed(box, row, box.own_differences(row), method="dense")
    held, free = mujoco.balanced(box, found.jacobian, case.start, seconds=6.0, seed=seed)
    assert held < 1e-3
    assert free > 1.0


def test_processes_give_the_same_jacobian(mujoco: Any) -> None:
    box = mujoco.Simulator(mujoco.CASES["hand"].xml())
    row = mujoco.state(mujoco.CASES["hand"], box, 0, moving=True)
    truth = box.own_differences(row)
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        there = mujoco.sensed(box, row, truth, method="dense", executor=pool)
    np.testing.assert_array_equal(there.jacobian, mujoco.sensed(box, row, truth, method="dense").jacobian)


def test_the_table_is_printed(mujoco: Any, capsys: pytest.CaptureFixture[str]) -> None:
    mujoco.main(["--models", "cart", "--workers", "1"])
    text = capsys.readouterr().out
    assert "two poles on a cart, upright: 3 degrees of freedom, 1 motors, 7 inputs" in text
    assert "LQR from regression" in text
