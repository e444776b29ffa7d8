"""What holds for every registered kind of task."""

from __future__ import annotations

import copy
import pickle
from itertools import islice
from typing import Any

import pytest
import torch
from cases import ADAM, equal
from torch import nn

from beyondprop import Backprop
from beyondprop.lab import registry, tasks
from beyondprop.lab.training import fit

# name: form, net
EXAMPLES = {
    "classification": ("classification:digits", "mlp:16x1"),
    "regression": ("regression:diabetes", "mlp:16x1"),
    "images": ("images:digits:centered:pad=1:flip", "mlp:16x1"),
    "autoencoder": ("autoencoder:digits", "mlp:16x1"),
    "adding": ("adding:20", "rnn:8:gru"),
    "split": ("split:digits", "mlp:16x1"),
    "permuted": ("permuted:digits:tasks=3", "mlp:16x1"),
}
every_task = pytest.mark.parametrize("name", list(EXAMPLES))


def _task(name: str, seed: int = 1) -> Any:
    task: Any = tasks.load(EXAMPLES[name][0])
    return task.drawn(seed) if hasattr(task, "drawn") else task


def _trained(name: str, task: Any, **settings: Any) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    rule = Backprop(task.net(EXAMPLES[name][1]), task.loss, ADAM)
    usual: dict[str, Any] = {"epochs": getattr(task, "epochs", 0.2), "batch_size": 50, "seed": 1}
    rows = fit(rule, task, **usual | settings).evaluations
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def test_every_registered_task_is_here() -> None:
    registry.tasks.names()
    built_in = [spec.name for spec in registry.tasks if spec.load.__module__.startswith("beyondprop.")]
    assert sorted(built_in) == sorted(EXAMPLES)


@every_task
def test_it_trains_by_one_call_and_is_repeatable(name: str) -> None:
    first, second = (_trained(name, _task(name)) for _ in range(2))
    assert first == second
    assert first[-1]["train_loss"] is not None
    assert all({metric.key for metric in _task(name).metrics} <= set(row) for row in first)


@every_task
def test_another_seed_shows_other_batches(name: str) -> None:
    task = _task(name)
    assert _trained(name, task) != _trained(name, task, seed=2)


@every_task
def test_a_look_changes_neither_modes_nor_weights_nor_random_numbers(name: str) -> None:
    task = _task(name)
    model = nn.Sequential(task.net(EXAMPLES[name][1]), nn.Dropout(0.5))
    model[0].eval()
    before, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    assert task.evaluate(model) == task.evaluate(model)
    assert (model.training, model[0].training, model[1].training) == (True, False, True)
    assert equal(before, model.state_dict())
    assert torch.equal(random, torch.get_rng_state())


@every_task
def test_metrics_have_labels_and_the_first_decides(name: str) -> None:
    task = _task(name)
    keys = [metric.key for metric in task.metrics]
    assert len(set(keys)) == len(keys) >= 1
    assert all(metric.label and metric.scale > 0 for metric in task.metrics)
    assert task.name
    assert task.sample


@every_task
def test_batches_from_the_middle_are_those_of_the_whole_epoch(name: str) -> None:
    task = _task(name)
    if not hasattr(task, "batches"):
        pytest.skip("its batches are its rows, shuffled: see tests/data")
    whole = list(task.batches(1, 64, seed=3))
    rest = list(task.batches(1, 64, seed=3, start=2))
    assert len(rest) == len(whole) - 2
    assert all(torch.equal(a, b) for pair in zip(whole[2:], rest, strict=True) for a, b in zip(*pair, strict=True))
    assert all(len(x) == len(y) for x, y in islice(whole, 3))


@every_task
def test_held_out_rows_are_training_rows_and_test_rows_are_gone(name: str) -> None:
    task = _task(name)
    held = task.held_out(1 / 6)
    assert [metric.key for metric in held.metrics] == [metric.key for metric in task.metrics]
    if getattr(task, "is_fresh", False):
        assert not torch.equal(task.drawn(7).x_train, task.x_train)  # another seed's sequences take their place
        return
    owner, kept = getattr(task, "dataset", task), getattr(held, "dataset", held)
    assert len(kept.x_train) + len(kept.x_test) == len(owner.x_train)
    assert len(kept.x_test) == round(len(owner.x_train) / 6)
    every = {row.numpy().tobytes() for row in owner.x_train}
    assert {row.numpy().tobytes() for row in kept.x_test} <= every
    again = task.held_out(1 / 6)
    assert torch.equal(getattr(again, "dataset", again).x_test, kept.x_test)


@every_task
def test_it_is_moved_and_copied(name: str) -> None:
    task = _task(name)
    found = [_trained(name, other) for other in (task, task.to("cpu"), copy.deepcopy(task))]
    assert found[0] == found[1] == found[2]
    if name != "permuted":  # permutations are functions of the stream
        assert _trained(name, pickle.loads(pickle.dumps(task))) == found[0]


@every_task
def test_what_is_wrong_with_a_form_is_named(name: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match="nonsense"):
        tasks.load(f"{name}:nonsense")
    spec = registry.tasks.get(name)
    assert spec.form.startswith(name)
    assert spec.summary
