"""What holds for every credit: the order of its assignments, its last one, and whose memory is free when."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from cases import blobs, mlp, relative
from torch import Tensor, nn

from beyondprop import (
    Chain,
    Codes,
    Credit,
    Descent,
    DifferenceTargetPropagation,
    DirectFeedbackAlignment,
    FeedbackAlignment,
    LocalRule,
    TargetPropagation,
)
from beyondprop.stages.affine import AffinePullback
from beyondprop.stages.chain import Trace
from beyondprop.stages.losses import LossPoint, OutputLoss
from beyondprop.stages.stage import Pullback

CREDITS: dict[str, Callable[[], Credit]] = {
    "line_search": Codes,
    "gradient": lambda: Codes("gradient"),
    "cg": lambda: Codes("cg"),
    "feedback": FeedbackAlignment,
    "direct_feedback": DirectFeedbackAlignment,
    "targets": TargetPropagation,
    "difference_targets": DifferenceTargetPropagation,
}
every_credit = pytest.mark.parametrize("name", list(CREDITS))


def _start(name: str, frozen: int = 0) -> tuple[Credit, Trace, LossPoint]:
    model = mlp(6, 8, 7, 5, 3, activation="tanh").double()
    for module in list(model)[: 2 * frozen]:
        module.requires_grad_(False)
    x, y = blobs(9, dtype=torch.float64)
    chain, credit = Chain(model), CREDITS[name]()
    credit.bind(chain)
    trace = chain.record(x, push=credit.pushes)
    return credit, trace, OutputLoss(nn.CrossEntropyLoss()).at(trace.output, y)


@every_credit
@pytest.mark.parametrize("frozen", [0, 1, 3])
@torch.no_grad()
def test_assignments_go_from_the_last_stage_to_the_lowest_that_trains(name: str, frozen: int) -> None:
    credit, trace, loss = _start(name, frozen)
    kept = list(credit.assign(trace, loss))
    assert [a.index for a in kept] == list(range(3, frozen - 1, -1))
    assert torch.equal(kept[0].delta, -loss.cotangent)
    assert [a.loss is loss for a in kept] == [True] + [False] * (3 - frozen)
    assert kept[-1].input_delta is None
    for above, below in pairwise(kept):
        assert above.input_delta is below.delta  # what moves the input is the stage below's delta


@every_credit
@torch.no_grad()
def test_a_stages_memory_is_free_for_the_next(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the next stage's delta is found, what the caller has let go of is not held by the credit."""
    credit, trace, loss = _start(name)
    stages: list[weakref.ref[Pullback]] = []
    deltas: list[weakref.ref[Tensor]] = []
    pull_head = AffinePullback.pull_head

    def watched(self: AffinePullback, cotangent: Tensor) -> Tensor:
        assert all(ref() is None for ref in [*stages, *deltas])
        return pull_head(self, cotangent)

    monkeypatch.setattr(AffinePullback, "pull_head", watched)
    for assignment in credit.assign(trace, loss):
        assert all(ref() is None for ref in [*stages, *deltas])
        stages.append(weakref.ref(assignment.pullback))
        deltas.append(weakref.ref(assignment.delta))
        del assignment
    assert len(stages) == 4


class _Transposed(Credit):
    """Backpropagation, as a credit of one method."""

    def below(self, index: int, pullback: Pullback, delta: Tensor, loss: LossPoint | None) -> Tensor:
        return pullback(delta)


@pytest.mark.parametrize("frozen", [0, 1, 3])
def test_a_credit_is_its_below(frozen: int) -> None:
    model = mlp(6, 8, 7, 5, 3, activation="tanh").double()
    for module in list(model)[: 2 * frozen]:
        module.requires_grad_(False)
    x, y = blobs(9, dtype=torch.float64)
    LocalRule(model, nn.CrossEntropyLoss(), _Transposed(), Descent()).backward(x, y)
    found = [p.grad for p in model.parameters() if p.grad is not None]
    trained = [p for p in model.parameters() if p.requires_grad]
    for own, true in zip(found, torch.autograd.grad(nn.functional.cross_entropy(model(x), y), trained), strict=True):
        assert relative(own, true) < 1e-12


def test_below_is_asked_once_a_stage_and_has_the_loss_at_the_last() -> None:
    asked: list[tuple[int, bool]] = []

    class Asked(_Transposed):
        def below(self, index: int, pullback: Pullback, delta: Tensor, loss: LossPoint | None) -> Tensor:
            asked.append((index, loss is not None))
            return super().below(index, pullback, delta, loss)

    LocalRule(mlp(6, 8, 7, 5, 3), nn.CrossEntropyLoss(), Asked(), Descent()).step(*blobs(9))
    assert asked == [(3, True), (2, False), (1, False)]


def test_a_credit_that_writes_nothing_says_what_to_write() -> None:
    rule = LocalRule(mlp(6, 8, 3), nn.CrossEntropyLoss(), Credit(), Descent())
    with pytest.raises(NotImplementedError, match="Credit writes neither `below` nor `assign`"):
        rule.step(*blobs(9))
