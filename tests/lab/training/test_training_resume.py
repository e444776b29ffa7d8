from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from beyondprop.lab import registry
from beyondprop.lab.runs.checkpoint import load_checkpoint, save_checkpoint, write_atomically
from beyondprop.lab.training import fit
from beyondprop.rules.base import LearningRule

CALL: dict[str, Any] = {"epochs": 4, "batch_size": 16, "seed": 3, "schedule": "cosine", "alignment": True}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def make_data() -> Any:
    g = torch.Generator().manual_seed(1)
    x = torch.randn(140, 6, generator=g)
    y = x[:, :3].argmax(1)
    return SimpleNamespace(x_train=x[:100], y_train=y[:100], x_test=x[100:], y_test=y[100:])


def build(name: str) -> LearningRule:
    """Dropout and BatchNorm below, a plain stage on top for rules with a memory."""
    torch.manual_seed(11)
    net = nn.Sequential(
        nn.Linear(6, 9),
        nn.BatchNorm1d(9),
        nn.ReLU(),
        nn.Dropout(0.3),
        nn.Linear(9, 8),
        nn.Tanh(),
        nn.Linear(8, 7),
        nn.ReLU(),
        nn.Linear(7, 3),
    )
    spec = registry.rules.get(name)
    return spec.build(net, nn.CrossEntropyLoss(), spec.lr)


def flat(tree: Any, where: str = "") -> dict[str, Any]:
    if isinstance(tree, dict):
        return {k: v for key, value in tree.items() for k, v in flat(value, f"{where}/{key!r}").items()}
    if isinstance(tree, list | tuple):
        kind = type(tree).__name__
        return {k: v for i, value in enumerate(tree) for k, v in flat(value, f"{where}/{kind}{i}").items()}
    return {where: tree}


def assert_same(a: Any, b: Any) -> None:
    first, second = flat(a), flat(b)
    assert list(first) == list(second)
    for where, value in first.items():
        if isinstance(value, Tensor):
            assert value.dtype == second[where].dtype, where
            assert torch.equal(value, second[where]), where
            assert value.stride() == second[where].stride(), where  # products round by the order in memory
        elif "seconds" not in where:
            assert (value, type(value)) == (second[where], type(second[where])), where


