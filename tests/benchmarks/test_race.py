"""Races of optimizers: steps by cost, a race that goes on, and the table; the contenders as a plugin."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from beyondprop import Backprop
from beyondprop.lab import RuleSpec, Settings, compare, registry
from beyondprop.lab.report import Run, read_run

FOLDER = Path(__file__).parents[2] / "benchmarks"
if not FOLDER.is_dir():
    pytest.skip("the benchmarks are not here", allow_module_level=True)
pytestmark = pytest.mark.filterwarnings("ignore:.*at the edge")
race = registry.load_file(str(FOLDER / "race.py"))


def rule(name: str, grid: tuple[float, ...] = (1e-3, 1e-2, 3e-2, 1e-1)) -> RuleSpec:
    make = getattr(torch.optim, name)
    return RuleSpec(
        name, f"The {name}", "", "", lambda m, loss, lr: Backprop(m, loss, partial(make, lr=lr)), 1e-2, grid
    )


RULES = [rule("SGD"), rule("Adam")]
COST = {"SGD": 1.0, "Adam": 2.3}


@pytest.fixture
def problem():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(310, 4, generator=generator)
    y = x.sum(1, keepdim=True).tanh()
    return race.Problem(
        name="toy",
        form="one-layer",
        build=lambda: nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)),
        criterion=nn.MSELoss(),
        x_train=x,
        y_train=y,
        batch=20,
        held=65,
        points=3,
        pacemaker="SGD",
        reference="Adam",
    )


def raced(problem, path: Path) -> Run:
    rules = race.timed(problem, RULES, COST, 2.5)
    return race.race(problem, rules, path, epochs=2.5, seeds=[0, 3], share=1 / 3)


def numbers(run: Run) -> list[dict[str, object]]:
    """Return all that was recorded but the clock."""
    return [{key: value for key, value in row.items() if key != "seconds"} for row in run.rows]


def test_contenders_train_for_equal_time_in_whole_steps(problem, tmp_path: Path) -> None:
    run = raced(problem, tmp_path / "race")
    steps = {name: run.of("eval", name, 3)[-1]["step"] for name in COST}
    assert steps == {"SGD": 37, "Adam": 16}  # of 2.5 epochs of 15 steps
    assert len([row for row in run.rows if row["kind"] == "tuning"]) == 8
    text = race.table(run, problem, COST)
    first, second = (line.split() for line in text.splitlines()[1:3])
    assert {first[1], second[1]} == {"SGD", "Adam"}
    assert float(first[6]) < float(second[6])
    by_name = {line[1]: line for line in (first, second)}
    assert by_name["Adam"][3:6] == ["1.00", "1.07", "2.5"]
    assert by_name["SGD"][3:6] == ["0.43", "2.47", "2.5"]
    assert "in steps of The Adam; time: in epochs of The SGD" in text
    with pytest.raises(ValueError, match="holds a run with other seeds"):
        race.race(problem, race.timed(problem, RULES, COST, 2.5), run.path, epochs=2.5, seeds=[0], share=1 / 3)


def test_a_race_goes_on_where_it_was_stopped(problem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = raced(problem, tmp_path / "whole")

    class Stopping(race.Lines):
        def end(self, member) -> None:
            super().end(member)
            if not member.tuning and member.seed == 0 and member.contender.rule.name == "Adam":
                raise KeyboardInterrupt

    monkeypatch.setattr(race, "Lines", Stopping)
    with pytest.raises(KeyboardInterrupt):
        raced(problem, tmp_path / "stopped")
    assert len(read_run(tmp_path / "stopped").rows) < len(whole.rows)
    monkeypatch.undo()
    assert numbers(raced(problem, tmp_path / "stopped")) == numbers(whole)


def test_batches_are_drawn_one_epoch_after_the_other_without_the_remainder(problem) -> None:
    generator = torch.Generator().manual_seed(7)
    orders = [torch.randperm(310, generator=generator)[:300].view(15, 20) for _ in range(3)]
    for epoch, order in enumerate(orders):
        found = [x for x, _ in problem.batches(epoch, 20, 7, start=2)]
        assert torch.equal(torch.stack(found), problem.x_train[order[2:]])
    held = problem.held_out()
    assert len(held.x_train) == 245
    assert len(held.scored[0]) == 65


def test_costs_are_measured_once(problem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "new" / "costs.json"
    found = race.costs(problem, RULES, file, rounds=1)
    assert found["SGD"] == 1.0
    assert found["Adam"] > 0
    monkeypatch.setattr(race, "step_costs", None)
    assert race.costs(problem, RULES, file) == found
    problem = race.replace(problem, name="another")
    with pytest.raises(ValueError, match=r"is of 'toy', not of 'another'"):
        race.costs(problem, RULES, file)


def test_a_loss_above_the_highest_ends_a_training_as_failed(problem, tmp_path: Path) -> None:
    wild = race.timed(problem, [rule("SGD", (1e5,))], COST, 1.0)
    run = race.race(problem, wild, tmp_path / "wild", epochs=1.0, seeds=[0], rates={"SGD": 1e5})
    assert "failed: 1 of 1 seeds" in race.table(run, problem, COST)
    assert "not 1000 or less" in run.failures[0]["message"]


def test_contenders_are_a_plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    registry.rules.names()  # what is built in comes first
    monkeypatch.setattr(registry.rules, "rows", dict(registry.rules.rows))
    monkeypatch.setattr(registry, "_loaded", set())
    plugin = str(FOLDER / "contenders.py")
    rules = ("adam", "muon", "muon-inside", "locoprop-m-rows-raced", "projection-adam")
    settings = Settings(nets=("mlp:8x2",), rules=rules, epochs=0.1, seeds=(0,), plugins=(plugin,), alignment=False)
    run = read_run(compare(settings, out=tmp_path / "run"))
    assert all(run.seeds(name)["done"] == (0,) for name in rules)
    peers = [spec for spec in registry.rules if spec.source.startswith("pip install")]
    assert {"kfac", "shampoo", "soap"} <= {spec.name for spec in peers}
    assert all(len(spec.grid) == 4 for spec in peers)
    monkeypatch.setitem(registry.load_file(plugin).SOURCES, "nowhere_to_be_found", "pip install it")
    with pytest.raises(ModuleNotFoundError, match="not installed; get it by: pip install it"):
        registry.load_file(plugin)._package("nowhere_to_be_found.inside")
