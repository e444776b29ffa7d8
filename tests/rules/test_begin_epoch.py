"""The hook of the training loop for what comes before an epoch: its batches, and what is resumed."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cases import SGD, blobs, equal, mlp, rule_state, target_propagation
from torch import Tensor, nn

from beyondprop import Backprop, DifferenceTargetProp, StepResult, fit
from beyondprop.lab.runs.checkpoint import load_checkpoint, save_checkpoint

CE = nn.CrossEntropyLoss()


class _Counting(Backprop):
    """Backpropagation that writes down its epochs."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.said: list[Any] = []

    def begin_epoch(self, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
        self.said.append([x.clone() for x, _ in batches])

    def step(self, x: Tensor, y: Tensor, *, diagnostics: bool = False) -> StepResult:
        self.said.append(x.clone())
        return super().step(x, y, diagnostics=diagnostics)


def _data() -> Any:
    x, y = blobs(50)
    return SimpleNamespace(x_train=x, y_train=y, x_test=x[:10], y_test=y[:10])


def test_fit_begins_every_epoch_with_its_own_batches() -> None:
    rule = _Counting(mlp(6, 5, 3), CE, SGD)
    fit(rule, _data(), epochs=2.5, batch_size=16)  # 4 + 4 + 2 steps
    begun = [i for i, said in enumerate(rule.said) if isinstance(said, list)]
    assert begun == [0, 5, 10]
    for start, end in ((0, 5), (5, 10), (10, 13)):
        assert equal(rule.said[start], rule.said[start + 1 : end])
    assert len(rule.said) == 13


@pytest.mark.parametrize("stop", [4, 6, 8])
def test_resuming_repeats_no_beginning(stop: int) -> None:
    """Stopped at an epoch's end the next one begins anew; stopped in the middle it does not."""
    whole = _Counting(mlp(6, 5, 3), CE, SGD)
    fit(whole, _data(), epochs=3, batch_size=16)
    states: list[Any] = []
    first = _Counting(copy.deepcopy(whole.model), CE, SGD)
    steps = iter(range(1, 13))
    with pytest.raises(KeyboardInterrupt):
        fit(
            first, _data(), epochs=3, batch_size=16, save=lambda s: states.append(copy.deepcopy(s)),
            interrupted=lambda: next(steps) == stop,
        )  # fmt: skip
    second = _Counting(copy.deepcopy(whole.model), CE, SGD)
    fit(second, _data(), epochs=3, batch_size=16, resume=states[-1])
    assert equal([*first.said, *second.said], whole.said)


@pytest.mark.parametrize("training", ["interleaved", "epoch"])
@pytest.mark.parametrize("stop", [4, 7])
def test_a_resumed_run_is_the_undisturbed_one_to_the_last_bit(training: str, stop: int, tmp_path: Path) -> None:
    call: dict[str, Any] = {"epochs": 3, "batch_size": 16, "schedule": "cosine"}

    def build() -> DifferenceTargetProp:
        torch.manual_seed(5)
        return target_propagation(inverse_training=training, noise_halving=2.0)

    whole = build()
    rows = fit(whole, _data(), **call).evaluations
    path = tmp_path / "state.safetensors"
    steps = iter(range(1, 13))
    with pytest.raises(KeyboardInterrupt):
        fit(build(), _data(), **call, save=lambda s: save_checkpoint(path, s), interrupted=lambda: next(steps) == stop)
    other = build()
    torch.manual_seed(99)
    with torch.no_grad():
        for p in other._parameters:
            p.zero_()
    again = fit(other, _data(), **call, resume=load_checkpoint(path)).evaluations
    assert [r["loss"] for r in rows][-len(again) :] == [r["loss"] for r in again]
    assert equal(whole.state_dict(), other.state_dict())
    assert equal(whole.model.state_dict(), other.model.state_dict())
    assert whole.credit.epoch == 3


def test_work_counts_the_beginning_of_epochs() -> None:
    from beyondprop.lab.training import work_per_step

    x, y = blobs(12)
    kinds = {}
    for training in ("interleaved", "epoch"):
        rule = target_propagation(inverse_training=training)
        before = rule_state(rule)
        kinds[training] = work_per_step(rule, x, y)
        assert equal(before, rule_state(rule))
    assert 1.2 < kinds["interleaved"] < kinds["epoch"] < 4
