"""Couplings as stages: credit goes down a reversible chain without stored activations, and is that of the stored chain."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from cases import CE
from torch import Tensor, nn

from beyondprop import (
    Codes,
    Credit,
    Credited,
    Descent,
    DifferenceTargetPropagation,
    DirectFeedbackAlignment,
    FeedbackAlignment,
    LocalRule,
    TargetPropagation,
    UnsupportedModelError,
)
from beyondprop.errors import ReconstructionWarning
from beyondprop.nn import AdditiveCoupling, AffineCoupling, MomentumCoupling, ReversibleSequential
from beyondprop.nn.revnets import revnet
from beyondprop.stages import Chain
from beyondprop.stages.block import BlockPullback
from beyondprop.stages.reversible import ReversiblePullback, ReversibleStage

SGD = partial(torch.optim.SGD, lr=0.05)
CREDITS: dict[str, Callable[[], Credit]] = {
    "line_search": Codes,
    "fitted": lambda: Codes("fitted"),
    "gradient": lambda: Codes("gradient"),
    "cg": lambda: Codes("cg"),
    "fa": FeedbackAlignment,
    "dfa": DirectFeedbackAlignment,
}


def _function(channels: int, out: int | None = None, dropout: float = 0.1) -> nn.Module:
    conv = nn.Conv2d(channels, out or channels, 3, padding=1)
    return nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU(), conv, nn.Dropout(dropout))


BLOCKS: dict[str, Callable[[], nn.Module]] = {
    "additive": lambda: AdditiveCoupling(_function(4), _function(4)),
    "affine": lambda: AffineCoupling(_function(4, 8), _function(4, 8)),
    "momentum": lambda: MomentumCoupling(_function(4), beta=0.8),
}


class _Kept(nn.Module):
    """A coupling that a chain takes for any module."""

    def __init__(self, coupling: nn.Module) -> None:
        super().__init__()
        self.coupling = coupling

    def forward(self, x: Tensor) -> Tensor:
        return self.coupling(x)


def _net(depth: int, block: str = "additive") -> nn.Sequential:
    torch.manual_seed(0)
    chain = ReversibleSequential(*(BLOCKS[block]() for _ in range(depth)))  # type: ignore[arg-type]
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))
    return nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), chain, *head).double()


def _stored(model: nn.Sequential) -> nn.Sequential:
    twin: Any = copy.deepcopy(model)
    return nn.Sequential(twin[0], *(_Kept(block) for block in twin[1]), *list(twin)[2:])


def _batch(step: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(100 + step)
    return torch.randn(6, 1, 8, 8, dtype=torch.float64), torch.arange(6) % 3


def _apart(one: nn.Module, two: nn.Module) -> float:
    pairs = zip([*one.parameters(), *one.buffers()], [*two.parameters(), *two.buffers()], strict=True)
    return max(float((p - q).detach().abs().max()) for p, q in pairs)


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("credit", CREDITS)
def test_a_reversible_chain_is_trained_as_the_stored_one(credit: str, block: str) -> None:
    model = _net(4, block)
    twin = _stored(model)
    rules = [LocalRule(m, CE, CREDITS[credit](), Descent(SGD)) for m in (model, twin)]
    assert sum(isinstance(stage, ReversibleStage) for stage in rules[0].chain) == 4
    assert not any(isinstance(stage, ReversibleStage) for stage in rules[1].chain)
    random = []
    for step in range(4):
        for rule in rules:
            x, y = _batch(step)
            rule.step(x, y)
            random.append(torch.rand(1))
    assert _apart(model, twin) < 1e-12
    assert random[::2] == random[1::2]  # a step draws what the stored one draws


@pytest.mark.parametrize("stagewise", [False, True])
@pytest.mark.parametrize("credit", ["line_search", "fa"])
def test_behind_a_backward_pass(credit: str, stagewise: bool) -> None:
    model = _net(3)
    twin = _stored(model)
    made, rule = Credited(model, CREDITS[credit](), CE), LocalRule(twin, CE, CREDITS[credit](), Descent(SGD))
    optimizer = SGD(made.parameters())
    for step in range(3):
        x, y = _batch(step)
        rule.step(x, y)
        x, y = _batch(step)
        optimizer.zero_grad()
        loss = CE(made(x.requires_grad_(stagewise)), y)
        for retained in (True, False):
            optimizer.zero_grad()
            loss.backward(retain_graph=retained)
        optimizer.step()
    assert _apart(model, twin) < 1e-12


@pytest.mark.parametrize("kind", [TargetPropagation, DifferenceTargetPropagation])
def test_exact_inverses_are_those_of_target_propagation(kind: type[TargetPropagation]) -> None:
    model: Any = _net(3)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    first = Chain(model)
    assert isinstance(first[2], ReversibleStage)
    # Dropout counts as drawing whatever its rate.
    with pytest.raises(UnsupportedModelError, match=r"Stage '1\.\d' draws random numbers"):
        _step(model, kind)
    for block in model[1]:
        for function in (block.f, block.g):
            del function[3]
    before = copy.deepcopy(model.state_dict())
    rule = _step(model, kind)
    assert not rule.optimizers[1:]  # nothing is learned
    moved = [n for n, p in model.state_dict().items() if not torch.equal(p, before[n])]
    assert {n.split(".")[0] for n in moved} == {"0", "1", "4"}
    assert model.state_dict()["1.0.f.0.num_batches_tracked"] == 1
    # With exact inverses the difference takes nothing away.
    deltas = []
    for difference in (TargetPropagation(), DifferenceTargetPropagation()):
        twin = copy.deepcopy(model)
        chain = Chain(twin)
        difference.bind(chain)
        trace = chain.record(_batch(7)[0])
        delta = 0.1 * torch.ones_like(trace[3].output)
        deltas.append(difference.below(3, trace[3], delta, None))
    torch.testing.assert_close(deltas[0], deltas[1], rtol=1e-10, atol=1e-12)


def _step(model: nn.Module, kind: type[TargetPropagation]) -> LocalRule:
    rule = LocalRule(model, CE, kind(optimizer=SGD), Descent(SGD))
    rule.step(*_batch(0))
    return rule


def _tensors() -> list[Tensor]:
    gc.collect()
    return [
        t for t in gc.get_objects() if type(t) in (Tensor, nn.Parameter) and t.layout == torch.strided
    ]  # other tests may leave tensors without memory


def _new_bytes(before: list[Tensor]) -> int:
    """Return the bytes of tensors that there were not before; these are alive, so that nothing has their memory."""
    old = {t.untyped_storage().data_ptr() for t in before}
    now = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in _tensors()}
    return sum(size for place, size in now.items() if place not in old)


@pytest.mark.parametrize("stagewise", [False, True])
def test_what_is_kept_does_not_grow_with_depth(stagewise: bool) -> None:
    kept = []
    for depth in (4, 16):
        model = _net(depth)
        made = Credited(model, Codes(), CE)
        x, y = _batch(0)
        before = _tensors()
        loss = CE(made(x.requires_grad_(stagewise)), y)
        kept.append(_new_bytes(before))
        del loss, made, model, before
    # What the 12 further blocks' functions drew, and a norm for each of their 8 weights; no activation.
    assert abs(kept[1] - kept[0]) <= 12 * (3 * torch.get_rng_state().nbytes + 8 * 8)


@pytest.mark.parametrize("way", ["rule", "sweep", "stagewise"])
def test_one_block_is_differentiated_at_a_time(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = _net(6)
    alive: list[int] = []
    whole = BlockPullback.add_gradients

    def add_gradients(self: BlockPullback, *args: Any) -> None:
        whole(self, *args)
        alive.append(sum(type(o) is BlockPullback for o in gc.get_objects()))

    monkeypatch.setattr(BlockPullback, "add_gradients", add_gradients)
    x, y = _batch(0)
    if way == "rule":
        LocalRule(model, CE, Codes(), Descent(SGD)).step(x, y)
    else:
        CE(Credited(model, Codes(), CE)(x.requires_grad_(way == "stagewise")), y).backward()
    assert len(alive) == 6
    assert max(alive) <= 2


def test_chains_that_round_or_are_watched_are_blocks() -> None:
    def kinds(**options: Any) -> list[str]:
        chain = ReversibleSequential(*(AdditiveCoupling(nn.Linear(4, 4), nn.Linear(4, 4)) for _ in range(2)), **options)
        return [type(stage).__name__ for stage in Chain(nn.Sequential(nn.Linear(8, 8), chain, nn.Linear(8, 3)))]

    assert kinds() == ["AffineStage", "ReversibleStage", "ReversibleStage", "AffineStage"]
    assert kinds(exact_bits=12) == ["AffineStage", "BlockStage", "AffineStage"]
    assert kinds(split_dim=-1) == ["AffineStage", "BlockStage", "AffineStage"]
    chain = ReversibleSequential(*(AdditiveCoupling(nn.Linear(4, 4), nn.Linear(4, 4)) for _ in range(3)))
    assert [stage.name for stage in Chain(chain)] == ["0", "1", "2"]


def test_a_stage_below_is_asked_after_the_one_above_it() -> None:
    chain = Chain(_net(3))
    trace = chain.record(_batch(0)[0], keep_codes=False)
    below = trace[1]
    assert isinstance(below, ReversiblePullback)
    with pytest.raises(RuntimeError, match=r"Stage '1\.0' was asked before the stage above it"):
        below(torch.ones(6, 8, 8, 8, dtype=torch.float64))


@pytest.mark.parametrize("credit", ["line_search", "fa"])
def test_published_networks_are_trained_as_stored_ones(credit: str) -> None:
    torch.manual_seed(0)
    model = revnet((2, 2), (8, 8, 16), 3, channels=1).double()
    twin: Any = copy.deepcopy(model)
    twin = nn.Sequential(
        _Kept(twin.stem.module),
        *(_Kept(block) for block in twin.stage1),
        twin.transition2.module,
        *(_Kept(block) for block in twin.stage2),
        *twin.head,
    )
    rules = [LocalRule(m, CE, CREDITS[credit](), Descent(SGD)) for m in (model, twin)]
    kinds = [type(stage).__name__ for stage in rules[0].chain]
    assert kinds == ["PipelineStage", *["ReversibleStage"] * 2, "BlockStage", "ReversibleStage", "PipelineStage"]
    for step in range(3):
        for rule in rules:
            rule.step(*_batch(step))
    assert _apart(model, twin) < 1e-11


@pytest.mark.parametrize("mode", ["store", "checkpoint"])
def test_a_chain_that_stores_is_stored(mode: str) -> None:
    model: Any = _net(2)
    chain = Chain(model)
    x = _batch(0)[0]
    assert isinstance(chain.record(x)[1], ReversiblePullback)
    model[1].mode = mode
    assert isinstance(chain.record(x)[1], BlockPullback)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_streams_that_cannot_be_undone_are_stored(dtype: torch.dtype) -> None:
    def function() -> nn.Module:
        return nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8))

    chain = ReversibleSequential(*(AdditiveCoupling(function(), function()) for _ in range(3)))
    model = nn.Sequential(nn.Linear(8, 16), chain, nn.Linear(16, 3)).to(dtype)
    trace = Chain(model).record(torch.randn(5, 8, dtype=dtype), keep_codes=False)
    assert [type(trace[i]).__name__ for i in (1, 2, 3)] == ["BlockPullback"] * 3


def test_a_bad_reconstruction_is_said_once_a_block() -> None:
    torch.manual_seed(0)
    chain = ReversibleSequential(*(AdditiveCoupling(nn.Linear(8, 8), nn.Linear(8, 8)) for _ in range(2)), check=1e-12)
    model = nn.Sequential(nn.Linear(8, 16), chain, nn.Linear(16, 3))
    rule = LocalRule(model, CE, Codes("gradient"), Descent(SGD))
    with pytest.warns(ReconstructionWarning) as caught:
        _ = [rule.step(torch.randn(5, 8), torch.arange(5) % 3) for _ in range(41)]
    assert [str(w.message)[:26] for w in caught] == ["The input of block '1.0' w", "The input of block '1.1' w"]


def test_weights_that_changed_before_the_way_back_are_refused() -> None:
    model = _net(2)
    made = Credited(model, Codes("gradient"), CE)
    optimizer = torch.optim.Adam(made.parameters(), fused=True)  # leaves no version behind
    x, y = _batch(0)
    CE(made(x), y).backward()
    loss = CE(made(x), y)
    optimizer.step()
    with pytest.raises(UnsupportedModelError, match="changed"):
        loss.backward()


def test_under_autocast_couplings_are_stored() -> None:
    model = _net(3).float()
    chain = Chain(model)
    x = _batch(0)[0].float()
    with torch.autocast("cpu", torch.bfloat16):
        assert isinstance(chain.record(x)[1], BlockPullback)
    assert isinstance(chain.record(x)[1], ReversiblePullback)
