"""The number of calls is what was promised, exactly: a counting function audits every counter."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from boxes import Counted, Linear, Noisy, Smooth, band, points, random_pattern
from torch import nn

from beyondprop.errors import CallBudgetExceededError
from beyondprop.func.sensing import color_columns, detect_pattern, jacobian, verify, vjp
from beyondprop.nn import BlackBox

MASK = random_pattern(10, 12, 3)
TOEPLITZ = Linear(torch.randn(21, dtype=torch.float64)[torch.arange(12) - torch.arange(10)[:, None] + 9])


def _box(options: dict[str, Any]) -> Any:
    return TOEPLITZ if "structure" in options else Smooth(MASK)


SETTINGS: dict[str, dict[str, Any]] = {
    "auto": {"pattern": MASK},
    "coloring": {"pattern": MASK, "method": "coloring"},
    "regression": {"pattern": MASK, "method": "regression"},
    "regression, 7": {"pattern": MASK, "method": "regression", "probes": 7},
    "dense": {"method": "dense"},
    "dense, pattern": {"pattern": MASK, "method": "dense"},
    "'dense'": {"pattern": "dense"},
    "small": {},
    "spsa": {"method": "spsa"},
    "spsa, 5": {"method": "spsa", "probes": 5},
    "tied": {"structure": torch.arange(12) - torch.arange(10)[:, None] + 9},
}
every_setting = pytest.mark.parametrize("options", SETTINGS.values(), ids=SETTINGS.keys())
every_difference = pytest.mark.parametrize(("difference", "sides"), [("central", 2), ("forward", 1)])


@every_setting
@every_difference
@pytest.mark.parametrize("rows", [1, 2, 7])
def test_a_training_step_costs_what_the_plan_says(
    options: dict[str, Any], difference: str, sides: int, rows: int
) -> None:
    box = Counted(_box(options))
    layer = BlackBox(box, difference=difference, **options)
    x = points(rows, 12).requires_grad_()
    for step in range(3):
        y = layer(x)
        assert box.since() == rows
        y.square().sum().backward()
        plan = layer.plan
        assert plan is not None
        assert plan.calls == sides * plan.probes
        assert box.since() == rows * plan.calls
        done = step + 1
        assert (layer.stats.forward, layer.stats.backward) == (done * rows, done * rows * plan.calls)
        assert layer.stats.total == layer.counters["calls"] == done * rows * (1 + plan.calls)
    assert layer.stats.setup == layer.stats.evaluation == layer.stats.retried == layer.stats.dropped == 0


@every_setting
@every_difference
@pytest.mark.parametrize("rows", [1, 4])
def test_functional_forms_cost_the_same(options: dict[str, Any], difference: str, sides: int, rows: int) -> None:
    box, x = Counted(_box(options)), points(rows, 12)
    layer = BlackBox(_box(options), difference=difference, **options)
    layer(x.clone().requires_grad_()).sum().backward()
    assert layer.plan is not None
    # The value is asked for where differences start from it, or only it tells how many outputs there are.
    known = options.get("structure") is not None or isinstance(options.get("pattern"), torch.Tensor)
    value = int(difference == "forward" or not known)
    jacobian(box, x, difference=difference, **options)
    assert box.since() == rows * (layer.plan.calls + value)
    vjp(box, x, torch.ones(rows, 10, dtype=torch.float64), difference=difference, **options)
    assert box.since() == rows * (layer.plan.calls + (difference == "forward"))


@every_difference
def test_the_probes_of_methods(difference: str, sides: int) -> None:
    def probes(mask: torch.Tensor = MASK, **options: Any) -> int:
        layer = BlackBox(Smooth(mask), difference=difference, **options)
        layer(points(1, 12).requires_grad_()).sum().backward()
        assert layer.plan is not None
        return layer.plan.probes

    widest = int(MASK.sum(1).max())
    assert probes(pattern=MASK, method="coloring") == color_columns(MASK).count
    assert widest + 1 <= probes(pattern=MASK, method="regression") <= widest + 2
    assert probes(pattern=MASK) <= min(widest + 2, color_columns(MASK).count)
    assert probes(pattern="dense") == probes(method="dense") == 12
    assert probes(band(10, 12), pattern=band(10, 12), method="coloring") == color_columns(band(10, 12)).count
    assert probes(method="spsa") == 4  # the root of 12


def test_nothing_is_spent_where_no_gradient_is_asked_for() -> None:
    box = Counted(Smooth(MASK))
    layer = BlackBox(box, pattern=MASK)
    x = points(4, 12)
    layer(x).sum()
    with torch.no_grad():
        layer(x.clone().requires_grad_())
    with torch.inference_mode():
        layer(x)
    y = layer(x.clone().requires_grad_())
    torch.autograd.grad((y * torch.ones_like(y)).sum(), y)  # a look behind the box only
    head = nn.Linear(10, 2).double()
    frozen = layer(x)
    head(frozen).sum().backward()
    assert head.weight.grad is not None
    assert box.since() == 5 * 4 == layer.stats.forward
    assert layer.stats.backward == 0


@every_difference
def test_rows_without_a_cotangent_cost_nothing(difference: str, sides: int) -> None:
    smooth = Smooth(MASK)
    box = Counted(smooth)
    layer = BlackBox(box, pattern=MASK, difference=difference)
    x = points(6, 12).requires_grad_()
    y = layer(x)
    box.since()
    kept = torch.tensor([True, False, False, True, True, False])
    (y * kept[:, None]).square().sum().backward()
    assert layer.plan is not None
    assert box.since() == 3 * layer.plan.calls
    assert x.grad is not None
    assert not bool(x.grad[~kept].any())
    twin = x.detach().clone().requires_grad_()
    (smooth.torch(twin) * kept[:, None]).square().sum().backward()
    assert twin.grad is not None
    assert float((x.grad - twin.grad).abs().max()) <= (1e-6 if sides == 2 else 1e-4)
    (layer(x) * 0.0).sum().backward()
    assert box.since() == 6


def test_evaluation_is_counted_apart() -> None:
    box = Counted(Smooth(MASK))
    layer = BlackBox(box, pattern=MASK).eval()
    layer(points(5, 12))
    assert layer.counters == {"calls": 0, "evaluation_calls": 5}
    assert box.since() == 5
    layer.train()
    layer(points(3, 12))
    assert layer.counters == {"calls": 3, "evaluation_calls": 5}
    assert box.since() == 3


@every_difference
def test_verification_is_counted(difference: str, sides: int) -> None:
    box = Counted(Smooth(MASK))
    layer = BlackBox(box, pattern=MASK, difference=difference)
    report = layer.verify(points(4, 12), n_probes=3)
    assert layer.plan is not None
    # The value, the Jacobian, three probes on both sides, and once without the first row: whether rows look at each other.
    assert box.rows == layer.stats.total == layer.stats.evaluation == 4 * (1 + layer.plan.calls + 3 * 2) + 3
    assert report.calls == 4 * 3 * 2 + 3
    box.since()
    verify(box, points(4, 12), pattern=MASK, difference=difference)
    assert box.since() == 4 * (1 + layer.plan.calls + 3 * 2) + 3


@every_difference
def test_setup_is_counted_apart_and_made_once(difference: str, sides: int) -> None:
    box = Counted(Noisy(Smooth(MASK), 1e-3))
    layer = BlackBox(box, pattern=MASK, noise="estimate", difference=difference)
    x = points(4, 12).requires_grad_()
    layer(x).sum().backward()
    assert layer.plan is not None
    assert layer.stats.setup > 0
    assert box.since() == layer.stats.total == layer.stats.setup + 4 * (1 + layer.plan.calls)
    layer(x).sum().backward()
    assert box.since() == 4 * (1 + layer.plan.calls)


@pytest.mark.parametrize("rows", [2, 16])
def test_discovery_is_counted_apart_and_made_once(rows: int) -> None:
    mask = random_pattern(40, 40, 2)
    box = Counted(Smooth(mask))
    layer = BlackBox(box, pattern="discover", sparsity=2)
    x = points(rows, 40).requires_grad_()
    layer(x).sum().backward()
    assert layer.plan is not None
    assert layer.sensor.detection is not None
    assert layer.stats.setup == 2 * rows * layer.sensor.detection.probes
    assert box.since() == layer.stats.total == layer.stats.setup + rows * (1 + layer.plan.calls)
    spent = []
    for _ in range(8):  # what was found is looked at again on a few later batches
        before = layer.stats.setup
        layer(x).sum().backward()
        spent.append(layer.stats.setup - before)
        assert box.since() == rows * (1 + layer.plan.calls) + spent[-1]
    assert max(spent) <= 2 * rows
    assert not any(spent[-4:])
    found = detect_pattern(box, x.detach(), sparsity=2)
    assert box.since() == rows * (1 + 2 * found.probes)


@pytest.mark.parametrize("vectorized", [True, False])
def test_a_budget_is_kept_to_the_call(vectorized: bool) -> None:
    smooth = Smooth(MASK)
    calls = Counted(lambda a: smooth(np.atleast_2d(a)).reshape(*a.shape[:-1], 10))
    box = calls if vectorized else (lambda row: calls(row[None])[0])
    layer = BlackBox(box, method="dense", max_calls=160, vectorized=vectorized)
    x = points(3, 12).requires_grad_()
    layer(x).sum().backward()  # 3 + 72
    layer(x).sum().backward()
    y = layer(x)
    with pytest.raises(
        CallBudgetExceededError, match=r"72 more calls .* 225, and its budget is max_calls=160"
    ) as caught:
        y.sum().backward()
    assert (caught.value.calls, caught.value.asked, caught.value.max_calls) == (153, 72, 160)
    assert calls.rows == layer.stats.total == 153
    for _ in range(2):  # 159 are within it
        layer(x)
    with pytest.raises(CallBudgetExceededError, match="max_calls"):
        layer(x)
    assert calls.rows == 159
    with pytest.raises(CallBudgetExceededError, match="none of them was made"):
        jacobian(box, x, method="dense", max_calls=20, vectorized=vectorized)


def test_copies_of_a_layer_share_the_budget_of_their_box() -> None:
    import copy

    layer = BlackBox(Smooth(MASK), method="dense", max_calls=30)
    twin = copy.deepcopy(layer)
    layer(points(20, 12))
    assert twin.stats.forward == 20
    with pytest.raises(CallBudgetExceededError, match="budget"):
        twin(points(20, 12))


def test_a_kept_graph_is_sensed_once() -> None:
    box = Counted(Smooth(MASK))
    layer = BlackBox(box, pattern=MASK)
    x = points(4, 12).requires_grad_()
    y = layer(x)
    first = torch.autograd.grad(y.sum(), x, retain_graph=True)[0]
    spent = box.since()
    again = torch.autograd.grad(y.sum(), x, retain_graph=True)[0]
    other = torch.autograd.grad(y.square().sum(), x)[0]
    assert box.since() == 0
    assert spent == 4 * (1 + (layer.plan.calls if layer.plan else 0))
    assert torch.equal(first, again)
    assert bool(other.any())


def test_a_linear_box_in_a_thin_net_of_many_steps() -> None:
    box = Counted(Linear(Smooth(MASK).matrix))
    model = nn.Sequential(nn.Linear(5, 12), nn.Tanh(), BlackBox(box, pattern=MASK), nn.Linear(10, 1)).double()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for rows in (8, 8, 3, 1):
        optimizer.zero_grad()
        model(points(rows, 5)).square().mean().backward()
        optimizer.step()
    layer = model[2]
    assert isinstance(layer, BlackBox)
    assert layer.plan is not None
    assert box.rows == layer.counters["calls"] == 20 * (1 + layer.plan.calls)
