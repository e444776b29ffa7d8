"""Copies, pickles and checkpoints of a black box: what was found stays found, what was spent stays spent."""

from __future__ import annotations

import copy
import gc
import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from boxes import Counted, Linear, Noisy, Smooth, arrow, far, points, random_pattern
from torch import Tensor, nn

from beyondprop.func.sensing import Pattern
from beyondprop.nn import BlackBox

MASK = random_pattern(30, 30, 2)
SMOOTH = Smooth(MASK)
HALF = Smooth(arrow(30)).matrix.triu()
SETTINGS: dict[str, dict[str, Any]] = {
    "coloring": {"pattern": MASK, "method": "coloring"},
    "regression": {"pattern": MASK, "method": "regression"},
    "dense": {"method": "dense"},
    "spsa": {"method": "spsa"},
    "discover": {"pattern": "discover"},
    "noise": {"pattern": MASK, "noise": "estimate"},
    "tied": {"pattern": arrow(30), "structure": "symmetric"},
    "bounds": {"pattern": MASK, "bounds": (-10, np.full(30, 10.0)), "x_scale": torch.ones(30)},
    "generator": {"pattern": MASK, "generator": torch.Generator().manual_seed(1)},
}
every_setting = pytest.mark.parametrize("options", SETTINGS.values(), ids=SETTINGS.keys())


def _box(options: dict[str, Any]) -> Any:
    if "structure" in options:
        return Linear(HALF + HALF.triu(1).T)
    return Noisy(SMOOTH, 1e-4) if "noise" in options else SMOOTH


def _gradient(layer: nn.Module, rows: int = 6) -> Tensor:
    torch.manual_seed(7)
    x = points(rows, 30).requires_grad_()
    layer(x).sum().backward()
    assert x.grad is not None
    return x.grad


def _used(options: dict[str, Any]) -> tuple[BlackBox, Tensor]:
    layer = BlackBox(_box(options), **options)
    for _ in range(5):  # a pattern that was found is looked at again a few times
        _gradient(layer)
    return layer, _gradient(layer)


@every_setting
@pytest.mark.parametrize("used", [False, True])
@pytest.mark.parametrize("way", ["pickle", "torch.save", "deepcopy", "copy"])
def test_a_copy_finds_the_same_gradient(options: dict[str, Any], used: bool, way: str) -> None:
    layer, found = _used(options)
    if not used:
        layer = BlackBox(_box(options), **options)
    if way == "pickle":
        twin = pickle.loads(pickle.dumps(layer))
    elif way == "torch.save":
        file = io.BytesIO()
        torch.save(nn.Sequential(layer), file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)[0]
    else:
        twin = (copy.deepcopy if way == "deepcopy" else copy.copy)(layer)
    spent = layer.stats.total
    assert twin.stats.total == spent
    again = _gradient(twin)
    assert far(again, found) <= (0.05 if "noise" in options else 1e-9)
    if way in ("pickle", "torch.save"):
        assert layer.stats.total == spent  # a stored one counts by itself
    else:
        assert layer.stats.total == twin.stats.total > spent  # two that live call one box
    assert twin.handle != layer.handle or way == "copy"


@every_setting
@pytest.mark.parametrize("file", [False, True])
def test_a_fresh_layer_takes_up_what_a_checkpoint_has(options: dict[str, Any], file: bool, tmp_path: Path) -> None:
    layer, found = _used(options)
    state = nn.Sequential(layer).state_dict()
    assert list(state) == ["0._extra_state"]
    assert isinstance(state["0._extra_state"], Tensor)
    if file:
        torch.save(state, tmp_path / "state.pt")
        state = torch.load(tmp_path / "state.pt", weights_only=True)
    box = Counted(_box(options))
    fresh = BlackBox(box, **options)
    nn.Sequential(fresh).load_state_dict(state, strict=True)
    assert fresh.stats == layer.stats
    before = fresh.stats.setup
    again = _gradient(fresh)
    assert fresh.stats.setup == before
    assert fresh.plan is not None
    assert box.rows == 6 * (1 + fresh.plan.calls)
    assert far(again, found) <= (0.05 if "noise" in options else 1e-9)
    assert fresh.pattern == layer.pattern
    assert fresh.info.step == layer.info.step


def test_a_checkpoint_before_the_first_pass_changes_nothing() -> None:
    layer = BlackBox(SMOOTH, pattern="discover")
    layer.load_state_dict(BlackBox(SMOOTH, pattern="discover").state_dict())
    _gradient(layer)
    assert layer.pattern == Pattern(MASK)