def without_seconds(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


@pytest.mark.parametrize("name", [n for n in registry.rules.names() if not registry.rules.get(n).whole_set])
def test_resumed_in_mid_epoch_equals_undisturbed(name: str, tmp_path: Path) -> None:
    data, whole = make_data(), build(name)
    expected = fit(whole, data, **CALL).rows

    stopped_at = 17  # of 28 steps: the third epoch's fourth
    path = tmp_path / "state.safetensors"
    steps = 0

    def interrupted() -> bool:
        nonlocal steps
        steps += 1
        return steps == stopped_at

    rows: list[dict[str, Any]] = []
    saved: list[Any] = []

    def save(state: Any) -> None:
        saved[:] = [copy.deepcopy(state)]
        save_checkpoint(path, state)

    first = build(name)
    with pytest.raises(KeyboardInterrupt):
        fit(first, data, **CALL, save=save, log=rows.append, interrupted=interrupted)
    state = load_checkpoint(path)
    assert state["step"] == stopped_at
    assert_same(saved[0], state)

    torch.manual_seed(12345)  # whatever the new process did before
    second = build(name)
    with torch.no_grad():
        for p in second.model.parameters():
            p.zero_()
    torch.rand(7)
    rows += fit(second, data, **CALL, resume=state).rows
    assert without_seconds(rows) == without_seconds(expected)
    assert_same(dict(second.model.state_dict()), dict(whole.model.state_dict()))
    assert_same(second.state_dict(), whole.state_dict())
    seconds = [row["seconds"] for row in rows if row["kind"] == "eval"]
    assert seconds == sorted(seconds)


@pytest.mark.parametrize("stop", [7, 28])
def test_stopped_at_the_end_of_an_epoch_or_of_the_run(stop: int) -> None:
    data = make_data()
    expected = fit(build("adam"), data, **CALL).rows
    states: dict[int, Any] = {}
    rows: list[dict[str, Any]] = []
    with pytest.raises(KeyboardInterrupt):
        fit(
            build("adam"),
            data,
            **CALL,
            save=lambda s: states.update({s["step"]: copy.deepcopy(s)}),
            log=rows.append,
            interrupted=lambda: max(states) == stop,
        )
    rows += fit(build("adam"), data, **CALL, resume=states[stop]).rows
    assert without_seconds(rows) == without_seconds(expected)


def test_early_stop_is_remembered() -> None:
    data = make_data()
    model = nn.Linear(6, 3)
    frozen = registry.rules.get("sgd").build(model, nn.CrossEntropyLoss(), 1e-12)
    states: list[Any] = []
    history = fit(frozen, data, **CALL, early_stop=2, save=lambda s: states.append(copy.deepcopy(s)))
    assert history.stopped_early
    again = registry.rules.get("sgd").build(nn.Linear(6, 3), nn.CrossEntropyLoss(), 1e-12)
    rows = fit(again, data, **CALL, early_stop=2, resume=states[-1]).rows
    assert [r["kind"] for r in rows] == ["finished"]
    assert rows[0]["step"] == 14


def test_saves_by_the_clock_between_evaluations() -> None:
    states: list[int] = []
    call = {**CALL, "evaluate_every": 10**6, "epochs": 20}
    fit(build("adam"), make_data(), **call, save=lambda s: states.append(s["step"]), save_every=1e-9)
    assert states[0] == 0
    assert states[-1] == 140
    assert len(states) > 2


def test_state_of_another_training_is_refused() -> None:
    states: list[Any] = []
    data = make_data()
    fit(build("adam"), data, **CALL, save=lambda s: states.append(copy.deepcopy(s)))
    with pytest.raises(ValueError, match=r"batch_size 16 then, 20 now"):
        fit(build("adam"), data, **{**CALL, "batch_size": 20}, resume=states[0])
    with pytest.raises(ValueError, match=r"This state is of 'Backprop'"):
        fit(build("am-adam"), data, **CALL, resume=states[0])


def test_tree_round_trip(tmp_path: Path) -> None:
    shared = torch.arange(6.0)
    tree = {
        "a": [1, 2.5, None, True, "text", (torch.tensor(3), {7: shared, "x/y": shared[2:]})],
        0: {"empty": torch.zeros(0, 4), "bits": torch.tensor([1, 0], dtype=torch.uint8), "none": {}, "list": []},
        "t": shared.view(2, 3).t(),
        "last": torch.rand(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "half": torch.ones(2, dtype=torch.bfloat16),
        "precise": 0.1 + 0.2,
    }
    save_checkpoint(tmp_path / "t.safetensors", tree)
    assert_same(load_checkpoint(tmp_path / "t.safetensors"), tree)


def test_damaged_and_foreign_checkpoints_are_named(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    path = tmp_path / "t.safetensors"
    with pytest.raises(FileNotFoundError, match=r"no checkpoint .*t\.safetensors"):
        load_checkpoint(path)
    save_checkpoint(path, {"a": torch.ones(100)})
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(ValueError, match=r"t\.safetensors' is damaged"):
        load_checkpoint(path)
    save_file({"a": torch.ones(1)}, path)
    with pytest.raises(ValueError, match=r"has format None; 'beyondprop-checkpoint-1' is needed"):
        load_checkpoint(path)


def test_what_a_checkpoint_cannot_hold_is_named(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"/a/1 is a set"):
        save_checkpoint(tmp_path / "t.safetensors", {"a": [0, {1}]})
    with pytest.raises(TypeError, match=r"Keys .* got \(1, 2\) in /a"):
        save_checkpoint(tmp_path / "t.safetensors", {"a": {(1, 2): 0}})
    assert list(tmp_path.iterdir()) == []


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_atomically(path, b"old")

    def fail(*_: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_state_of_an_older_version_is_refused_and_nothing_changes() -> None:
    states: list[dict[str, Any]] = []
    fit(build("adam"), make_data(), **CALL, save=lambda state: states.append(copy.deepcopy(state)))
    del states[1]["samples"]
    rule = build("adam")
    before = copy.deepcopy(rule.model.state_dict())
    with pytest.raises(ValueError, match="of an older version and lacks samples; begin the training anew"):
        fit(rule, make_data(), **CALL, resume=states[1])
    assert_same(rule.model.state_dict(), before)