def test_calls_that_were_made_stay_made() -> None:
    layer, _ = _used(SETTINGS["coloring"])
    early = BlackBox(SMOOTH, **SETTINGS["coloring"]).state_dict()
    spent = layer.stats.total
    layer.load_state_dict(early)
    assert layer.stats.total == spent


@pytest.mark.parametrize(
    "state", [torch.zeros(3), torch.zeros(2, 2), {"pattern": 1}, None, torch.full((40,), 7.0)], ids=str
)
def test_what_is_no_state_is_named(state: Any) -> None:
    layer = BlackBox(SMOOTH, pattern=MASK)
    with pytest.raises(ValueError, match="state of a BlackBox"):
        layer.set_extra_state(state)


def test_a_state_that_is_cut_short_is_named() -> None:
    layer, _ = _used(SETTINGS["discover"])
    state = layer.get_extra_state()
    with pytest.raises(ValueError, match="cut short"):
        BlackBox(SMOOTH, pattern="discover").set_extra_state(state[:-5])


def test_a_state_of_another_pattern_is_not_taken_in_silence() -> None:
    """Of a box of 30 inputs into one of 8: at the latest where it is used, it is refused by name."""
    layer, _ = _used(SETTINGS["discover"])
    other = Smooth(random_pattern(8, 8, 2))
    fresh = BlackBox(other, pattern="discover")

    def use() -> None:
        fresh.load_state_dict(layer.state_dict())
        fresh(points(4, 8).requires_grad_()).sum().backward()

    with pytest.raises(ValueError, match=r"\(30, 30\)"):
        use()


def test_strictness() -> None:
    layer = BlackBox(SMOOTH, pattern=MASK)
    with pytest.raises(RuntimeError, match="_extra_state"):
        nn.Sequential(layer).load_state_dict({})
    nn.Sequential(layer).load_state_dict({}, strict=False)
    with pytest.raises(RuntimeError, match="Unexpected"):
        nn.Sequential(nn.Linear(2, 2)).load_state_dict(nn.Sequential(layer).state_dict(), strict=True)


def test_a_lambda_cannot_be_stored_and_torch_says_so() -> None:
    layer = BlackBox(lambda a: a, pattern=torch.eye(3))
    with pytest.raises((pickle.PicklingError, AttributeError), match="lambda"):
        pickle.dumps(layer)
    copy.deepcopy(layer)(points(2, 3))  # a copy shares it
    assert layer.stats.forward == 2


def test_an_executor_is_left_behind_by_a_pickle_and_shared_by_a_copy() -> None:
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(2) as executor:
        layer = BlackBox(SMOOTH, pattern=MASK, executor=executor)
        found = _gradient(layer)
        twin, copied = pickle.loads(pickle.dumps(layer)), copy.deepcopy(layer)
        assert copied.caller.settings.executor is executor
        assert layer.caller.settings.executor is executor
    assert twin.caller.settings.executor is None
    assert torch.equal(_gradient(twin), found) or far(_gradient(twin), found) <= 1e-12


def test_a_copy_does_not_write_into_what_the_other_reports() -> None:
    layer, _ = _used(SETTINGS["coloring"])
    step = layer.info.step
    twin = copy.deepcopy(layer)
    twin(points(3, 30, dtype=torch.float32).requires_grad_()).sum().backward()
    assert layer.info.step == step
    assert twin.info.step != step


def test_conversions_of_a_model_leave_the_state_alone() -> None:
    layer, _ = _used(SETTINGS["discover"])
    model = nn.Sequential(nn.Linear(30, 30), layer)
    before = layer.get_extra_state()
    for convert in (nn.Module.half, nn.Module.bfloat16, nn.Module.double, nn.Module.float, nn.Module.cpu):
        convert(model)
        assert torch.equal(layer.get_extra_state(), before)
    assert layer.pattern == Pattern(MASK)


def test_a_layer_shows_what_it_is() -> None:
    layer = BlackBox(SMOOTH, 30, pattern=MASK)
    assert repr(layer).startswith("BlackBox(Smooth, out_features=30, ")
    assert layer.plan is not None
    assert "probes" in repr(layer)
    assert "calls a sample" in repr(layer.plan)
    named = BlackBox(np.sin)
    assert "sin" in repr(named)
    assert layer.costly


def test_layers_are_not_kept_alive_by_their_numbers() -> None:
    import weakref

    layer, _ = _used(SETTINGS["coloring"])
    kept = weakref.ref(layer)
    del layer
    gc.collect()
    assert kept() is None
